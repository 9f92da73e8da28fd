"""Every product that torch knows is counted, falls into counted ones, or is named; GPU kernels' formulas, run on shapes alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from green_torch.flops import LiveCounter, StepFlops, count_flops
from green_torch.flops.formulas import FORMULAS, computes, formula_of
from green_torch.flops.once import meta_tally
from green_torch.records import Flag

aten = torch.ops.aten

B, H, D = 2, 4, 16
STARTS_Q, STARTS_K = (0, 3, 16), (0, 12, 32)
PAIRS_OF_PARTS = 3 * 12 + 13 * 20


def meta(*shape, dtype=torch.bfloat16, grad=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def count(step, attention="full"):
    with LiveCounter(attention) as counter:
        step()
    return counter.count()


def starts(places, device="cpu"):
    return torch.tensor(places, dtype=torch.int32, device=device)


def has(name):
    return pytest.mark.skipif(not hasattr(aten, name), reason=f"this torch has no {name}")


# --- nothing is silently 0 ---------------------------------------------------------------------------------------------------------

LIKE_A_PRODUCT = re.compile(
    r"mm|mv|matmul|dot|linear|conv|attention|attn|mha|rnn|lstm|gru|einsum|bilinear|[cp]dist|svd|qr|chol|solve|invers|encoder|gemm"
)
"""Wider than what the counter itself goes by: it must see what that would miss."""

ONLY_NAMED = {
    r"_foreach_mm|_mm_native": "one kernel of an operation that is counted above it",
    r"_c[dp]ist|_[cp]dist_(forward|backward)": "distances one by one, by differences: no products",
    r"sparse|smm|spsolve|hspmm|sspaddmm|cslt": "FLOPs depend on where the zeros are",
    r"linalg|cholesky|svd|qr|geqrf|ldl|triangular_solve|householder|_spsolve": "a decomposition or a solver: no fixed count of FLOPs",
    r"_linear_combination": "the inner loop of a matrix exponential",
    r"quantized_(lstm|gru)|int4pack|dyn_quant|_mixed_dtypes_linear": "inference on packed weights, whose shapes are not the matrices'",
    r"mps|lstm_mps": "Apple's kernels, which put several gradients into one call",
    r"_slow_conv2d_backward": "a kernel below convolution_backward, which is counted",
    r"^matmul_backward$": "of nested tensors alone, which are broken up first",
}
"""Operations that have no formula and are listed among the uncounted: by a part of the name, and why."""

NO_PRODUCT = {
    r"lgamma|digamma|polygamma|igamma|gammainc|gammaln|_standard_gamma": "special functions, element by element",
    r"comma|symmetric|dimV|dummy|hamming|cummax|cummin|is_distributed": "letters that happen to stand in the name",
    r"sqrt": "square roots, element by element",
    r"convert_indices|convert_weight|convert_element": "copies",
    r"upsample_|grid_sampler": "interpolation: a few weights an element",
    r"embedding_bag": "sums of rows",
    r"resolve_|slice_inverse": "views",
    r"flatten_weight|reorder|prepack|pack_quantized|quantize_weight|_pack_": "weights laid out anew",
    r"(fused|differentiable)_(lstm|gru)_cell": "a cell's gates, element by element, after its products ran as operations of their own",
    r"pairwise_distance|^dist$|^fused_adam|_amp_": "element by element",
    r"cslt_sparse_mm_search": "a search for the fastest kernel",
}
"""Operations whose names look like a product's and that run none: by a part of the name, and why."""


def overloads():
    names = {}
    for full in torch._C._dispatch_get_all_op_names():
        names.setdefault(full.partition(".")[0], []).append(full)
    return names


def falls_apart(full_names):
    """Whether torch breaks it up into other operations before a counter sees it."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has_kernel(name, "CompositeImplicitAutograd") for name in full_names)


def reason_for(op, table):
    return next((why for part, why in table.items() if re.search(part, op)), None)


def test_no_product_of_torch_is_silently_zero():
    """Every operation of this torch whose name looks like a product has a formula, breaks up, is named, or stands in a list with its reason."""
    open_questions = []
    for name, full_names in overloads().items():
        namespace, _, op = name.partition("::")
        if not LIKE_A_PRODUCT.search(op) or formula_of(name) is not None:
            continue
        if namespace != "aten":
            if not computes(name) and reason_for(op, NO_PRODUCT) is None:
                open_questions.append(f"{name}: not named")
        elif falls_apart(full_names):
            continue
        elif computes(name):
            if reason_for(op, ONLY_NAMED) is None:
                open_questions.append(f"{name}: named, without a reason")
        elif reason_for(op, NO_PRODUCT) is None:
            open_questions.append(f"{name}: silently 0")
    assert open_questions == []


@pytest.mark.skipif(not hasattr(aten, "_foreach_mm"), reason="an older torch, which lacks some of the operations")
def test_every_formula_is_of_an_operation():
    """No name in the registry of formulas is misspelt: each of aten's is an operation of torch."""
    assert {name for name in FORMULAS if name.startswith("aten::")} <= set(overloads())


