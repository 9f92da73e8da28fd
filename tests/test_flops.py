"""Counting one step, live and on meta: exact targets, hand counts, and nothing touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from green_torch.errors import ArgumentError, CountingError
from green_torch.flops import COUNTS_COMPILED, LiveCounter, count_flops
from green_torch.flops.formulas import FORMULAS, attention, computes, formula_of
from green_torch.flops.once import meta_tally

GPT2_124M_AT_8_BY_1024 = 7_001_333_563_392


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert torch._C._len_torch_dispatch_stack() == 0, "a mode was left behind"


class Block(nn.Module):
    def __init__(self, width, heads, by_hand):
        super().__init__()
        self.heads, self.by_hand = heads, by_hand
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(c, -1))
        if self.by_hand:
            mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            y = ((q @ k.mT) / 8).masked_fill(mask, -torch.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, *, layers=12, width=768, heads=12, vocab=50304, length=1024, by_hand=False, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, by_hand) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def small_gpt(**options):
    return GPT(layers=2, width=32, heads=4, vocab=50, length=16, **options)


TOKENS = torch.arange(24).reshape(2, 12)


def live(step, **options):
    with LiveCounter(**options) as counter:
        step()
    return counter.count()


def train_live(model, *inputs, **options):
    def step():
        output = model(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.sum().backward()

    return live(step, **options)


@pytest.mark.parametrize(("by_hand", "reentrant"), [(False, None), (True, True), (False, False)])
def test_gpt2_is_exact(by_hand, reentrant):
    """GPT-2 124M at 8 x 1024 has the published model FLOPs, however attention is written, checkpointed or not."""
    with torch.device("meta"):
        model = GPT(by_hand=by_hand, reentrant=reentrant)
        count = count_flops(model, torch.empty(8, 1024, dtype=torch.long))
    assert count.model_flops == GPT2_124M_AT_8_BY_1024
    assert count.hardware_flops == count.model_flops + count.recompute_flops
    assert count.flops_by_dtype == {"mm/float32": count.hardware_flops}
    assert (count.recompute_flops > 0) == (reentrant is not None)
    if reentrant:
        assert round(count.hardware_flops / count.model_flops, 3) == 1.243


def test_gpt2_is_exact_where_attention_is_fused():
    """A fused backward computes the scores once more: hardware FLOPs rise by a fifth of attention's, model FLOPs stay."""
    with torch.device("meta"):
        model, tokens = GPT(), torch.empty(8, 1024, dtype=torch.long)
    count = meta_tally(model, (tokens,), {}, attention="full", device="cpu", autocast=None, fused=True).count()
    assert count.model_flops == GPT2_124M_AT_8_BY_1024
    scores = 2 * 12 * 8 * 12 * 1024 * 1024 * 64
    assert count.recompute_flops == scores
    assert count.hardware_flops == count.model_flops + scores
    assert count.estimated


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("attention_flops", ["full", "causal"])
def test_live_equals_meta(by_hand, reentrant, attention_flops):
    """A small GPT counts the same while it runs and on meta, in every field but the mark of an estimate."""
    model = small_gpt(by_hand=by_hand, reentrant=reentrant)
    counted = count_flops(model, TOKENS, attention=attention_flops)
    ran = train_live(model, TOKENS, attention=attention_flops)
    assert (ran.model_flops, ran.hardware_flops, ran.recompute_flops, ran.flops_by_dtype) == (
        counted.model_flops,
        counted.hardware_flops,
        counted.recompute_flops,
        counted.flops_by_dtype,
    )
    plain = train_live(small_gpt(by_hand=by_hand), TOKENS, attention=attention_flops)
    assert ran.model_flops == plain.model_flops


def test_causal_halves_attention_where_the_call_says_so():
    """attention="causal" halves attention's model FLOPs with is_causal, and nothing without it."""
    q = torch.randn(2, 4, 8, 16)
    for is_causal, share in ((True, 0.5), (False, 1.0)):
        count = live(lambda c=is_causal: F.scaled_dot_product_attention(q, q, q, is_causal=c), attention="causal")
        assert count.model_flops == share * 4 * 2 * 4 * 8 * 8 * 16


