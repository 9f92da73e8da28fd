"""Variants as users run them: compiled, in real workers."""

from __future__ import annotations

import shutil

import pytest

from green_torch.experiment import compare
from green_torch.experiment.applied import CACHE_VARIABLE

compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on a CPU"
)


@compiles
def test_a_compiled_variant_trains_and_says_what_ran(tmp_path, monkeypatch):
    """The same losses as without; flash attention is named from within the compiled graph, and its FLOPs are known."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    found = compare(
        "tests.tiny_attention:build",
        ["fp32", "fp32+flash", "fp32+flash+compile"],
        blocks=2,
        steps_per_block=4,
        warmup_steps=3,
        threads=1,
        log_dir=tmp_path / "runs",
        track={"meters": [], "intensity": 100.0, "peak_flop_per_s": 1e12},
    )
    math, flash, compiled = found.results
    assert [result.error for result in found.results] == [None] * 3
    assert [result.kernels for result in found.results] == [("math",), ("flash",), ("flash",)]
    assert len({result.ran for result in found.results}) == 3
    assert "compiled" in compiled.ran
    for other in (flash, compiled):
        assert other.final_loss == pytest.approx(math.final_loss, rel=1e-4)
        assert found.departure(other.name) == ""
    assert compiled.mfu is not None
    assert compiled.mfu * compiled.step_time_s == pytest.approx(flash.mfu * flash.step_time_s)
    assert {result.manifest.model for result in found.results} == {"Attentive"}
