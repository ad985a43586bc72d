"""The look of all pictures: distinct for colour-blind readers and in grey print, the same in every drawing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.utils.io import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito. In grey print they are alike, so what they tell apart also differs by line or marker.
FORGET, RETAIN, BOUND, DUAL = "#D55E00", "#0072B2", "#000000", "#009E73"
LINES = ("-", "--", "-.", ":")
MARKERS = "os^DvPX*"

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.0,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    # Without a salt, the ids in an SVG are random: the same run would give another file each time.
    "svg.hashsalt": "lit-unlearn",
}


@contextmanager
def picture(
    targets: Sequence[Path], width: float, height: float, layout: str | None = "constrained"
) -> Iterator[Figure]:
    """Yield a figure to draw on, and write it when the block ends.

    Args:
        targets: Files to write; their suffixes give the formats.
        width: Inches.
        height: Inches.
        layout: Layout engine of matplotlib; ``None`` for none.

    Raises:
        OutputError: If a file cannot be written.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # "default" first: the user's own matplotlibrc must not change the pictures.
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # Answers may be in a script that matplotlib's font lacks; a box instead of a letter is no reason to warn of each.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        # Not pyplot, which keeps figures open and chooses a window system.
        figure = Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
        FigureCanvasAgg(figure)
        yield figure
        for target in targets:
            metadata = {"Date": None} if target.suffix == ".svg" else None
            with atomic_file(target) as file:
                figure.savefig(file, dpi=150, metadata=metadata)


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.97), ncols=5, columnspacing=1.2, handlelength=1.8)


def choose_y_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the y-axis logarithmic if that is needed to tell the values apart."""
    if needs_logarithm(values):
        axes.set_yscale("log")


def needs_logarithm(values: Sequence[float]) -> bool:
    """Return whether all values are positive and span more than a factor of 20."""
    finite = list(filter(math.isfinite, values))
    return bool(finite) and min(finite) > 0 and max(finite) > 20 * min(finite)
