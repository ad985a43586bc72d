"""Draw the constraint and its price: pictures of the runs of the stage ``bounds``.

    python -m benchmarks.quality.bound_pictures

Runs that failed are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality import protocol
from benchmarks.quality.results_files import RESULTS, Result, read_results
from benchmarks.quality.selection_rule import get_retain_nll, get_values, retain_only_truth_ratio
from lit_unlearn.plotting.style import BOUND, DUAL, FORGET, LINES, MARKERS, RETAIN, legend_above, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (FORGET, RETAIN, DUAL, "#CC79A7")
RELATIVE_BOUNDS = [1 + bound for bound in protocol.BOUNDS]
FIXED = "fixed"

Series = dict[str, list[Result]]


def read_series(results: Path) -> Series:
    """Return the runs by what they have in common: first λ and step size with all bounds, or fixed weights."""
    series: Series = {}
    for run in read_results(results, "bounds"):
        if "error" in run:
            continue
        facts = run["unit"]["facts"]
        name = FIXED if "weight" in facts else f"λ₀ {facts['first']}, η {facts['rate']}"
        series.setdefault(name, []).append(run)
    for runs in series.values():
        runs.sort(key=_bound_or_weight)
    return series


def relative_growth(run: Result) -> float:
    """Return the retain NLL at the end of a run, as a multiple of that before."""
    value, _ = get_retain_nll(run)
    return value / run["report"]["before"]["constraint/nll/value"]


def draw_bound(series: Series, target: Path) -> None:
    """Draw the retain NLL at the end against the bound."""
    with picture([target], 6, 3.6) as figure:
        axes = figure.subplots()
        axes.plot(RELATIVE_BOUNDS, RELATIVE_BOUNDS, color=BOUND, label="bound")
        for runs, line, style in _styled_dual_runs(series):
            axes.plot(list(map(_relative_bound, runs)), list(map(relative_growth, runs)), line, **style)
        # A fixed weight has no bound: its runs are horizontal lines.
        for run in series.get(FIXED, []):
            growth = relative_growth(run)
            axes.axhline(growth, color="0.6", linewidth=0.8)
            label = f"fixed {run['unit']['facts']['weight']:g}"
            coordinates = ("axes fraction", "data")
            axes.annotate(label, (1, growth), (3, 2), xycoords=coordinates, textcoords="offset points", color="0.4")
        axes.set(
            xscale="log", yscale="log", xlabel="bound / retain NLL before", ylabel="retain NLL at the end / before"
        )
        _set_plain_ticks(axes, RELATIVE_BOUNDS)
        legend_above(axes)


def draw_price(series: Series, retain_only: float, target: Path) -> None:
    """Draw the forget set's truth ratio against the bound, and against the multiplier at the end.

    Args:
        series: Runs from `read_series`.
        retain_only: Truth ratio of the retain-only model, which forgetting should reach and not pass.
        target: File to write.
    """
    with picture([target], 8, 3.6) as figure:
        by_bound, by_multiplier = figure.subplots(1, 2, sharey=True)
        for runs, line, style in _styled_dual_runs(series):
            truth_ratios = list(map(_truth_ratio, runs))
            by_bound.plot(list(map(_relative_bound, runs)), truth_ratios, line, **style)
            # Without a line: runs with neighbouring bounds can end with multipliers in any order.
            by_multiplier.plot(list(map(_final_multiplier, runs)), truth_ratios, linestyle="", **style)
        fixed = series.get(FIXED, [])
        weights, truth_ratios = list(map(_bound_or_weight, fixed)), list(map(_truth_ratio, fixed))
        by_multiplier.plot(weights, truth_ratios, "x", color="0.4", label="fixed weight")
        by_bound.set(xscale="log", xlabel="bound / retain NLL before", ylabel="truth ratio of the forget rows")
        for axes in (by_bound, by_multiplier):
            axes.axhline(retain_only, color=BOUND, label="retain-only model")
        # Multipliers can end at zero, which a plain logarithmic axis cannot show.
        by_multiplier.set(xscale="symlog", xlim=(-0.5, 1e4), xlabel="λ at the end, or fixed weight")
        _set_plain_ticks(by_bound, RELATIVE_BOUNDS)
        # One legend for both axes: these have all the labels.
        figure.legend(*by_multiplier.get_legend_handles_labels(), loc="outside upper left", ncols=6)


def _bound_or_weight(run: Result) -> float:
    facts = run["unit"]["facts"]
    return facts["bound"] if "bound" in facts else facts["weight"]


def _styled_dual_runs(series: Series) -> Iterator[tuple[list[Result], str, dict[str, Any]]]:
    """Yield the runs of every dual series with its line and the other arguments of ``plot``."""
    dual = dict(series)
    dual.pop(FIXED, None)
    # Not strict: another results folder can have fewer series than there are styles.
    for (name, runs), line, marker, colour in zip(dual.items(), LINES, MARKERS, COLOURS, strict=False):
        yield runs, line, {"marker": marker, "color": colour, "fillstyle": "none", "label": name}


def _relative_bound(run: Result) -> float:
    return 1 + run["unit"]["facts"]["bound"]


def _final_multiplier(run: Result) -> float:
    return run["report"]["constraints"]["nll"]["multiplier_after"]


def _truth_ratio(run: Result) -> float:
    return get_values(run)["forget/truth_ratio"]


def _set_plain_ticks(axes: Axes, positions: Sequence[float]) -> None:
    axes.set_xticks(positions, list(map("{:g}".format, positions)))
    # A logarithmic axis has minor ticks with labels of their own.
    axes.minorticks_off()


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--pictures", type=Path, default=protocol.ROOT / "docs/pictures", help="folder to write to")
    options = parser.parse_args(arguments)
    series = read_series(options.results)
    draw_bound(series, options.pictures / "bound.png")
    draw_price(series, retain_only_truth_ratio(options.results), options.pictures / "price.png")


if __name__ == "__main__":
    main()
