"""The hard constraint and its price: pictures of the runs of the stage ``bounds``.

    python benchmarks/quality/bounds.py

Runs that failed are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import protocol
from choose import read, retain_nll, values, wanted_truth_ratio

from lit_unlearn.plotting.style import BOUND, DUAL, FORGET, LINES, MARKERS, RETAIN, legend_above, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (FORGET, RETAIN, DUAL, "#CC79A7")

Series = dict[str, list[dict[str, Any]]]


def series(results: Path) -> Series:
    """The runs by what they have in common: a start of λ and step size each with all bounds; fixed weights with each other."""
    found: Series = {}
    for run in read(results, "bounds"):
        if "error" in run:
            continue
        facts = run["unit"]["facts"]
        found.setdefault("fixed" if "weight" in facts else f"λ₀ {facts['first']}, η {facts['rate']}", []).append(run)
    for runs in found.values():
        runs.sort(key=lambda run: run["unit"]["facts"].get("bound") or run["unit"]["facts"]["weight"])
    return found


def growth(run: dict[str, Any]) -> float:
    """Retain NLL at the end, as a multiple of that before."""
    value, _ = retain_nll(run)
    return value / run["report"]["before"]["constraint/nll/value"]


def draw_bound(found: Series, target: Path) -> None:
    """Where the retain NLL ended, against where it was allowed to."""
    with picture([target], 6, 3.6) as figure:
        axes = figure.subplots()
        allowed = [1 + bound for bound in protocol.BOUNDS]
        axes.plot(allowed, allowed, color=BOUND, label="bound")
        for (name, runs), line, marker, colour in zip(_dual(found), LINES, MARKERS, COLOURS, strict=False):
            axes.plot(
                [1 + run["unit"]["facts"]["bound"] for run in runs], [growth(run) for run in runs],
                line, marker=marker, color=colour, fillstyle="none", label=name,
            )  # fmt: skip
        for run in found.get("fixed", []):
            axes.axhline(growth(run), color="0.6", linewidth=0.8)
            weight = f"fixed {run['unit']['facts']['weight']:g}"
            axes.annotate(weight, (1, growth(run)), (3, 2), xycoords=("axes fraction", "data"), textcoords="offset points", color="0.4")  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlabel="bound / retain NLL before", ylabel="retain NLL at the end / before"
        )
        _plain_ticks(axes, allowed)
        legend_above(axes)


def draw_price(found: Series, wanted: float, target: Path) -> None:
    """What was forgotten, against the bound and against the multiplier at the end; and what a retain-only model has."""
    with picture([target], 8, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, runs), line, marker, colour in zip(_dual(found), LINES, MARKERS, COLOURS, strict=False):
            how = {"marker": marker, "color": colour, "fillstyle": "none", "label": name}
            forgotten = [values(run)["forget/truth_ratio"] for run in runs]
            left.plot([1 + run["unit"]["facts"]["bound"] for run in runs], forgotten, line, **how)
            last = [run["report"]["constraints"]["nll"]["multiplier_after"] for run in runs]
            right.plot(last, forgotten, linestyle="", **how)
        fixed = found.get("fixed", [])
        right.plot(
            [run["unit"]["facts"]["weight"] for run in fixed],
            [values(run)["forget/truth_ratio"] for run in fixed],
            "x", color="0.4", label="fixed weight",
        )  # fmt: skip
        left.set(xscale="log", xlabel="bound / retain NLL before", ylabel="truth ratio of the forget rows")
        for axes in (left, right):
            axes.axhline(wanted, color=BOUND, label="retain-only model")
        right.set(xscale="symlog", xlim=(-0.5, 1e4), xlabel="λ at the end, or fixed weight")
        _plain_ticks(left, [1 + bound for bound in protocol.BOUNDS])
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper left", ncols=6)


def _dual(found: Series) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(name, runs) for name, runs in found.items() if name != "fixed"]


def _plain_ticks(axes: Axes, places: Sequence[float]) -> None:
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--pictures", type=Path, default=protocol.ROOT / "docs/pictures")
    options = parser.parse_args(arguments)
    found = series(options.results)
    draw_bound(found, options.pictures / "bound.png")
    draw_price(found, wanted_truth_ratio(options.results), options.pictures / "price.png")


if __name__ == "__main__":
    main()
