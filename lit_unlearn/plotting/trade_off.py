"""A picture of models side by side: forgetting against utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.errors import ConfigError
from lit_unlearn.plotting.labels import place_labels
from lit_unlearn.plotting.style import BOUND, DUAL, FORGET, MARKERS, RETAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_unlearn.evaluation.results import Results

# Okabe–Ito, without the pale yellow. Not as many as there are markers, so that models with one colour have other markers.
_COLOURS = (RETAIN, FORGET, DUAL, "#CC79A7", BOUND, "#E69F00", "#56B4E9")

# Forget quality is drawn down to here: that of 400 rows reaches 1e-240, and 0 has no place on a logarithmic axis.
_MIN_QUALITY = 1e-30


def draw_trade_off(results: Sequence[Results], names: Sequence[str], target: Path) -> None:
    """Draw how well models forgot against what they still know: further up and to the right is better.

    Args:
        results: Results of the models.
        names: A name for each, written beside its marker.
        target: Picture to write; the suffix gives the format.

    Raises:
        ConfigError: If there is no measure of forgetting, or none of utility, that every model has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    forget = _find_shared_value(results, names, "forget_quality", "forget/probability")
    utility = _find_shared_value(results, names, "model_utility", "retain/probability")
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.ticklabel_format(useOffset=False)
    axes.margins(0.15)

    xs, ys = [], []
    for result in results:
        xs.append(result.aggregate[forget])
        ys.append(result.aggregate[utility])
    if forget == "forget_quality":
        xs = _set_p_value_axis(axes, xs)
    else:
        xs = [1 - x for x in xs]
        axes.set_xlabel("1 − answer probability on the forget set")
    axes.set_ylabel("model utility" if utility == "model_utility" else "answer probability on the retain set")

    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        colour, marker = _COLOURS[i % len(_COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, y, marker, color=colour, fillstyle="none", markersize=9, markeredgewidth=1.8)
    axes.grid(alpha=0.3)
    place_labels(axes, list(zip(xs, ys, strict=True)), names)
    figure.savefig(target, dpi=150)


def _set_p_value_axis(axes: Axes, qualities: Sequence[float]) -> list[float]:
    """Make the x-axis logarithmic, ending at 1, and return the coordinates there."""
    note = "" if min(qualities) >= _MIN_QUALITY else f"; below {_MIN_QUALITY:g} drawn there"
    axes.set_xlabel(f"forget quality, p-value (1: like the retain-only model{note})")
    axes.set_xscale("log")
    # A single tiny value would push all others together.
    xs = [max(quality, _MIN_QUALITY) for quality in qualities]
    low = min(-1, math.floor(math.log10(min(xs))))
    axes.set_xlim(10 ** (1.15 * low), 10 ** (-0.15 * low))
    axes.set_xticks([10.0**exponent for exponent in range(0, low - 1, low // 8)])
    axes.minorticks_off()
    return xs


def _find_shared_value(results: Sequence[Results], names: Sequence[str], preferred: str, fallback: str) -> str:
    """Return the name of a value that every model has."""
    for key in (preferred, fallback):
        lacking = [name for name, result in zip(names, results, strict=True) if result.aggregate.get(key) is None]
        if not lacking:
            return key
    raise ConfigError(
        f"the picture needs '{preferred}' or '{fallback}' of every model; even '{fallback}' is missing from the results of "
        f"{', '.join(lacking)}."
    )
