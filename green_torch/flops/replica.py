"""A copy of a model, or of its inputs, whose tensors are converted on the way: to ``meta`` (no memory), to clones, to sketches.

Nobody's hooks come along, but those that a forward needs: with which ``torch.nn.utils`` computes weights, and with which
transformers gathers what a model's layers put out. A compiled model's copy runs eagerly, and one that FSDP shares out among ranks is
whole in the copy, on ``meta`` where FSDP1 laid its parameters flat: their values are elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

Convert = Callable[[torch.Tensor], torch.Tensor]

_FSDP1 = "FullyShardedDataParallel"
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    _FSDP1: "_fsdp_wrapped_module",  # its "module" leaves out a checkpoint's wrapper, and with it the replays
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
}
_MIXED_IN = frozenset({"FSDPModule", "ReplicateModule", "DDP"})
"""What torch's functions that wrap in place put before the user's class, in a class that they make of both: ``FSDPGPT`` of ``GPT``."""
MAX_VALUES = 1 << 22
"""How many elements a tensor on meta may have whose values are kept on the CPU."""
_NEEDED_HOOKS = ("torch.nn.utils.", "transformers.utils.output_capturing")
_FOREIGN = frozenset({"_trainer", "_fabric"})  # a LightningModule's way out of the model


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, strides and dtype, with no memory behind it. A sharded parameter gets its full shape."""
    try:
        blank = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    except RuntimeError:
        blank = torch.empty(tensor.size(), dtype=tensor.dtype, device="meta")
    return _alike(blank, tensor)


