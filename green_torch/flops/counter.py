"""Counts the FLOPs of whatever runs inside a ``with`` block, operation by operation, while it runs."""

# mypy: disable-error-code="no-untyped-call"
# (torch's own classes carry no types)

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from green_torch.errors import ArgumentError
from green_torch.flops.formulas import Cost, Formula, attention, computes, formula_of
from green_torch.flops.stack import Role, reason
from green_torch.records import FlopCount

if TYPE_CHECKING:
    from types import TracebackType

Attention = Literal["full", "causal"]

COUNTS_COMPILED = hasattr(TorchDispatchMode, "ignore_compile_internals")
"""Whether compiled functions may run while counting; on an older torch they would fall back to eager for good."""


class Entry(NamedTuple):
    """One operation that ran: where (see :class:`Tally`), which, in what dtype, what for, and its cost."""

    place: str
    op: str
    kind: str
    dtype: str
    role: Role
    cost: Cost

    @property
    def model_flops(self) -> int:
        """What of it the mathematics asks for."""
        return self.cost.model if self.role is Role.WORK else 0

    @property
    def recompute_flops(self) -> int:
        """What of it had run before."""
        if self.role is Role.WORK:
            return self.cost.recompute
        return self.cost.hardware if self.role is Role.REPLAY else 0


class Tally:
    """What was seen so far. Entries are appended, which the threads of a backward may do at the same time.

    ``locate`` names the place where the running operation belongs; it is asked at each of them, once it is set. ``of_values`` tells
    whether the same operations on the same shapes may cost something else another time.
    """

    def __init__(self, attention_flops: Attention, dtype_of: Callable[[str, torch.dtype], torch.dtype] | None = None) -> None:
        if attention_flops not in {"full", "causal"}:
            raise ArgumentError(f'attention={attention_flops!r} is not known; say attention="full" or attention="causal".')
        self.causal = attention_flops == "causal"
        self.uncounted: set[str] = set()
        self.estimated = False
        self.of_values = False
        self.locate: Callable[[], str] | None = None
        self.entries: list[Entry] = []
        self._dtype_of = dtype_of
        self._known: dict[Any, tuple[str, Formula] | None] = {}

    def add(self, op: str, kind: str, dtype: torch.dtype, cost: Cost, place: str | None = None) -> None:
        """Enters the cost of an operation, for the reason for which it runs now."""
        why = reason()
        if why.compiled:  # a compiled graph may recompute, and its own kernels go unseen
            self.estimated = True
        if place is None:
            place = self.locate() if self.locate else ""
        ran_in = str(self._dtype_of(op, dtype) if self._dtype_of else dtype).removeprefix("torch.")
        self.entries.append(Entry(place, op, kind, ran_in, why.role, cost))

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
        """Enters one operation that has just run. Never raises: what can't be counted is named among the uncounted."""
        place = self.locate() if self.locate else ""
        try:
            known = self._known[func]
        except KeyError:
            known = self._known[func] = _look_up(func)
            if known is None and computes(_name(func)):
                self.uncounted.add(_name(func))
        if known is None:
            return
        try:
            kind, formula = known
            arguments = _by_name(func, args, kwargs, out)
            cost = formula(arguments, self.causal)
            self.of_values = self.of_values or cost.of_values
            self.add(_name(func), kind, _first_dtype(arguments), cost, place)
        except Exception as error:
            self.uncounted.add(f"{_name(func)} ({error})" if isinstance(error, NotImplementedError) else _name(func))

    def count(self) -> FlopCount:
        """The sum of the entries."""
        model = hardware = recompute = 0
        by_dtype: dict[str, int] = {}
        for entry in list(self.entries):
            model += entry.model_flops
            hardware += entry.cost.hardware
            recompute += entry.recompute_flops
            if entry.cost.hardware:
                key = f"{entry.kind}/{entry.dtype}"
                by_dtype[key] = by_dtype.get(key, 0) + entry.cost.hardware
        return FlopCount(
            float(model),
            float(hardware),
            float(recompute),
            {key: float(value) for key, value in by_dtype.items()},
            tuple(sorted(self.uncounted)),
            self.estimated,
        )


