"""Answers as text for a terminal, with the probability of every token."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import dropwhile, groupby
from typing import NamedTuple

from lit_unlearn.evaluation.inspection import Answer, Asked, mean_scores
from lit_unlearn.evaluation.tables import format_table

# A character, and the eighth that the probability of its token is in; `None` if that is not known.
Cell = tuple[str, int | None]

# For a token's probability, in eighths.
_BARS = "▁▂▃▄▅▆▇█"
# The same on a terminal of 256 colours: orange to blue, which no colour-blindness confuses.
_COLOURS = (166, 208, 215, 223, 195, 153, 75, 32)
_END_MARK, _EXACT_MARK = "∎", "✓"
_BOLD, _RESET = "\x1b[1m", "\x1b[0m"


class AnswerPage(NamedTuple):
    """Answers for a terminal: every token above a bar as high as its probability, or on a colour for it.

    Args:
        width: Of a line, in characters.
        coloured: Whether the terminal shows 256 colours.
    """

    width: int
    coloured: bool

    def format_page(self, answered: Sequence[Asked]) -> str:
        """Return all questions with their answers and, where there are right ones, the means over all."""
        blocks = [self.format_legend(any(question.answer is not None for question in answered))]
        for question in answered:
            text = textwrap.fill(_make_printable(question.question), self.width)
            blocks.append(f"{_BOLD}{text}{_RESET}" if self.coloured else text)
            blocks.append(self.format_answers(question))
        if means := mean_scores(answered):
            rows = []
            for name, mean in means.items():
                probability = "" if mean["probability"] is None else f"{mean['probability']:.3g}"
                rows.append([name, probability, f"{mean['exact']:.0%}"])
            blocks.append(format_table(rows, [f"questions: {len(answered)}", "answer probability", "exact answers"]))
        return "\n\n".join(blocks)

    def format_legend(self, right: bool = False) -> str:
        """Return what the signs mean, also those beside ``right`` answers."""
        scale = "".join(_paint_text(" ", level) for level in range(8)) if self.coloured else _BARS
        signs = f"probability of each token: 0 {scale} 1   {_END_MARK} end of the answer"
        if not right:
            return signs
        return f"{signs}   {_EXACT_MARK} the right one\nright: the right answer, and its answer probability"

    def format_answers(self, answered: Asked) -> str:
        """Return each model's answer and, where that is not the right one, how probable it finds the right one."""
        name_width = max(map(len, answered.replies)) + 2
        lines: list[str] = []
        for name, reply in answered.replies.items():
            label = f"{name:<{name_width}}"
            says = f"says {_EXACT_MARK}" if reply.exact else "says"
            # A server does not score the right answer.
            probability = None if reply.expected is None else reply.expected.probability
            if not reply.exact or probability is None:
                lines += self._format_answer(f"{label}{says:<{6 if reply.expected is None else 15}}", reply.generated)
                label = " " * name_width
            if reply.expected is not None and probability is not None:
                kind = says if reply.exact else "right"
                lines += self._format_answer(f"{label}{kind:<6} {probability:<8.2g}", reply.expected)
        return "\n".join(lines)

    def _format_answer(self, label: str, answer: Answer) -> Iterator[str]:
        indent = f"  {label}"
        for cells in _wrap_cells(_answer_cells(answer), max(self.width - len(indent), 20)):
            text = "".join(char for char, _ in cells)
            if self.coloured:
                painted = ""
                for level, run_of_cells in groupby(cells, key=lambda cell: cell[1]):
                    painted += _paint_text("".join(char for char, _ in run_of_cells), level)
                yield indent + painted
            else:
                yield indent + text
                bars = "".join(" " if level is None else _BARS[level] for _, level in cells)
                if bars.strip():  # a server may give no probabilities
                    yield " " * len(indent) + bars
            indent = " " * len(indent)


def _answer_cells(answer: Answer) -> list[Cell]:
    tokens = [*answer.tokens[:-1], _END_MARK if answer.ended else f"{answer.tokens[-1]}…"]
    cells: list[Cell] = []
    for token, probability in zip(tokens, answer.probabilities, strict=True):
        level = None if probability is None else min(int(8 * probability), 7)
        cells += [(char, level) for char in _make_printable(token)]
    return list(dropwhile(lambda cell: cell[0] == " ", cells))


def _wrap_cells(cells: list[Cell], width: int) -> Iterator[list[Cell]]:
    # textwrap knows texts only; here every character brings its token's probability along.
    while len(cells) > width:
        space = next((i for i in range(width, 0, -1) if cells[i][0] == " "), None)
        yield cells[: space or width]
        cells = cells[space + 1 if space else width :]
    yield cells


def _paint_text(text: str, level: int | None) -> str:
    if level is None:
        return text
    return f"\x1b[38;5;16;48;5;{_COLOURS[level]}m{text}{_RESET}"


def _make_printable(text: str) -> str:
    # Control characters in a model's answer would steer the terminal.
    return "".join(char if char.isprintable() else "\ufffd" for char in text.replace("\n", "↵"))
