"""Grid intensity by region from the tables that codecarbon ships: offline, validated first, each with its basis.

codecarbon answers an unknown region with the world average and a log line, so a region is looked up in its tables before it is
asked for. What the tables are (read from codecarbon 3.3.2's files and the pages they name):

- countries: Our World in Data's "lifecycle carbon intensity of electricity generation", after Ember;
- US states: EPA eGRID, total output emission rate (what leaves the stacks);
- Canadian provinces: Canada Energy Regulator's generation mix times combustion factors (hydro, nuclear and wind count zero);
- Chinese provinces: the ministry's official factors, CO2 of generation only;
- Nordic bidding zones: ENTSO-E's generation mix times factors that are lifecycle for hydro, wind and nuclear;
- Google Cloud regions: Google's region-carbon page, "operational gross emissions" of the grid;
- world: IEA, Global Energy & CO2 Status Report 2019, CO2 of generation.

All are yearly means. codecarbon is imported on first use (0.2-2 s), with its logger muted; nothing here opens a connection.
"""

from __future__ import annotations

import difflib
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from green_torch.errors import ArgumentError, UnknownRegionError
from green_torch.intensity.cloud_regions import cloud_regions
from green_torch.records import IntensityPoint

if TYPE_CHECKING:
    from collections.abc import Iterator

WORLD = "world average, no region set"
_WORLD_G_PER_KWH = 475.0  # IEA, as in codecarbon's own table; used only where that table can't be read
_WORLD_SOURCE = "IEA, Global Energy & CO2 Status Report 2019"
_ALIASES = {"UK": "GB", "EL": "GR"}  # reserved in ISO 3166-1 for these countries, and widely typed
_NEAREST = 5


@dataclass(frozen=True, slots=True)
class _Zone:
    """A row of one of codecarbon's tables: what to ask it for, and what the answer means."""

    code: str
    name: str
    iso3: str
    region: str | None  # as codecarbon spells it; None for the country itself
    table: str
    basis: str
    year: int | None


def table_point(region: str) -> IntensityPoint:
    """The yearly mean of a country, subdivision or cloud region, whatever its case.

    Raises:
        UnknownRegionError: no table has it; the message names the nearest ones.
        ArgumentError: not a string, or codecarbon can't be imported.
    """
    if not isinstance(region, str):
        raise ArgumentError(f'region={region!r} is not a string: type region="FR", say.')
    try:
        zones = _zones()
    except Exception as error:  # a broken codecarbon may raise anything
        raise ArgumentError(
            f"region={region!r} needs codecarbon's tables, which can't be read ({type(error).__name__}: {error}): "
            f"type pip install --force-reinstall 'codecarbon>=3.3.2,<4', or give the figure itself: intensity=<gCO2e/kWh>."
        ) from error
    code = _canonical(region)
    zone = zones.get(code)
    if zone is not None:
        return _point(zone, code, zone.name)
    cloud = cloud_regions().get(code)
    if cloud is not None and cloud.zone in zones:
        return _point(zones[cloud.zone], code, f"{cloud.location} on the grid of {cloud.zone}")
    raise UnknownRegionError(_unknown(region, code, zones))


def world_point() -> IntensityPoint:
    """The world average, named as such, for a run without a region."""
    try:
        value_g = float(_source().get_carbon_intensity_per_source_data()["world_average"])
        source = f"{_stamp()} ({_WORLD_SOURCE})"
    except Exception as error:  # the run goes on without codecarbon: the same figure, and the source says so
        value_g = _WORLD_G_PER_KWH
        source = f"{_WORLD_SOURCE} (codecarbon's tables can't be read: {type(error).__name__}: {error})"
    return IntensityPoint(value_g, region=WORLD, source=source, basis="direct")


def known_regions() -> tuple[str, ...]:
    """Every code that :func:`table_point` takes, sorted."""
    zones = _zones()
    return tuple(sorted({*zones, *(code for code, row in cloud_regions().items() if row.zone in zones)}))


@contextmanager
def _muted() -> Iterator[None]:
    """Silences codecarbon's logger while we use it (importing it sets level and handler), and leaves it as it was."""
    logger = logging.getLogger("codecarbon")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@cache
def _source() -> Any:
    """The reader of codecarbon's own files."""
    with _muted():
        from codecarbon.input import DataSource  # slow: on first use

        return DataSource()  # type: ignore[no-untyped-call]  # codecarbon is not annotated there


def _stamp() -> str:
    return f"codecarbon {version('codecarbon')} tables"


def _point(zone: _Zone, code: str, place: str) -> IntensityPoint:
    with _muted():
        from codecarbon.core.emissions import Emissions  # slow: on first use
        from codecarbon.core.units import Energy
        from codecarbon.external.geography import CloudMetadata, GeoMetadata

        emissions, one_kwh = Emissions(_source()), Energy.from_energy(1.0)
        if ":" in zone.code:
            provider, _, name = zone.code.partition(":")
            kg = emissions.get_cloud_emissions(one_kwh, CloudMetadata(provider=provider, region=name))
        else:
            kg = emissions.get_private_infra_emissions(one_kwh, GeoMetadata(country_iso_code=zone.iso3, region=zone.region))
    return IntensityPoint(
        g_per_kwh=round(kg * 1000.0, 6),
        region=code,
        source=f"{_stamp()} ({zone.table}; {place})",
        basis=zone.basis,
        year=zone.year,
    )


