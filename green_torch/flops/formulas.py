"""FLOPs of one operation from its shapes, 2 to a multiply-add; element-wise work counts as nothing.

The formulas are our own, written on the operations' mathematics, because those of ``torch.utils.flop_counter`` are wrong for
grouped convolutions' backward, take no account of what a fused attention computes twice, and lack many operations. What stands
in its registry and not here (a user's ``register_flop_formula``) is used from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of one operation: what it runs, what the mathematics asks for, and what of the former it computes a second time.

    ``of_values``: not the shapes alone tell, but values (lengths of sequences that lie end to end) too.
    """

    hardware: int
    model: int
    recompute: int = 0
    of_values: bool = False


Formula = Callable[[Arguments, bool], Cost]
"""Takes the operation's arguments by name, and whether causal attention counts half."""


def _plain(flops: int) -> Cost:
    return Cost(flops, flops)


def _product(x: Any, y: Any) -> int:
    """``(..., m, k) @ (..., k, n)``, or with a vector on the right, or a dot product: twice the left times the columns."""
    if x.layout is not torch.strided or y.layout is not torch.strided:
        raise NotImplementedError("sparse layout")
    columns = y.shape[-1] if y.dim() > 1 else 1
    return int(2 * x.numel() * columns) * _packed(x)


def _packed(x: Any) -> int:
    """How many values an element holds: 4-bit floats come in pairs."""
    return 2 if str(x.dtype).endswith("_x2") else 1


def _matmul(left: str, right: str) -> Formula:
    return lambda a, _causal: _plain(_product(a[left], a[right]))


def _foreach_mm(a: Arguments, _causal: bool) -> Cost:
    """Several products in one call."""
    return _plain(sum(_product(x, y) for x, y in zip(a["self"], a["mat2"], strict=True)))


def _mm_plus_mm(a: Arguments, _causal: bool) -> Cost:
    """The sum of two products, which a compiler made one call."""
    return _plain(_product(a["a"], a["b"]) + _product(a["c"], a["d"]))


def _all_gather_matmul(a: Arguments, _causal: bool) -> Cost:
    """One product for each right side; the left one is a shard until it is gathered, so the results tell its rows."""
    return _plain(sum(2 * out.numel() * a["A"].shape[-1] for out in a["<out>"][1]))


def _scaled_mm_v2(a: Arguments, _causal: bool) -> Cost:
    """The caller may say which dimension is summed over."""
    x = a["self"]
    inner = x.shape[a["contraction_dim"][0] if a.get("contraction_dim") else -1]
    return _plain(2 * a["<out>"].numel() * inner * _packed(x))


def _twice(formula: Formula) -> Formula:
    """A backward that makes both gradients of a product."""
    return lambda a, causal: _plain(2 * formula(a, causal).model)


def _linear(a: Arguments, _causal: bool) -> Cost:
    """``input @ weight.T`` where a backend doesn't break it up."""
    x, weight = _first(a, "input", "self", "X"), _first(a, "weight", "W", "mat2")
    if x is None or weight is None:
        raise NotImplementedError("unknown arguments")
    return _plain(2 * x.numel() * weight.shape[0])


def _linear_backward(a: Arguments, _causal: bool) -> Cost:
    """One product for each gradient that is asked for: of the input, and of the weight."""
    products = sum(a["output_mask"][:2]) if "output_mask" in a else 1
    return _plain(2 * a["grad_output"].numel() * a["weight"].shape[-1] * products)


def _grouped_mm(a: Arguments, _causal: bool) -> Cost:
    """Matrices of several experts in one call: a 2-D operand is cut along its long side, so each of its rows meets one expert."""
    x, y = a["self"], a["mat2"]
    groups = x.shape[0] if x.dim() == y.dim() == 3 else 1
    return _plain(2 * groups * x.shape[-2] * x.shape[-1] * y.shape[-1] * _packed(x))


