"""Draws a comparison: what each variant costs, block by block, and how far it is from the baseline, with the interval as whiskers.

Reads what ``green-torch compare --json`` or ``green-torch demo --json`` prints, or what ``Comparison.to_dict()`` gives::

    green-torch compare my_project.train:build --variants fp32,bf16 --json > comparison.json
    python examples/plot_comparison.py comparison.json comparison.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

UNITS = (("tokens", "token"), ("samples", "sample"), ("n_steps", "step"))
LESS, MORE, CANNOT_TELL = "#1b7837", "#b35806", "#888888"


def name_of(result: dict[str, Any]) -> str:
    """A variant's name; a run's, where runs on disk were compared."""
    name: str = result["name"] if "name" in result else result["variant"]["name"]
    return name


def draw(comparison: dict[str, Any], path: Path) -> None:
    """Writes a picture: at the left each block's cost, at the right the differences from the baseline."""
    ran = [result for result in comparison["results"] if result["blocks"]]
    if not ran:
        raise SystemExit("nothing was measured: there is nothing to draw")
    what = comparison["headline"]
    quantity, scale = ("energy_j", "mJ") if what == "energy" else ("duration_s", "ms")
    key, unit = next(one for one in UNITS if all(block[one[0]] for result in ran for block in result["blocks"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.4 + 0.6 * len(ran)), layout="constrained", sharey=True)
    places = range(len(ran))
    for place, result in zip(places, ran, strict=True):
        costs = [1e3 * block[quantity] / block[key] for block in result["blocks"] if block[quantity] is not None]
        left.plot(costs, [place] * len(costs), "|", color="black", markersize=14, alpha=0.6)
    left.set_yticks(places, [name_of(result) for result in ran])
    left.set_xlabel(f"{what}, {scale} per {unit} (each mark a block)")
    left.set_xlim(left=0)
    left.set_ylim(len(ran) - 0.4, -0.6)

    right.axvline(0, color="black", linewidth=0.8)
    for place, result in zip(places, ran, strict=True):
        against = comparison["differences"].get(name_of(result), {})
        found = against.get(what)
        if found is None:
            told = "not known" if against else "baseline"
            right.annotate(told, (0, place), xytext=(6, 0), textcoords="offset points", va="center", color=CANNOT_TELL)
            continue
        estimate = 100 * found["estimate"]
        colour = CANNOT_TELL if against["departure"] or not found["distinguishable"] else LESS if estimate < 0 else MORE
        whiskers = None if found["lo"] is None else [[estimate - 100 * found["lo"]], [100 * found["hi"] - estimate]]
        right.errorbar([estimate], [place], xerr=whiskers, fmt="o", color=colour, capsize=5)
        told = f"{estimate:+.1f} %" if found["distinguishable"] else "can't be told apart"
        told += f"\n{against['departure'].partition(':')[0]}" if against["departure"] else ""
        right.annotate(
            told, (estimate, place), xytext=(0, 8), textcoords="offset points", ha="center", color=colour, fontsize=9
        )
    right.margins(x=0.25)
    confidence = f"{100 * comparison['confidence']:g} % intervals"
    right.set_xlabel(f"{what} per {unit} against {comparison['baseline']}, % ({confidence})")
    modelled = "; power was modelled, so energy follows from time" if what == "time" else ""
    methods = ", ".join(f"{name} {method}" for name, method in ran[0]["methods"].items()) or "no meter"
    figure.suptitle(f"{ran[0]['model'] or 'model not known'}: joules by {methods}{modelled}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads, draws, and says where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="the JSON")
    parser.add_argument("picture", type=Path, help="the PNG, SVG or PDF to write")
    args = parser.parse_args()
    content = json.loads(args.comparison.read_text(encoding="utf-8"))
    draw(content.get("comparison", content), args.picture)
    print(args.picture)


if __name__ == "__main__":
    main()
