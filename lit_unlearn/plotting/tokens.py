"""A picture of answers, token by token: what the model still says, and what it has forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_unlearn.plotting.run_log import Answer, NothingToDraw, Run
from lit_unlearn.plotting.style import FORGET, RETAIN, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _LEFT = 7.2, 0.62  # inches: of the picture, and of what stands at the left
_SIZE = 7.5  # of the text, in points
_ADVANCE = 0.602 * _SIZE / 72  # inches per character of DejaVu Sans Mono
_ROW, _GAP = 0.19, 0.35  # inches; between two lines of an answer, in rows
_LINES = 3  # of one answer; what is longer is cut
_LONGEST = 24  # characters of one token
_SPACES = {"\n": "⏎", "\t": "⇥", "\r": ""}


class _Cell(NamedTuple):
    """A token's place in its line, in characters from the left; without a token, the dots at the end."""

    token: int | None
    left: float
    width: float
    text: str


def draw_tokens(run: Run, *targets: Path) -> None:
    """Draws the recorded answers' tokens, each coloured by its probability before (above) and after (below).

    Args:
        run: With recorded answers.
        targets: Pictures to write; the suffixes give the formats.

    Raises:
        NothingToDraw: If no answer was recorded.
    """
    if not run.answers:
        raise NothingToDraw(
            "no answers were recorded (that takes a ForgetRetain data module and `picture.answers` above 0)"
        )
    lines = [list(_wrap(answer)) for answer in run.answers]
    rows = [1 if answer.after is None else 2 for answer in run.answers]
    heights = [1.35 + len(own) * (count + _GAP) for own, count in zip(lines, rows, strict=True)]
    total = sum(heights) + 3.6  # with the colour bar
    with picture(targets, _WIDTH, total * _ROW, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-_LEFT / _ADVANCE, (_WIDTH - _LEFT) / _ADVANCE)
        axes.set_ylim(total, 0)
        top = 0.3
        for answer, own, height in zip(run.answers, lines, heights, strict=True):
            _draw(axes, answer, own, top)
            top += height
        _key(figure, axes, run, total)


def _draw(axes: Axes, answer: Answer, lines: Sequence[Sequence[_Cell]], top: float) -> None:
    label = f"{answer.stream} {answer.row + 1}"
    colour = FORGET if answer.stream == "forget" else RETAIN
    _write(axes, 0.8 - _LEFT / _ADVANCE, top, label, size=8, weight="bold", color=colour)
    left = max(0.0, 1.3 * (len(label) - 6))
    prompt, room = " ".join(answer.prompt.split()), int((_WIDTH - _LEFT) / _ADVANCE - left)
    shown = prompt if len(prompt) <= room else "…" + prompt[-room:].partition(" ")[2]
    _write(axes, left, top, shown, color="0.25")
    top += 1.1
    for line in lines:
        for name, probabilities in (("before", answer.before), ("after", answer.after)):
            if probabilities is not None:
                _write(axes, -0.6, top, name, size=7, color="0.25", ha="right")
                _colour(axes, line, probabilities, top)
                top += 1
        top += _GAP


def _colour(axes: Axes, line: Sequence[_Cell], probabilities: Sequence[float], top: float) -> None:
    """One line of cells."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    for cell in line:
        p = None if cell.token is None else probabilities[cell.token]
        if p is not None:
            style: dict[str, Any] = {"facecolor": colormaps["cividis"](p), "edgecolor": "white", "linewidth": 0.5}
            axes.add_patch(Rectangle((cell.left, top), cell.width, 0.96, **style))
        dark = p is not None and p < 0.47  # where both have the same contrast
        _write(axes, cell.left + 0.4, top, cell.text, family="monospace", color="white" if dark else "black")


def _write(axes: Axes, left: float, top: float, text: str, **style: Any) -> None:
    axes.text(left, top + 0.5, text, va="center", parse_math=False, **{"size": _SIZE, **style})


def _wrap(answer: Answer) -> Iterator[list[_Cell]]:
    """The answer's tokens, line by line."""
    room = (_WIDTH - _LEFT) / _ADVANCE - 3  # for the dots
    line: list[_Cell] = []
    number, left = 1, 0.0
    for token, text in enumerate(answer.tokens):
        shown = _printable(text)
        width = max(len(shown), 1) + 0.8
        if left + width > room:
            if number == _LINES:
                yield [*line, _Cell(None, left, 1.8, "…")]
                return
            yield line
            line, left, number = [], 0.0, number + 1
        line.append(_Cell(token, left, width, shown))
        left += width
    yield [*line, _Cell(None, left, 1.8, "…")] if answer.cut else line


def _printable(text: str) -> str:
    shown = "".join(_SPACES.get(c, c if c.isprintable() else "·") for c in text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def _key(figure: Figure, axes: Axes, run: Run, total: float) -> None:
    """The colour bar, and which model is after."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    place = figure.add_axes((0.55, 2.2 / total, 0.4, 0.6 / total))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colormaps["cividis"]), cax=place, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.ax.tick_params(labelsize=_SIZE)
    bar.set_label("probability of the right token", size=8)
    key = ["∎  end of the answer"]
    if run.kept_step is not None and any(answer.after is not None for answer in run.answers):
        key.append(f"after: the kept model, step {run.kept_step}")
    for i, text in enumerate(key):
        _write(axes, 0, total - 2.7 + 1.1 * i, text, size=8)