@pytest.mark.parametrize("name", ["inductor::_mm_plus_mm", "symm_mem::fused_something_matmul", "prims::svd", "somebody::op"])
def test_products_in_plumbing_are_seen(name):
    """A product in one of torch's own namespaces of plumbing counts or is named."""
    assert formula_of(name) is not None or computes(name)


@pytest.mark.parametrize(
    "name", ["inductor::accumulate_grad_", "c10d::allgather_", "prims::convert_element_type", "prims::sqrt"]
)
def test_plumbing_is_not_listed(name):
    """Plumbing without a product is no gap in a count."""
    assert not computes(name)


# --- attention kernels of GPUs, on meta tensors ------------------------------------------------------------------------------------

SDPA = {
    "_scaled_dot_product_flash_attention": {"dropout_p": 0.1},
    "_scaled_dot_product_efficient_attention": {"attn_bias": None, "compute_log_sumexp": True},
    "_scaled_dot_product_cudnn_attention": {"attn_bias": None, "compute_log_sumexp": True, "dropout_p": 0.1},
    "_scaled_dot_product_fused_attention_overrideable": {},
}


@pytest.mark.parametrize("kernel", SDPA)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize(("length", "keys"), [(8, 8), (8, 24)])
def test_fused_attention(kernel, is_causal, attention, length, keys):
    """Each kernel counts two products forward and four backward, its fifth in hardware alone; half where half is asked for."""
    q, k, v = meta(B, H, length, D), meta(B, H, keys, D), meta(B, H, keys, D)
    product = 2 * B * H * length * keys * D
    share = 0.5 if is_causal and attention == "causal" else 1.0

    def step():
        getattr(aten, kernel)(q, k, v, is_causal=is_causal, **SDPA[kernel])[0].sum().backward()

    found = count(step, attention)
    assert found.uncounted_ops == ()
    assert found.model_flops == share * 6 * product
    assert found.recompute_flops == share * product
    assert found.hardware_flops == share * 7 * product
    assert found.flops_by_dtype == {"mm/bfloat16": share * 7 * product}