def test_attention_with_fewer_key_heads():
    """GQA counts a product for every query head, fused and as math alike, with the fused backward's extra in hardware alone."""
    q, k = torch.randn(2, 4, 8, 16, requires_grad=True), torch.randn(2, 2, 8, 16, requires_grad=True)

    def step():
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True).sum().backward()

    fused = live(step)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        math = live(step)
    product = 2 * 2 * 4 * 8 * 8 * 16
    assert fused.model_flops == math.model_flops == math.hardware_flops == 6 * product
    assert fused.hardware_flops - fused.model_flops == fused.recompute_flops
    assert fused.recompute_flops in {0, product}  # torch before 2.8 or so ran it as math on the CPU


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_attention_formula(batch, key_heads, share, length, keys, width, value_width):  # noqa: PLR0917 - given by hypothesis
    """Attention is two products forward and four backward; what fused kernels add is the scores; halving halves the model's."""
    q, k, v = (batch, key_heads * share, length, width), (batch, key_heads, keys, width), (batch, key_heads, keys, value_width)
    forward = attention(q, k, v, backward=False, fused=True, halved=False)
    backward = attention(q, k, v, backward=True, fused=True, halved=False)
    pairs = 2 * batch * key_heads * share * length * keys
    assert forward.model == forward.hardware == pairs * (width + value_width)
    assert backward.model == 2 * forward.model
    assert backward.hardware - backward.model == backward.recompute == pairs * width
    assert attention(q, k, v, backward=True, fused=False, halved=True).hardware == backward.model
    assert attention(q, k, v, backward=True, fused=False, halved=True).model == forward.model


def test_depthwise_and_grouped_convolution():
    """A CNN with depthwise, grouped, strided and transposed convolutions counts as by hand, forward and backward."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1, stride=2, groups=2),
        nn.ConvTranspose2d(16, 4, 2, stride=2, groups=4),
    )
    x = torch.randn(5, 3, 12, 12)
    forwards = [2 * 5 * 144 * 8 * 3 * 9, 2 * 5 * 144 * 8 * 9, 2 * 5 * 36 * 16 * 4, 2 * 5 * 36 * 16 * 1 * 4]
    by_hand = 3 * sum(forwards) - forwards[0]  # nobody asks for the gradient of the images
    for count in (train_live(model, x), count_flops(model, x)):
        assert count.model_flops == count.hardware_flops == by_hand
        assert count.flops_by_dtype == {"conv/float32": by_hand}


@pytest.mark.parametrize("dims", [1, 3])
def test_convolution_in_one_and_three_dimensions(dims):
    """Conv1d (unbatched too) and Conv3d count one multiply-add a weight and output position."""
    layer = (nn.Conv1d, nn.Conv3d)[dims == 3](4, 6, 3)
    x = torch.randn(4, *[7] * dims)
    assert live(lambda: layer(x)).model_flops == 2 * 5**dims * 6 * 4 * 3**dims


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"bias": False}])
def test_lstm(options):
    """An LSTM's fused kernel counts the same model FLOPs as its steps one by one on meta, and both as by hand."""
    model, x = nn.LSTM(8, 16, **options), torch.randn(5, 3, 8)
    ran, counted = train_live(model, x), count_flops(nn.Sequential(model), x)
    tokens, batch = 15, 5 if options.get("batch_first") else 3
    by_hand = 0
    for name, weight in model.named_parameters():
        if "weight" in name:
            by_hand += 6 * tokens * weight.numel()
            if name.startswith("weight_ih_l0"):
                by_hand -= 2 * tokens * weight.numel()  # the input's gradient
            if name.startswith("weight_hh"):
                by_hand -= 2 * batch * weight.numel()  # the first state's
    assert ran.model_flops == counted.model_flops == by_hand
    assert ran.hardware_flops >= by_hand
    assert ran.uncounted_ops == counted.uncounted_ops == ()


def test_gru_and_rnn():
    """GRU and plain RNN count the same live and on meta, and more than nothing."""
    for model in (nn.GRU(8, 16, 2), nn.RNN(8, 16)):
        x = torch.randn(5, 3, 8)
        assert train_live(model, x).model_flops == count_flops(model, x).model_flops > 0


def test_cudnn_rnn_formula():
    """The fused RNN of cuDNN counts as the same network's steps one by one, told from its arguments."""
    model = nn.LSTM(8, 16, 2, bidirectional=True)
    x, state = torch.randn(5, 3, 8), torch.zeros(4, 3, 16)
    arguments = {"input": x, "weight": list(model._flat_weights), "weight_stride0": 4, "bidirectional": True, "hx": state}
    arguments |= {"batch_first": False, "batch_sizes": [], "output_mask": [False, False, False, True]}
    forward = FORMULAS["aten::_cudnn_rnn"][1](arguments, False)
    backward = FORMULAS["aten::_cudnn_rnn_backward"][1](arguments, False)
    assert forward.model + backward.model == train_live(model, x).model_flops


