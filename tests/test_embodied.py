"""What making a card emitted: the table's rows, their look-up by the driver's name, and ``track(embodied="device")``."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

import pytest

import green_torch
from green_torch import footprint
from green_torch.embodied import embodied_for, made_device, made_devices
from green_torch.errors import ArgumentError, GreenTorchWarning
from green_torch.peaks import known_devices
from green_torch.sinks.codec import from_dict, to_dict
from green_torch.testing import ScriptedClock, ScriptedMeter

if TYPE_CHECKING:
    from green_torch.records import Domain, Reading

A100 = "NVIDIA A100-SXM4-40GB"


class CardMeter:
    """A scripted counter of GPUs under the names that a driver prints."""

    interval_s = None

    def __init__(self, clock: ScriptedClock, devices: dict[str, str], extra: dict[str, float] | None = None) -> None:
        self._meter = ScriptedMeter(clock, dict.fromkeys(devices, 320.0) | (extra or {}), period_s=0.1)
        self._devices = devices

    @property
    def domains(self) -> tuple[Domain, ...]:
        return tuple(replace(one, device=self._devices.get(one.name, one.device)) for one in self._meter.domains)

    def read(self) -> Reading:
        return self._meter.read()

    def close(self) -> None:
        self._meter.close()


def test_every_row_has_its_figure_within_its_spread_a_source_and_a_date():
    """No number of the table stands without what it rests on; one that rests on a model alone has no bounds made up for it."""
    assert len(made_devices()) >= 20
    for row in made_devices():
        assert row.kg > 0
        if row.basis.startswith("model"):
            assert (row.lo_kg, row.hi_kg) == (None, None), row.name
        else:
            assert 0 < row.lo_kg <= row.kg <= row.hi_kg, row.name
        assert "https://" in row.source
        assert row.spread
        assert row.basis
        assert date.fromisoformat(row.checked) >= date(2026, 11, 23)
        if row.server_kg is not None:
            assert 0 < row.server_lo_kg < row.server_kg < row.server_hi_kg
            assert "https://" in row.server_source


def test_every_row_is_a_card_of_the_peaks_table_or_two_of_them_never_share_one():
    """A driver's name finds one row at most, and each row is found by some known card's name, V100 32GB for one."""
    names = [name for known in known_devices() for name in known.examples] + ["NVIDIA H800 80GB HBM3"]
    found = {name: [row.name for row in made_devices() if row.matches(name)] for name in names}
    assert all(len(rows) <= 1 for rows in found.values())
    assert {row.name for row in made_devices()} == {rows[0] for rows in found.values() if rows}


@pytest.mark.parametrize(
    ("device", "kg"),
    [
        (A100, 127.6),  # arXiv 2509.00093
        ("NVIDIA H100 80GB HBM3", 1312 / 8),  # NVIDIA's PCF of a board of eight
        ("NVIDIA B200", 2274 / 8),
        ("NVIDIA A100-PCIE-40GB", 181),
        ("Tesla V100-SXM2-32GB", 290.0),
    ],
)
def test_published_figures_are_those_of_the_sources(device, kg):
    """One card's share of what its maker or a study tells."""
    assert made_device(device).kg == pytest.approx(kg)


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40", "NVIDIA GH200 480GB", "cpu", "", "A100"])
def test_an_unknown_device_has_no_footprint(device):
    """A slice, a card without a published figure and half a name are not guessed."""
    assert embodied_for(device) is None


def test_a_count_and_a_server_share_add_up():
    """Eight A100s are eight times one; with the server, 381 kg come to each."""
    one, eight = embodied_for(A100), embodied_for(A100, 8, lifetime_years=6, expected_utilization=0.85)
    assert eight.manufacturing_kg == pytest.approx(8 * one.manufacturing_kg)
    assert (eight.manufacturing_lo_kg, eight.manufacturing_hi_kg) == pytest.approx((8 * 127.6, 8 * 319.3))
    assert (eight.lifetime_years, eight.expected_utilization) == (6, 0.85)
    assert embodied_for(A100, server=True).manufacturing_kg == pytest.approx(127.6 + 381)
    assert "not known and left out" in embodied_for("NVIDIA L4", server=True).source