def _trilinear(a: Arguments, _causal: bool) -> Cost:
    """``nn.Bilinear`` and its backward: one multiply-add for each element of the three operands' common shape."""
    shapes = []
    for index in "123":
        shape = list(a[f"i{index}"].shape)
        for dim in sorted(a[f"expand{index}"]):
            shape.insert(dim, 1)
        shapes.append(shape)
    return _plain(2 * prod(max(sizes) for sizes in zip(*shapes, strict=True)))


def _euclidean_dist(a: Arguments, _causal: bool) -> Cost:
    """``torch.cdist`` by matrix product."""
    return _plain(2 * a["x1"].numel() * a["x2"].shape[-2])


def _convolution_flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int], transposed: bool) -> int:
    """One multiply-add for each weight at each output position (transposed: input position), of each sample.

    The weight holds ``c_in / groups`` (transposed: ``c_out / groups``) channels a filter, which takes care of groups.
    """
    positions = x if transposed else y
    batch = x[0] if len(x) == len(weight) else 1
    return 2 * batch * prod(positions[2 - len(weight) :]) * prod(weight)


def _convolution(transposed: bool | None = None) -> Formula:
    def formula(a: Arguments, _causal: bool) -> Cost:
        x, weight = _first(a, "input", "self", "X"), _first(a, "weight", "W")
        if x is None or weight is None:
            raise NotImplementedError("unknown arguments")
        flipped = a.get("transposed", False) if transposed is None else transposed
        return _plain(_convolution_flops(x.shape, weight.shape, a["<out>"].shape, flipped))

    return formula


def _convolution_backward(a: Arguments, _causal: bool) -> Cost:
    """The gradients of input and weight each take as many multiply-adds as the forward."""
    forward = _convolution_flops(a["input"].shape, a["weight"].shape, a["grad_output"].shape, a["transposed"])
    return _plain(forward * sum(a["output_mask"][:2]))


def _conv_tbc(a: Arguments, _causal: bool) -> Cost:
    """A convolution over ``(time, batch, channels)`` with a weight of ``(width, channels in, channels out)``."""
    width, channels, _ = a["weight"].shape
    return _plain(2 * a["<out>"].numel() * width * channels)


def attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *, backward: bool, fused: bool, halved: bool
) -> Cost:
    """Attention over ``(..., heads, length, width)``; fewer key heads than query heads are shared (GQA).

    Forward: scores and their product with the values. Backward: two products for each of them; a fused kernel computes the scores
    once more first, which the hardware runs and the mathematics doesn't ask for. ``halved`` counts the lower triangle alone:
    for the model's FLOPs always, for the hardware's where the kernel skips the rest.
    """
    pairs = 2 * prod(query[:-1]) * key[-2]
    scores, product = pairs * query[-1], pairs * value[-1]
    model = scores + product
    recompute = 0
    if backward:
        model *= 2
        recompute = scores if fused else 0
    hardware = model + recompute
    if halved:
        model //= 2
        if fused:
            hardware, recompute = hardware // 2, recompute // 2
    return Cost(hardware, model, recompute)


def _qkv(a: Arguments) -> tuple[Any, Any, Any]:
    return _first(a, "query", "q"), _first(a, "key", "k"), _first(a, "value", "v")


def _attention(*, backward: bool) -> Formula:
    def formula(a: Arguments, causal: bool) -> Cost:
        query, key, value = (t.shape for t in _qkv(a))
        return attention(query, key, value, backward=backward, fused=True, halved=causal and bool(a.get("is_causal")))

    return formula


