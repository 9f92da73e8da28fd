"""RAPL: counters read from real files in a folder that looks like sysfs."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from green_torch.errors import MeterError
from green_torch.meters import discover
from green_torch.meters.rapl import Counter, open_meters
from green_torch.processor import cpu_name
from green_torch.records import Method

if TYPE_CHECKING:
    from collections.abc import Iterator

RANGE_UJ = 262_143_328_850  # a common one: (2^32 - 1) counts of 2^-14 J
SECOND_NS = 1_000_000_000


class Ticks:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def zone(
    root: Path, name: str, label: str, energy_uj: int, *, limits: dict[str, tuple[int, int]] | None = None, **files: object
) -> Path:
    """Makes one zone; ``limits`` maps a constraint's name to its limit and its maximum in µW."""
    path = root / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{label}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    for index, (kind, (limit_uw, max_uw)) in enumerate((limits or {}).items()):
        (path / f"constraint_{index}_name").write_text(f"{kind}\n")
        (path / f"constraint_{index}_power_limit_uw").write_text(f"{limit_uw}\n")
        (path / f"constraint_{index}_max_power_uw").write_text(f"{max_uw}\n")
    for file, content in files.items():
        (path / file).write_text(f"{content}\n")
    return path


def set_uj(path: Path, energy_uj: int) -> None:
    (path / "energy_uj").write_text(f"{energy_uj}\n")


PACKAGE = {"long_term": (205_000_000, 205_000_000), "short_term": (246_000_000, 413_000_000), "peak_power": (900_000_000, 0)}


def one_socket(root: Path) -> tuple[Path, Path]:
    """A server's tree: package with core, uncore and memory, a psys zone, and the mmio copy."""
    package = zone(root, "intel-rapl:0", "package-0", 5_000_000, limits=PACKAGE)
    zone(root, "intel-rapl:0:0", "core", 1)
    zone(root, "intel-rapl:0:1", "uncore", 2)
    memory = zone(root, "intel-rapl:0:2", "dram", 7_000_000, limits={"long_term": (0, 0)})
    zone(root, "intel-rapl:1", "psys", 3)
    zone(root, "intel-rapl-mmio:0", "package-0", 5_000_000)
    (root / "intel-rapl").mkdir()
    return package, memory


def test_one_socket_is_cpu_and_dram_and_nothing_is_counted_twice(tmp_path):
    """Core, uncore, psys and the mmio copy are left out."""
    package, memory = one_socket(tmp_path)
    meters, missing = open_meters(tmp_path)
    assert missing == []
    (meter,) = meters
    assert [domain.name for domain in meter.domains] == ["cpu", "dram"]
    assert meter.read().energy_j == pytest.approx({"cpu": 5.0, "dram": 7.0})
    set_uj(package, 6_500_000)
    set_uj(memory, 7_250_000)
    assert meter.read().energy_j == pytest.approx({"cpu": 6.5, "dram": 7.25})
    meter.close()
    meter.close()


def test_a_domain_says_how_it_is_known(tmp_path):
    """Counter, with its quantum from the range, and the highest lasting limit of the package."""
    one_socket(tmp_path)
    cpu, dram = open_meters(tmp_path)[0][0].domains
    assert cpu.method is dram.method is Method.COUNTER
    assert cpu.power_limit_w == pytest.approx(413.0)  # the short term's maximum, not the peak of milliseconds
    assert cpu.quantum_j == pytest.approx(2**-14, rel=1e-5)
    assert dram.power_limit_w is None  # limits of zero are not set
    assert cpu.device == cpu_name()  # the zone's own name, package-0, is every CPU's
    assert str(tmp_path / "intel-rapl:0") in cpu.source
    assert dram.device == "dram"
    assert cpu.gain_error is None