@pytest.mark.parametrize("kernel", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"])
def test_fused_attention_with_fewer_key_heads(kernel):
    """A kernel that shares key heads counts a product for every query head."""
    q, k, v = meta(B, H, 8, D), meta(B, 2, 8, D), meta(B, 2, 8, D)
    found = count(lambda: getattr(aten, kernel)(q, k, v, **SDPA[kernel])[0].sum().backward())
    assert (found.model_flops, found.uncounted_ops) == (6 * 2 * B * H * 8 * 8 * D, ())


def flash(cu, keys):
    shapes = [(B, 8, H, D), (B, keys, H, D)] if cu is None else [(16, H, D), (32, H, D)]
    q, k, v = meta(*shapes[0]), meta(*shapes[1]), meta(*shapes[1])
    cu_q, cu_k = (None, None) if cu is None else (starts(STARTS_Q, cu), starts(STARTS_K, cu))
    return aten._flash_attention_forward(q, k, v, cu_q, cu_k, 16, 24, 0.1, False, False)[0]


def efficient(cu, keys):
    shapes = [(B, 8, H, D), (B, keys, H, D)] if cu is None else [(1, 16, H, D), (1, 32, H, D)]
    q, k, v = meta(*shapes[0]), meta(*shapes[1]), meta(*shapes[1])
    cu_q, cu_k = (None, None) if cu is None else (starts(STARTS_Q, cu), starts(STARTS_K, cu))
    return aten._efficient_attention_forward(q, k, v, None, cu_q, cu_k, 16, 24, 0.1, 0, True)[0]


def varlen(cu, _keys):
    module = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = meta(16, H, D), meta(32, H, D), meta(32, H, D)
    return module.varlen_attn(q, k, v, starts(STARTS_Q, cu), starts(STARTS_K, cu), 16, 24)


@pytest.mark.parametrize("kernel", [flash, efficient])
@pytest.mark.parametrize("keys", [8, 24])
def test_kernels_below_sdpa(kernel, keys):
    """Flash's and the memory-efficient kernel count the same in their own layout, keys of another length included."""
    found = count(lambda: kernel(None, keys).sum().backward())
    product = 2 * B * H * 8 * keys * D
    assert (found.model_flops, found.hardware_flops, found.uncounted_ops) == (6 * product, 7 * product, ())


@pytest.mark.parametrize("kernel", [flash, efficient, varlen])
def test_sequences_end_to_end(kernel):
    """Each of several sequences in one tensor counts at its own length; where the lengths are unknown the operation is named."""
    product = 2 * H * D * PAIRS_OF_PARTS
    known = count(lambda: kernel("cpu", 0).sum().backward())
    assert (known.model_flops, known.hardware_flops, known.uncounted_ops) == (6 * product, 7 * product, ())
    unknown = count(lambda: kernel("meta", 0).sum().backward())
    assert unknown.model_flops == 0
    assert len(unknown.uncounted_ops) == 2
    assert all("lengths unknown" in name for name in unknown.uncounted_ops)


def cost(name, causal=False, **arguments):
    return FORMULAS[name][1](arguments, causal)


def test_kernels_that_run_nowhere_else():
    """cuDNN's, flash-attn's and Triton's kernels, which have no shapes-only version, by their formulas."""
    dense = {"query": meta(B, H, 8, D), "key": meta(B, H, 24, D), "value": meta(B, H, 24, D)}
    product = 2 * B * H * 8 * 24 * D
    assert cost("aten::_cudnn_attention_forward", **dense, cum_seq_q=None, cum_seq_k=None).model == 2 * product
    backward = cost("aten::_cudnn_attention_backward", **dense, cum_seq_q=meta(1), cum_seq_k=meta(1))
    assert (backward.model, backward.hardware) == (4 * product, 5 * product)
    packed = {"query": meta(16, H, D), "key": meta(32, H, D), "value": meta(32, H, D)}
    where = {"cum_seq_q": starts(STARTS_Q), "cum_seq_k": starts(STARTS_K)}
    assert cost("aten::_cudnn_attention_forward", **packed, **where).model == 4 * H * D * PAIRS_OF_PARTS
    q, k = meta(B, 8, H, D), meta(B, 24, 2, D)
    assert cost("flash_attn::_flash_attn_forward", q=q, k=k, v=k, causal=False).model == 2 * product
    assert cost("flash_attn::_flash_attn_forward", causal=True, q=q, k=k, v=k).model == 2 * product
    q, k = packed["query"], packed["key"]
    where = {"cu_seqlens_q": starts(STARTS_Q), "cu_seqlens_k": starts(STARTS_K), "causal": True}
    varlen_backward = FORMULAS["flash_attn::_flash_attn_varlen_backward"][1]({"q": q, "k": k, "v": k, **where}, True)
    assert varlen_backward.model == 4 * H * D * PAIRS_OF_PARTS
    q, k = meta(B, H, 8, D), meta(B, H, 24, D)
    assert cost("aten::_triton_scaled_dot_attention", q=q, k=k, v=k).model == 2 * product


def test_keys_cut_short():
    """Where a kernel is told how many of the keys to use, only these count."""
    q, k = meta(B, 8, H, D), meta(B, 24, H, D)
    arguments = {"query": q, "key": k, "value": k, "cum_seq_q": None, "cum_seq_k": None, "seqused_k": starts((5, 24))}
    assert cost("aten::_flash_attention_forward", **arguments).model == 4 * H * D * 8 * (5 + 24)


class Packed(nn.Module):
    """Attention over sequences that lie end to end; ``how`` the model comes by their starts."""

    def __init__(self, how="given"):
        super().__init__()
        self.how, self.qkv = how, nn.Linear(H * D, 3 * H * D, bias=False)

    def forward(self, x, places):
        q, k, v = self.qkv(x).view(-1, 3, H, D).unbind(1)
        if self.how == "computed":
            places = torch.cat([places.new_zeros(1), places.diff().cumsum(0).to(torch.int32)])
        elif self.how == "data":
            places = torch.zeros(3, dtype=torch.int32, device=x.device).copy_(x.sum(0)[:3])
        out = torch.ops.aten._flash_attention_forward(q, k, v, places, places, 32, 32, 0.0, True, False)[0]
        return out.flatten(1)


def packed_flops(*lengths):
    return 3 * 4 * H * D * sum(n * n for n in lengths) + 2 * 2 * sum(lengths) * 3 * (H * D) ** 2


def test_lengths_keep_their_values_on_meta():
    """A model copied to meta knows its sequences' lengths where whole numbers say them, and names the kernel where its data do."""
    x, places = torch.randn(32, H * D), starts((0, 3, 32))
    for how in ("given", "computed"):
        found = meta_count(Packed(how), x, places)
        assert (found.model_flops, found.uncounted_ops) == (packed_flops(3, 29), ())
    assert any("lengths unknown" in name for name in meta_count(Packed("data"), x, places).uncounted_ops)


def meta_count(model, *inputs):
    return meta_tally(model, inputs, {}, attention="full", device="cpu", autocast=None, fused=True).count()


def test_other_lengths_in_the_same_shape_are_flagged():
    """A later step on sequences of other lengths, which no shape tells, says that its FLOPs are those of another batch."""
    model = Packed()
    flops = StepFlops(model)
    flops._before_forward(model, (torch.randn(32, H * D), starts((0, 3, 32))), {})
    first = flops.take()
    assert first.flags == (Flag.COUNTED,)
    assert first.flops.model_flops == packed_flops(3, 29)
    for _ in range(2):
        flops._before_forward(model, (torch.randn(32, H * D), starts((0, 16, 32))), {})
        assert flops.take() == type(first)(first.flops, (Flag.FLOPS_SCALED,))


# --- products of GPUs, and of few backends -----------------------------------------------------------------------------------------

FP8 = torch.float8_e4m3fn
OFFS = (4, 8, 16)


def scale(*shape):
    return torch.empty(shape, device="meta")


PRODUCTS = {
    "_scaled_mm": (
        2 * 16 * 32 * 48,
        "float8_e4m3fn",
        lambda: torch._scaled_mm(
            meta(16, 32, dtype=FP8, grad=False),
            meta(48, 32, dtype=FP8, grad=False).t(),
            scale(),
            scale(),
            out_dtype=torch.bfloat16,
        ),
    ),
    "_scaled_grouped_mm": (
        2 * 16 * 32 * 48,
        "float8_e4m3fn",
        lambda: torch._scaled_grouped_mm(
            *(meta(16, 32, dtype=FP8, grad=False), meta(3, 48, 32, dtype=FP8, grad=False).mT, scale(16), scale(3, 48)),
            offs=starts(OFFS, "meta"),
            out_dtype=torch.bfloat16,
        ),
    ),
    "_grouped_mm": (
        2 * 16 * 32 * 48,
        "bfloat16",
        lambda: torch._grouped_mm(meta(16, 32), meta(3, 32, 48), offs=starts(OFFS, "meta")),
    ),
    "_int_mm": (
        2 * 32 * 32 * 64,
        "int8",
        lambda: torch._int_mm(meta(32, 32, dtype=torch.int8, grad=False), meta(32, 64, dtype=torch.int8, grad=False)),
    ),
    "_addmm_activation": (2 * 16 * 32 * 48, "bfloat16", lambda: torch._addmm_activation(meta(48), meta(16, 32), meta(32, 48))),
    "linear_backward": (
        4 * 16 * 32 * 48,
        "bfloat16",
        lambda: aten.linear_backward(meta(16, 32), meta(16, 48), meta(48, 32), [True, True, True]),
    ),
    "_foreach_mm": (
        2 * (16 * 32 * 48 + 2 * 3 * 4),
        "float32",
        lambda: torch._foreach_mm([torch.ones(16, 32), torch.ones(2, 3)], [torch.ones(32, 48), torch.ones(3, 4)]),
    ),
    "_weight_int8pack_mm": (
        2 * 16 * 64 * 48,
        "bfloat16",
        lambda: torch._weight_int8pack_mm(
            torch.ones(16, 64, dtype=torch.bfloat16), torch.ones(48, 64, dtype=torch.int8), torch.ones(48, dtype=torch.bfloat16)
        ),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=has(name)) for name in PRODUCTS])
