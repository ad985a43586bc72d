"""How all pictures look: told apart by colour-blind people and in grey print, and the same in every drawing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.utils.io import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORGET, RETAIN, BOUND, DUAL = "#D55E00", "#0072B2", "#000000", "#009E73"  # Okabe–Ito
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
    "svg.hashsalt": "lit-unlearn",  # else every drawing would have other ids
}


@contextmanager
def picture(
    targets: Sequence[Path], width: float, height: float, layout: str | None = "constrained"
) -> Iterator[Figure]:
    """A figure to draw on, which is written when the block ends.

    Args:
        targets: Files to write; their suffixes give the formats.
        width: In inches.
        height: In inches.
        layout: What places the axes, as for matplotlib; ``None`` for nothing.

    Raises:
        OSError: If a file cannot be written.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a script that matplotlib's font lacks
        figure = Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
        FigureCanvasAgg(figure)
        yield figure
        for target in targets:
            with atomic_file(target) as file:
                figure.savefig(file, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)


def legend_above(axes: Axes) -> None:
    """A legend that hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.97), ncols=5, columnspacing=1.2, handlelength=1.8)


def suit_scale(axes: Axes, values: Sequence[float]) -> None:
    """Makes the y-axis logarithmic where all values are positive and the largest dwarfs the smallest."""
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
