"""The FLOPs of each step of a run: every input shape is counted once, on the training thread, and remembered."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.flops.counter import COUNTS_COMPILED, Attention, LiveCounter, sweep
from green_torch.flops.once import autocast_dtype, device_of, hidden, meta_tally
from green_torch.flops.replica import converted, model_name, tensors_in, to_sketch, where_to_watch
from green_torch.records import Flag, FlopCount

MAX_KEYS = 16
_MAX_PENDING = 1024
_RECHECK_TAKES = 64
_DEPTH = 6
_BLIND_TAKES = 2  # one may come before the first forward, at the beginning of a phase

Key = tuple[Any, ...]

_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # noqa: SLF001 - a fast way past a slow question


@dataclass(frozen=True, slots=True)
class StepWork:
    """FLOPs of a step, ``None`` where nothing is known, and the flags that its record carries."""

    flops: FlopCount | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sketch:
    """A forward that is yet to be counted: a sketch of its inputs (``None``: too many keys, to be scaled), and how it ran."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
    backward: bool
    elements: int
    autocast: torch.dtype | None = None


class StepFlops:
    """Watches what a step runs and tells its FLOPs; used by the tracker and the callbacks. No method raises but the constructor.

    In a plain loop ``attach()`` hooks the model's forward: a forward on inputs of a new key (shapes, dtypes, train or eval,
    gradients, autocast) leaves a sketch of them behind, which ``take()`` counts on a meta copy of the model. Where the whole step
    is ours, ``begin_step(batch)`` and ``end_step()`` count the first step of each key live. ``counting()`` counts one step live by
    the user's wish. At most 16 keys are counted; further ones are scaled by their number of elements from the nearest. Where attention
    runs over sequences that lie end to end, whose lengths no shape tells, later steps of a key are flagged as scaled too.

    A model compiled from within (``model.compile()``, or hooked and then compiled) can't be watched: its forwards are not seen. From
    the second step that this happens to, steps are flagged, with one warning.

    Raises:
        ArgumentError: ``attention`` is neither "full" nor "causal".
    """

    def __init__(
        self, model: nn.Module | None = None, attention: Attention = "full", *, warn: Callable[[str], None] | None = None
    ) -> None:
        if attention not in {"full", "causal"}:
            raise ArgumentError(f'attention={attention!r} is not known; say attention="full" or attention="causal".')
        self._model = model
        self._tell = warn or _say
        self._attention: Attention = attention
        self._hook: Any = None
        self._devices: tuple[str, ...] = ()
        self._known: dict[Key, tuple[FlopCount | None, int]] = {}  # None: can't be counted
        self._of_values: set[Key] = set()  # keys that may cost something else another time
        self._sketches: dict[Key, _Sketch] = {}
        self._pending: dict[Key, int] = {}
        self._usual: dict[Key, int] = {}  # what was pending at the last take, where that had no flags; and its work
        self._usual_work = StepWork(None)
        self._live_flops: FlopCount | None = None
        self._flags: set[str] = set()
        self._warned: set[str] = set()
        self._counter: LiveCounter | None = None
        self._step_key: Key | None = None
        self._step_elements = 0
        self._live = False
        self._forwards_live: dict[Key, int] = {}
        self._live_elements = 0
        self._takes = 0
        self._trained: int | None = None
        self._seen = False  # a forward in training, or a step that is ours
        self._blind_takes = 0
        self._graphs = 0
        self._stopped = False  # the model can't be counted on meta: what comes is scaled, or counted by hand
        self._off = False

    # -- plain loops -------------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Registers one forward pre-hook on the model."""
        if self._model is None or self._hook is not None:
            return
        try:
            self._devices = tuple({"cpu", *(("cuda",) if torch.cuda.is_available() else ()), device_of(self._model)} - {"meta"})
            self._trained = self._trainable()
            self._graphs = _graphs_compiled()
            self._hook = where_to_watch(self._model).register_forward_pre_hook(self._before_forward, with_kwargs=True)
        except Exception as error:
            self._give_up(error)

    def detach(self) -> None:
        """Takes the hook off again; safe to call twice."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # inside somebody's graph there is nothing to see, and nothing of ours to compile
            return
        try:
            key = self._key(module.training, args, kwargs)
            seen = self._forwards_live if self._live else self._pending
            times = seen.get(key)
            if times is not None:
                seen[key] = times + 1
            elif len(seen) < _MAX_PENDING:
                if self._live:
                    self._live_elements = _elements((args, kwargs))
                elif key not in self._known:
                    self._sketches[key] = self._sketch(args, kwargs)
                seen[key] = 1
            else:
                self._flags.add(Flag.FLOPS_UNKNOWN)
        except Exception as error:
            self._give_up(error)

    def _key(self, training: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
        parts: list[Any] = [training, torch.is_grad_enabled()]
        if _any_autocast():
            parts += [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in self._devices]
        for value in args:
            parts.append(_trait(value))
        for name, value in kwargs.items():
            parts.append((name, _trait(value)))
        return tuple(parts)

    def _sketch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Sketch:
        backward = torch.is_grad_enabled()
        elements = _elements((args, kwargs))
        if self._stopped or self._model is None or len(self._sketches) + len(self._known) >= MAX_KEYS:
            return _Sketch(None, backward, elements)
        with hidden():
            inputs = converted((args, kwargs), to_sketch)
        return _Sketch(inputs, backward, elements, autocast_dtype(device_of(self._model)))

    # -- the whole step is ours ----------------------------------------------------------------------------------------------------

    def begin_step(self, batch: Any) -> None:
        """Opens a step on this batch: counts it live where its key is new."""
        try:
            self.abort()
            if self._off or self._live:
                return
            self._step_key = ("step", *self._key(True, (batch,), {}))  # whatever the mode is now: some trainers set it later
            if self._step_key in self._known:
                return
            self._step_elements = _elements(batch)
            if len(self._known) >= MAX_KEYS:
                self._sketches[self._step_key] = _Sketch(None, backward=True, elements=self._step_elements)
            elif self._has_compiled() and not COUNTS_COMPILED:
                self._known[self._step_key] = (None, self._step_elements)
                self._warn(
                    "This torch can't count compiled models while they run, so no MFU is reported. Upgrade torch, or pass flops_per_step=."
                )
            else:
                self._counter = LiveCounter(self._attention)
                self._counter.__enter__()
        except Exception as error:
            self._give_up(error)

    def end_step(self) -> None:
        """Closes the step and enters its work."""
        try:
            key, self._step_key = self._step_key, None
            counter, self._counter = self._counter, None
            if counter is not None:
                counter.__exit__(None, None, None)
                if key is not None:
                    self._enter(key, self._live_count(counter), self._step_elements, counter)
                    self._flags.add(Flag.COUNTED)
            if key is not None:
                self._pending[key] = self._pending.get(key, 0) + 1
        except Exception as error:
            self._give_up(error)

    def abort(self) -> None:
        """Drops the step that is open, after an exception say; no counting mode stays behind."""
        counter, self._counter, self._step_key = self._counter, None, None
        if counter is not None:
            try:
                counter.__exit__(None, None, None)
            except Exception as error:
                self._give_up(error)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts live what runs inside, one step of the user's say; what raises inside is not entered."""
        if self._live or self._counter is not None:  # it is being counted already
            yield
            return
        self._live, self._forwards_live = True, {}
        counter = LiveCounter(self._attention)
        try:
            with counter:
                yield
        finally:
            self._live = False
        try:
            self._enter_live(self._live_count(counter), counter)
        except Exception as error:
            self._give_up(error)

    def _enter(self, key: Key, count: FlopCount, elements: int, counter: LiveCounter) -> None:
        self._known[key] = (count, elements)
        if counter.of_values:
            self._of_values.add(key)

    def _enter_live(self, count: FlopCount, counter: LiveCounter) -> None:
        self._live_flops = count if self._live_flops is None else self._live_flops + count
        self._flags.add(Flag.COUNTED)
        if len(self._forwards_live) == 1:  # what was counted by hand holds for every later forward on such inputs
            ((key, times),) = self._forwards_live.items()
            self._enter(key, count.scaled(1 / times), self._live_elements, counter)

    # -- what it came to -----------------------------------------------------------------------------------------------------------

    def take(self) -> StepWork:
        """FLOPs of everything since the last call; counts what is new. Flags: counted, flops_scaled, flops_unknown."""
        self._takes += 1
        rechecks = self._takes % _RECHECK_TAKES == 0
        if self._pending and self._pending == self._usual and not (self._flags or rechecks) and self._live_flops is None:
            sweep()
            self._pending.clear()
            return self._usual_work
        pending, self._pending = self._pending, {}
        sketches, self._sketches = self._sketches, {}
        total, self._live_flops = self._live_flops, None
        flags, self._flags = self._flags, set()
        try:
            sweep()
            if not pending and total is None and self._is_blind():
                flags.add(Flag.FLOPS_UNKNOWN)
            for key, times in pending.items():
                self._seen = self._seen or bool(key[0])
                flops = self._flops_of(key, sketches.get(key), flags)
                if flops is not None:
                    part = flops if times == 1 else flops.scaled(times)
                    total = part if total is None else total + part
            if rechecks:
                self._recheck()
        except Exception as error:
            self._give_up(error)
        if self._off and total is None:
            flags.add(Flag.FLOPS_UNKNOWN)
        if Flag.FLOPS_UNKNOWN in flags:
            total = None
        self._usual = pending if self._known and total is not None and not flags else {}
        self._usual_work = StepWork(total, tuple(sorted(flags)))
        return self._usual_work

    def _flops_of(self, key: Key, sketch: _Sketch | None, flags: set[str]) -> FlopCount | None:
        known = self._known.get(key)
        if known is None and sketch is not None:
            if sketch.inputs is None:
                scaled = self._scaled(key, sketch.elements)
                flags.add(Flag.FLOPS_UNKNOWN if scaled is None else Flag.FLOPS_SCALED)
                return scaled
            flags.add(Flag.COUNTED)
            known = self._known[key] = (self._count(key, sketch), sketch.elements)
        elif key in self._of_values and Flag.COUNTED not in flags:  # a step like the one that was counted, not the same
            flags.add(Flag.FLOPS_SCALED)
        if known is None or known[0] is None:
            flags.add(Flag.FLOPS_UNKNOWN)
            return None
        return known[0]

    def _count(self, key: Key, sketch: _Sketch) -> FlopCount | None:
        assert self._model is not None
        assert sketch.inputs is not None
        try:
            tally = meta_tally(
                self._model,
                *sketch.inputs,
                attention=self._attention,
                device=device_of(self._model),
                autocast=sketch.autocast,
                fused=True,
                backward=sketch.backward,
            )
        except Exception as error:
            self._unknown(error)
            return None
        if tally.of_values:
            self._of_values.add(key)
        return self._checked(tally.count())

    def _scaled(self, key: Key, elements: int) -> FlopCount | None:
        """The nearest key that ran in the same way, times the ratio of elements."""
        head = 3 if key and key[0] == "step" else 2
        like = [(count, own) for other, (count, own) in self._known.items() if count is not None and other[:head] == key[:head]]
        if not like:
            return None
        count, own = min(like, key=lambda item: abs(math.log((item[1] or 1) / (elements or 1))))
        return count.scaled((elements or 1) / (own or 1))

    def _is_blind(self) -> bool:
        """Whether the model seems to train inside a compiled graph, our hook left out: nothing was seen of it, and something compiled."""
        if self._seen or self._hook is None or self._model is None or not self._model.training:
            return False
        inner = getattr(where_to_watch(self._model), "_compiled_call_impl", None) is not None
        if not inner and _graphs_compiled() == self._graphs:
            return False
        self._blind_takes += 1
        if self._blind_takes < _BLIND_TAKES:
            return False
        self._warn(
            f"No forward of {self._name()} is seen, as it runs inside a compiled graph, so no MFU is reported. Give track() the "
            "compiled model (compiled = torch.compile(model); track(compiled)), count a step: with tracker.count(): ..., or pass flops_per_step=."
        )
        return True

    def _recheck(self) -> None:
        """Forgets all counts where parameters were frozen or released since the last time."""
        if self._model is None or not self._known:
            return
        trained = self._trainable()
        if self._trained is not None and trained != self._trained:
            self._known.clear()
        self._trained = trained

    def _trainable(self) -> int:
        return hash(tuple(p.requires_grad for p in self._model.parameters())) if self._model is not None else 0

    def _has_compiled(self) -> bool:
        modules = self._model.modules() if self._model is not None else ()
        return any(
            type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None for m in modules
        )

    def _checked(self, count: FlopCount) -> FlopCount:
        if count.uncounted_ops:
            self._warn(
                f"These operations have no FLOP formula and count as 0: {', '.join(count.uncounted_ops)}. MFU is too low by their share. "
                "Register one with torch.utils.flop_counter.register_flop_formula(torch.ops.<namespace>.<op>), or pass flops_per_step=."
            )
        return count

    def _live_count(self, counter: LiveCounter) -> FlopCount:
        count = self._checked(counter.count())
        return replace(count, estimated=True) if self._has_compiled() else count

    def _name(self) -> str:
        return model_name(self._model) if self._model is not None else "the model"

    def _unknown(self, error: Exception) -> None:
        self._warn(
            f"The FLOPs of {self._name()} can't be counted without running it ({type(error).__name__}: {_short(error)}), so no MFU "
            "is reported. Pass flops_per_step= (a number, model FLOPs), or count a step while it runs: with tracker.count(): ..."
        )
        self._stopped = True

    def _give_up(self, error: Exception) -> None:
        self._off = True
        self.detach()
        self._warn(
            f"Counting FLOPs failed ({type(error).__name__}: {_short(error)}) and is off. Pass flops_per_step= (a number, model FLOPs) for MFU."
        )

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._tell(text)


def _graphs_compiled() -> int:
    """How many graphs ``torch.compile`` has made in this process so far; 0 where this torch doesn't tell."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    try:
        return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
    except Exception:
        return 0


def _say(text: str) -> None:
    warnings.warn(text, GreenTorchWarning, stacklevel=5)


def _short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _elements(value: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_in(value))


def _trait(value: Any, depth: int = _DEPTH) -> Any:
    """What of an input decides the FLOPs: shapes and dtypes, whole numbers, and words that are arguments of their own."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.requires_grad
    if value is None or isinstance(value, int) or (depth == _DEPTH and isinstance(value, str)):
        return value
    kind = type(value)
    if isinstance(value, str | float | complex | nn.Module | type) or depth == 0:
        return kind
    if isinstance(value, Mapping):
        return (kind, *((name, _trait(item, depth - 1)) for name, item in value.items()))
    if isinstance(value, list | tuple):
        return (kind, *(_trait(item, depth - 1) for item in value))
    return (kind, *((t.shape, t.dtype) for t in tensors_in(value, depth)))
