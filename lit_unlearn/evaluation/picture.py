"""Pictures of a run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

_FORGET, _RETAIN, _BOUND, _DUAL = "#D55E00", "#0072B2", "#000000", "#009E73"  # Okabe–Ito, told apart by everyone


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