def _packed_attention(*, backward: bool) -> Formula:
    """The kernels below varlen attention and nested tensors, laid out ``(..., length, heads, width)``.

    Where they are told where sequences start, these of several lengths lie end to end, and each counts at its own; a key's may be
    cut short further.
    """

    def formula(a: Arguments, causal: bool) -> Cost:
        query, key, value = _qkv(a)
        halved = causal and bool(_first(a, "is_causal", "causal", "custom_mask_type"))
        starts_q = _first(a, "cum_seq_q", "cu_seqlens_q", "cu_seq_q")
        starts_k = _first(a, "cum_seq_k", "cu_seqlens_k", "cu_seq_k")
        used_k = _first(a, "seqused_k", "seqlen_k")
        if starts_q is None:
            batch = prod(query.shape[:-3])
            lengths_q, lengths_k = [query.shape[-3]], [key.shape[-3]]
        else:
            batch = 1
            lengths_q = _lengths(starts_q)
            lengths_k = lengths_q if starts_k is None else _lengths(starts_k)
        if used_k is not None:
            lengths_k = _values(used_k)
            if starts_q is None:
                batch, lengths_q = batch // len(lengths_k), lengths_q * len(lengths_k)
        hardware = model = recompute = 0
        for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
            one = attention(
                (batch, query.shape[-2], length_q, query.shape[-1]),
                (batch, key.shape[-2], length_k, key.shape[-1]),
                (batch, value.shape[-2], length_k, value.shape[-1]),
                backward=backward,
                fused=True,
                halved=halved,
            )
            hardware, model, recompute = hardware + one.hardware, model + one.model, recompute + one.recompute
        return Cost(hardware, model, recompute, of_values=not (starts_q is None and used_k is None))

    return formula


def _cudnn_attention(*, backward: bool) -> Formula:
    """The kernel of cuDNN: ``(batch, heads, length, width)``, and as the others where it is told where sequences start."""
    dense, packed = _attention(backward=backward), _packed_attention(backward=backward)

    def formula(a: Arguments, causal: bool) -> Cost:
        return (dense if a["query"].dim() == 4 else packed)(a, causal)

    return formula


def _lengths(starts: Any) -> list[int]:
    """Of sequences that lie end to end."""
    places = _values(starts)
    return [end - start for start, end in pairwise(places)]


def _values(numbers: Any) -> list[int]:
    """What a tensor holds. A meta tensor, or a fake one, holds nothing."""
    if numbers.device.type == "meta" or isinstance(numbers, FakeTensor):
        raise NotImplementedError("lengths unknown")
    return [int(number) for number in numbers.tolist()]


def _first(a: Arguments, *names: str) -> Any:
    return next((a[name] for name in names if a.get(name) is not None), None)


def _sequences(x: Any) -> list[int]:
    """Lengths of the sequences in a ``(batch, length, width)`` tensor, nested ones included."""
    if x.is_nested:
        return [int(length) for length in x._nested_tensor_size()[:, 0].tolist()]  # noqa: SLF001 - the only way to its shape
    return [x.shape[-2]] * prod(x.shape[:-2])


def _self_attention(x: Any, width: int, projections: int) -> int:
    """Projections over all tokens, and each sequence's attention over itself."""
    lengths = _sequences(x)
    return 2 * sum(lengths) * projections + sum(4 * length * length * width for length in lengths)


def _native_mha(a: Arguments, _causal: bool) -> Cost:
    """The inference path of ``nn.MultiheadAttention``."""
    if a["query"] is not a["key"] and _sequences(a["query"]) != _sequences(a["key"]):
        raise NotImplementedError("cross attention")
    return _plain(_self_attention(a["query"], a["embed_dim"], a["qkv_weight"].numel() + a["proj_weight"].numel()))


