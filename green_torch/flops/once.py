"""Counts one training step of a model on a copy of it, without computing where the copy can live on ``meta``."""

# mypy: disable-error-code="no-untyped-call"
# (torch's own functions carry no types)

from __future__ import annotations

import random
import sys
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatch
from torch.utils._pytree import tree_map_only

from green_torch.errors import ArgumentError, CountingError
from green_torch.flops.counter import Attention, CountingMode, Tally
from green_torch.flops.formulas import attention as attention_cost
from green_torch.flops.replica import (
    MAX_VALUES,
    converted,
    flat_parameters,
    model_name,
    replicate,
    sharded_dtype,
    tensors_in,
    to_clone,
    to_sketch,
    whole,
)
from green_torch.flops.stack import in_backward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from green_torch.records import FlopCount


class Locator(Protocol):
    """Tells where in a model an operation belongs."""

    def watch(self, replica: nn.Module) -> Callable[[], str]:
        """Begins anew on this copy; the function names the place of the operation that runs when it is called."""


def count_flops(model: nn.Module, *args: Any, attention: Attention = "full", **kwargs: Any) -> FlopCount:
    """FLOPs of one training step: ``model(*args, **kwargs)``, its outputs summed to a scalar (or its ``loss``), backward.

    Counted on a copy on ``meta``, which computes nothing; where the model asks for values (``.item()``, boolean masks), on a copy
    that does compute, in as much memory again. The model, its gradients, buffers, hooks and mode, and all random generators are
    left as they were; what has ``requires_grad=False`` gets no gradient; where nothing has one, the forward alone is counted.
    ``attention="causal"`` halves attention that is called with ``is_causal``. On ``meta`` a real model's attention is taken to run
    fused where torch's settings allow that (``estimated`` hardware FLOPs); a meta model's runs as torch runs it there: as math.
    FlexAttention counts in full, whatever its mask. Sequences that lie end to end count at the lengths that these inputs give.

    Raises:
        ArgumentError: ``model`` is not a module, or ``attention`` neither "full" nor "causal".
        CountingError: the model can't run on these inputs; the message names the cause.
    """
    return tally_of(model, args, kwargs, attention=attention).count()


def tally_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, attention: Attention, locator: Locator | None = None
) -> Tally:
    """The operations of the step that :func:`count_flops` counts; a ``locator`` names their places."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"count_flops() counts a torch.nn.Module, not {type(model).__name__}: count_flops(model, inputs).")
    device = device_of(model)
    autocast = autocast_dtype(device)
    try:
        return meta_tally(
            model, args, kwargs, attention=attention, device=device, autocast=autocast, fused=device != "meta", locator=locator
        )
    except ArgumentError:
        raise
    except Exception as error:
        if device == "meta":
            raise CountingError(_explain(model, error, "count_flops(model.to_empty(device='cpu'), ...)")) from error
        if flat_parameters(model):  # what values this rank has of them is a shard
            raise CountingError(
                _explain(model, error, "it before FSDP wraps it, or with LiveCounter(): ... around a step")
            ) from error
    try:
        replica = replicate(model, to_clone)
        inputs, named = converted((args, kwargs), to_clone)
        tally = Tally(attention)
        if locator is not None:
            tally.locate = locator.watch(replica)
        with _same_randomness(), torch.enable_grad(), CountingMode(tally, _Originals(model).run):
            _train(replica, inputs, named)
    except Exception as error:
        raise CountingError(_explain(model, error, "model(*args) first, to see it run")) from error
    return tally


def meta_tally(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    attention: Attention,
    device: str,
    autocast: torch.dtype | None,
    fused: bool,
    backward: bool = True,
    locator: Locator | None = None,
) -> Tally:
    """The operations of a step on a meta copy of the model.

    ``device`` is the kind on which it really runs, whose ``autocast`` dtype it runs under. Raises whatever the model raises on meta.
    """
    stand_in = _StandIn(device, _Originals(model), attention, sharded_dtype(model))
    tally = stand_in.tally
    fused = fused and _fused_allowed()
    with ExitStack() as stack:
        for context in (hidden(), _eagerly(), _same_randomness(), torch.set_grad_enabled(backward)):
            stack.enter_context(context)
        if torch.amp.is_autocast_available(device):
            stack.enter_context(torch.autocast(device, autocast, enabled=autocast is not None))
        replica = replicate(model, to_sketch)
        if locator is not None:
            tally.locate = locator.watch(replica)
        inputs, named = converted((args, kwargs), to_sketch)
        stack.enter_context(stand_in)
        stack.enter_context(CountingMode(tally, stand_in.run))
        if fused or tally.causal:
            stack.enter_context(_attention_on_meta(tally, fused=fused))
        _train(replica, inputs, named)
    return tally


def device_of(model: nn.Module) -> str:
    """The kind of device that holds the model: "cuda", "cpu", "meta"."""
    return next((tensor.device.type for tensor in (*model.parameters(), *model.buffers())), "cpu")


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on that kind of device; ``None`` where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _train(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    loss = _loss(model(*args, **kwargs))
    if loss is not None:
        loss.backward()


def _loss(output: Any) -> torch.Tensor | None:
    """The output's ``loss`` where it has a scalar one, else the sum of all that has a gradient."""
    named = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(named, torch.Tensor) and named.numel() == 1 and named.requires_grad:
        return named
    parts = [t if not t.is_complex() else torch.view_as_real(t) for t in tensors_in(output) if t.requires_grad]
    sums = [(part * 1).sum() for part in parts]  # the gradient of a bare sum has no strides, which some kernels refuse
    return sum(sums[1:], sums[0]) if sums else None


