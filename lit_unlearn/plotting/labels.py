"""Labels beside markers, placed so that they hide neither each other nor a marker.

By hand, not with adjustText: that pushes labels apart by forces until it runs out of iterations or time, and brings scipy.
Candidate positions in a fixed order give the same picture on every machine, and keep each label inside the axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase

_DISTANCES = (8, 20, 35, 50, 70, 90)  # from the marker, in points
_ANGLES = (0, 180, 90, 270, 45, 135, 225, 315)  # degrees, in the order of preference
_LINE_FROM = 10  # points; a label that is nearer needs no line to its marker
_POINTS_PER_INCH = 72
_LEADER = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write names beside markers, with a line to a marker that is further away.

    Args:
        axes: Axes with the markers, and with their final limits.
        points: The markers' coordinates.
        names: A name for each; an empty one is not written.
    """
    # Settles the layout, on which distances in pixels depend.
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    half = 6 * axes.figure.dpi / _POINTS_PER_INCH
    occupied = [_make_square(x, y, half) for x, y in axes.transData.transform(points)]
    candidates = []
    for distance in _DISTANCES:
        for angle in map(math.radians, _ANGLES):
            candidates.append((distance * math.cos(angle), distance * math.sin(angle)))

    for name, point in zip(names, points, strict=True):
        if not name:
            continue
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize="small", parse_math=False)
        label.set_in_layout(False)
        # Stays legible where it crosses a line.
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})
        # At a tie the first candidate is taken, so that labels are on the right and near where they can be.
        offset = min(candidates, key=lambda candidate: _try_offset(label, candidate, axes, occupied))
        _try_offset(label, offset, axes, occupied)
        occupied += [label.get_window_extent(), *_cover_line(label, axes)]
        if math.hypot(*offset) > _LINE_FROM:
            line = axes.annotate("", point, offset, textcoords="offset points", arrowprops=_LEADER)
            line.set_in_layout(False)


def _try_offset(label: Annotation, offset: tuple[float, float], axes: Axes, occupied: Sequence[BboxBase]) -> int:
    """Move a label to an offset from its marker, in points, and return how much it hides there."""
    x, y = round(offset[0]), round(offset[1])
    label.set_position(offset)
    label.set(ha=("center", "left", "right")[_sign(x)], va=("center", "bottom", "top")[_sign(y)])
    box = label.get_window_extent()
    is_outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
    num_crossed = sum(square.count_overlaps(occupied) for square in _cover_line(label, axes))
    # A label outside the axes is the worst, a hidden label or marker is worse than a line across one.
    return 100 * is_outside + 10 * box.count_overlaps(occupied) + num_crossed


def _cover_line(label: Annotation, axes: Axes) -> list[BboxBase]:
    """Return squares along the line from a marker to its label, in pixels; none if the label is near."""
    x, y = axes.transData.transform(label.xy)
    dx, dy = label.get_position()
    steps = range(8, int(math.hypot(dx, dy)) - 1, 3)
    scale = axes.figure.dpi / _POINTS_PER_INCH / steps.stop if steps else 0.0
    return [_make_square(x + scale * dx * step, y + scale * dy * step, 1) for step in steps]


def _make_square(x: float, y: float, half: float) -> BboxBase:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
