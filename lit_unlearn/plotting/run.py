"""Pictures of a run's numbers: how the multiplier enforces a constraint, and what forgetting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.plotting.labels import place_labels
from lit_unlearn.plotting.run_log import NothingToDraw, RunLog
from lit_unlearn.plotting.style import (
    BOUND,
    DUAL,
    FORGET,
    LINES,
    MARKERS,
    RETAIN,
    choose_y_scale,
    legend_above,
    needs_logarithm,
    picture,
)
from lit_unlearn.plotting.tokens import draw_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

# The forget objective decides which feasible model is kept, so it is what the picture must show; logs of other modules may lack it.
_FORGETTING_LABELS = {
    "loss": "forget objective, all forget examples (lower: forgotten more)",
    "nll": "NLL of the forget set (nats per token): further to the right, more is forgotten",
}
_DOTS: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
_HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": FORGET, "hatch": "////", "linewidth": 0, "zorder": 3}
_STEPS_LABEL = "optimizer steps taken"
_NUM_LABELS = 3  # along a trajectory, beside the first, the last and the kept step
_NUM_ARROWS = 3


def draw_run(run: RunLog, folder: Path, formats: Sequence[str] = ("png", "svg")) -> dict[str, list[Path] | str]:
    """Draw every picture that the run has data for.

    Args:
        run: From `read_run`.
        folder: Folder to write to; created if it does not exist.
        formats: Suffixes of the files.

    Returns:
        By name of the picture its files, or the reason why there is none.

    Raises:
        OutputError: If a file cannot be written.
    """
    if run.constraints:
        pictures = {"dual": draw_dual, "trajectory": draw_trajectory, "tokens": draw_tokens}
    else:
        pictures = {"finetuning": draw_finetuning, "tokens": draw_tokens}
    drawn: dict[str, list[Path] | str] = {}
    for name, draw in pictures.items():
        targets = [folder / f"{name}.{suffix}" for suffix in formats]
        try:
            draw(run, *targets)
            drawn[name] = targets
        except NothingToDraw as reason:
            drawn[name] = str(reason)
    return drawn


def draw_dual(run: RunLog, *targets: Path) -> None:
    """Draw each constraint against its epsilon, λ, and forgetting, over the optimizer steps.

    Args:
        run: A run of `LitUnlearn`.
        targets: Pictures to write; the suffixes give the formats.

    Raises:
        NothingToDraw: If the run has no constraint.
    """
    names = run.constraints
    if not names:
        raise NothingToDraw("no constraint was logged")
    # One above the other, on the same steps: where a constraint is violated, λ rises, and forgetting slows down.
    with picture(targets, 7, 2 * (len(names) + 2)) as figure:
        *constraints, dual, forget = figure.subplots(len(names) + 2, 1, sharex=True)
        for axes, name in zip(constraints, names, strict=True):
            _draw_constraint(axes, run, name)
        for i, name in enumerate(names):
            steps, multipliers = run.get_step_values(f"multiplier/{name}")
            dual.plot(steps, multipliers, LINES[i % len(LINES)], color=DUAL, label=f"λ {name}")
        dual.set_ylabel("multiplier λ")
        _plot_values(forget, run, "forget/loss", FORGET)
        forget.set_ylabel("forget objective")
        forget.set_xlabel(_STEPS_LABEL)

        for axes in (*constraints, dual, forget):
            if run.kept_step is not None:
                label = f"kept model, step {run.kept_step}" if axes is constraints[0] else None
                axes.axvline(run.kept_step, color="0.4", linestyle=(0, (1, 1)), linewidth=1.6, label=label)
            # A single λ is named by the axis already.
            if axes is not dual or len(names) > 1:
                legend_above(axes)
        figure.align_ylabels()


def _draw_constraint(axes: Axes, run: RunLog, name: str) -> None:
    """Draw one constraint over the steps, hatched where it is violated."""
    _plot_values(axes, run, f"constraint/{name}/value", RETAIN)
    axes.set_ylabel(f"constraint\n{name}")
    epsilon = run.find_epsilon(name)
    if epsilon is None:
        return
    _draw_epsilon(axes, epsilon)
    steps, values = run.get_step_values(f"constraint/{name}/value")
    is_violated = [value > epsilon for value in values]
    # Hatching, since colour alone is lost in grey print.
    if any(is_violated):
        axes.fill_between(steps, values, epsilon, is_violated, interpolate=True, label="violated", **_HATCHED)


def _draw_epsilon(axes: Axes, epsilon: float) -> None:
    axes.axhline(epsilon, color=BOUND, linestyle="--", linewidth=1.2, label=f"ε = {epsilon:.3g}")


def _plot_values(axes: Axes, run: RunLog, name: str, colour: str) -> None:
    """Plot a value as every step and as every validation measured it."""
    steps, values = run.get_step_values(name)
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.6, label="batch of the step")
    validation_steps, validation_values = run.get_stream_values(name)
    axes.plot(validation_steps, validation_values, "o", color=colour, label="all examples", **_DOTS)
    choose_y_scale(axes, values + validation_values)


def draw_trajectory(run: RunLog, *targets: Path) -> None:
    """Draw what forgetting costs: retention over the forget objective, from validation to validation, and the constraint.

    The kept model is the feasible one furthest to the left, unless the run keeps its last one.

    Raises:
        NothingToDraw: If nothing was measured on whole streams.
    """
    metric = next((name for name in _FORGETTING_LABELS if f"val/forget/{name}" in run.metrics), None)
    names = [name for name in run.constraints if f"val/constraint/{name}/value" in run.metrics]
    if metric is None or not names:
        raise NothingToDraw("no validation measured the forget set and a constraint")
    # A validation without both values, or with NaN, has no place in the picture.
    forgetting = dict(zip(*run.get_stream_values(f"forget/{metric}"), strict=True))
    with picture(targets, 7, 3.8 * len(names)) as figure:
        for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
            axes.set_xlabel(_FORGETTING_LABELS[metric])
            axes.set_ylabel(f"constraint {name}")
            points = {}
            for step, y in zip(*run.get_stream_values(f"constraint/{name}/value"), strict=True):
                x = forgetting.get(step, math.nan)
                if math.isfinite(x) and math.isfinite(y):
                    points[step] = (x, y)
            if points:
                _draw_path(axes, points, run, name)


def _draw_path(axes: Axes, points: dict[int, Point], run: RunLog, name: str) -> None:
    """Draw the path through the validations, with a label at some of them."""
    path = list(points.values())
    epsilon = run.find_epsilon(name)
    xs, ys = zip(*path, strict=True)
    axes.plot(xs, ys, color="0.55", linewidth=1, zorder=1)

    feasible: list[Point] = []
    violated: list[Point] = []
    for point in path:
        is_violated = epsilon is not None and point[1] > epsilon
        (violated if is_violated else feasible).append(point)
    if feasible:
        axes.plot(*zip(*feasible, strict=True), "o", color=RETAIN, label="feasible", **_DOTS)
    if violated:
        axes.plot(*zip(*violated, strict=True), "X", color=FORGET, label="violated", **_DOTS)

    axes.margins(0.1)
    choose_y_scale(axes, ys)
    if needs_logarithm(xs):
        axes.set_xscale("log")
    if epsilon is not None:
        _draw_epsilon(axes, epsilon)
        # Even where every point is feasible, the picture shows where it would not be.
        low, high = axes.get_ylim()
        high = max(high, epsilon + 0.15 * (high - low))
        axes.axhspan(epsilon, high, facecolor="0.93", zorder=0)
        axes.set_ylim(low, high)
    if run.kept_step in points:
        style = {**_DOTS, "markersize": 13}
        axes.plot(*points[run.kept_step], "*", color="black", label=_explain_kept(run, points), **style)
    legend_above(axes)
    _draw_arrows(axes, path)
    place_labels(axes, path, _choose_labels(list(points), run.kept_step))


def _explain_kept(run: RunLog, points: dict[int, Point]) -> str:
    """Return the label of the kept model, with the reason where the picture shows it."""
    feasible = []
    for step in points:
        if step > 0 and all(_is_feasible_at(run, name, step) for name in run.constraints):
            feasible.append(points[step][0])
    label = f"kept: step {run.kept_step}"
    if feasible and points[run.kept_step or 0][0] <= min(feasible) and "val/forget/loss" in run.metrics:
        label += ", lowest objective of the feasible"
    return label


def _is_feasible_at(run: RunLog, name: str, step: int) -> bool:
    epsilon = run.find_epsilon(name)
    values = dict(zip(*run.get_stream_values(f"constraint/{name}/value"), strict=True))
    return epsilon is None or values.get(step, math.inf) <= epsilon


def _choose_labels(steps: Sequence[int], kept_step: int | None) -> list[str]:
    """Return a label for every step; most are empty, since sixty would be unreadable."""
    labelled = {kept_step, steps[-1]}
    for i in range(1, _NUM_LABELS + 1):
        labelled.add(steps[len(steps) * i // (_NUM_LABELS + 1)])
    labels = []
    for step in steps:
        if step == 0:
            labels.append("before")
        else:
            labels.append(f"step {step}" if step in labelled else "")
    return labels


def _draw_arrows(axes: Axes, path: Sequence[Point]) -> None:
    """Draw the direction, on the longest segments of the path."""
    pixels = axes.transData.transform(path)
    lengths = [(math.dist(start, end), i) for i, (start, end) in enumerate(pairwise(pixels))]
    lengths.sort(reverse=True)
    for length, i in lengths[:_NUM_ARROWS]:
        # On a segment that is hardly longer than the arrow head, the head would hide the markers.
        if length > 20:
            head = axes.transData.inverted().transform((pixels[i] + 1.4 * pixels[i + 1]) / 2.4)
            style = {"arrowstyle": "-|>", "color": "0.55", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", tuple(head), path[i], arrowprops=style)


def draw_finetuning(run: RunLog, *targets: Path) -> None:
    """Draw what a run of `LitFinetune` learned: its NLL on every stream, over the optimizer steps.

    Raises:
        NothingToDraw: If no NLL was logged.
    """
    names = []
    for name in run.metrics:
        if name.endswith("/nll") and not name.startswith("test/"):
            names.append(name.removesuffix("/nll"))
    if not names:
        raise NothingToDraw("neither a constraint nor an NLL was logged")
    colours = (DUAL, FORGET, RETAIN, BOUND)
    values: list[float] = []
    with picture(targets, 7, 3) as figure:
        axes = figure.subplots()
        for i, name in enumerate(names):
            colour = colours[i % len(colours)]
            stream = name.removeprefix("val/")
            if name.startswith("val/"):
                series, label = run.get_stream_values(f"{stream}/nll"), f"{stream}, all examples"
                axes.plot(*series, MARKERS[i % len(MARKERS)], color=colour, markersize=4.5, label=label)
            else:
                series, label = run.get_step_values(f"{name}/nll"), f"{name}, batch of the step"
                axes.plot(*series, "-", color=colour, linewidth=0.9, label=label)
            values += series[1]
        choose_y_scale(axes, values)
        axes.set_ylabel("NLL (nats per token)")
        axes.set_xlabel(_STEPS_LABEL)
        legend_above(axes)