class LiveCounter:
    """Counts what runs inside: ``with LiveCounter() as counter: step()``, then ``counter.count()``.

    Model FLOPs leave out checkpoints' replays, what fused attention computes twice, and the optimizer's products; hardware FLOPs
    hold them all; ``recompute_flops`` are the first two. ``attention="causal"`` halves attention where the call says ``is_causal``
    (hand-written masks can't be told; they count in full). Compiled functions stay compiled: what they call as operations is counted
    and marked ``estimated``, kernels that the compiler wrote itself go unseen: compiled FlexAttention is named as uncounted wherever this
    process has compiled it, since whether it ran inside can't be told. On a torch without
    ``TorchDispatchMode.ignore_compile_internals`` compiled functions run eagerly inside (they would do so for good otherwise).
    Nothing raised here reaches the code inside.

    Raises:
        ArgumentError: ``attention`` is neither "full" nor "causal".
    """

    def __init__(self, attention: Attention = "full") -> None:
        self._tally = Tally(attention)
        self._mode: CountingMode | None = None
        self._stance: Any = None

    def __enter__(self) -> Self:
        sweep()
        if not COUNTS_COMPILED:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        self._mode = CountingMode(self._tally)
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        mode, self._mode = self._mode, None
        stance, self._stance = self._stance, None
        if mode is not None:
            mode.retire()
        if stance is not None:
            stance.__exit__(None, None, None)

    @property
    def of_values(self) -> bool:
        """Whether the same operations on the same shapes may cost something else another time: sequences that lie end to end."""
        return self._tally.of_values

    def count(self) -> FlopCount:
        """FLOPs of everything that ran inside so far."""
        if _flex_was_compiled():
            self._tally.uncounted.add("higher_order::flex_attention (compiled)")
        return self._tally.count()


@lru_cache(maxsize=256)
def _holds_flex(path: str) -> bool:
    try:
        return "flex_attention" in Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _flex_was_compiled() -> bool:
    """Whether the compiler wrote code for FlexAttention in this process."""
    cache = getattr(sys.modules.get("torch._inductor.codecache"), "PyCodeCache", None)
    return any(_holds_flex(getattr(module, "__file__", None) or "") for module in list(getattr(cache, "modules", ())))


_retired: list[CountingMode] = []


Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any], Any]]
"""Runs an operation in a way of its own, and tells the arguments that it ran on and its result."""


class CountingMode(TorchDispatchMode):
    """Shows every operation to a tally. ``run`` may run it in a way of its own."""

    supports_higher_order_operators = True

    def __init__(self, tally: Tally, run: Run | None = None) -> None:
        super().__init__()
        self._tally = tally
        self._run = run
        self._active = True
        self._below: object = None
        self._fake = _fake_mode()
        if not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
            _introduce()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets compiled functions stay compiled while this is on."""
        return True

    def __enter__(self) -> Self:
        stack = _stack()
        if not (stack and stack[-1] is self):
            self._below = stack[-1] if stack else None
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, then enters it."""
        kwargs = kwargs or {}
        if not self._active:
            return func(*args, **kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):  # noqa: SLF001 - no public name for it
            return self.higher_order(func, args, kwargs)
        if _fake_mode() is not self._fake:  # shapes alone, of a sharding or a trace: nothing runs
            return func(*args, **kwargs)
        if self._fake is None and any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):  # type: ignore[attr-defined]  # tensors
            return NotImplemented  # DTensor, nested and quantized tensors break up first: their parts are what runs here
        if torch.is_inference_mode_enabled() and formula_of(_name(func)) is None:  # composites arrive whole: break them up
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if self._run is None:
            out = func(*args, **kwargs)
        else:
            args, kwargs, out = self._run(func, args, kwargs)
        self._tally.see(func, args, kwargs, out)
        return out

    def higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """FlexAttention counts in full, whatever its mask; other operators on functions are named as uncounted."""
        name = str(func)
        out = func(*args, **kwargs)
        if name not in {"flex_attention", "flex_attention_backward"}:
            self._tally.uncounted.add(f"higher_order::{name}")
            return out
        try:
            shapes = [tensor.shape for tensor in args[:3]]
            cost = attention(*shapes, backward=name == "flex_attention_backward", fused=True, halved=False)
            self._tally.add(name, "mm", args[0].dtype, cost)
        except Exception:
            self._tally.uncounted.add(f"higher_order::{name}")
        return out

    def retire(self) -> None:
        """Leaves the stack of modes, and leaves everybody else on it as they are.

        Where a mode entered later is still on, this one stays below it without effect until the next sweep. Where a mode entered
        earlier was left in between, leaving it took this one off and left that one on: it goes now.
        """
        self._active = False
        stack = _stack()
        if stack is None or (stack and stack[-1] is self):
            self.__exit__(None, None, None)
        elif any(mode is self for mode in stack):
            _retired.append(self)
        elif stack and stack[-1] is self._below:
            dispatch._pop_mode()  # noqa: SLF001 - what its owner believes to have done


