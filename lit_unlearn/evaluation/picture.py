"""Pictures of a run, and of models side by side."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.evaluation.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase

_FORGET, _RETAIN, _BOUND, _DUAL = "#D55E00", "#0072B2", "#000000", "#009E73"  # Okabe–Ito, told apart by everyone
_COLOURS = (_RETAIN, _FORGET, _DUAL, "#CC79A7", _BOUND, "#E69F00", "#56B4E9")  # theirs, without the pale yellow
_MARKERS = "os^DvPX*"  # not as many as there are colours: what shares one has another of the other
_LEAST = 1e-30  # forget quality drawn; those of 400 rows reach 1e-240, and 0 has no place on a logarithmic axis


def read_metrics(files: Sequence[Path]) -> dict[str, tuple[list[int], list[float]]]:
    """Reads a CSV logger's files.

    Args:
        files: The ``metrics.csv`` of a run and, before it, of those that it resumed; the later ones count.

    Returns:
        For each metric the optimizer steps and the values logged there.
    """
    series: dict[str, dict[int, float]] = {}
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        series.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in series.items()}


def draw_run(files: Sequence[Path], target: Path, epsilons: dict[str, float]) -> None:
    """Draws retention against its bound, λ, and forgetting, over the optimizer steps.

    Args:
        files: As for `read_metrics`.
        target: Picture to write; the suffix gives the format.
        epsilons: Upper bound of every constraint, by name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_metrics(files)
    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    retain, dual, forget = figure.subplots(3, 1, sharex=True)
    styles = ["-", "--", ":", "-."]
    for (name, epsilon), style in zip(epsilons.items(), styles * len(epsilons), strict=False):
        if f"constraint/{name}/value" in series:
            retain.plot(*series[f"constraint/{name}/value"], style, color=_RETAIN, alpha=0.6, label=f"{name}, per step")
            dual.plot(*series[f"multiplier/{name}"], style, color=_DUAL, label=f"λ {name}")
        if f"val/constraint/{name}/value" in series:
            retain.plot(*series[f"val/constraint/{name}/value"], "o", color=_RETAIN, label=f"{name}, all retain rows")
        retain.axhline(epsilon, color=_BOUND, linestyle=style, linewidth=1, label=f"ε {name} = {epsilon:.3g}")
    if "forget/loss" in series:
        forget.plot(*series["forget/loss"], color=_FORGET, alpha=0.6, label="forget objective, per step")
    if "val/forget/margin" in series:
        forget.plot(*series["val/forget/margin"], "o", color=_FORGET, label="mean logit margin, all forget rows")
    forget.set_yscale("log")
    retain.set_ylabel("retain loss\n(nats per token)")
    dual.set_ylabel("multiplier λ")
    forget.set_ylabel("forgetting")
    forget.set_xlabel("optimizer step")
    for axes in (retain, dual, forget):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(target, dpi=150)


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
    xs = [one["aggregate"][forget] for one in results]
    ys = [one["aggregate"][utility] for one in results]
    if forget == "forget_quality":
        xs = _logarithmic(axes, xs)
    else:
        xs = [1 - x for x in xs]
        axes.set_xlabel("1 − answer probability on the forget rows")
    axes.set_ylabel("model utility" if utility == "model_utility" else "answer probability on the retain rows")
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(x, y, marker, color=colour, fillstyle="none", markersize=9, markeredgewidth=1.8)
    axes.grid(alpha=0.3)
    _label(axes, list(zip(xs, ys, strict=True)), names)
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
        lacking = [name for name, one in zip(names, results, strict=True) if one["aggregate"].get(key) is None]
        if not lacking:
            return key
    raise ValueError(
        f"the picture needs '{best}' or '{other}' of every model; not even the latter is there of {', '.join(lacking)}."
    )


def _label(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes each name beside its marker, off the other names and markers; to one that is further away leads a line."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles the layout, on which distances depend
    taken = [_square(x, y, 6 * axes.figure.dpi / 72) for x, y in axes.transData.transform(points)]
    turns = [math.radians(degrees) for degrees in (0, 180, 90, 270, 45, 135, 225, 315)]
    places = [(r * math.cos(turn), r * math.sin(turn)) for r in (8, 20, 35, 50, 70, 90) for turn in turns]
    for name, point in zip(names, points, strict=True):
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize="small", parse_math=False)
        label.set_in_layout(False)
        costs = [_put(label, place, axes, taken) for place in places]
        nearest = places[costs.index(min(costs))]
        _put(label, nearest, axes, taken)
        taken += [label.get_window_extent(), *_line(label, axes)]
        line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        if math.hypot(*nearest) > 10:
            axes.annotate("", point, nearest, textcoords="offset points", arrowprops=line).set_in_layout(False)


def _put(label: Annotation, place: tuple[float, float], axes: Axes, taken: Sequence[BboxBase]) -> int:
    """Moves a label to an offset from its marker, in points; returns how bad that is."""
    x, y = (round(part) for part in place)
    label.set_position(place)
    label.set(ha="left" if x > 0 else "right" if x else "center", va="bottom" if y > 0 else "top" if y else "center")
    box = label.get_window_extent()
    outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
    crossed = sum(one.count_overlaps(taken) for one in _line(label, axes))
    return 100 * outside + 10 * box.count_overlaps(taken) + crossed


def _line(label: Annotation, axes: Axes) -> list[BboxBase]:
    """Squares along the line from a marker to its label, in pixels; none if the label is near."""
    x, y = axes.transData.transform(label.xy)
    dx, dy = (part * axes.figure.dpi / 72 for part in label.get_position())
    steps = range(8, int(math.hypot(*label.get_position())) - 1, 3)
    return [_square(x + dx * step / steps.stop, y + dy * step / steps.stop, 1) for step in steps]


def _square(x: float, y: float, half: float) -> BboxBase:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)
