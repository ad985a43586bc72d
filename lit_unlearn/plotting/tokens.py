"""A picture of answers, token by token: what the model still knows, and what it has forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_unlearn.plotting.run_log import NothingToDraw, RecordedAnswer, RunLog
from lit_unlearn.plotting.style import FORGET, RETAIN, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Horizontal positions are in characters of the monospaced font, vertical ones in rows of text: with both, the axes need no
# renderer to know where a token ends.
_WIDTH, _MARGIN = 7.2, 0.62  # of the picture and at its left, inches
_FONT_SIZE = 7.5  # points
_CHARACTER = 0.602 * _FONT_SIZE / 72  # width in DejaVu Sans Mono, inches
_LINE_WIDTH = (_WIDTH - _MARGIN) / _CHARACTER
_ROW = 0.19  # inches
_GAP = 0.35  # between two lines of an answer, rows
_PROMPT_HEIGHT, _ANSWER_GAP, _KEY_HEIGHT = 1.1, 0.25, 3.6  # rows
_MAX_LINES = 3  # of one answer; the rest is not drawn
_MAX_CHARACTERS = 24  # of one token
_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": ""}

# Above this probability the cell is so light that black text has more contrast than white.
_DARK_BELOW = 0.47


class _Cell(NamedTuple):
    """A token's position in its line, in characters from the left; without a token, the dots at the end."""

    token: int | None
    left: float
    width: float
    text: str


def draw_tokens(run: RunLog, *targets: Path) -> None:
    """Draw the recorded answers' tokens, each coloured by its probability before (above) and after (below).

    Raises:
        NothingToDraw: If no answer was recorded.
    """
    if not run.answers:
        raise NothingToDraw(
            "no answers were recorded (set the configuration's `picture.answers`, or `answers` of `RunPicture`, above 0)"
        )
    # The height of the picture depends on all lines, so they are laid out before anything is drawn.
    layouts = []
    total = _KEY_HEIGHT
    for answer in run.answers:
        lines = list(_wrap_tokens(answer))
        rows_per_line = 1 if answer.after is None else 2
        height = _PROMPT_HEIGHT + len(lines) * (rows_per_line + _GAP) + _ANSWER_GAP
        layouts.append((answer, lines, height))
        total += height

    with picture(targets, _WIDTH, total * _ROW, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-_MARGIN / _CHARACTER, _LINE_WIDTH)
        axes.set_ylim(total, 0)  # downwards
        top = 0.3
        for answer, lines, height in layouts:
            _draw_answer(axes, answer, lines, top)
            top += height
        _draw_key(figure, axes, run, total)


def _draw_answer(axes: Axes, answer: RecordedAnswer, lines: Sequence[Sequence[_Cell]], top: float) -> None:
    label = f"{answer.stream} {answer.row + 1}"
    colour = FORGET if answer.stream == "forget" else RETAIN
    _write_text(axes, 0.8 - _MARGIN / _CHARACTER, top, label, size=8, weight="bold", color=colour)

    # The end of a long prompt is shown: the question is there.
    left = max(0.0, 1.3 * (len(label) - 6))
    room = int(_LINE_WIDTH - left)
    prompt = " ".join(answer.prompt.split())
    if len(prompt) > room:
        prompt = "…" + prompt[-room:].partition(" ")[2]
    _write_text(axes, left, top, prompt, color="0.25")

    top += _PROMPT_HEIGHT
    for line in lines:
        for name, probabilities in (("before", answer.before), ("after", answer.after)):
            if probabilities is not None:
                _write_text(axes, -0.6, top, name, size=7, color="0.25", ha="right")
                _draw_cells(axes, line, probabilities, top)
                top += 1
        top += _GAP


def _draw_cells(axes: Axes, line: Sequence[_Cell], probabilities: Sequence[float], top: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    for cell in line:
        text_colour = "black"
        if cell.token is not None:
            probability = probabilities[cell.token]
            face = colormaps["cividis"](probability)
            axes.add_patch(
                Rectangle((cell.left, top), cell.width, 0.96, facecolor=face, edgecolor="white", linewidth=0.5)
            )
            if probability < _DARK_BELOW:
                text_colour = "white"
        _write_text(axes, cell.left + 0.4, top, cell.text, family="monospace", color=text_colour)


def _write_text(axes: Axes, left: float, top: float, text: str, **style: Any) -> None:
    # `parse_math`: a dollar sign in an answer is no formula.
    axes.text(left, top + 0.5, text, va="center", parse_math=False, **{"size": _FONT_SIZE, **style})


def _wrap_tokens(answer: RecordedAnswer) -> Iterator[list[_Cell]]:
    """Yield the answer's tokens line by line, with dots where it is cut."""
    room = _LINE_WIDTH - 3  # for the dots
    line: list[_Cell] = []
    number, left = 1, 0.0
    for token, text in enumerate(answer.tokens):
        visible = _make_visible(text)
        width = max(len(visible), 1) + 0.8
        if left + width > room:
            if number == _MAX_LINES:
                yield [*line, _make_dots(left)]
                return
            yield line
            line, left, number = [], 0.0, number + 1
        line.append(_Cell(token, left, width, visible))
        left += width
    yield [*line, _make_dots(left)] if answer.cut else line


def _make_dots(left: float) -> _Cell:
    return _Cell(None, left, 1.8, "…")


def _make_visible(text: str) -> str:
    characters = []
    for character in text:
        fallback = character if character.isprintable() else "·"
        characters.append(_VISIBLE.get(character, fallback))
    visible = "".join(characters)
    return visible if len(visible) <= _MAX_CHARACTERS else visible[: _MAX_CHARACTERS - 1] + "…"


def _draw_key(figure: Figure, axes: Axes, run: RunLog, total: float) -> None:
    """Draw the colour bar, and say which model "after" is."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar_axes = figure.add_axes((0.55, 2.2 / total, 0.4, 0.6 / total))
    colours = ScalarMappable(Normalize(0, 1), colormaps["cividis"])
    bar = figure.colorbar(colours, cax=bar_axes, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.ax.tick_params(labelsize=_FONT_SIZE)
    bar.set_label("probability of the answer's token", size=8)
    key = ["∎  end of the answer"]
    has_after = any(answer.after is not None for answer in run.answers)
    if run.kept_step is not None and has_after:
        key.append(f"after: the kept model, step {run.kept_step}")
    for i, text in enumerate(key):
        _write_text(axes, 0, total - 2.7 + 1.1 * i, text, size=8)
