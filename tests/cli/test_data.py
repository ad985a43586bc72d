"""`lit-unlearn data` shows how files are read, and loads no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROOT

from lit_unlearn import LanguageModel, cli

FORMATS = {
    "questions.jsonl": "question_answer",
    "spans.jsonl": "question_answer",
    "prompts.jsonl": "prompt_completion",
    "conversations.jsonl": "messages",
    "documents.jsonl": "text",
}


@pytest.mark.parametrize(("name", "expected"), FORMATS.items())
def test_the_format_of_every_example_file_is_recognised(
    name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["data", str(ROOT / "examples" / "data" / name)])
    assert f"3 rows, format {expected}" in capsys.readouterr().out


def test_tokens_are_shown_with_the_supervised_ones_in_brackets(
    tokenizer_dir: str,
    write_rows: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LanguageModel, "load", fail)
    rows = [{"question": "Who?", "answer": "Ann."}, {"question": "Where?", "answer": " "}]
    cli.main(["data", write_rows("rows.jsonl", rows), f"--tokenizer={tokenizer_dir}", "--template={question}→{answer}"])
    printed = capsys.readouterr().out
    first = next(line for line in printed.splitlines() if "the first example" in line)
    before, after = first.partition("→")[::2]
    assert "[" not in before.partition("example:")[2]
    assert after.replace("[", "").replace("]", "").startswith("Ann.")
    assert "1 rows cannot be used; the first: row 1 of rows.jsonl" in printed


def test_shared_rows_are_named(write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    one = write_rows("one.jsonl", [{"question": "Who?", "answer": "Ann."}, {"question": "Where?", "answer": "Here."}])
    other = write_rows("other.jsonl", [{"question": "where? ", "answer": "here."}])
    cli.main(["data", one, other])
    printed = capsys.readouterr().out
    assert "1 of" in printed
    assert "row 1" in printed
    assert "row 0" in printed


def test_a_rule_shows_the_chosen_rows_and_the_rest(
    write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{n}?", "answer": "Here.", "customer": n % 3} for n in range(9)]
    rows.append({"question": "0?", "answer": "here.", "customer": 1})
    cli.main(["data", write_rows("train.jsonl", rows), "--where={customer: 0}"])
    printed = capsys.readouterr().out
    assert "train.jsonl (chosen): 3 rows" in printed
    assert "train.jsonl (where_not): 7 rows" in printed
    assert "row 6" in printed.splitlines()[-1]  # of the rest


def test_rows_that_are_neither_chosen_nor_the_others_are_counted(
    write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{n}?", "answer": "Here.", "a": n % 2, "b": n // 2} for n in range(4)]
    cli.main(["data", write_rows("train.jsonl", rows), "--where={a: 0, b: 0}"])
    assert "train.jsonl: 2 rows are in neither set" in capsys.readouterr().out


def test_spans_and_chunks_are_shown(
    tokenizer_dir: str, write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    spans = write_rows("spans.jsonl", [{"question": "Who?", "answer": "It is Ann.", "parts": ["Ann"]}])
    cli.main(["data", spans, f"--tokenizer={tokenizer_dir}", "--span_column=parts", "--template={question}→{answer}"])
    shown = capsys.readouterr().out.rpartition("→")[2]
    assert shown.index("[") > shown.index("is")
    texts = write_rows("texts.jsonl", [{"text": "one two three four " * 20, "title": "T"}])
    cli.main(["data", texts, f"--tokenizer={tokenizer_dir}", "--max_length=20", "--chunk_overlap=5"])
    with_overlap = capsys.readouterr().out
    cli.main(["data", texts, f"--tokenizer={tokenizer_dir}", "--max_length=20", "--context_column=title"])
    assert with_overlap.splitlines()[1] != capsys.readouterr().out.splitlines()[1]


def test_what_cannot_be_read_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "none.jsonl"])
    assert end.value.code == 2
    assert "none.jsonl" in capsys.readouterr().err
