"""Grid intensity: every row of codecarbon's own files, the sourced cloud table, the user's figure, and wrong arguments."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_torch.errors import ArgumentError, UnknownRegionError
from green_torch.intensity import known_regions, pue_for, resolve
from green_torch.intensity.cloud_regions import cloud_regions
from green_torch.units import G_PER_KG

if TYPE_CHECKING:
    from green_torch.records import IntensityPoint

KG_PER_LB = 0.45359237  # the international pound


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test of this file may try to connect, not even behind an ``except``."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert tried == []


def codecarbon_file(name: str) -> Path:
    spec = find_spec("codecarbon")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "data" / name


def codecarbon_json(name: str) -> dict:
    return json.loads(codecarbon_file(name).read_text(encoding="utf-8"))


def point(region: str | None, intensity: object = None) -> IntensityPoint:
    return resolve(region, intensity).at(1_700_000_000_000_000_000)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that ends at the first try to connect."""
    guard = "import socket\ndef refuse(*a, **k): raise SystemExit('a connection was tried')\nsocket.socket.connect = socket.getaddrinfo = refuse\n"
    environ = {key: value for key, value in os.environ.items() if "CODECARBON" not in key} | environment
    return subprocess.run([sys.executable, "-c", guard + code], capture_output=True, text=True, check=False, env=environ)


def test_every_country_has_the_figure_and_year_of_codecarbons_file():
    """A country's alpha-3 code gives what stands in global_energy_mix.json, lifecycle."""
    table = codecarbon_json("private_infra/global_energy_mix.json")
    assert len(table) > 200
    for iso3, row in table.items():
        found = point(iso3)
        assert found.g_per_kwh == pytest.approx(row["carbon_intensity"], abs=1e-6)
        assert (found.basis, found.average, found.estimated, found.year) == ("lifecycle", True, True, row["year"])


@pytest.mark.parametrize("spelling", ["FR", "fr", "FRA", "fra", " Fr "])
def test_spellings_of_a_country_are_one_region(spelling):
    """Alpha-2, alpha-3, any case and stray blanks lead to the same canonical point."""
    assert point(spelling) == point("FR")
    assert point(spelling).region == "FR"


def test_uk_is_taken_for_great_britain():
    """The reserved code that everyone types is accepted."""
    assert point("uk") == point("GB")


def test_every_us_state_has_its_egrid_rate():
    """lb/MWh of usa_emissions.json, in g/kWh, with the table's own name and year."""
    table = codecarbon_json("private_infra/2023/usa_emissions.json")
    states = {row["regionCode"]: row for name, row in table.items() if not name.startswith("_") and name != "usa"}
    assert len(states) == 51
    for code, row in states.items():
        found = point(f"us-{code.lower()}")
        assert found.g_per_kwh == pytest.approx(row["emissions"] * KG_PER_LB, abs=1e-5)
        assert (found.region, found.basis, found.year) == (f"US-{code}", "direct", table["_source"]["year"])
        assert table["_source"]["name"] in found.source


def test_alpha_3_and_underscore_lead_a_subdivision_too():
    """USA_CA is US-CA."""
    assert point("usa_ca") == point("US-CA")


def test_canadian_provinces_follow_their_generation_mix():
    """Every province of codecarbon's file is known, and each is as codecarbon computes it."""
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    provinces = {"CA-QC": "quebec", "CA-ON": "ontario", "CA-AB": "alberta", "CA-NL": "newfoundland and labrador"}
    for code, name in provinces.items():
        kg = Emissions(DataSource()).get_region_emissions(Energy.from_energy(1.0), GeoMetadata("CAN", region=name))
        assert point(code).g_per_kwh == pytest.approx(kg * G_PER_KG, abs=1e-6)
        assert point(code).basis == "direct"
    listed = [region for region in known_regions() if region.startswith("CA-")]
    assert len(listed) == len(codecarbon_json("private_infra/2023/canada_energy_mix.json"))


def test_chinese_provinces_have_the_official_factor():
    """Each row of china_provincial_emissions.json answers to its ISO code."""
    for code, row in codecarbon_json("private_infra/2023/china_provincial_emissions.json")["data"].items():
        found = point(code)
        assert found.g_per_kwh == pytest.approx(row["emission_factor"])
        assert (found.region, found.basis, found.year) == (code, "direct", row["year"])