def test_products(name):
    """Scaled (fp8), grouped, integer and fused products count 2 a multiply-add, in the dtype of what is multiplied."""
    flops, dtype, run = PRODUCTS[name]
    found = count(run)
    assert found.uncounted_ops == ()
    assert found.model_flops == found.hardware_flops == flops
    assert found.flops_by_dtype == {f"mm/{dtype}": flops}


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no 4-bit floats")
def test_four_bit_products():
    """Two 4-bit values lie in an element: a product of such elements is twice as long as it looks."""
    a, b = (meta(128, 64, dtype=torch.float4_e2m1fn_x2, grad=False) for _ in range(2))
    scales = meta(128 * 8, dtype=FP8, grad=False)
    found = count(lambda: torch._scaled_mm(a, b.t(), scales, scales, out_dtype=torch.bfloat16))
    assert found.model_flops == 2 * 128**3


def test_products_of_shards():
    """A product that is fused with its collective counts what this rank multiplies."""
    a, b = meta(4, 32), meta(32, 48)
    gathered = cost("symm_mem::fused_all_gather_matmul", A=a, Bs=[b, b], **{"<out>": (None, [meta(16, 48), meta(16, 48)])})
    assert gathered.model == 2 * 2 * 16 * 32 * 48
    assert cost("symm_mem::fused_matmul_reduce_scatter", A=a, B=b).model == 2 * 4 * 32 * 48
    assert cost("inductor::_mm_plus_mm", a=a, b=b, c=a, d=b).model == 2 * 2 * 4 * 32 * 48


