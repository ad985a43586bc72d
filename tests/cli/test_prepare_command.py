"""The command that makes rows with a model: one file per kind, never one that is there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from lit_unlearn import cli
from lit_unlearn.cli.main import CommandFailed

ROWS = [
    {"question": "Where was Lunnian Dunmeth born?", "answer": "In Oslo, Norway, by the sea."},
    {"question": "Who is Kerrys Raskane?", "answer": "A writer of sea stories."},
]


@pytest.fixture
def command(model_dir: str, in_tmp: Path, write_rows: Callable[..., str]) -> Callable[..., list[dict[str, Any]]]:
    """Runs one kind and returns the rows that it wrote."""
    forget = write_rows("forget.jsonl", ROWS)

    def run(kind: str, *options: str, output: str = "made.jsonl") -> list[dict[str, Any]]:
        arguments = ["prepare", kind, f"--model={model_dir}", f"--forget={forget}", f"--output={output}"]
        cli.main([*arguments, "--max_new_tokens=4", *options])
        return [json.loads(line) for line in (in_tmp / output).read_text(encoding="utf-8").splitlines()]

    return run


@pytest.mark.parametrize("kind", ["alternates", "retain", "unseen", "paraphrases"])
def test_every_kind_writes_rows_and_says_how_many(
    kind: str, command: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max_prompts=3"] if kind == "retain" else []
    if kind in ("retain", "unseen"):
        # Of a model with random weights, no sentence is left.
        monkeypatch.setattr("lit_unlearn.cli.prepare.ask_with", lambda *_: lambda asked: ["In Riga."] * len(asked))
    rows = command(kind, *options)
    said = capsys.readouterr().out
    assert f"{kind}: {len(rows)} rows, made.jsonl" in said
    assert all({"question", "answer"} <= row.keys() for row in rows)
    assert rows == command(kind, *options, output="again.jsonl")


def test_dates_of_a_table_are_written_as_text(model_dir: str, in_tmp: Path) -> None:
    table = pyarrow.table({name: [row[name] for row in ROWS] for name in ROWS[0]} | {"day": [date(2025, 4, 10)] * 2})
    pyarrow.parquet.write_table(table, "forget.parquet")
    arguments = ["--forget=forget.parquet", "--output=made.jsonl", "--max_new_tokens=4"]
    cli.main(["prepare", "alternates", f"--model={model_dir}", *arguments])
    lines = (in_tmp / "made.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["day"] for line in lines] == ["2025-04-10"] * 2


def test_no_file_is_written_where_no_row_is_left(command: Any, in_tmp: Path, write_rows: Any) -> None:
    forget = write_rows("no_names.jsonl", [{"question": "who?", "answer": "nobody at all."}])
    with pytest.raises(CommandFailed, match="no unseen to write: 1 × no name"):
        command("unseen", f"--forget={forget}")
    with pytest.raises(CommandFailed, match=r"JSON lines.*\.jsonl"):
        command("unseen", output="made.csv")
    assert not [*in_tmp.glob("made*")]


def test_neighbours_come_from_the_training_file(command: Any, write_rows: Any) -> None:
    training = write_rows("training.jsonl", [*ROWS, {"question": "Where was Ada born?", "answer": "In Rome."}])
    rows = command("retain", f"--training={training}", "--max_prompts=1", "--max_neighbours=5")
    assert rows[0] == {"question": "Where was Ada born?", "answer": "In Rome."}
    assert not [row for row in rows if row in ROWS]


def test_one_customer_of_a_single_file_of_conversations(model_dir: str, in_tmp: Path, write_rows: Any) -> None:
    rows = []
    for number, row in enumerate(ROWS):
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        rows.append({"customer": f"c-{number}", "messages": messages})
    Path("chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", encoding="utf-8"
    )
    training = write_rows("training.jsonl", rows)
    cli.main(
        [
            *(
                "prepare",
                "retain",
                f"--model={model_dir}",
                f"--forget.path={training}",
                "--forget.where={customer: c-1}",
            ),
            *(f"--training={training}", "--output=retain.jsonl", "--max_prompts=1", "--max_new_tokens=4"),
            *("--chat.template=chat.jinja", "--chat.system=Be brief."),
        ]
    )
    first = (in_tmp / "retain.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first) == {"messages": rows[0]["messages"]}


def test_a_template_without_a_question_is_refused_first(command: Any, in_tmp: Path) -> None:
    with pytest.raises(CommandFailed, match=r"\{question\}"):
        command("alternates", "--template=Answer: {answer}")
    with pytest.raises(CommandFailed, match="exclude each other"):
        command("alternates", "--template={question} {answer}", "--chat.system=Be brief.")


def test_a_file_that_is_there_is_not_replaced(command: Any, in_tmp: Path) -> None:
    (in_tmp / "made.jsonl").write_text("edited by hand", encoding="utf-8")
    with pytest.raises(CommandFailed, match="may be a file of yours") as failed:
        command("alternates")
    assert failed.value.code == 2
    assert (in_tmp / "made.jsonl").read_text(encoding="utf-8") == "edited by hand"