def test_nordic_bidding_zones_have_their_factor():
    """SE-SE1 to NO-NO5 answer with their row; Finland's single zone is the country."""
    rows = codecarbon_json("private_infra/nordic_emissions.json")["data"]
    for zone in (zone for zone in rows if zone != "FI"):
        found = point(f"{zone[:2]}-{zone}")
        assert found.g_per_kwh == pytest.approx(rows[zone]["emission_factor"])
        assert found.year == rows[zone]["year"]
    assert point("FI").g_per_kwh == codecarbon_json("private_infra/global_energy_mix.json")["FIN"]["carbon_intensity"]


def test_google_regions_have_googles_figure():
    """Each row of impact.csv answers to gcp:<region>, direct."""
    with codecarbon_file("cloud/impact.csv").open(encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if row["region"] != "me-cenrtal1"]  # misspelt by codecarbon
    assert len(rows) >= 39
    for row in rows:
        found = point(f"GCP:{row['region']}")
        assert found.g_per_kwh == pytest.approx(float(row["impact"]))
        assert (found.region, found.basis) == (f"gcp:{row['region']}", "direct")


def test_every_row_of_our_cloud_table_stands_on_a_known_grid_and_names_its_source():
    """AWS, Azure and newer Google regions take the figure of their country or state, and say so."""
    assert {code.partition(":")[0] for code in cloud_regions()} == {"aws", "azure", "gcp"}
    for code, row in cloud_regions().items():
        found = point(code.upper())
        assert found.g_per_kwh == point(row.zone).g_per_kwh
        assert found.basis == point(row.zone).basis
        assert found.region == code
        assert row.zone in found.source
        assert row.source.startswith("https://")


@pytest.mark.parametrize("table", ["cloud_regions.csv", "pue.csv"])
def test_every_row_of_our_tables_is_sourced_and_dated(table):
    """No row without an address and a day."""
    path = Path(__file__).parent.parent / "green_torch" / "data" / table
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert row["source"].startswith("https://")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["looked_up"])


def test_a_well_known_region_is_where_it_is():
    """us-west-2 is in Oregon, westeurope in the Netherlands."""
    assert point("aws:us-west-2").g_per_kwh == point("US-OR").g_per_kwh
    assert point("azure:westeurope").g_per_kwh == point("NL").g_per_kwh


def test_every_known_region_resolves_to_itself():
    """What the list of regions offers can be typed."""
    for region in known_regions():
        assert point(region).region == region


def test_the_source_stamps_codecarbons_version():
    """Figures move between releases, so the release is named."""
    for region in ("FR", "US-CA", "gcp:europe-west1", "aws:us-west-2", None):
        assert f"codecarbon {version('codecarbon')} tables" in point(region).source


def test_no_region_is_the_world_average_by_name():
    """The default is the figure of codecarbon's table, and carries its name."""
    found = point(None)
    assert found.region == "world average, no region set"
    assert found.g_per_kwh == codecarbon_json("private_infra/carbon_intensity_per_source.json")["world_average"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("FQ", "FR"),
        ("FRZ", "FR"),
        ("france", "FR"),
        ("Oregon", "US-OR"),
        ("US-ZZ", "US"),
        ("DE-BY", "DE"),
        ("us-west-2", "aws:us-west-2"),
        ("aws:us-wset-2", "aws:us-west-2"),
        ("gcp:europe-wst1", "gcp:europe-west1"),
        ("azure:westerope", "azure:westeurope"),
    ],
)
def test_an_unknown_region_names_the_nearest(typo, meant):
    """The message holds what was meant, in quotes, and the way out by a number."""
    with pytest.raises(UnknownRegionError) as caught:
        resolve(typo)
    assert f'"{meant}"' in str(caught.value)
    assert "intensity=" in str(caught.value)


def test_a_country_without_a_figure_is_told_apart_from_a_typo():
    """Liechtenstein exists; the table just has no row, and nothing near is offered in its place."""
    with pytest.raises(UnknownRegionError, match="Liechtenstein") as caught:
        resolve("LI")
    assert "Nearest" not in str(caught.value)


