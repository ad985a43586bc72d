"""A picture of attacks: what comes back of the forget set, against the effort."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.plotting.style import BOUND, DUAL, FORGET, RETAIN, legend_above, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_unlearn.evaluation.attack_run import Value

# Okabe–Ito, in the order in which curves are told apart best.
_COLOURS = (FORGET, RETAIN, DUAL, "#CC79A7", "#E69F00", "#56B4E9")
# By model: line and fill differ, so that grey print tells the two apart.
_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "model": {"linestyle": "-", "marker": "o"},
    "retain_only": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
}
_NAMES = {"model": "model", "retain_only": "retain-only"}
_LABELS = {
    "probability": "answer probability",
    "rougeL_recall": "ROUGE-L recall",
    "exact": "answers given word for word",
    "extraction_strength": "extraction strength",
}


def draw_attacks(report: Mapping[str, Any], value: Value, *targets: Path) -> None:
    """Draw leakage against effort: a panel of curves for each kind of effort, and one of the attacks with a single effort.

    Filled markers are the model, hollow ones with broken lines the retain-only model. No text of rows is in it.

    Args:
        report: Content of the results file of ``lit-unlearn attack``.
        value: Name of the measure of leakage.
        targets: Pictures to write; the suffixes give the formats.

    Raises:
        OutputError: If a file cannot be written.
    """
    from lit_unlearn.evaluation.attack_run import choose_value

    curves: dict[str, dict[str, Any]] = {}
    singles: dict[str, Any] = {}
    for label, entry in report["attacks"].items():
        points = max((len(entry.get(role, {}).get("points", [])) for role in _NAMES), default=0)
        if points > 1:
            curves.setdefault(entry["unit"], {})[label] = entry
        else:
            singles[label] = entry

    width, height = 4.2 * (len(curves) + 1), max(3.4, 1.4 + 0.28 * len(singles))
    with picture(targets, width, height) as figure:
        panels = figure.subplots(1, len(curves) + 1, squeeze=False)[0]
        for axes, (unit, entries) in zip(panels, curves.items(), strict=False):
            # All attacks with efforts of one kind have the same measures.
            _draw_curves(axes, unit, entries, choose_value(next(iter(entries.values())), value))
        _draw_singles(panels[-1], singles, value)


def _draw_curves(axes: Axes, unit: str, entries: Mapping[str, Any], value: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (label, entry) in enumerate(entries.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for role, look in _LOOKS.items():
            points = [point for point in entry.get(role, {}).get("points", []) if point[value] is not None]
            efforts, leaked = [point["effort"] for point in points], [point[value] for point in points]
            name = label if role == "model" else None
            axes.plot(efforts, leaked, color=colour, label=name, markersize=4, clip_on=False, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(unit)
    axes.set_ylabel(_LABELS[value])
    axes.set_ylim(0, 1)
    # Below the axes: names of attacks are long.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_singles(axes: Axes, entries: Mapping[str, Any], value: str) -> None:
    axes.plot([], [], color=BOUND, label=_NAMES["model"], **{**_LOOKS["model"], "linestyle": "none"})
    axes.plot([], [], color=BOUND, label=_NAMES["retain_only"], **{**_LOOKS["retain_only"], "linestyle": "none"})
    for height, entry in enumerate(entries.values()):
        for role, look in _LOOKS.items():
            outcome = entry.get(role, {})
            for point in outcome.get("points", []):
                if point[value] is not None:
                    axes.plot(point[value], height, color=BOUND, clip_on=False, **{**look, "linestyle": "none"})
            if role == "model" and "not_tested" in outcome:
                axes.text(0.98, height, "not tested", ha="right", va="center", fontsize="small", color="0.4")
    axes.set_yticks(range(len(entries)), list(entries))
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel(_LABELS[value])
    legend_above(axes)