def test_frozen_parameters():
    """Frozen layers get no weight gradient, and below the first trained one no gradient at all; on meta too."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    x, one = torch.randn(4, 8), 2 * 4 * 8 * 8
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    for count in (train_live(model, x), count_flops(model, x)):
        assert count.model_flops == 3 * one + 2 * one
    model.requires_grad_(False)
    assert count_flops(model, x).model_flops == 3 * one


def test_gradient_penalty_is_not_recomputation():
    """A second derivative is work that the mathematics asks for."""
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    one = 2 * 4 * 8 * 8

    def step():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    count = live(step)
    assert count.recompute_flops == 0
    assert count.model_flops == count.hardware_flops == 6 * one


def test_gradient_penalty_inside_a_checkpoint():
    """A derivative taken inside a checkpointed function is work the first time and recomputation in the replay."""
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)

    def penalty(y):
        (gradient,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
        return gradient.square().sum()

    plain = live(lambda: penalty(x).backward())
    replayed = live(lambda: checkpoint(penalty, x, use_reentrant=False).backward())
    assert replayed.model_flops == plain.model_flops
    assert plain.recompute_flops == 0
    assert replayed.recompute_flops == replayed.hardware_flops - replayed.model_flops > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints_and_no_grad_in_a_replay(reentrant):
    """Every replay of nested checkpoints is recomputation, what runs without gradients in it too."""
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    x = torch.randn(4, 8, requires_grad=True)

    def inner(y):
        with torch.no_grad():
            scale = layers[2](y).mean()
        return layers[1](y).relu() * scale

    def outer(y):
        return checkpoint(inner, layers[0](y), use_reentrant=reentrant).relu()

    one = 2 * 4 * 8 * 8
    count = live(lambda: checkpoint(outer, x, use_reentrant=reentrant).sum().backward())
    assert count.model_flops == 3 * one + 4 * one
    assert count.recompute_flops == count.hardware_flops - count.model_flops >= 3 * one


def test_selective_checkpointing():
    """What a policy saves is not recomputed, and what it doesn't is."""
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU())
    x = torch.randn(4, 8, requires_grad=True)

    def step(saved):
        policy = {"context_fn": lambda: create_selective_checkpoint_contexts([saved]), "use_reentrant": False}
        checkpoint(layers, x, **policy).sum().backward()

    counts = [live(lambda op=op: step(op)) for op in (torch.ops.aten.mm.default, torch.ops.aten.relu.default)]
    assert [count.model_flops for count in counts] == [6 * 2 * 4 * 8 * 8] * 2
    assert counts[0].recompute_flops == 0 < counts[1].recompute_flops


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_optimizer_products_are_hardware_only():
    """Muon's products raise hardware FLOPs alone; what its closure runs is work, without gradients too."""
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
    optimizer = torch.optim.Muon(layer.parameters())

    def forward_and_backward():
        with torch.no_grad():
            layer(x)
        optimizer.zero_grad()
        loss = layer(x).sum()
        loss.backward()
        return loss

    with_closure = live(lambda: optimizer.step(forward_and_backward))
    optimizer_alone = live(optimizer.step)
    assert optimizer_alone.model_flops == 0 < optimizer_alone.hardware_flops
    assert with_closure.model_flops == 3 * 2 * 4 * 8 * 8
    assert with_closure.hardware_flops == with_closure.model_flops + optimizer_alone.hardware_flops
    assert with_closure.recompute_flops == 0


def test_autocast_counts_the_dtype_that_ran():
    """Under autocast products count in its dtype, forward and backward, live and on meta."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).sum()
        loss.backward()

    ran = live(step)
    with torch.autocast("cpu", torch.bfloat16):
        counted = count_flops(model, x)
    assert list(ran.flops_by_dtype) == ["mm/bfloat16"]
    assert ran == counted


def test_autocast_inside_the_model():
    """A model that enters autocast itself counts on meta what it runs in."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.low(x)
            with torch.no_grad():
                return self.high(x.float())

    model, x = Own(), torch.randn(4, 8)
    assert count_flops(model, x).flops_by_dtype == live(lambda: model(x)).flops_by_dtype
    assert set(count_flops(model, x).flops_by_dtype) == {"mm/bfloat16", "mm/float32"}


