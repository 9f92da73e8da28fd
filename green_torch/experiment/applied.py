"""Applies a variant to a workload: precision, attention kernel, gradient checkpointing, compilation; in a worker, where torch is."""

from __future__ import annotations

import getpass
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError, GreenTorchError
from green_torch.experiment.kernels import Seen
from green_torch.experiment.variants import UserStep, Variant, Workload

if TYPE_CHECKING:
    import torch  # noqa: TC004  (the parent process never loads torch)

Loss = Any  # a tensor, a number, or None where the user's step gives none
_COUNTED = {"tokens", "samples"}
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class CannotRunError(GreenTorchError):
    """What a variant asks for does not exist on this device."""


@dataclass(frozen=True, slots=True)
class Trainee:
    """Something that trains step by step. ``train`` takes one optimizer step and returns its loss and the units of its batch.

    ``skipped`` counts the steps that a gradient scaler left out so far (``None``: not known). ``describe`` takes what was seen of a step
    and says what ran in all; empty where only the user knows, or nobody could look: what was not seen is not the same.
    """

    model: torch.nn.Module | None
    device: torch.device
    train: Callable[[], tuple[Loss, Mapping[str, int]]]
    compiled: bool
    applied_by_user: bool
    skipped: Callable[[], int | None]
    describe: Callable[[Seen], str]


def applied(variant: Variant, built: object, seed: int) -> Trainee:
    """What ``build(variant)`` returned, with the variant applied where that is ours to do.

    Raises:
        ArgumentError: it is neither a workload nor a callable, or has nothing to checkpoint.
        CannotRunError: the attention kernel does not exist here.
    """
    if isinstance(built, Workload):
        ours = _Applied(variant, built, seed)
        return Trainee(ours.model, ours.device, ours.train, variant.compile, False, ours.skipped, ours.describe)
    if callable(built):
        return _theirs(built)
    raise ArgumentError(
        f"build({variant.name!r}) returned {type(built).__name__}; return a green_torch.experiment.Workload, or a callable that "
        "takes one optimizer step and returns its loss."
    )


def seed_all(seed: int) -> None:
    """Seeds every generator that data may be drawn or augmented with: torch's, Python's, and NumPy's, which torch loads where it can."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def apart_in_cache(variant: Variant) -> None:
    """Gives compiled graphs a cache of their own for each attention kernel; call it before torch is loaded.

    torch's compile cache does not tell pinned kernels apart: a graph compiled with attention as math is found again, and runs as
    math, where flash is pinned (measured, torch 2.13).
    """
    if variant.compile:
        root = os.environ.get(CACHE_VARIABLE) or str(Path(tempfile.gettempdir()) / f"torchinductor_{_user()}")
        os.environ[CACHE_VARIABLE] = str(Path(root) / f"green_torch-{variant.sdpa_backend or 'auto'}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "nobody"


def _theirs(step: UserStep) -> Trainee:
    """The user's own step; ``step.units`` and ``step.model`` are taken where they are."""
    model = getattr(step, "model", None)
    units = getattr(step, "units", {})

    def train() -> tuple[Loss, Mapping[str, int]]:
        loss = step()
        detach = getattr(loss, "detach", None)
        return (loss if detach is None else detach()), _checked(units() if callable(units) else units)

    return Trainee(model, _device_of(model), train, False, True, lambda: 0, lambda _: "")


def _checked(units: object) -> Mapping[str, int]:
    """What a batch holds, if that can be counted.

    Raises:
        ArgumentError: it can't.
    """
    if not isinstance(units, Mapping) or not units.keys() <= _COUNTED:
        raise ArgumentError(
            f'The units of a batch are {units!r}; count tokens, samples or both: {{"tokens": 4096, "samples": 8}}.'
        )
    return units


def _device_of(model: torch.nn.Module | None) -> torch.device:
    """The model's device; of no model, the accelerator where there is one."""
    import torch

    if model is not None:
        first = next(model.parameters(), None)
        return first.device if first is not None else torch.device("cpu")
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