def _canonical(region: str) -> str:
    """``fra`` -> ``FR``, ``usa_ca`` -> ``US-CA``, ``AWS:US-West-2`` -> ``aws:us-west-2``."""
    text = region.strip()
    if ":" in text:
        return text.lower()
    country, dash, subdivision = text.upper().replace("_", "-").partition("-")
    return _alpha2().get(country, _ALIASES.get(country, country)) + dash + subdivision


@cache
def _alpha2() -> dict[str, str]:
    """ISO 3166-1 alpha-3 to alpha-2."""
    import pycountry  # comes with codecarbon

    return {country.alpha_3: country.alpha_2 for country in pycountry.countries}


@cache
def _zones() -> dict[str, _Zone]:
    """Every row of codecarbon's tables by its canonical code."""
    source = _source()
    zones = (*_countries(source), *_states(source), *_provinces(source), *_china(source), *_nordic(source), *_google(source))
    return {zone.code: zone for zone in zones}


def _countries(source: Any) -> Iterator[_Zone]:
    table = "Our World in Data after Ember, lifecycle mean of the country"
    for iso3, row in source.get_global_energy_mix_data().items():
        if iso3 in _alpha2() and row.get("carbon_intensity") is not None:
            yield _Zone(_alpha2()[iso3], row["country_name"], iso3, None, table, "lifecycle", row.get("year"))


def _states(source: Any) -> Iterator[_Zone]:
    data = source.get_country_emissions_data("usa")
    table, year = data["_source"]["name"], data["_source"].get("year")
    for name, row in data.items():
        if not name.startswith("_") and name != "usa":
            yield _Zone(f"US-{row['regionCode']}", name.title(), "USA", name, table, "direct", year)


def _provinces(source: Any) -> Iterator[_Zone]:
    import pycountry  # comes with codecarbon

    table = "Canada Energy Regulator's generation mix x combustion factors"
    year = re.search(r"/(\d{4})/", source.config["can_energy_mix_data_path"])
    codes = {place.name.lower(): place.code for place in pycountry.subdivisions if place.country_code == "CA"}
    codes.setdefault("quebec", "CA-QC")  # named Québec in some releases of pycountry
    for name in source.get_country_energy_mix_data("can"):
        code = codes.get(name)
        if code is not None:
            yield _Zone(code, name.title(), "CAN", name, table, "direct", int(year[1]) if year else None)


def _china(source: Any) -> Iterator[_Zone]:
    table = "Ministry of Ecology and Environment of China, CO2 of the province's electricity"
    for code, row in source.get_china_provincial_emissions_data()["data"].items():
        yield _Zone(code, row["description"], "CHN", row["names"][0], table, "direct", row.get("year"))


def _nordic(source: Any) -> Iterator[_Zone]:
    table = "ENTSO-E generation mix x codecarbon's factors, lifecycle for hydro, wind and nuclear"
    countries = {"SE": "SWE", "NO": "NOR"}  # Finland's one zone is the country
    for zone, row in source.get_nordic_country_energy_mix_data()["data"].items():
        country = zone[:2]
        if country in countries:
            yield _Zone(f"{country}-{zone}", row["description"], countries[country], zone, table, "lifecycle", row.get("year"))


def _google(source: Any) -> Iterator[_Zone]:
    table = "Google's region-carbon page, operational emissions of the grid"
    for row in source.get_cloud_emissions_data().to_dict("records"):
        code = f"{row['provider']}:{row['region']}".lower()
        if code != "gcp:me-cenrtal1":  # misspelt there; ours has me-central1
            yield _Zone(code, f"{row['city']}, {row['country_name']}", row["countryIsoCode"], None, table, "direct", None)


def _unknown(region: str, code: str, zones: dict[str, _Zone]) -> str:
    """What is wrong, what is near, and what to type."""
    import pycountry  # comes with codecarbon

    country = code.partition("-")[0]
    listed = pycountry.countries.get(alpha_2=country)
    if listed is not None and country not in zones:
        near = []
        told = f"region={region!r} is {listed.name}, for which codecarbon's tables have no figure. "
    else:
        near = list(dict.fromkeys([country] * (country in zones) + _nearest(region.strip().lower(), zones)))[:_NEAREST]
        told = f"region={region!r} is in none of codecarbon's tables nor in our list of cloud regions. "
    if near:
        told += "Nearest: " + ", ".join(f'"{key}"' + (f" ({zones[key].name})" if key in zones else "") for key in near) + ". "
    return (
        told + 'Type a country ("FR"), a subdivision ("US-CA"), a cloud region ("gcp:europe-west1"), '
        "or the figure itself: intensity=<gCO2e/kWh>."
    )


def _nearest(text: str, zones: dict[str, _Zone]) -> list[str]:
    """Codes spelt or named alike; for a code of two or three letters, those that begin alike."""
    if text and len(text) <= len("FRA"):
        short = len(text) == len("FR")
        countries = {
            (zone.code if short else zone.iso3).lower(): zone.code for zone in zones.values() if len(zone.code) == len("FR")
        }
        alike = [key for end in range(len(text), 0, -1) for key in sorted(countries) if key.startswith(text[:end])]
        return [countries[key] for key in dict.fromkeys(alike)]
    spelt: dict[str, list[str]] = {}
    for zone in zones.values():
        spelt.setdefault(zone.name.lower(), []).append(zone.code)
    for code in known_regions():
        spelt.setdefault(code.lower(), []).append(code)
    return [code for key in difflib.get_close_matches(text, spelt, n=_NEAREST, cutoff=0.6) for code in spelt[key]]