def _explain(model: nn.Module, error: Exception, remedy: str) -> str:
    return f"The FLOPs of {model_name(model)} can't be counted: {type(error).__name__}: {error}. Try {remedy}."


class _Originals:
    """The tensors of the model that is copied: a copy that works on them is none, and would leave traces."""

    def __init__(self, model: nn.Module) -> None:
        self._ids = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def refuse(self, tensors: list[torch.Tensor]) -> None:
        """Stops an operation on one of them, before it runs."""
        if any(id(tensor) in self._ids for tensor in tensors):
            raise RuntimeError("a function on it keeps to the original (a replaced forward?), so that no copy can run")

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Runs an operation that is not on one of them."""
        self.refuse(_tensors(args, kwargs))
        return args, kwargs, func(*args, **kwargs)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    flat = [*args, *kwargs.values()]
    return [t for item in flat for t in (item if type(item) in {list, tuple} else (item,)) if isinstance(t, torch.Tensor)]


class _StandIn(TorchFunctionMode):
    """Lets a model run on meta tensors and on what is real among them, and remembers what autocast would have made of them.

    Autocast doesn't cast meta tensors, and its state can't be read from inside an operation: it is read at each call of torch. Nor does
    FSDP cast the parameters of a copy: ``sharded`` is the dtype that the model's products run in by its mixed precision.
    FlexAttention refuses tensors on meta: it is told that they are on a GPU, and its kernel is not run. What is counted is in ``tally``.
    """

    def __init__(self, device: str, originals: _Originals, attention: Attention, sharded: torch.dtype | None) -> None:
        super().__init__()
        self.tally = Tally(attention, self.dtype)
        self._originals = originals
        self._device = device
        self._sharded = sharded
        self._autocast: torch.dtype | None = None
        self._autocast_seen: torch.dtype | None = None
        self._written: dict[int, torch.UntypedStorage] = {}

    def __torch_function__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _DEVICE_OF and sys._getframe(1).f_code.co_qualname in _ASK_FOR_FLEX:  # noqa: SLF001 - who asks
            return _GPU
        autocast = autocast_dtype(self._device)
        if not in_backward():
            self._autocast = autocast
            self._autocast_seen = autocast or self._autocast_seen
        if isinstance(func, torch._ops.HigherOrderOperator) and str(func) == "flex_attention":  # noqa: SLF001 - no public name
            return _flex_attention(self.tally, *args, **(kwargs or {}))
        if autocast is None or self._device != "cpu":
            return func(*args, **(kwargs or {}))
        torch.set_autocast_enabled("cpu", False)  # else it would cast what is real, which then fits nothing
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_autocast_enabled("cpu", True)

    def dtype(self, op: str, dtype: torch.dtype) -> torch.dtype:
        """What a product of this dtype runs in; a backward runs in what its forward ran in."""
        cast = None if op in _NOT_CAST else self._autocast_seen if in_backward() else self._autocast
        cast = cast or self._sharded
        return cast if cast is not None and dtype is torch.float32 else dtype

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Runs an operation on meta if one of its tensors is there, else on the CPU, where its values are.

        What the model makes on its own device goes to meta, but for whole numbers and truths: they stay real, so that what is asked
        of masks, ids and lengths has an answer. What a meta tensor was written into is one from then on: its values are wrong.
        The arguments are given back with the values that they have: lengths of sequences decide what attention costs.
        """
        tensors = _tensors(args, kwargs)
        self._originals.refuse(tensors)
        real = [tensor for tensor in tensors if not tensor.is_meta]
        on_meta = len(real) < len(tensors) or self._is_stale(real) or _elements_at_most(real) > MAX_VALUES
        given = args, kwargs
        if on_meta and real:
            stale = self._is_stale(real)
            self._note_writes(func, args, kwargs)
            args = self._with_places(func, args)
            args, kwargs = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
            given = (args, kwargs) if stale else given
        device = kwargs.get("device")
        elsewhere = device is not None and (on_meta or torch.device(device).type != "cpu")
        if elsewhere:
            kwargs = {**kwargs, "device": torch.device("meta")}
        shapes = _SHAPES.get(func) if on_meta else None
        out = func(*args, **kwargs) if shapes is None else shapes(*args, **kwargs)
        if elsewhere and not on_meta and whole(out.dtype) and out.numel() <= MAX_VALUES:
            out = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return *given, out

    def _is_stale(self, real: list[torch.Tensor]) -> bool:
        """Whether meta tensors were written into one of them."""
        return bool(self._written) and any(t.untyped_storage()._cdata in self._written for t in real)  # noqa: SLF001 - its identity

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        declared = func._schema.arguments  # noqa: SLF001 - the only place where an operation says what it writes to
        written = [value for a, value in zip(declared, args, strict=False) if a.is_write]
        written += [kwargs[a.name] for a in declared if a.is_write and a.name in kwargs]
        for tensor in _tensors(tuple(written), {}):
            storage = tensor.untyped_storage()
            self._written[storage._cdata] = storage  # noqa: SLF001 - kept, so that no other takes its number

    def _with_places(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with the places of the true ones for a mask that picks elements: their number is a shape."""
        if func._schema.name not in {"aten::index", "aten::index_put", "aten::index_put_"}:  # noqa: SLF001 - as above
            return args
        places: list[torch.Tensor | None] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype in {torch.bool, torch.uint8}
            known = is_mask and not index.is_meta and not self._is_stale([index])
            places += index.nonzero().unbind(1) if known else [index]
        return (args[0], places, *args[2:])


def _elements_at_most(tensors: list[torch.Tensor]) -> int:
    """Of what comes of them where they are broadcast."""
    return prod(max(sizes) for sizes in zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1))


def _grouped_mm(x: torch.Tensor, y: torch.Tensor, offs: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
    """What ``aten::_grouped_mm`` makes; its own version for meta refuses dtypes that its kernels take."""
    groups = [offs.shape[0]] if offs is not None and x.dim() == y.dim() == 2 else list(x.shape[:-2]) if y.dim() == 3 else []
    return x.new_empty((*groups, x.shape[-2], y.shape[-1]))


_DEVICE_OF = torch.Tensor.device.__get__
_ASK_FOR_FLEX = frozenset({"flex_attention", "_validate_device"})
_GPU = torch.device("cuda")

_NOT_CAST = frozenset({"aten::_grouped_mm"})
"""Products that autocast leaves alone."""

_SHAPES: Mapping[Any, Callable[..., torch.Tensor]] = (
    {torch.ops.aten._grouped_mm.default: _grouped_mm} if hasattr(torch.ops.aten, "_grouped_mm") else {}  # noqa: SLF001 - torch's name
)
"""Operations whose results on meta are ours."""


@contextmanager
def _attention_on_meta(tally: Tally, *, fused: bool) -> Iterator[None]:
    """Enters attention of meta tensors as one operation, as a device with fused kernels runs it; torch would break it up.

    Registers a kernel for the time being; tensors with values, of other threads say, don't reach it.
    """

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
        mask, is_causal = (
            rest[index] if len(rest) > index else named.get(name) for index, name in ((0, "attn_mask"), (2, "is_causal"))
        )
        tally.estimated = tally.estimated or fused
        how = _How("aten::scaled_dot_product_attention", tally, fused=fused, halved=tally.causal and bool(is_causal))
        return _Attention.apply(how, query, key, value, mask)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("scaled_dot_product_attention", kernel, "AutogradMeta")
        yield
    finally:
        library._destroy()  # noqa: SLF001 - else it would wait for the garbage collector


def _flex_attention(
    tally: Tally, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Any, *rest: Any, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What FlexAttention's kernel gives: the output, and of each row the logarithm of the sum and the maximum.

    Its mask has no say, so the hardware's FLOPs, of which blocks without any pair are left out, are an estimate.
    """
    tally.estimated = True
    captured = [cell.cell_contents for cell in getattr(score_mod, "__closure__", None) or ()]
    learned = [tensor for tensor in tensors_in([captured, rest]) if tensor.requires_grad]
    output = _Attention.apply(_How("flex_attention", tally, fused=True, halved=False), query, key, value, *learned)
    row = output.sum(-1, dtype=torch.float32)  # of no value, and of the same graph
    return output, row, row.detach()


@dataclass(frozen=True, slots=True)
class _How:
    """In what way attention runs: by which name, whether as one kernel and over half of the pairs, and where it is entered."""

    name: str
    tally: Tally
    fused: bool
    halved: bool


class _Attention(torch.autograd.Function):
    """Attention that has shapes and costs, and no values."""

    @staticmethod
    def forward(ctx: Any, how: _How, *tensors: torch.Tensor | None) -> torch.Tensor:
        """Enters the forward's cost. The tensors are query, key, value, and what else gets a gradient."""
        query, key, value = tensors[:3]
        assert query is not None
        assert key is not None
        assert value is not None
        batch = query.shape[:-2]
        if key.shape[-3] == query.shape[-3]:
            batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        ctx.shapes = ((*batch, *query.shape[-2:]), key.shape, value.shape)
        ctx.tensors = tensors
        ctx.how = how
        _Attention._enter(ctx, backward=False)
        return query.new_empty((*batch, query.shape[-2], value.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> tuple[Any, ...]:
        """Enters the backward's cost."""
        _Attention._enter(ctx, backward=True)
        if torch.is_grad_enabled():
            ctx.how.tally.uncounted.add(f"{ctx.how.name} (second derivative)")
        return None, *(torch.empty_like(t) if t is not None and t.requires_grad else None for t in ctx.tensors)

    @staticmethod
    def _enter(ctx: Any, *, backward: bool) -> None:
        how = ctx.how
        cost = attention_cost(*ctx.shapes, backward=backward, fused=how.fused, halved=how.halved)
        how.tally.add(f"{how.name}{'_backward' * backward}", "mm", ctx.tensors[0].dtype, cost)


def _fused_allowed() -> bool:
    switches = torch.backends.cuda
    return any((switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(), switches.cudnn_sdp_enabled()))


def hidden() -> AbstractContextManager[object]:
    """Hides our work from dispatch modes that are on; they are back afterwards, in order."""
    disable: Any = getattr(dispatch, "_disable_current_modes", nullcontext)
    return disable()  # type: ignore[no-any-return]  # private, hence untyped


def _eagerly() -> AbstractContextManager[object]:
    """Compiled parts of the model run as written: meta inputs must not cost anybody a recompilation."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]  # untyped in torch


@contextmanager
def _same_randomness() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