def test_no_card_has_the_server_of_another():
    """Server shares are those of AWS's A100, H100 and H200 machines, and of no other card's."""
    with_server = {row.name for row in made_devices() if row.server_kg is not None}
    assert with_server
    assert all(re.search(r"A100 SXM4|H100 SXM5|H200 SXM", name) for name in with_server)


def test_a_modelled_card_has_no_spread():
    """Neither for one, nor for several, nor beside cards that have one, nor with a server's."""
    alone = embodied_for("NVIDIA L40S", 2)
    assert (alone.manufacturing_kg, alone.manufacturing_lo_kg, alone.manufacturing_hi_kg) == (554.2, None, None)
    mixed, _ = tracked({"gpu0": A100, "gpu1": "NVIDIA L40S"})
    assert (mixed.embodied.manufacturing_lo_kg, mixed.embodied.manufacturing_hi_kg) == (None, None)
    assert embodied_for("NVIDIA H200", server=True).manufacturing_hi_kg is None


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"count": 1.5}, {"lifetime_years": 0}, {"expected_utilization": 0}, {"expected_utilization": 60}]
)
def test_nonsense_is_refused(wrong):
    """A count, lifetime or share that can't be."""
    with pytest.raises(ArgumentError):
        embodied_for(A100, **wrong)


def test_blooms_embodied_share_of_its_gpus():
    """1.08 million GPU hours at 150 kg over 6 years in use 85 % of them: the paper prints 0.003 kg an hour and 3.64 t (arXiv 2211.02001)."""
    bloom = green_torch.Embodied(150.0, "lower bound taken by the paper", lifetime_years=6, expected_utilization=0.85)
    hourly_g = footprint.embodied_g(bloom, 3600.0)
    assert hourly_g == pytest.approx(3.4, abs=0.05)
    assert 1.08e6 * hourly_g / 1e6 == pytest.approx(3.64, rel=0.01)


def tracked(devices, extra=None):
    """The manifest and summary of a short run on these devices."""
    clock = ScriptedClock()
    meters = [CardMeter(clock, devices, extra)]
    with green_torch.track(clock=clock, meters=meters, region="FR", embodied="device") as tracker:
        for _ in range(10):
            clock.advance(0.5)
            tracker.step()
    return tracker.manifest, tracker.summary()


def test_track_looks_up_the_gpus_that_it_meters():
    """Two A100s are charged together; the spread and the source go into the manifest, and into its file and back."""
    manifest, summary = tracked({"gpu0": A100, "gpu1": A100}, {"cpu": 50.0})
    assert manifest.embodied.manufacturing_kg == pytest.approx(2 * 127.6)
    assert manifest.embodied.manufacturing_hi_kg == pytest.approx(2 * 319.3)
    assert "2509.00093" in manifest.embodied.source
    assert summary.totals.embodied_g == pytest.approx(footprint.embodied_g(manifest.embodied, summary.totals.duration_s))
    assert from_dict(to_dict(manifest)) == manifest


@pytest.mark.parametrize(
    ("devices", "why"),
    [({"gpu0": A100, "gpu1": "NVIDIA L40"}, "no published figure for NVIDIA L40"), ({"cpu": "x"}, "no GPU is metered")],
)
def test_track_says_what_it_can_not_look_up(devices, why):
    """One warning that names the card and what to type; embodied emissions are not counted, not even in part."""
    with pytest.warns(GreenTorchWarning, match=rf"{why}.*embodied=150"):
        manifest, summary = tracked(devices)
    assert manifest.embodied is None
    assert summary.totals.embodied_g is None


def test_track_refuses_another_word():
    """``embodied="auto"`` raises before training, and names the word."""
    with pytest.raises(ArgumentError, match="'device'"):
        green_torch.track(embodied="auto")