def test_small_products():
    """Vector products, broadcasting and einsum count two FLOPs a multiply-add."""
    a, b, v = torch.randn(4, 5), torch.randn(5, 6), torch.randn(5)
    cases = {
        2 * 4 * 5 * 6: lambda: a @ b,
        2 * 4 * 5: lambda: a @ v,
        2 * 5: lambda: v @ v,
        2 * 4 * 5 + 0: lambda: torch.addmv(torch.randn(4), a, v),
        2 * 3 * 4 * 5 * 6: lambda: torch.randn(3, 4, 5) @ b,
        2 * 7 * 4 * 5 * 4: lambda: torch.einsum("bij,bkj->bik", torch.randn(7, 4, 5), torch.randn(7, 4, 5)),
        2 * 3 * 4 * 5 * 2: lambda: torch.addbmm(torch.randn(4, 2), torch.randn(3, 4, 5), torch.randn(3, 5, 2)),
        2 * 3 * 4 * 5 * 2 + 0: lambda: torch.baddbmm(torch.randn(3, 4, 2), torch.randn(3, 4, 5), torch.randn(3, 5, 2)),
        2 * 6 * 4 * 3 * 5: lambda: F.bilinear(torch.randn(4, 3), torch.randn(4, 5), torch.randn(6, 3, 5)),
        2 * 30 * 40 * 4: lambda: torch.cdist(torch.randn(30, 4), torch.randn(40, 4)),
    }
    for flops, run in cases.items():
        assert live(run).model_flops == flops


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_matmul():
    """The experts of a mixture in one call count each token once."""
    tokens, experts = torch.randn(12, 16, dtype=torch.bfloat16), torch.randn(3, 16, 8, dtype=torch.bfloat16)
    count = live(lambda: F.grouped_mm(tokens, experts, offs=torch.tensor([4, 8, 12], dtype=torch.int32)))
    assert count.flops_by_dtype == {"mm/bfloat16": 2 * 12 * 16 * 8}


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_encoder_layer_fast_path(quiet):
    """TransformerEncoderLayer's and MultiheadAttention's inference kernels count as their training paths do."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    heads = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    trained = live(lambda: (layer(x), heads(x, x, x)))
    layer.eval()
    heads.eval()
    with quiet():
        fast = live(lambda: (layer(x), heads(x, x, x)))
    assert fast.model_flops == trained.model_flops
    assert fast.uncounted_ops == ()


def test_encoder_fast_path_skips_padding():
    """With a padding mask the fast path runs nested tensors: each sequence counts at its own length."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        count = live(lambda: encoder(torch.randn(2, 5, 16), src_key_padding_mask=padding))
    assert count.model_flops == 2 * 8 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 16 * (25 + 9)


def test_inference_mode_breaks_composites_up():
    """Inference mode hands composites over whole: they count as their parts."""
    x, layer = torch.randn(2, 5, 16), nn.Conv1d(5, 3, 2)
    with torch.inference_mode():
        count = live(lambda: (torch.einsum("bte,bse->bts", x, x), layer(x), F.scaled_dot_product_attention(x, x, x)))
    assert count.model_flops == 2 * 2 * 5 * 5 * 16 + 2 * 2 * 15 * 3 * 5 * 2 + 2 * 2 * 2 * 5 * 5 * 16


def test_jagged_tensors_count_their_parts():
    """A nested tensor's product counts at the tokens that it holds."""
    jagged = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    layer = nn.Linear(8, 4)
    assert live(lambda: layer(jagged)).model_flops == 2 * 8 * 8 * 4


def test_flex_attention_is_counted():
    """FlexAttention counts in full, and runs while it is being counted; so do operators on functions, which are named."""
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(2, 4, 8, 16)
    outputs = []
    count = live(lambda: outputs.append(flex_attention(q, q, q)))
    assert count.model_flops == 4 * 2 * 4 * 8 * 8 * 16
    assert outputs[0].shape == q.shape
    count = live(lambda: outputs.append(torch.cond(q.sum() > 0, torch.sin, torch.cos, (q,))))
    assert outputs[1].shape == q.shape
    assert count.uncounted_ops == ("higher_order::cond",)