def _encoder_layer(a: Arguments, _causal: bool) -> Cost:
    """The inference path of ``nn.TransformerEncoderLayer``."""
    weights = sum(a[name].numel() for name in ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2"))
    return _plain(_self_attention(a["src"], a["embed_dim"], weights))


def _rnn_layers(a: Arguments) -> list[tuple[bool, list[Any]]]:
    """The matrices of each layer and direction of a fused RNN, with whether they read the network's input."""
    if "weight0" in a or "weight1" in a:  # mkldnn: one layer, one direction
        names = ("weight0", "weight1") if "weight0" in a else ("weight1", "weight2")
        return [(True, [a[name] for name in names])]
    flat, stride = list(a["weight"]), a["weight_stride0"]
    directions = 2 if a["bidirectional"] else 1
    groups = [flat[start : start + stride] for start in range(0, len(flat), stride)]
    return [(index < directions, [w for w in group if w.dim() == 2]) for index, group in enumerate(groups)]


def _rnn_sizes(a: Arguments) -> tuple[int, int]:
    """Tokens and batch of a fused RNN's input; a packed one is ``(tokens, width)``."""
    x = a["input"]
    if a.get("batch_sizes"):
        return x.shape[0], a["batch_sizes"][0]
    return x.shape[0] * x.shape[1], x.shape[0 if a.get("batch_first") and "weight" in a else 1]


def _rnn(a: Arguments, _causal: bool) -> Cost:
    """Every matrix meets every token."""
    tokens, _ = _rnn_sizes(a)
    return _plain(2 * tokens * sum(w.numel() for _, matrices in _rnn_layers(a) for w in matrices))


def _rnn_backward(a: Arguments, _causal: bool) -> Cost:
    """The gradients of weights and of what they met; not of the network's input or first state where nobody asks for them."""
    tokens, batch = _rnn_sizes(a)
    mask = a.get("output_mask")
    state = a.get("hx", a.get("hx_"))
    wants_input = a["input"].requires_grad if mask is None else mask[0]
    wants_state = state is not None and state.requires_grad if mask is None else mask[1]
    wants_weights = mask is None or mask[3]
    hardware = model = 0
    for reads_input, matrices in _rnn_layers(a):
        for index, weight in enumerate(matrices):
            full = 2 * tokens * weight.numel()
            asked = full
            if index == 0 and reads_input and not wants_input:
                asked = 0
            elif index == 1 and not wants_state:
                asked -= 2 * batch * weight.numel()
            ran = full if mask is None else asked
            model += asked + full * wants_weights
            hardware += ran + full * wants_weights
    return Cost(hardware, model)


def _named(kind: str, formula: Formula, *names: str) -> dict[str, tuple[str, Formula]]:
    return {name if "::" in name else f"aten::{name}": (kind, formula) for name in names}


FORMULAS: Mapping[str, tuple[str, Formula]] = {
    **_named("mm", _matmul("self", "mat2"), "mm", "bmm", "_int_mm", "_scaled_mm"),
    **_named("mm", _scaled_mm_v2, "_scaled_mm_v2"),
    **_named("mm", _foreach_mm, "_foreach_mm"),
    **_named("mm", _matmul("mat1", "mat2"), "addmm", "_addmm_activation"),
    **_named("mm", _matmul("batch1", "batch2"), "baddbmm", "addbmm"),
    **_named("mm", _matmul("self", "vec"), "mv"),
    **_named("mm", _matmul("mat", "vec"), "addmv"),
    **_named("mm", _matmul("self", "tensor"), "dot"),
    **_named("mm", _matmul("self", "other"), "vdot"),
    **_named("mm", _linear, "linear", "mkldnn_linear", "mkldnn::_linear_pointwise", "_weight_int8pack_mm"),
    **_named("mm", _linear_backward, "linear_backward", "mkldnn_linear_backward"),
    **_named("mm", _linear_backward, "mkldnn_linear_backward_input", "mkldnn_linear_backward_weights"),
    **_named("mm", _mm_plus_mm, "inductor::_mm_plus_mm"),
    **_named("mm", _matmul("a", "b"), "symm_mem::_async_input_mm"),
    **_named("mm", _all_gather_matmul, "symm_mem::fused_all_gather_matmul", "symm_mem::fused_all_gather_scaled_matmul"),
    **_named("mm", _matmul("A", "B"), "symm_mem::fused_matmul_reduce_scatter", "symm_mem::fused_scaled_matmul_reduce_scatter"),
    **_named("mm", _grouped_mm, "_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"),
    **_named("mm", _matmul("input", "weight"), "transformers::grouped_mm_fallback"),
    **_named("mm", _twice(_matmul("input", "weight")), "transformers::grouped_mm_fallback_backward"),
    **_named("mm", _trilinear, "_trilinear"),
    **_named("mm", _euclidean_dist, "_euclidean_dist"),
    **_named(
        "conv",
        _convolution(),
        *("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "cudnn_convolution_relu"),
        *("cudnn_convolution_add_relu", "miopen_convolution", "miopen_depthwise_convolution", "mkldnn_convolution"),
        *("thnn_conv2d", "_slow_conv2d_forward", "slow_conv3d", "slow_conv3d_forward", "_conv_depthwise2d", "conv_depthwise3d"),
        *("slow_conv_dilated2d", "slow_conv_dilated3d", "mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_"),
        *("miopen_convolution_relu", "miopen_convolution_add_relu", "_nnpack_spatial_convolution", "_mps_convolution"),
    ),
    **_named(
        "conv",
        _convolution(transposed=True),
        *("cudnn_convolution_transpose", "slow_conv_transpose2d", "slow_conv_transpose3d", "miopen_convolution_transpose"),
        *("_mps_convolution_transpose", "mkldnn::_convolution_transpose_pointwise"),
    ),
    **_named("conv", _conv_tbc, "conv_tbc"),
    **_named("conv", _convolution_backward, "convolution_backward", "convolution_backward_overrideable"),
    **_named(
        "mm",
        _attention(backward=False),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        *("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math_for_mps"),
        "_triton_scaled_dot_attention",
    ),
    **_named(
        "mm",
        _attention(backward=True),
        *("_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        *("_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward"),
        "_scaled_dot_product_fused_attention_overrideable_backward",
    ),
    **_named(
        "mm",
        _packed_attention(backward=False),
        *("_flash_attention_forward", "_flash_attention_forward_no_dropout_inplace", "_efficient_attention_forward"),
        *("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_out"),
        *("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
    ),
    **_named(
        "mm",
        _packed_attention(backward=True),
        *("_flash_attention_backward", "_efficient_attention_backward", "torch_attn::_varlen_attn_backward"),
        *("flash_attn::_flash_attn_backward", "flash_attn::_flash_attn_varlen_backward"),
    ),
    **_named("mm", _cudnn_attention(backward=False), "_cudnn_attention_forward"),
    **_named("mm", _cudnn_attention(backward=True), "_cudnn_attention_backward"),
    **_named("mm", _native_mha, "_native_multi_head_attention", "_triton_multi_head_attention"),
    **_named("mm", _encoder_layer, "_transformer_encoder_layer_fwd"),
    **_named("mm", _rnn, "_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer"),
    **_named("mm", _rnn_backward, "_cudnn_rnn_backward", "miopen_rnn_backward", "mkldnn_rnn_layer_backward"),
}
"""The kind (``mm`` or ``conv``) and formula of each operation, by its schema's name."""

_COMPUTES = re.compile(
    r"(^|_)(\w*(mm|mv)|matmul|v?dot|linear)($|_)|conv(olution|\d|_)|attention|rnn|lstm|gru|linalg_(?!vector_norm|cross|diagonal|_powsum"
    r"|check)|[cp]dist|_fft_|(?<!re)solve|cholesky|svd|(^|_)qr|ormqr|orgqr|geqrf|householder|^inverse|matrix_exp|linear_combination"
)
_DOES_NOT = re.compile(r"rnn_flatten|_(fused|differentiable)_(lstm|gru)_cell|prepack$|quantize_weight|reorder")
_PLUMBING = re.compile(
    r"prims?(_impl)?|debugprims|rngprims|inductor(_prims)?|flex_lib|quantized_decomposed|debug_mode_ops|profiler|streams|record_function"
    r"|c10d|_?c10d_functional(_autograd)?|_dtensor|fsdp|symm_mem"
)


def formula_of(name: str) -> tuple[str, Formula] | None:
    """The kind and formula of an operation, in-place ones by their plain name; ``None`` where there is none."""
    return FORMULAS.get(name) or FORMULAS.get(name.removesuffix("_"))


def computes(name: str) -> bool:
    """Whether an operation without a formula does more than element-wise work, by its name; foreign operations may do anything."""
    namespace, _, op = name.partition("::")
    if namespace != "aten" and _PLUMBING.fullmatch(namespace) is None:
        return True
    return _COMPUTES.search(op) is not None and _DOES_NOT.search(op) is None