def to_sketch(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers and truths as they are, in memory of the CPU: masks, ids, lengths; all else, and what is large, on meta."""
    kept = whole(tensor.dtype) and tensor.numel() <= MAX_VALUES and not (tensor.is_meta or isinstance(tensor, nn.Parameter))
    if not kept or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):  # waiting would end the capture
        return to_meta(tensor)
    try:
        return tensor.detach().to("cpu", copy=True)
    except Exception:  # a shard, fake, nested; or a device that must not be waited for by the user's wish
        return to_meta(tensor)


def whole(dtype: torch.dtype) -> bool:
    """Whether it holds whole numbers or truths."""
    return not (dtype.is_floating_point or dtype.is_complex)


def to_clone(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory of their own."""
    return _alike(tensor.detach().clone(), tensor)


def _alike(tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    if isinstance(original, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=original.requires_grad)
    return tensor.requires_grad_(original.requires_grad)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP's, FSDP's, Fabric's and ``torch.compile``'s wrappers."""
    while (attribute := _WRAPPERS.get(own_class(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model


def model_name(model: nn.Module) -> str:
    """What its author calls it, whatever wraps it."""
    inner = unwrap(model)
    checkpointed = getattr(inner, "_checkpoint_wrapped_module", None)
    return own_class(inner).__name__ if checkpointed is None else model_name(checkpointed)


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class that its author gave it: ``fully_shard()`` and ``replicate()`` change it in place."""
    kind = type(model)
    while kind.__bases__[0].__name__ in _MIXED_IN and kind.__bases__[0].__module__.startswith("torch.distributed."):
        kind = kind.__bases__[1]
    return kind


def flat_parameters(model: nn.Module) -> list[Any]:
    """FSDP1's: each holds a shard of many parameters laid end to end, and knows their names and shapes; empty for any other model.

    With ``use_orig_params=True`` they stand in no module: only the wrapper, where it is ``model`` or inside it, leads to them.
    """
    flat: dict[int, Any] = {}
    for module in model.modules():
        handle = getattr(module, "_handle", None) if type(module).__name__ == _FSDP1 else None
        for one in (getattr(handle, "flat_param", None), module._parameters.get("_flat_param")):  # noqa: SLF001 - no public way
            if one is not None:
                flat[id(one)] = one
    return list(flat.values())


def parameter_count(model: nn.Module) -> int | None:
    """How many values its parameters hold, on all the ranks that share them; ``None`` while some have no shape, or tell none.

    The latter is a model inside FSDP1's wrapper with ``use_orig_params=True``, seen without the wrapper.
    """
    flat = flat_parameters(model)
    known = {id(one) for whole in flat for one in (whole, *(whole._params or ()), *(whole._shared_params or ()))}  # noqa: SLF001 - as above
    others = [one for one in model.parameters() if id(one) not in known]
    if any(is_lazy(one) or getattr(one, "_fsdp_flattened", False) for one in others):
        return None
    return sum(sum(one._numels) for one in flat) + sum(one.numel() for one in others)  # noqa: SLF001 - as above


def sharded_dtype(model: nn.Module) -> torch.dtype | None:
    """What FSDP casts parameters to for the computation; ``None`` where it doesn't, or to several dtypes."""
    found: set[torch.dtype | None] = set()
    for module in model.modules():
        policy: Any = None
        if type(module).__name__ == _FSDP1:
            policy = module.mixed_precision
        elif own_class(module) is not type(module):
            policy = getattr(getattr(module, "_get_fsdp_state", lambda: None)(), "_mp_policy", None)
        found.add(getattr(policy, "param_dtype", None))
    found.discard(None)  # what FSDP leaves as it is: BatchNorm say
    return found.pop() if len(found) == 1 else None


def where_to_watch(model: nn.Module) -> nn.Module:
    """The module whose forward runs under the settings that count: Fabric's wrapper enters its precision only inside."""
    while type(model).__name__ == "_FabricModule":
        model = getattr(model, _WRAPPERS["_FabricModule"])
    return model


def replicate(model: nn.Module, convert: Convert) -> nn.Module:
    """A copy of the model with every tensor converted; tied weights stay tied, frozen ones frozen."""
    flat = flat_parameters(model)
    model = unwrap(model)
    modules = list(model.modules())
    memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
    memo |= {id(module): memo[id(unwrap(module))] for module in modules if type(module).__name__ == _FSDP1}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):  # noqa: SLF001 - lazily parametrized ones too
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = convert(tensor)
    for module in modules:
        if type(module).__name__ != _FSDP1:
            memo[id(module)].__dict__.update(
                {name: _attribute(name, value, convert, memo) for name, value in module.__dict__.items()}
            )
    for one in flat:
        _unfold(one, convert, memo)
    replica: nn.Module = memo[id(model)]
    return replica


def _unfold(flat: Any, convert: Convert, memo: dict[int, Any]) -> None:
    """Gives the copies of modules the parameters that FSDP1 laid flat, whole; where one of them is trained, all get gradients, as there."""
    for (name, module, _), shape in zip(flat._param_infos, flat._shapes, strict=True):  # noqa: SLF001 - no public way
        blank = torch.empty(shape, dtype=flat.dtype, device="meta")
        setattr(memo[id(module)], name, convert(nn.Parameter(blank, requires_grad=flat.requires_grad)))
    for name, module, _, first_name, first_module, _ in flat._shared_param_infos:  # noqa: SLF001 - as above
        setattr(memo[id(module)], name, getattr(memo[id(first_module)], first_name))


def _attribute(name: str, value: Any, convert: Convert, memo: dict[int, Any]) -> Any:
    if name in _FOREIGN or name == "_compiled_call_impl":
        return None
    if "_hooks" in name and isinstance(value, dict):
        own = {key: hook for key, hook in value.items() if str(getattr(hook, "__module__", "")).startswith(_NEEDED_HOOKS)}
        return type(value)((key, converted(hook, convert, memo)) for key, hook in own.items())
    return converted(value, convert, memo)


def converted(value: Any, convert: Convert, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy with every tensor converted; what refuses to be copied is shared."""
    memo = {} if memo is None else memo
    try:
        with _Converting(convert):
            return copy.deepcopy(value, memo)
    except Exception:
        if type(value) in {list, tuple}:
            return type(value)(converted(item, convert, memo) for item in value)
        if type(value) is dict:
            return {key: converted(item, convert, memo) for key, item in value.items()}
        return value


class _Converting(TorchFunctionMode):
    """Converts the tensors that ``copy.deepcopy`` comes across."""

    def __init__(self, convert: Convert) -> None:
        super().__init__()
        self._convert = convert

    def __torch_function__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._convert(tensor)
            return memo[id(tensor)]
        if func is torch.Tensor.clone:  # how a parameter copies itself
            return self._convert(args[0])
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any, depth: int = 6) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers and in the attributes of plain objects."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or isinstance(value, nn.Module | type):
        return
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple | set):
        items = list(value)
    else:
        items = list(getattr(value, "__dict__", {}).values())
    for item in items:
        yield from tensors_in(item, depth - 1)
