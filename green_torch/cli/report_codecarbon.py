"""A report as codecarbon's emissions.csv: a row a run, in kg and kWh, for whoever reads that format already.

As in codecarbon's own files, energy and power are the facility's: IT times PUE. What we don't know stays empty.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from green_torch.cli.report_exports import utc
from green_torch.ledger import group
from green_torch.units import G_PER_KG, joules_to_kwh, kwh_to_joules

if TYPE_CHECKING:
    from green_torch.cli.report import Report
    from green_torch.ledger import Run


def rows(report: Report) -> list[dict[str, Any]]:
    """A row for each run, with every column of this codecarbon's version, in its order."""
    os.environ.setdefault("CODECARBON_LOG_LEVEL", "error")
    from codecarbon.output_methods.emissions_data import EmissionsData  # slow: only for this format

    return [dict(EmissionsData(**_row(run)).values) for one in report.groups for run in one.runs]


def _row(run: Run) -> dict[str, Any]:
    manifest, grid, duration_s = run.manifest, run.manifest.intensity, run.duration_s
    emissions_g = group("", [run]).operational_g
    kg = None if emissions_g is None else emissions_g / G_PER_KG
    energy = {kind: _kwh(run, prefix) for kind, prefix in (("cpu", "cpu"), ("gpu", "gpu"), ("ram", "dram"))}
    power = {
        f"{kind}_power": None if value is None or not duration_s else kwh_to_joules(value) / duration_s
        for kind, value in energy.items()
    }
    facility_j = run.totals.facility_energy_j
    provider, _, cloud_region = (grid.region if grid else "").partition(":")
    country = _country(grid.region if grid and not cloud_region else "")
    gpus = [domain for domain in manifest.domains if domain.name.startswith("gpu")]
    cpus = [domain.device for domain in manifest.domains if domain.name.startswith("cpu")]
    return {
        "timestamp": utc(run.ended_unix_ns).partition("+")[0],
        "project_name": run.project,
        "run_id": run.run_id,
        "experiment_id": run.name,
        "duration": duration_s,
        "emissions": kg,
        "emissions_rate": None if kg is None or not duration_s else kg / duration_s,
        **power,
        **{f"{kind}_energy": value for kind, value in energy.items()},
        "energy_consumed": None if facility_j is None else joules_to_kwh(facility_j),
        "water_consumed": None,
        "country_name": country[0],
        "country_iso_code": country[1],
        "region": country[2],
        "cloud_provider": provider if cloud_region else "",
        "cloud_region": cloud_region,
        "os": manifest.versions.get("os", ""),
        "python_version": manifest.versions.get("python", ""),
        "codecarbon_version": manifest.versions.get("codecarbon", version("codecarbon")),
        "cpu_count": None,
        "cpu_model": cpus[0] if cpus else "",
        "gpu_count": len(gpus) * len({one.manifest.rank for one in run.segments}) or None,
        "gpu_model": gpus[0].device if gpus else "",
        "longitude": None,
        "latitude": None,
        "ram_total_size": None,
        "tracking_mode": "machine",  # counters and models alike are of whole devices
        "on_cloud": "Y" if cloud_region else "N",
        "pue": manifest.pue,
        "wue": None,
        **dict.fromkeys(("cpu_utilization_percent", "gpu_utilization_percent", "ram_utilization_percent", "ram_used_gb"), None),
    }


def _kwh(run: Run, prefix: str) -> float | None:
    """Facility energy of one kind of device; ``None`` where none was metered."""
    joules = [domain.energy_j for domain in run.totals.domains if domain.name.startswith(prefix)]
    return joules_to_kwh(sum(joules) * run.manifest.pue) if joules else None


def _country(region: str) -> tuple[str, str, str]:
    """Name, three-letter code and subdivision of "US-CA"; empty where the region is no country's."""
    import pycountry  # comes with codecarbon

    code, _, subdivision = region.partition("-")
    country = pycountry.countries.get(alpha_2=code.upper()) if len(code) == len("FR") else None
    return (country.name, country.alpha_3, subdivision) if country else ("", "", "")
