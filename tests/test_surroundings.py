"""Where a process stands among others, and what its job says."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from green_torch.arguments import energy_meters
from green_torch.meters import NODE_UNKNOWN, ONCE_PER_NODE
from green_torch.processor import cpu_name, instructions
from green_torch.surroundings import Place, common_run_id, described, job, place, restarted, same_job
from green_torch.testing import ScriptedClock, ScriptedMeter

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "SLURM_JOB_ID",
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nobody else's variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place(0, 1, 0, None)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "2"}, Place(5, 8, 2, 2)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            Place(5, 8, None, -1),
        ),  # a batch script's
        (
            {"RANK": "5", "WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Place(5, 8, 1, 1),
        ),
        (
            {"RANK": "4", "WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            Place(4, 8, None, -1),
        ),  # spawned by what mpirun started
        ({"RANK": "5", "WORLD_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALRANKID": "1"}, Place(5, 8, 1, 1)),
        (
            {"RANK": "4", "WORLD_SIZE": "8", "MV2_COMM_WORLD_RANK": "4", "MV2_COMM_WORLD_LOCAL_RANK": "0"},
            Place(4, 8, 0, 0),
        ),
        ({"RANK": "0", "WORLD_SIZE": "8"}, Place(0, 8, 0, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Place(3, 8, None, -1)),
    ],
)
def test_place_by_the_environment(monkeypatch, variables, expected):
    """Rank, world size, local rank and GPU; what can't be known is not guessed."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


def test_only_a_restart_of_the_same_job_is_one():
    """Slurm's id decides where there is one; torchrun's where a run was given one."""
    slurm = {"job_id": "1", "restart_count": "2"}
    assert restarted(slurm)
    assert not restarted({"job_id": "1", "restart_count": "0"})
    assert restarted({"elastic_restart_count": "1"})
    assert same_job(slurm, {"job_id": "1"})
    assert not same_job(slurm, {"job_id": "2"})
    assert not same_job(slurm, {"elastic_run_id": "a"})
    assert same_job({"elastic_run_id": "a"}, {"elastic_run_id": "a"})
    assert not same_job({"elastic_run_id": "none"}, {"elastic_run_id": "none"})
    assert not same_job({}, {})


def test_every_rank_of_a_start_makes_the_same_run_id(monkeypatch, tmp_path):
    """Of what launcher and scheduler tell all ranks; another launch, directory or start makes another, and nothing told makes none."""
    assert common_run_id(tmp_path, 1) is None
    made = []
    for variables, directory, segment in (
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, "a", 1),
        ({}, "a", 2),
        ({}, "b", 1),
        ({"MASTER_PORT": "29501"}, "a", 1),
        ({"TORCHELASTIC_RUN_ID": "x"}, "a", 1),
        ({"SLURM_JOB_ID": "1"}, "a", 1),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        made.append(common_run_id(tmp_path / directory, segment))
        monkeypatch.setenv("RANK", str(len(made)))
        assert common_run_id(tmp_path / "c" / ".." / directory, segment) == made[-1]
    assert len(set(made)) == len(made)


def test_outside_a_job_nothing_is_said():
    """No scheduler, no launcher: no field, and no host name."""
    assert job() == {}


def test_a_node_is_metered_once():
    """Ranks but the first of a node leave out CPU and memory, given or found, and say so; so do those that can't know their place."""
    clock = ScriptedClock()
    gpu, node = ScriptedMeter(clock, {"gpu1": 1.0}), ScriptedMeter(clock, {"cpu0": 1.0, "dram": 1.0})
    assert energy_meters([gpu, node], 0.01, Place(0, 2, 0, 0)) == ([gpu, node], ())
    assert energy_meters([gpu, node], 0.01, Place(1, 2, 1, 1)) == ([gpu], (ONCE_PER_NODE,))
    assert energy_meters([gpu, node], 0.01, Place(1, 2, None, -1)) == ([gpu], (NODE_UNKNOWN,))
    whole = ScriptedMeter(clock, {"gpu1": 1.0, "cpu": 1.0})
    assert energy_meters([whole], 0.01, Place(0, 2, 0, 0)) == ([whole], ())
    (part,), missing = energy_meters([whole], 0.01, Place(1, 2, 1, 1))
    assert ([domain.name for domain in part.domains], missing) == (["gpu1"], (ONCE_PER_NODE,))
    found, missing = energy_meters(None, 0.01, Place(1, 2, None, -1))
    assert missing[-1] == NODE_UNKNOWN
    assert not [domain for meter in found for domain in meter.domains if not domain.name.startswith("gpu")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel tells only the figure that a child inherits")
def test_peak_memory_is_not_the_parents():
    """A process started by a larger one has a peak of its own."""
    ballast = bytearray(300_000_000)
    code = "from green_torch.surroundings import peak_memory_bytes; print(peak_memory_bytes(None))"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5_000_000 < peak < len(ballast) / 2


def test_a_cpu_has_a_name(tmp_path):
    """The model's name where Linux tells one, as it stands; else what Python knows of the processor."""
    told = tmp_path / "cpuinfo"
    told.write_text(
        "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz\n\nprocessor\t: 1\nmodel name\t: other\n"
    )
    assert cpu_name(told) == "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz"
    (tmp_path / "arm").write_text("processor\t: 0\nCPU part\t: 0xd40\n")
    assert cpu_name(tmp_path / "arm") == cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fma avx2 avx512f avx512_bf16", "AVX512-BF16"),
        ("avx512f avx512_bf16 amx_bf16", "AMX-BF16"),
        ("avx2 avx512f", "AVX512"),
        ("avx2", ""),
    ],
)
def test_a_cpus_instructions_are_told(tmp_path, flags, found):
    """The widest that it has, so that results of virtual machines of one name are kept apart; none where nothing tells."""
    told = tmp_path / "cpuinfo"
    told.write_text(f"model name\t: AMD EPYC\nflags\t\t: fpu {flags} sse\n")
    assert instructions(told) == found
    assert instructions(tmp_path / "none") == ""


def test_a_model_is_called_by_its_own_name():
    """A manifest names the model that torch.compile, Fabric and the like wrap, and the CPU that it is on."""
    from lightning.fabric.wrappers import _FabricModule
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = torch.nn.Linear(2, 3)
    compiled = torch.compile(model)
    checkpointed = checkpoint_wrapper(compiled)
    for wrapped in (
        model,
        compiled,
        checkpointed,
        torch.nn.DataParallel(model),
        _FabricModule(compiled, None, original_module=model),
    ):
        assert described(wrapped) == {"model": "Linear", "parameters": 9, "device": cpu_name()}
