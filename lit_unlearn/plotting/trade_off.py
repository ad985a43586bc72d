"""A picture of models side by side: forgetting against utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.plotting.labels import place_labels
from lit_unlearn.plotting.style import BOUND, DUAL, FORGET, MARKERS, RETAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_unlearn.evaluation.results import Results

_COLOURS = (RETAIN, FORGET, DUAL, "#CC79A7", BOUND, "#E69F00", "#56B4E9")  # Okabe–Ito, without the pale yellow; not as
# many as there are markers: models that share a colour have other markers
_LEAST = 1e-30  # forget quality drawn; those of 400 rows reach 1e-240, and 0 has no place on a logarithmic axis


def draw_trade_off(results: Sequence[Results], names: Sequence[str], target: Path) -> None:
    """Draws how well models forgot against what they still know: the further up and to the right, the better.

    Args:
        results: Of the models.
        names: One for each, beside its marker.
        target: Picture to write; the suffix gives the format.

    Raises:
        ValueError: If there is no measure of forgetting, or none of utility, that every model has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    forget = _shared(results, names, "forget_quality", "forget/probability")
    utility = _shared(results, names, "model_utility", "retain/probability")
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.ticklabel_format(useOffset=False)
    axes.margins(0.15)
    xs = [one.aggregate[forget] for one in results]
    ys = [one.aggregate[utility] for one in results]
    if forget == "forget_quality":
        xs = _logarithmic(axes, xs)
    else:
        xs = [1 - x for x in xs]
        axes.set_xlabel("1 − answer probability on the forget rows")
    axes.set_ylabel("model utility" if utility == "model_utility" else "answer probability on the retain rows")
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        colour, marker = _COLOURS[i % len(_COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, y, marker, color=colour, fillstyle="none", markersize=9, markeredgewidth=1.8)
    axes.grid(alpha=0.3)
    place_labels(axes, list(zip(xs, ys, strict=True)), names)
    figure.savefig(target, dpi=150)


def _logarithmic(axes: Axes, qualities: Sequence[float]) -> list[float]:
    """An axis that ends at 1, as p-values do, and the places there; the least would push the others together."""
    least = "" if min(qualities) >= _LEAST else f"; below {_LEAST:g} drawn there"
    axes.set_xlabel(f"forget quality, p-value (1: like the retain-only model{least})")
    axes.set_xscale("log")
    xs = [max(quality, _LEAST) for quality in qualities]
    low = min(-1, math.floor(math.log10(min(xs))))
    axes.set_xlim(10 ** (1.15 * low), 10 ** (-0.15 * low))
    axes.set_xticks([10.0**exponent for exponent in range(0, low - 1, low // 8)])
    axes.minorticks_off()
    return xs


def _shared(results: Sequence[Results], names: Sequence[str], best: str, other: str) -> str:
    """The name of a value that every model has."""
    for key in (best, other):
        lacking = [name for name, one in zip(names, results, strict=True) if one.aggregate.get(key) is None]
        if not lacking:
            return key
    raise ValueError(
        f"the picture needs '{best}' or '{other}' of every model; not even the latter is there of {', '.join(lacking)}."
    )
