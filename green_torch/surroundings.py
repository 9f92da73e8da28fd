"""What a process finds around it: its place among the ranks, its job, versions, and the model's device. Loads nothing by itself."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import green_torch
from green_torch.clock import cuda_in_use
from green_torch.processor import cpu_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

DEFERRAL = "GREEN_TORCH_DEFERRAL"  # environment variable by which green-torch wait tells the run what waiting was to save
_STATUS = Path("/proc/self/status")
_JOB = {
    "job_id": "SLURM_JOB_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "node_list": "SLURM_JOB_NODELIST",
    "restart_count": "SLURM_RESTART_COUNT",
    "elastic_run_id": "TORCHELASTIC_RUN_ID",
    "elastic_restart_count": "TORCHELASTIC_RESTART_COUNT",
}  # https://slurm.schedmd.com/sbatch.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES, https://docs.pytorch.org/docs/stable/elastic/run.html

_LOCAL_RANKS = (  # a launcher's variable for the place on the node, and its rank, by which it is known to speak of this process
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK"),
    ("MPI_LOCALRANKID", "PMI_RANK"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_RANK"),
    ("SLURM_LOCALID", "SLURM_PROCID"),
)  # https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html, Intel MPI's and MVAPICH2's guides, srun's manual

_LAUNCH = (  # what is the same in every process of a start, and seldom in two
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands: ``local_rank`` counts the processes of its node, ``None`` where that is not known.

    ``gpu`` is the CUDA index of the one GPU that is its own: ``None`` for a process alone, to which all are; -1 where it is not known.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    gpu: int | None = None

    @property
    def first_on_node(self) -> bool:
        """Whether what a node has once (CPU, memory) is metered by this process."""
        return self.local_rank == 0


def place() -> Place:
    """Where this process stands.

    Rank and world size are the process group's where there is one (Lightning's launcher sets no ``RANK``), else the environment's; the
    GPU is torch's current device where CUDA is up and one was chosen, else that of the local rank.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size <= 1:
        return Place(rank, world_size)
    told = [os.environ.get(local) for local, launched in _LOCAL_RANKS if os.environ.get(launched) == str(rank)]
    text = next((local for local in (os.environ.get("LOCAL_RANK"), *told) if local is not None), None)
    local_rank = int(text) if text is not None else 0 if rank == 0 else None
    chosen = sys.modules["torch"].cuda.current_device() if cuda_in_use() else 0
    return Place(rank, world_size, local_rank, chosen or (-1 if local_rank is None else local_rank))


def job() -> dict[str, str]:
    """What the scheduler and the launcher tell of the job, and the node's name; empty outside one."""
    found = {name: value for name, variable in _JOB.items() if (value := os.environ.get(variable))}
    if not found and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return {}
    scheduler = {"scheduler": "slurm"} if "job_id" in found else {}
    return {**scheduler, **found, "node": os.environ.get("SLURMD_NODENAME") or platform.node()}


def restarts(own: Mapping[str, str]) -> tuple[int, ...]:
    """How often the job was requeued by Slurm, and since then its workers restarted by torchrun: more with each start."""
    counts = (own.get(count, "").strip() for count in ("restart_count", "elastic_restart_count"))
    return tuple(int(count) if count.isdecimal() else 0 for count in counts)


def restarted(own: Mapping[str, str]) -> bool:
    """Whether the job has been started before."""
    return any(restarts(own))


def same_job(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether both are starts of one job (torchrun calls a run ``none`` that was given no id)."""
    if "job_id" in one or "job_id" in other:
        return one.get("job_id") == other.get("job_id")
    run_id = one.get("elastic_run_id", "none")
    return run_id != "none" and run_id == other.get("elastic_run_id")


def common_run_id(log_dir: Path, segment: int) -> str | None:
    """A run id that every rank of this start makes by itself, of what scheduler and launcher tell all of them; ``None`` where they don't.

    Launches by hand may meet at one address again and again: the run's directory and the number of its start tell them apart.
    """
    told = [os.environ.get(variable, "") for variable in _LAUNCH]
    if not any(told):
        return None
    return hashlib.sha256("\n".join([*told, str(log_dir.resolve()), str(segment)]).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {"green_torch": green_torch.__version__, "python": platform.python_version(), "os": platform.platform()}
    for name in ("torch", "codecarbon", "nvidia-ml-py", "lightning", "pytorch-lightning", "tensorboard"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_of(model: torch.nn.Module | None) -> torch.device:
    """Where the model is; without one, where torch computes."""
    import torch  # only where FLOPs are counted

    first = next(model.parameters(), None) if model is not None else None
    if first is not None:
        return first.device
    return torch.device("cuda" if cuda_in_use() else "cpu")


def dtype_name(model: torch.nn.Module | None) -> str:
    """The dtype of the model's parameters, or the one that FSDP casts them to for the computation."""
    first = next(model.parameters(), None) if model is not None else None
    if model is None or first is None:
        return "float32"
    from green_torch.flops.replica import sharded_dtype  # loads torch

    return str(sharded_dtype(model) or first.dtype).removeprefix("torch.")


def described(model: torch.nn.Module | None) -> dict[str, Any]:
    """``model``, ``parameters`` and ``device`` of the manifest: of the whole model, under its own name, whatever wraps it or shares it out."""
    if model is None:
        return {}
    import torch

    from green_torch.flops.replica import model_name, parameter_count

    device = device_of(model)
    return {
        "model": model_name(model),
        "parameters": parameter_count(model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
    }


def peak_memory_bytes(model: torch.nn.Module | None) -> int | None:
    """Peak memory of the process so far: of the accelerator where the model is on one, else resident."""
    torch = sys.modules.get("torch")
    if model is not None and torch is not None and cuda_in_use():
        return int(torch.cuda.max_memory_allocated(device_of(model)))  # asked from a thread whose current device is another
    with suppress(OSError, StopIteration):  # Linux; the figure below it would be the parent's, where that was larger
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
