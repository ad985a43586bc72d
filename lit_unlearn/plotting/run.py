"""Pictures of a run's numbers: how the multiplier enforces a bound, and what forgetting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.plotting.labels import place_labels
from lit_unlearn.plotting.run_log import NothingToDraw, Run, Series
from lit_unlearn.plotting.style import BOUND, DUAL, FORGET, LINES, MARKERS, RETAIN, legend_above, picture, suit_scale
from lit_unlearn.plotting.tokens import draw_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORGOTTEN = {
    "nll": "NLL of the forget rows (nats per token): the further to the right, the more is forgotten",
    "loss": "forget objective, all forget rows",
}
_DOTS: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
_LABELLED = 3  # validations along a trajectory, beside the first, the last and the kept one


def draw_run(run: Run, folder: Path, formats: Sequence[str] = ("png", "svg")) -> dict[str, list[Path] | str]:
    """Draws every picture that there is something for.

    Args:
        run: From `read_run`.
        folder: Where to; made if it is not there.
        formats: Suffixes of the files.

    Returns:
        By name of the picture its files, or why there is none.

    Raises:
        OSError: If a file cannot be written.
    """
    kinds = {"dual": draw_dual, "trajectory": draw_trajectory} if run.constraints else {"teaching": draw_teaching}
    drawn: dict[str, list[Path] | str] = {}
    for name, draw in {**kinds, "tokens": draw_tokens}.items():
        targets = [folder / f"{name}.{suffix}" for suffix in formats]
        try:
            draw(run, *targets)
            drawn[name] = targets
        except NothingToDraw as nothing:
            drawn[name] = str(nothing)
    return drawn


def draw_dual(run: Run, *targets: Path) -> None:
    """Draws retention against its bound, λ, and forgetting, over the optimizer steps.

    Args:
        run: Of `LitUnlearn`.
        targets: Pictures to write; the suffixes give the formats.

    Raises:
        NothingToDraw: If the run has no constraint.
    """
    names = run.constraints
    if not names:
        raise NothingToDraw("no constraint was logged")
    with picture(targets, 7, 2 * (len(names) + 2)) as figure:
        *bounds, dual, forget = figure.subplots(len(names) + 2, 1, sharex=True)
        for axes, name in zip(bounds, names, strict=True):
            _bound(axes, run, name)
        for i, name in enumerate(names):
            dual.plot(*run.per_step(f"multiplier/{name}"), LINES[i % len(LINES)], color=DUAL, label=f"λ {name}")
        dual.set_ylabel("multiplier λ")
        _measured(forget, run, "forget/loss", FORGET)
        forget.set_ylabel("forget objective")
        forget.set_xlabel("optimizer steps taken")
        for axes in (*bounds, dual, forget):
            if run.kept_step is not None:
                label = f"kept model, step {run.kept_step}" if axes is bounds[0] else None
                axes.axvline(run.kept_step, color="0.4", linestyle=(0, (1, 1)), linewidth=1.6, label=label)
            if axes is not dual or len(names) > 1:
                legend_above(axes)
        figure.align_ylabels()


def _bound(axes: Axes, run: Run, name: str) -> None:
    """One constraint over the steps; where its bound is broken is hatched."""
    _measured(axes, run, f"constraint/{name}/value", RETAIN)
    axes.set_ylabel(f"constraint\n{name}")
    epsilon = run.epsilon(name)
    if epsilon is None:
        return
    _line_at(axes, epsilon)
    steps, values = run.per_step(f"constraint/{name}/value")
    above = [value > epsilon for value in values]
    if any(above):
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": FORGET, "hatch": "////", "linewidth": 0, "zorder": 3}
        axes.fill_between(steps, values, epsilon, above, interpolate=True, label="bound broken", **style)


def _line_at(axes: Axes, epsilon: float) -> None:
    axes.axhline(epsilon, color=BOUND, linestyle="--", linewidth=1.2, label=f"ε = {epsilon:.3g}")


def _measured(axes: Axes, run: Run, name: str, colour: str) -> None:
    """A value as every step and as every validation measured it."""
    every, whole = run.per_step(name), run.whole(name)
    axes.plot(*every, color=colour, linewidth=0.9, alpha=0.6, label="rows of the step")
    axes.plot(*whole, "o", color=colour, label="all rows", **_DOTS)
    suit_scale(axes, [value for value in every[1] + whole[1] if math.isfinite(value)])


def draw_trajectory(run: Run, *targets: Path) -> None:
    """Draws what forgetting costs: from validation to validation, retention over forgetting, and the bound.

    Args:
        run: Of `LitUnlearn`, with validations.
        targets: Pictures to write; the suffixes give the formats.

    Raises:
        NothingToDraw: If nothing was measured on whole streams.
    """
    metric = next((name for name in _FORGOTTEN if f"val/forget/{name}" in run.metrics), None)
    names = [name for name in run.constraints if f"val/constraint/{name}/value" in run.metrics]
    if metric is None or not names:
        raise NothingToDraw("no validation measured the forget rows and a constraint")
    forgotten = dict(zip(*run.whole(f"forget/{metric}"), strict=True))
    with picture(targets, 7, 3.8 * len(names)) as figure:
        for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
            kept = dict(zip(*run.whole(f"constraint/{name}/value"), strict=True))
            points = {step: (forgotten[step], kept[step]) for step in sorted(forgotten.keys() & kept.keys())}
            axes.set_xlabel(_FORGOTTEN[metric])
            axes.set_ylabel(f"constraint {name}")
            _path(axes, {step: point for step, point in points.items() if all(map(math.isfinite, point))}, run, name)


def _path(axes: Axes, points: dict[int, tuple[float, float]], run: Run, name: str) -> None:
    """The way through the validations, labelled here and there."""
    if not points:
        return
    epsilon, steps, places = run.epsilon(name), list(points), list(points.values())
    axes.plot(*zip(*places, strict=True), color="0.55", linewidth=1, zorder=1)
    broken = [epsilon is not None and y > epsilon for _, y in places]
    for now, marker, colour, label in ((False, "o", RETAIN, "bound holds"), (True, "X", FORGET, "bound broken")):
        mine = [place for place, one in zip(places, broken, strict=True) if one == now]
        if mine:
            axes.plot(*zip(*mine, strict=True), marker, color=colour, label=label, **_DOTS)
    axes.margins(0.1)
    suit_scale(axes, [y for _, y in places])
    if epsilon is not None:
        _line_at(axes, epsilon)
        low, high = axes.get_ylim()
        high = max(high, epsilon + 0.15 * (high - low))  # there is always a part where the bound is broken
        axes.axhspan(epsilon, high, facecolor="0.93", zorder=0)
        axes.set_ylim(low, high)
    if run.kept_step in points:
        style = {**_DOTS, "markersize": 13}
        axes.plot(*points[run.kept_step], "*", color="black", label="kept model", **style)
    legend_above(axes)
    _arrows(axes, places)
    place_labels(axes, places, [_step_label(step, steps, run.kept_step) for step in steps])


def _step_label(step: int, steps: Sequence[int], kept: int | None) -> str:
    """What is written beside a point; nothing beside most."""
    if step == 0:
        return "before"
    between = {steps[len(steps) * i // (_LABELLED + 1)] for i in range(1, _LABELLED + 1)}
    return f"step {step}" if step in {kept, steps[-1], *between} else ""


def _arrows(axes: Axes, places: Sequence[tuple[float, float]]) -> None:
    """The direction, on the longest parts of the way."""
    pixels = axes.transData.transform(places)
    parts = [(math.dist(a, b), i) for i, (a, b) in enumerate(pairwise(pixels))]
    for _, i in sorted((part for part in parts if part[0] > 20), reverse=True)[:_LABELLED]:
        head = axes.transData.inverted().transform((pixels[i] + 1.4 * pixels[i + 1]) / 2.4)
        style = {"arrowstyle": "-|>", "color": "0.55", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", tuple(head), places[i], arrowprops=style)


def draw_teaching(run: Run, *targets: Path) -> None:
    """Draws what a model learned: its NLL on every stream, over the optimizer steps.

    Args:
        run: Of `LitFinetune`.
        targets: Pictures to write; the suffixes give the formats.

    Raises:
        NothingToDraw: If no NLL was logged.
    """
    names = [
        name.removesuffix("/nll") for name in run.metrics if name.endswith("/nll") and not name.startswith("test/")
    ]
    if not names:
        raise NothingToDraw("neither a constraint nor an NLL was logged")
    with picture(targets, 7, 3) as figure:
        axes = figure.subplots()
        colours = dict(zip(names, (DUAL, FORGET, RETAIN, BOUND) * len(names), strict=False))
        every: list[float] = []
        for i, name in enumerate(names):
            whole = name.startswith("val/")
            series: Series = run.whole(f"{name.removeprefix('val/')}/nll") if whole else run.per_step(f"{name}/nll")
            label = f"{name.removeprefix('val/')}, all rows" if whole else f"{name}, rows of the step"
            axes.plot(
                *series,
                MARKERS[i % len(MARKERS)] if whole else "-",
                color=colours[name],
                markersize=4.5,
                linewidth=0.9,
                label=label,
            )
            every += [value for value in series[1] if math.isfinite(value)]
        suit_scale(axes, every)
        axes.set_ylabel("NLL (nats per token)")
        axes.set_xlabel("optimizer steps taken")
        legend_above(axes)