@pytest.mark.parametrize("region", ["", "   ", ":", "aws:", "-", "US-"])
def test_fragments_are_unknown_regions(region):
    """Nothing that is almost empty becomes the world average."""
    with pytest.raises(UnknownRegionError):
        resolve(region)


@pytest.mark.parametrize("region", [5, 3.5, b"FR", ["FR"]])
def test_a_region_that_is_no_string_is_an_argument_error(region):
    """The message says what to type."""
    with pytest.raises(ArgumentError, match="region"):
        resolve(region)


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_any_finite_figure_is_taken_as_it_is(value):
    """Zero included; the source says that the user gave it."""
    found = point(None, value)
    assert found.g_per_kwh == value
    assert found.source == "given by the user"


@pytest.mark.parametrize("value", [7, np.float32(7), np.int64(7)])
def test_any_kind_of_number_is_taken(value):
    """Python's and numpy's."""
    assert point(None, value).g_per_kwh == 7.0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf, "56", True, object()])
def test_an_impossible_figure_is_an_argument_error(value):
    """Negative, not finite, or no number at all."""
    with pytest.raises(ArgumentError, match="intensity"):
        resolve("FR", value)


def test_a_figure_wins_over_the_region_which_stays_its_name():
    """Both given: the number counts, whatever the region is called."""
    found = point("our own solar roof", 12.0)
    assert (found.g_per_kwh, found.region) == (12.0, "our own solar roof")


def test_a_provider_is_returned_as_it_is():
    """Anything with at() is a provider, region or not."""
    provider = resolve("FR")
    assert resolve(None, provider) is provider
    assert resolve("DE", provider) is provider


def test_a_constant_is_the_same_at_any_time():
    """A yearly mean belongs to no instant."""
    provider = resolve("FR")
    assert provider.at(0) == provider.at(2**62)
    assert provider.at(0).time_unix_ns is None


def test_cloud_regions_have_their_providers_pue():
    """The published average with its address; elsewhere no overhead is counted."""
    for region in ("aws:us-west-2", "AZURE:westeurope", "gcp:europe-west1"):
        pue, source = pue_for(region)
        assert 1.0 < pue < 1.3
        assert "https://" in source
    assert pue_for("FR") == pue_for(None) == pue_for("nowhere:1") == (1.0, "no facility overhead counted")


def test_codecarbons_logger_is_left_as_it_was():
    """The user's own codecarbon goes on talking."""
    resolve("FR")
    assert logging.getLogger("codecarbon").disabled is False


def test_a_lookup_prints_nothing_opens_nothing_and_leaves_the_environment_alone():
    """In a fresh process, with an API token set that codecarbon's tracker would use."""
    code = (
        "import os, sys\nbefore = dict(os.environ)\nfrom green_torch.intensity import resolve\n"
        "assert 'codecarbon' not in sys.modules and 'torch' not in sys.modules\n"
        "g = [resolve(region).at(0).g_per_kwh for region in ('FR', 'US-CA', 'gcp:europe-west1', None)]\n"
        "assert before == dict(os.environ)\nprint(len(g))"
    )
    done = python(code, CODECARBON_ELECTRICITYMAPS_API_TOKEN="none", ELECTRICITYMAPS_API_TOKEN="none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def test_without_codecarbon_the_world_average_stands_and_a_region_is_refused():
    """A broken codecarbon never stops a bare run; a region that can't be honoured is an argument error with the mend."""
    code = (
        "import sys\nsys.modules['codecarbon'] = None\nfrom green_torch.errors import ArgumentError\n"
        "from green_torch.intensity import resolve\npoint = resolve().at(0)\n"
        "print(point.g_per_kwh, point.region, '|', point.source)\n"
        "try:\n    resolve('FR')\nexcept ArgumentError as error:\n    print(error)"
    )
    done = python(code)
    assert done.stderr == ""
    assert "475.0 world average, no region set | IEA" in done.stdout
    assert "can't be read" in done.stdout
    assert "pip install" in done.stdout