def test_two_sockets_are_numbered(tmp_path):
    """cpu0, cpu1 with their own memory."""
    for index, energy_uj in ((0, 10_000_000), (1, 90_000_000)):
        zone(tmp_path, f"intel-rapl:{index}", f"package-{index}", energy_uj, limits=PACKAGE)
        zone(tmp_path, f"intel-rapl:{index}:0", "dram", energy_uj // 10)
    (meter,) = open_meters(tmp_path)[0]
    assert meter.read().energy_j == pytest.approx({"cpu0": 10.0, "cpu1": 90.0, "dram0": 1.0, "dram1": 9.0})


def test_a_die_that_mirrors_its_package_is_left_out(tmp_path):
    """AMD on some kernels shows one counter for every die; Intel's dies with counters of their own are kept."""
    zone(tmp_path, "intel-rapl:0", "package-0-die-0", 50_000_000)
    zone(tmp_path, "intel-rapl:1", "package-0-die-1", 50_000_900)
    assert [domain.name for domain in open_meters(tmp_path)[0][0].domains] == ["cpu"]
    set_uj(tmp_path / "intel-rapl:1", 77_000_000)
    assert [domain.name for domain in open_meters(tmp_path)[0][0].domains] == ["cpu0", "cpu1"]


def test_a_wrap_is_a_step_forward(tmp_path):
    """From just below the range to just above zero is a small positive step."""
    package, _ = one_socket(tmp_path)
    clock = Ticks()
    set_uj(package, RANGE_UJ - 1_000_000)
    (meter,) = open_meters(tmp_path, now_ns=clock)[0]
    before = meter.read().energy_j["cpu"]
    clock.ns += SECOND_NS
    set_uj(package, 2_000_000)
    assert meter.read().energy_j["cpu"] - before == pytest.approx(3.0)


def test_a_fall_too_large_for_a_wrap_is_a_reset_and_goes_back(tmp_path):
    """After sleep the counter starts over: 262 kJ in a second is not power, and the sampler must see the fall."""
    package, _ = one_socket(tmp_path)
    clock = Ticks()
    set_uj(package, 9_000_000)
    (meter,) = open_meters(tmp_path, now_ns=clock)[0]
    before = meter.read().energy_j["cpu"]
    clock.ns += SECOND_NS
    set_uj(package, 1_000_000)
    after = meter.read().energy_j["cpu"]
    assert after < before
    clock.ns += SECOND_NS
    set_uj(package, 1_500_000)
    assert meter.read().energy_j["cpu"] - after == pytest.approx(0.5)


@settings(max_examples=50)
@given(st.integers(0, RANGE_UJ - 1), st.lists(st.integers(0, RANGE_UJ - 1), max_size=30))
def test_any_run_of_steps_shorter_than_a_wrap_is_summed_exactly(start_uj, steps_uj):
    """Unwrapped, the counter rises by what was drawn and never falls, however often it wraps."""
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(zone(Path(folder), "intel-rapl:0", "package-0", 0), limit_w=None)
    true_uj = start_uj
    assert counter.unwrap(start_uj, 0) == start_uj
    for index, step_uj in enumerate(steps_uj):
        true_uj += step_uj
        assert counter.unwrap(true_uj % RANGE_UJ, index * SECOND_NS) == true_uj


@settings(max_examples=50)
@given(st.lists(st.integers(0, RANGE_UJ), min_size=2, max_size=30))
def test_without_a_known_limit_no_step_is_negative(raw_uj):
    """Whatever the counter shows, every fall is taken for a wrap."""
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(zone(Path(folder), "intel-rapl:0", "package-0", 0), limit_w=None)
    totals = [counter.unwrap(value, 0) for value in raw_uj]
    assert totals == sorted(totals)


def test_a_counter_that_vanishes_midway_is_left_out_and_comes_back(tmp_path):
    """The other domain goes on; what passed meanwhile is in the next reading."""
    package, memory = one_socket(tmp_path)
    (meter,) = open_meters(tmp_path)[0]
    meter.read()
    (package / "energy_uj").unlink()
    assert set(meter.read().energy_j) == {"dram"}
    (memory / "energy_uj").write_text("no number\n")
    with pytest.raises(MeterError, match=r"cpu: .*energy_uj.*dram"):
        meter.read()
    set_uj(package, 6_000_000)
    set_uj(memory, 8_000_000)
    assert meter.read().energy_j == pytest.approx({"cpu": 6.0, "dram": 8.0})


def test_a_reading_brackets_its_instant(tmp_path):
    """Begin and end are the clock just before and after."""
    one_socket(tmp_path)
    reading = open_meters(tmp_path)[0][0].read()
    assert reading.begin_ns <= reading.end_ns


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything: the tests of a refusal go on as nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_counter_for_root_only_is_a_reason_with_the_line_that_mends_it():
    """Permission denied is no exception, and one reason for all zones."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for path in one_socket(root):
            (path / "energy_uj").chmod(0o400 if os.geteuid() == 0 else 0)
        with unprivileged():
            meters, missing = open_meters(root)
    assert meters == []
    (reason,) = missing
    assert reason.startswith("cpu, dram:")
    assert f"sudo chmod a+r {root}/intel-rapl:*/energy_uj" in reason
    assert "udev" in reason


@pytest.mark.parametrize("content", ["", "0", "soon"])
def test_a_zone_whose_range_is_unknown_is_a_reason(tmp_path, content):
    """Where the counter wraps must be known."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1, max_energy_range_uj=content)
    meters, (reason,) = open_meters(tmp_path)
    assert meters == []
    assert reason.startswith("cpu:")


def test_no_zones_and_no_folder_are_reasons(tmp_path):
    """A virtual machine, a container that masks them (dangling links), or no Linux."""
    (tmp_path / "intel-rapl:0").symlink_to(tmp_path / "masked")
    assert open_meters(tmp_path)[0] == []
    assert "modprobe" in open_meters(tmp_path)[1][0]
    assert open_meters(tmp_path / "none")[0] == []
    assert "bare metal" in open_meters(tmp_path / "none")[1][0]


def test_discover_leaves_to_codecarbon_only_what_rapl_does_not_cover(tmp_path):
    """With both counters nothing is estimated; without the memory's it alone is."""
    _, memory = one_socket(tmp_path)
    methods = {domain.name: domain.method for meter in discover(rapl_root=tmp_path).meters for domain in meter.domains}
    assert methods["cpu"] is methods["dram"] is Method.COUNTER
    memory.rename(tmp_path / "gone")
    found = discover(rapl_root=tmp_path)
    methods = {domain.name: domain.method for meter in found.meters for domain in meter.domains}
    assert (methods["cpu"], methods["dram"]) == (Method.COUNTER, Method.ESTIMATED)
