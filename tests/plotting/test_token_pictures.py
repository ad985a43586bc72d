"""The picture of answers, token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lit_unlearn.plotting import NothingToDraw, RecordedAnswer, RunLog, draw_tokens


def run_of(*answers: RecordedAnswer) -> RunLog:
    return RunLog({}, {}, 7, list(answers), [])


def drawn(run: RunLog, target: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **kw: (save(self, *rest, **kw), figures.append(self)))
    draw_tokens(run, target)
    return figures[0]


def cells(figure: Figure) -> list[tuple[Rectangle, Any]]:
    """Each cell with its text, row by row."""
    axes = figure.axes[0]
    texts = {(text.get_position()[0], text.get_position()[1]): text for text in axes.texts}
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [(patch, texts[patch.get_x() + 0.4, patch.get_y() + 0.5]) for patch in patches]


def luminance(colour: Any) -> float:
    """Relative luminance as the WCAG defines it."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(colour)[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_cells_have_the_colour_of_their_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = RecordedAnswer(
        "forget", 0, "Question: who?\nAnswer:", [" I", " $x$\n", "∎"], [0.9, 1.0, 0.5], [0.0, 0.25, 0.75]
    )
    figure = drawn(run_of(answer), tmp_path / "tokens.png", monkeypatch)
    found = cells(figure)
    assert [text.get_text() for _, text in found] == [" I", " $x$⏎", "∎"] * 2
    assert [patch.get_facecolor() for patch, _ in found] == [
        colormaps["cividis"](p) for p in answer.before + (answer.after or [])
    ]
    tops = [patch.get_y() for patch, _ in found]
    assert tops[0] == tops[2] < tops[3]  # the axis points down: before is above
    assert [patch.get_width() for patch, _ in found[:3]] == [patch.get_width() for patch, _ in found[3:]]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"forget 1", "Question: who? Answer:", "before", "after", "after: the kept model, step 7"} <= set(texts)


def test_text_stands_out_at_every_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [i / 50 for i in range(51)]
    figure = drawn(run_of(RecordedAnswer("retain", 0, "", ["x"] * 51, values)), tmp_path / "tokens.png", monkeypatch)
    found = cells(figure)
    assert len(found) == 51
    for patch, text in found:
        light, dark = sorted((luminance(patch.get_facecolor()), luminance(text.get_color())), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5  # what the WCAG asks for


def test_long_answers_are_wrapped_and_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f" word{i}" for i in range(64)] + ["x" * 40]
    answers = [
        RecordedAnswer("forget", 0, "long " * 60, tokens, [0.5] * 65, [0.5] * 65),
        RecordedAnswer("a_stream_with_a_long_name", 122, "w", tokens[:3], [0.5] * 3, [0.5] * 3, cut=True),
        RecordedAnswer("retain", 1, "w", tokens[-1:], [0.5], None),
    ]
    figure = drawn(run_of(*answers), tmp_path / "tokens.png", monkeypatch)
    axes = figure.axes[0]
    figure.canvas.draw()
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("…") == 4  # two rows each
    assert "x" * 23 + "…" in texts
    assert texts.count("before") == 3 + 1 + 1
    assert texts.count("after") == 3 + 1
    assert max(patch.get_x() + patch.get_width() for patch in axes.patches) <= axes.get_xlim()[1]
    rows: dict[float, float] = {}
    for patch, _ in cells(figure):
        assert patch.get_x() >= rows.get(patch.get_y(), 0.0) - 1e-9  # none lies on another
        rows[patch.get_y()] = patch.get_x() + patch.get_width()
    shown = [text for text in axes.texts if text.get_text().strip()]
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in shown)


def test_any_characters_and_values(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tokens = ["", " 日本", "\t", "\x00", "\u202e", "ß", "�"]
    for suffix in ("png", "svg"):
        draw_tokens(
            run_of(RecordedAnswer("forget", 0, "ど\n$", tokens, [math.nan] * 7, [1.0] * 7)),
            tmp_path / f"tokens.{suffix}",
        )
    assert [str(warning.message) for warning in recwarn] == []
    assert "<!-- ß -->" in (tmp_path / "tokens.svg").read_text(encoding="utf-8")
    with pytest.raises(NothingToDraw, match="no answers were recorded"):
        draw_tokens(run_of(), tmp_path / "tokens.png")