def test_linear_backward_of_mkldnn():
    """Its two halves count one product each."""
    grad, weight = meta(16, 48), meta(48, 32)
    halves = [cost("aten::mkldnn_linear_backward_input", grad_output=grad, weight=weight)]
    halves += [cost("aten::mkldnn_linear_backward_weights", grad_output=grad, input=meta(16, 32), weight=weight)]
    assert [half.model for half in halves] == [2 * 16 * 48 * 32] * 2


def test_time_first_convolution():
    """conv_tbc counts as the same convolution of the usual layout, backward too."""
    x, weight, bias = torch.randn(9, 2, 4, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True), torch.zeros(6)
    forward = count(lambda: torch.conv_tbc(x, weight, bias))
    assert forward.flops_by_dtype == {"conv/float32": 2 * 7 * 2 * 6 * 3 * 4}
    trained = count(lambda: torch.conv_tbc(x, weight, bias).sum().backward())
    assert (trained.model_flops, trained.uncounted_ops) == (3 * forward.model_flops, ())


def test_second_derivative_of_a_convolution():
    """A gradient penalty through a convolution counts the convolutions that it runs."""
    layer, x = nn.Conv2d(3, 4, 3, bias=False), torch.randn(2, 3, 8, 8, requires_grad=True)
    one = 2 * 2 * 36 * 4 * 27

    def step():
        (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()

    found = count(step)
    assert found.uncounted_ops == ()
    assert found.model_flops % one == 0
    assert found.model_flops >= 4 * one


# --- FlexAttention on meta ---------------------------------------------------------------------------------------------------------


class Flex(nn.Module):
    """FlexAttention in its various ways of being called."""

    def __init__(self, how, key_heads=H):
        super().__init__()
        self.how, self.key_heads = how, key_heads
        self.q, self.kv = nn.Linear(64, 64, bias=False), nn.Linear(64, 2 * D * key_heads, bias=False)
        self.bias = nn.Linear(8, 1, bias=False)
        self.register_buffer("places", torch.randn(32, 8))
        self.mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, 32, 32, device="cpu")
        self.compiled = torch.compile(flex_attention)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, H, D).transpose(1, 2)
        k, v = (y.view(batch, length, self.key_heads, D).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        options = {"enable_gqa": self.key_heads != H}
        if self.how == "mask":
            options["block_mask"] = self.mask
        elif self.how == "mask made in forward":
            options["block_mask"] = create_block_mask(lambda _b, _h, i, j: i >= j, batch, None, length, length, device=x.device)
        elif self.how == "learned bias":
            bias = self.bias(self.places)
            options["score_mod"] = lambda score, _b, _h, i, _j: score + bias[i, 0]
        elif self.how == "statistics":
            return flex_attention(q, k, v, return_lse=True, **options)[1]
        return (self.compiled if self.how == "compiled" else flex_attention)(q, k, v, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("key_heads", [H, 2])
@pytest.mark.parametrize("how", ["plain", "mask", "mask made in forward", "learned bias", "statistics", "compiled"])
def test_flex_attention_on_meta(how, key_heads):
    """FlexAttention counts in full on meta, where it can't run, compiled or not; its hardware FLOPs are an estimate, as masks cut blocks."""
    found = count_flops(Flex(how, key_heads), torch.randn(2, 32, 64))
    product = 2 * 2 * H * 32 * 32 * D
    linear = 2 * 2 * 64 * (64 * 64 + 64 * 2 * D * key_heads) + 2 * 2 * 32 * 8 * (how == "learned bias")
    assert found.uncounted_ops == ()
    assert found.model_flops == 6 * product + linear
    assert found.hardware_flops == 7 * product + linear
    assert found.estimated


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_in_a_plain_loop():
    """A model with FlexAttention has its FLOPs in a loop that is only watched, without a warning."""
    warnings = []
    flops = StepFlops(Flex("mask"), warn=warnings.append)
    flops._before_forward(flops._model, (torch.randn(2, 32, 64),), {})
    assert flops.take().flops.model_flops == count_flops(Flex("mask"), torch.randn(2, 32, 64)).model_flops
    assert warnings == []
