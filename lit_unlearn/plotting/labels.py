"""Names beside markers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes names beside markers, off the other names and markers; to one that is further away leads a line.

    Args:
        axes: With its markers, and its limits as they are to stay.
        points: The markers.
        names: One for each; an empty one is not written.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles the layout, on which distances depend
    taken = [_square(x, y, 6 * axes.figure.dpi / 72) for x, y in axes.transData.transform(points)]
    turns = [math.radians(degrees) for degrees in (0, 180, 90, 270, 45, 135, 225, 315)]
    places = [(r * math.cos(turn), r * math.sin(turn)) for r in (8, 20, 35, 50, 70, 90) for turn in turns]
    for name, point in zip(names, points, strict=True):
        if not name:
            continue
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize="small", parse_math=False)
        label.set_in_layout(False)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})  # legible across lines
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
