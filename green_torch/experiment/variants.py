"""What is asked: the variants of a training, their names, and the workload that they train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError

if TYPE_CHECKING:
    import torch  # noqa: TC004  (the parent process never loads torch)

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
MATMUL_PRECISIONS = ("highest", "high", "medium")
SDPA_BACKENDS = ("math", "flash", "efficient", "cudnn")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train; what is ``None`` is left as torch has it.

    ``precision`` as Lightning spells it (:data:`PRECISIONS`; "16-mixed" comes with torch's gradient scaler, and the steps that it skips are
    counted); ``matmul_precision`` of FP32 matmuls (``torch.set_float32_matmul_precision``: "high" is TF32 on a GPU that has it);
    ``sdpa_backend`` pins the attention kernel; ``gradient_checkpointing`` recomputes blocks in backward: each module of the model's
    ``ModuleList``s, or ``Workload.checkpoint_blocks``; ``compile`` is ``torch.compile``; ``batch_size`` is for ``build`` to heed.

    Raises:
        ArgumentError: for a value that is not known.
    """

    name: str
    precision: str = "32-true"
    matmul_precision: str | None = None
    sdpa_backend: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.name in {"", ".."} or self.name != Path(self.name).name:
            raise ArgumentError(f"A variant's name becomes a folder's: {self.name!r} can't be one.")
        for key, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("matmul_precision", self.matmul_precision, (None, *MATMUL_PRECISIONS)),
            ("sdpa_backend", self.sdpa_backend, (None, *SDPA_BACKENDS)),
        ):
            if value not in known:
                raise ArgumentError(f"{key}={value!r} is not known; use one of {', '.join(map(repr, known))}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ArgumentError(f"batch_size={self.batch_size!r} must be 1 or more.")


_BASES = {
    "fp32": {"precision": "32-true", "matmul_precision": "highest"},
    "tf32": {"precision": "32-true", "matmul_precision": "high"},
    "bf16": {"precision": "bf16-mixed", "matmul_precision": "highest"},
    "bf16-mixed": {"precision": "bf16-mixed", "matmul_precision": "highest"},
    "bf16-true": {"precision": "bf16-true", "matmul_precision": "highest"},
    "fp16": {"precision": "16-mixed", "matmul_precision": "highest"},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"sdpa_backend": name} for name in SDPA_BACKENDS},
    "auto": {"sdpa_backend": None},
    "checkpoint": {"gradient_checkpointing": True},
    "compile": {"compile": True},
}


def parse_variant(name: str) -> Variant:
    """The built-in variant of a name such as "fp32", "bf16+flash" or "bf16+flash+checkpoint+compile".

    Attention runs on torch's "math" kernel unless an option says otherwise ("+auto" leaves the choice to torch), so that two
    variants never differ, or agree, by torch's own choice.

    Raises:
        ArgumentError: for an unknown name; the message lists the known ones.
    """
    base, *options = name.split("+")
    known = f"{', '.join(_BASES)}; each with any of {', '.join('+' + option for option in _OPTIONS)}"
    unknown = [part for part, names in ((base, _BASES), *((option, _OPTIONS) for option in options)) if part not in names]
    if unknown:
        raise ArgumentError(f"The variant {name!r} is not known ({', '.join(map(repr, unknown))}). Known are {known}.")
    settings: dict[str, Any] = {"sdpa_backend": "math", **_BASES[base]}
    chosen: set[str] = set()
    for option in options:
        if chosen & _OPTIONS[option].keys():
            raise ArgumentError(f"The variant {name!r} says the same thing twice (+{option}). Known are {known}.")
        chosen |= _OPTIONS[option].keys()
        settings |= _OPTIONS[option]
    return Variant(name, **settings)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained; the library owns backward and step.

    ``model`` is on its device. ``optimizer(parameters)`` makes the optimizer. ``loss(model, batch)`` is the mean loss of a batch.
    ``batches(seed)`` yields batches (of tensors, however nested), the same for the same seed; they are moved to the model's
    device, and gone through again where they end. ``units(batch)`` counts what a batch holds: ``{"tokens": 4096, "samples": 8}``,
    either or both. ``checkpoint_blocks`` are the classes of the modules that gradient checkpointing recomputes; none: each module of
    the outermost ``ModuleList``s. A step accumulates the gradients of ``accumulate`` batches, and clips them to
    ``gradient_clip_norm`` where that is given.

    Raises:
        ArgumentError: ``accumulate`` below 1, or a clip that is not above zero.
    """

    model: torch.nn.Module
    optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    batches: Callable[[int], Iterable[Any]]
    units: Callable[[Any], Mapping[str, int]]
    checkpoint_blocks: tuple[type[torch.nn.Module], ...] = ()
    accumulate: int = 1
    gradient_clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ArgumentError(f"accumulate={self.accumulate!r} must be 1 or more.")
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise ArgumentError(f"gradient_clip_norm={self.gradient_clip_norm!r} must be above zero, or None.")

    @classmethod
    def from_lightning(
        cls,
        module: Any,
        data: Any = None,
        *,
        trainer: Mapping[str, Any] | None = None,
        units: Callable[[Any], Mapping[str, int]] | None = None,
        checkpoint_blocks: tuple[type[torch.nn.Module], ...] = (),
    ) -> Workload:
        """A workload of a ``LightningModule``, trained as its Trainer would on one device; Lightning itself is not needed.

        Calls ``prepare_data``, ``configure_model``, ``setup("fit")``, ``configure_optimizers`` and, each batch, ``training_step``.
        Schedulers follow the steps or the epochs, an epoch being one pass through the data; where batches are accumulated, a step may
        take them from the end of one and the beginning of the next. Refused, with the reason, is what would make it another training:
        manual optimization, several optimizers, several devices, a scheduler that goes by a metric, callbacks that do more than watch,
        and the module's own ``optimizer_step``, ``backward`` and the like. Not called are the hooks named ``on_…``; ``self.log`` does
        nothing; ``self.trainer`` does not exist. Where a module needs more, let ``build`` return a callable that takes one step of your
        own loop.

        Args:
            module: the ``LightningModule``, of ``lightning.pytorch`` or ``pytorch_lightning``.
            data: a dataloader or any iterable of batches, or a ``LightningDataModule``. None: ``module.train_dataloader()``.
            trainer: arguments of your Trainer. ``accelerator``, ``accumulate_grad_batches``, ``gradient_clip_val`` (by norm) and
                ``limit_train_batches`` are applied; what concerns only its length, its logging and its validation, and callbacks that
                only watch, are passed over; ``precision`` is the variant's.
            units: as of a ``Workload``. None: samples by the first tensor's first dimension, tokens by ``input_ids``.
            checkpoint_blocks: as of a ``Workload``.

        Raises:
            ArgumentError: what would change the training and is not covered, with the reason and what to do instead.
        """
        from green_torch.experiment.lightning_step import workload_of

        return workload_of(module, data, trainer or {}, units, checkpoint_blocks)


UserStep = Callable[[], Any]
"""One optimizer step of the user's own code, with the variant applied by that code; returns the mean loss, or None.

Where it has an attribute ``units``, a mapping such as ``{"tokens": 4096}`` or a callable that gives one, joules are compared per unit;
where it has an attribute ``model``, that is named and its memory and device are looked at.
"""

Build = str | Callable[[Variant], Workload | UserStep]