class _Applied:
    """A workload under its variant, trained by the library."""

    def __init__(self, variant: Variant, workload: Workload, seed: int) -> None:
        import torch

        model = workload.model
        self.device = _device_of(model)
        self._mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(variant.precision)
        self._whole = torch.bfloat16 if variant.precision == "bf16-true" else None
        if variant.matmul_precision is not None:
            torch.set_float32_matmul_precision(variant.matmul_precision)
            torch.backends.cudnn.allow_tf32 = variant.matmul_precision != "highest"
        check_attention(variant.sdpa_backend, self.device, self._mixed or self._whole or torch.float32)
        model.to(self._whole).train()
        if variant.gradient_checkpointing:
            _checkpoint(model, workload.checkpoint_blocks)
        self.model: Any = torch.compile(model) if variant.compile else model
        self._variant = variant
        self._workload = workload
        self._optimizer = workload.optimizer(model.parameters())
        self._optimizer.register_step_post_hook(self._count)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=variant.precision == "16-mixed")
        self._batches = _endless(workload.batches, seed)
        self._asked = self._taken = 0  # steps, of the optimizer

    def train(self) -> tuple[Loss, Mapping[str, int]]:
        """One step."""
        units, total = Counter[str](), None
        with attention(self._variant.sdpa_backend):  # around backward too: recomputation must choose the same kernel
            for _ in range(self._workload.accumulate):
                batch = next(self._batches)
                loss = self._loss(batch)
                if self._workload.accumulate > 1:
                    loss = loss / self._workload.accumulate
                self._scaler.scale(loss).backward()
                total = loss.detach() if total is None else total + loss.detach()
                units.update(_checked(self._workload.units(batch)))
        self._step()
        return total, units

    def skipped(self) -> int | None:
        """Steps that the scaler left out; not known of a fused optimizer, which is always called and skips within."""
        fused = self._scaler.is_enabled() and getattr(self._optimizer, "_step_supports_amp_scaling", False)
        return None if fused else self._asked - self._taken

    def describe(self, step: Seen) -> str:
        """What ran; empty where nobody could look."""
        if not step.operations:
            return ""
        variant = self._variant
        return "; ".join(
            (
                variant.precision + _tf32(variant, self.device),
                f"attention {', '.join(step.kernels) or 'not seen'}",
                str(step),
                *(["checkpointed"] if variant.gradient_checkpointing else []),
                *(["compiled"] if variant.compile else []),
                f"batch {variant.batch_size or 'as built'}",
            )
        )

    def _loss(self, batch: Any) -> Any:
        import torch

        with torch.autocast(self.device.type, dtype=self._mixed, enabled=self._mixed is not None):
            loss = self._workload.loss(self.model, moved(batch, self.device, self._whole))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ArgumentError(f"loss(model, batch) returned {found}; return a tensor that holds one number.")
        return loss

    def _step(self) -> None:
        import torch

        if self._workload.gradient_clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._workload.model.parameters(), self._workload.gradient_clip_norm)
        self._asked += 1
        self._scaler.step(self._optimizer)  # where it is not enabled, it does nothing but step
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _count(self, *_: Any) -> None:
        self._taken += 1


def _tf32(variant: Variant, device: torch.device) -> str:
    """How FP32 matmuls are loosened, where this device can at all."""
    import torch

    loosened = variant.matmul_precision not in {None, "highest"}
    if not loosened or variant.precision == "bf16-true":
        return ""
    if device.type == "cuda":
        return f" ({variant.matmul_precision})" if torch.cuda.get_device_capability(device) >= (8, 0) else ""
    return "" if variant.matmul_precision == "high" else f" ({variant.matmul_precision})"  # a CPU has no TF32


def check_attention(backend: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Tries an attention kernel on a few numbers, forward and backward.

    Raises:
        CannotRunError: it does not run, with torch's reasons.
    """
    if backend is None:
        return
    import torch

    query = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings(record=True) as said, attention(backend):
        warnings.simplefilter("always")  # torch gives its reasons as warnings
        try:
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
        except RuntimeError as error:
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
            raise CannotRunError(
                f"the attention kernel {backend!r} does not exist for {str(dtype).removeprefix('torch.')} on {_named(device)} with "
                f"torch {torch.__version__} ({(' '.join(reasons) or str(error)).rstrip('.')}). Ask for another: +math runs everywhere, +auto leaves it to torch"
            ) from error


def _named(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"


def attention(backend: str | None) -> AbstractContextManager[None]:
    """Pins torch's attention kernel."""
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    pinned: AbstractContextManager[None] = sdpa_kernel(kernels[backend])
    return pinned


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on the device, its floating-point tensors in the dtype, through tuples, lists and mappings."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [moved(value, device, dtype) for value in batch]
        return (
            type(batch)(*parts) if isinstance(batch, tuple) and type(batch) is not tuple else type(batch)(parts)
        )  # named tuples
    return batch


def _endless(batches: Callable[[int], Iterable[Any]], seed: int) -> Iterator[Any]:
    """The batches, again and again."""
    while True:
        empty = True
        for batch in batches(seed):
            empty = False
            yield batch
        if empty:
            raise ArgumentError(f"batches({seed}) yields nothing to train on.")


def _checkpoint(model: torch.nn.Module, kinds: tuple[type[torch.nn.Module], ...]) -> None:
    """Recomputes blocks in backward: the outermost modules of these kinds, or each module of the outermost lists of modules.

    Raises:
        ArgumentError: the model has none.
    """
    from torch.utils.checkpoint import checkpoint

    blocks = list(_blocks(model, kinds))
    if not blocks:
        wanted = ", ".join(kind.__name__ for kind in kinds) or "torch.nn.ModuleList"
        raise ArgumentError(
            f"gradient_checkpointing needs blocks: {type(model).__name__} has no {wanted}. Name their classes: "
            "Workload(..., checkpoint_blocks=(Block,)), likewise Workload.from_lightning."
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(model: torch.nn.Module, kinds: tuple[type[torch.nn.Module], ...]) -> Iterator[torch.nn.Module]:
    import torch

    for child in model.children():
        if isinstance(child, kinds):
            yield child
        elif not kinds and isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child, kinds)