def sweep() -> None:
    """Takes retired modes off the top of the stack."""
    while _retired:
        stack = _stack()
        if not stack or stack[-1] is not _retired[-1]:
            _retired[:] = [mode for mode in _retired if any(mode is other for other in stack or ())]
            return
        _retired.pop().__exit__(None, None, None)


def _introduce() -> None:
    """Tells an older torch's operators on functions how to run under a counter; they would raise at a mode they don't know."""
    for operator in getattr(torch._ops, "_higher_order_ops", {}).values():  # noqa: SLF001 - no public list; guarded
        if CountingMode not in operator.python_key_table:
            operator.py_impl(CountingMode)(lambda mode, *args, _op=operator, **kwargs: mode.higher_order(_op, args, kwargs))


def _stack() -> list[Any] | None:
    """The dispatch modes that are on, outermost first; ``None`` where this torch doesn't tell."""
    try:
        return list(dispatch._get_current_dispatch_mode_stack())  # noqa: SLF001 - no public way; guarded
    except AttributeError:
        return None


def _fake_mode() -> object:
    """Torch's own mode that runs shapes without values, where it is on."""
    try:
        return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)  # noqa: SLF001 - no public way; guarded
    except AttributeError:
        return None


def _name(func: Any) -> str:
    return str(func._schema.name)  # noqa: SLF001 - the only place where an operation keeps its name and arguments


def _look_up(func: Any) -> tuple[str, Formula] | None:
    """Our formula, else the one of torch's registry, where users register theirs."""
    own = formula_of(_name(func))
    if own is not None:
        return own
    from torch.utils.flop_counter import flop_registry  # here, since it complains on GPU machines without triton

    theirs = flop_registry.get(func.overloadpacket)
    if theirs is None:
        return None

    def formula(a: Mapping[str, Any], _causal: bool) -> Cost:
        flops = int(theirs(*a["<args>"], **a["<kwargs>"], out_val=a["<out>"]))
        return Cost(flops, flops)

    return "conv" if "conv" in _name(func) else "mm", formula


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> dict[str, Any]:
    declared = func._schema.arguments  # noqa: SLF001 - as above
    arguments = {a.name: a.default_value for a in declared}
    arguments.update(zip((a.name for a in declared), args, strict=False))
    return arguments | kwargs | {"<out>": out, "<args>": args, "<kwargs>": kwargs}


def _first_dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a kernel computes in: of ``mat1`` rather than the bias it is added to."""
    for name in ("mat1", "batch1", "mat", "query", "src", "grad_output"):
        if isinstance(arguments.get(name), torch.Tensor):
            return arguments[name].dtype  # type: ignore[no-any-return]  # just seen to be a tensor
    return next((a.dtype for a in arguments.values() if isinstance(a, torch.Tensor)), torch.float32)