def test_what_has_no_formula_is_named():
    """Sparse products, decompositions and foreign operations are listed; element-wise work and norms are not."""
    x = torch.randn(4, 4)

    @torch.library.custom_op("green_torch_test::mystery", mutates_args=())
    def mystery(y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    count = live(
        lambda: (x.to_sparse() @ x, torch.linalg.inv(x + 9 * torch.eye(4)), mystery(x), x.softmax(-1), x.norm(), x.cumsum(0))
    )
    assert count.uncounted_ops == ("aten::linalg_inv_ex", "aten::mm (sparse layout)", "green_torch_test::mystery")
    assert count.model_flops == 0


def test_a_registered_formula_is_used():
    """What a user registers with torch's own decorator counts."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("green_torch_test::known", mutates_args=())
    def known(y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    target = torch.ops.green_torch_test.known
    register_flop_formula(target)(lambda shape, *_, out_shape=None, **_kw: 7 * shape[0])
    try:
        count = live(lambda: known(torch.randn(3)))
    finally:
        del flop_registry[target]
    assert (count.model_flops, count.uncounted_ops) == (21, ())


ELEMENTWISE = [
    "detach",
    "upsample_linear1d",
    "resolve_conj",
    "linalg_vector_norm",
    "upsample_bilinear2d",
    "_convert_indices_from_coo_to_csr",
    "comma",
    "add",
    "native_layer_norm",
    "_thnn_fused_lstm_cell",
    "slice_inverse",
    "_fused_adam",
    "_foreach_addcmul",
    "embedding",
]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_work_is_not_listed(name):
    """Operations that only move or scale values are no gap in a count."""
    assert formula_of(f"aten::{name}") is None
    assert not computes(f"aten::{name}")


def test_compiled_functions_stay_compiled():
    """A compiled function is compiled once, counts what it calls, and the count says that it is an estimate."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    function = torch.compile(lambda a, b: (a @ b).relu(), backend="aot_eager")
    a = torch.randn(8, 8, requires_grad=True)
    counts = [live(lambda: function(a, a).sum().backward()) for _ in range(2)]
    function(a, a)
    assert torch._dynamo.utils.counters["frames"] == {"total": 1, "ok": 1}
    for count in counts:
        assert count.model_flops == 3 * 2 * 8**3
        assert count.estimated == COUNTS_COMPILED


def test_meta_count_compiles_nothing():
    """A compiled part of a model is counted as written, at no compilation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), backend="aot_eager")
    assert count_flops(model, torch.randn(2, 4)).model_flops == 5 * 2 * 2 * 4 * 4
    assert not torch._dynamo.utils.counters["frames"]


class Everything(nn.Module):
    """A model with state of all sorts; ``ask`` makes it look at values, which meta has none of."""

    def __init__(self, ask):
        super().__init__()
        self.ask, self.seen = ask, []
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, x):
        self.seen.append(1)
        y = self.body(x)
        return y * y.abs().max().item() if self.ask else y


@pytest.mark.parametrize("ask", [False, True])
def test_nothing_is_touched(ask):
    """Parameters, gradients, buffers, inputs, hooks, flags and random generators are as before, computed or not."""
    import random

    model, calls = Everything(ask), []
    model.body.eval()
    model.body[2].train()
    model.register_forward_hook(lambda *_: calls.append("forward"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
        parameter.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    x = torch.randn(4, 6, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    count = count_flops(model, x)
    assert count.model_flops == 3 * 2 * 4 * (36 + 12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert [module.training for module in model.modules()] == training
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (x.grad, calls, model.seen, len(model._forward_hooks)) == (None, [], [], 1)
    assert torch.is_grad_enabled()


def test_a_replaced_forward():
    """A forward that was put on the instance counts as a method; as a closure over the original it is refused, nothing touched."""
    import types

    x = torch.randn(2, 4)
    model = nn.Linear(4, 4, bias=False)
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(type(model).forward), model)
    assert count_flops(model, x).flops_by_dtype == {"mm/bfloat16": 2 * 2 * 2 * 4 * 4}
    model = nn.BatchNorm1d(4)
    original = model.forward
    model.forward = lambda y: original(y)  # noqa: PLW0108 - a closure is what is tested
    with pytest.raises(CountingError, match="original"):
        count_flops(model, x)
    assert model.weight.requires_grad
    assert model.weight.grad is None
    assert torch.equal(model.running_mean, torch.zeros(4))


@pytest.mark.skipif(not hasattr(torch.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU")
def test_distributed_wrappers():
    """DDP, FSDP2 and tensor parallelism count what this rank runs, live; DDP and FSDP2 on meta too, replays told apart."""
    from torch import distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plain = count_flops(small_gpt(), TOKENS)
    replayed = count_flops(small_gpt(reentrant=False), TOKENS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        wrapped = small_gpt()
        wrapped.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in wrapped.blocks)
        cases = [
            (nn.parallel.DistributedDataParallel(small_gpt()), plain),
            (fully_shard(small_gpt(), mesh=mesh), plain),
            (fully_shard(small_gpt(reentrant=False), mesh=mesh), replayed),
            (wrapped, replayed),
        ]
        for model, expected in cases:
            assert train_live(model, TOKENS).hardware_flops == expected.hardware_flops
            assert count_flops(model, TOKENS) == expected
            assert train_live(model, TOKENS).model_flops == plain.model_flops
        layer = parallelize_module(nn.Linear(16, 16, bias=False), mesh, ColwiseParallel())
        assert train_live(layer, torch.randn(2, 16)).model_flops == 2 * 2 * 2 * 16 * 16
    finally:
        dist.destroy_process_group()


def test_a_shard_has_not_the_values():
    """A model of FSDP1's that asks for values can't be counted on a copy: the error says where it can."""
    from torch import distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Asking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.sum().item()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(Asking(4, 4), device_id=torch.device("cpu"))
        with pytest.raises(CountingError, match=r"FLOPs of Asking .* Try it before FSDP wraps it, or with LiveCounter\(\): "):
            count_flops(model, torch.randn(2, 4))
    finally:
        dist.destroy_process_group()


def test_fake_tensors():
    """A counter inside the user's fake mode counts; a fake mode that somebody enters while counting runs nothing, so it doesn't."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = nn.Linear(4, 4, bias=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert live(lambda: layer(torch.randn(2, 4))).model_flops == 2 * 2 * 4 * 4

    def shapes_only():
        with fake:
            layer(torch.empty(2, 4))

    assert live(shapes_only).model_flops == 0


def test_users_modes_stay_as_they_were():
    """A dispatch mode of the user's stays on, in its place, sees live work once and meta work not at all."""
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

    class Spy(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    with Spy() as outer, Spy() as inner:
        count_flops(layer, x)
        assert torch.ops.aten.mm.default not in outer.seen + inner.seen
        assert _get_current_dispatch_mode_stack() == [outer, inner]
        train_live(layer, x)
        assert _get_current_dispatch_mode_stack() == [outer, inner]
        assert outer.seen.count(torch.ops.aten.mm.default) == inner.seen.count(torch.ops.aten.mm.default) == 2


def test_an_exception_inside_leaves_no_mode():
    """What raises inside a counter goes on as it was, and nothing is counted afterwards."""
    with pytest.raises(ZeroDivisionError), LiveCounter() as counter:
        1 / 0  # noqa: B018
    torch.randn(2, 2) @ torch.randn(2, 2)
    assert counter.count().model_flops == 0


def test_weights_made_by_torchs_own_hooks():
    """Weight norm, old and new, and tied weights come along into the copy."""
    old = torch.nn.utils.weight_norm(nn.Linear(4, 4, bias=False))
    new = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    x = torch.randn(2, 4)
    for layer in (old, new):
        assert count_flops(layer, x).model_flops == train_live(layer, x).model_flops == 2 * 2 * 2 * 4 * 4


def test_tensors_made_in_forward():
    """Tensors that a forward makes on the CPU, from Python's numbers too, meet meta ones without harm."""

    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4, bias=False)
            self.plain = torch.ones(4)

        def forward(self, x):
            n = torch.tensor([1, 2]).sum().item()
            y = (
                self.body(x) * torch.arange(4)
                + torch.tensor([1.0, 2.0, 3.0, float(n)])
                + torch.zeros(4, device="cpu").to(x.device)
            )
            return (y + self.plain).to("cpu")

    assert count_flops(Makes(), torch.randn(2, 4)).model_flops == 2 * 2 * 2 * 4 * 4


class Asks(nn.Module):
    """A model whose way depends on masks and lengths, as transformers' do: 2 x 4 tokens, padded."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.register_buffer("places", torch.arange(4))

    def forward(self, ids, mask):
        x = self.embed(ids)
        if not bool((self.places == torch.arange(ids.shape[1], device=x.device)).all()):
            x = self.body(x)  # never
        lengths = mask.to(x.device).sum(1)
        if not (mask == 1).all():  # padded
            x = self.body(x)
        x = x * mask.to(device=x.device, dtype=x.dtype).unsqueeze(-1)
        for row, length in zip(x, lengths.tolist(), strict=True):
            self.head(row[:length]).sum()
        return self.head(x[mask.bool()])


PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_masks_and_lengths_have_values_on_meta():
    """What a model asks of whole numbers and truths (inputs, buffers, what it makes of them) is answered as it is where it runs."""
    model, ids = Asks(), torch.randint(9, (2, 4))
    one = 2 * 4 * 4  # a product for one token
    assert meta(model, ids, PADDED).model_flops == 3 * 8 * one + (6 + 3 * 6) * one
    full = torch.ones(2, 4, dtype=torch.long)
    assert meta(model, ids, full).model_flops == (8 + 3 * 8) * one
    assert meta(model, ids, PADDED) == train_live(model, ids, PADDED)


def meta(model, *inputs):
    return meta_tally(model, inputs, {}, attention="full", device="cpu", autocast=None, fused=True).count()


@pytest.mark.parametrize("way", ["written", "view", "out", "picked"])
def test_what_meta_is_written_into_has_no_values(way):
    """Counts that come of the model's own results (an expert's load) are unknown: asking for them fails instead of giving stale ones."""

    class Routes(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 3, bias=False)

        def forward(self, x):
            chosen = self.gate(x).argmax(-1)
            load = torch.zeros(3, dtype=torch.long, device=x.device)
            seen = load[:]
            if way == "out":
                torch.add(chosen[:3], 1, out=load)
            else:
                load.scatter_add_(0, chosen, torch.ones_like(chosen))
            if way == "picked":
                return self.gate(x[: len(load)][load.bool()])
            return self.gate(x[: int((seen if way == "view" else load).sum())])

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        meta(Routes(), torch.randn(5, 4))


def test_large_masks_stay_on_meta():
    """A mask of more elements than are kept with values is made on meta: no memory, no time."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            rows = torch.arange(1 << 20, device=x.device)
            self.mask = rows[:, None] >= rows[None, :]
            return self.body(x)

    assert meta(Masked(), torch.randn(2, 4)).model_flops == 2 * 2 * 2 * 4 * 4


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_grouped_matmul_of_any_dtype_on_meta(autocast):
    """Experts in float32 count on meta as they do live; autocast leaves them alone."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, x):
            return F.grouped_mm(x, self.up, offs=torch.tensor([4, 8, 12], dtype=torch.int32, device=x.device))

    count = meta_tally(
        Experts(), (torch.randn(12, 16),), {}, attention="full", device="cpu", autocast=autocast, fused=True
    ).count()
    assert count.flops_by_dtype == {"mm/float32": 2 * 2 * 12 * 16 * 8}


def test_outputs_of_any_form():
    """Dictionaries, tuples and objects are summed up; where there is a scalar loss, that alone is followed."""

    class Form(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.a, self.b, self.form = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), form

        def forward(self, x, *, scale=1):
            return self.form(self.a(x) * scale, self.b(x))

    x, one = torch.randn(2, 4), 2 * 2 * 4 * 4
    assert count_flops(Form(lambda a, b: {"a": a, "rest": [b, None, 3]}), x, scale=2).model_flops == 4 * one
    assert count_flops(Form(lambda a, b: {"loss": a.sum(), "logits": b}), x).model_flops == 3 * one
    assert count_flops(Form(lambda a, b: (a.sum(), b.sum())), x).model_flops == 4 * one


def test_what_cant_be_counted_says_why():
    """A meta model that asks for values, inputs that don't fit and wrong arguments raise our errors, with a cause."""
    with torch.device("meta"):
        model = Everything(ask=True)
        with pytest.raises(CountingError, match="Everything"):
            count_flops(model, torch.empty(4, 6))
    with pytest.raises(CountingError, match="Linear"):
        count_flops(nn.Linear(3, 3), torch.randn(2, 5))
    with pytest.raises(ArgumentError, match="attention"):
        count_flops(nn.Linear(3, 3), torch.randn(2, 3), attention="half")
    with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
        count_flops(len, [])
