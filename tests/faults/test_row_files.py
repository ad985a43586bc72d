"""Files of rows: read as they are written, or refused with file, row and remedy, and never with the text of a row."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_unlearn import ForgetRetain, QABenchmark
from lit_unlearn.data.alternates import read_refusals
from lit_unlearn.data.source import Source
from lit_unlearn.errors import DataError

ROWS = [{"question": "Who is CANARY?", "answer": "Ann Žluť."}, {"question": "Where?", "answer": 'In\u2028Rome, "it".'}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'question,answer\nWho is CANARY?,Ann Žluť.\nWhere?,"In\u2028Rome, ""it""."\n'


def load(path: Path) -> list[dict[str, Any]]:
    return Source(str(path)).load("forget", "forget").to_list()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", TEXT.encode()),
        ("rows.ndjson", TEXT.encode()),
        ("rows.JSONL", TEXT.encode()),
        ("rows.jsonl", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()),
        ("rows.jsonl", TEXT.encode("utf-16")),
        ("rows.jsonl", TEXT.encode("utf-32")),
        ("rows.jsonl", ("\n\n" + TEXT.replace("\n", "\n\n")).encode()),
        # The time would be a part of the test's name, which must be the same in every process.
        ("rows.jsonl.gz", gzip.compress(TEXT.encode(), mtime=0)),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.json", TEXT.encode()),
        ("rows.csv", TABLE.encode()),
        ("rows.csv", b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode()),
        ("rows.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("rows.tsv", TABLE.replace(",", "\t", 1).replace("?,", "?\t").encode()),
    ],
)
def test_every_way_to_write_rows_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert load(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    "cell", ["1965-03-21", "2020-01-01T00:00:00", "None", "NA", "null", "nan", "1965", "True", "007", ""]
)
def test_text_stays_text(tmp_path: Path, cell: str) -> None:
    """Also where all cells of a column look like dates, numbers or missing values."""
    (tmp_path / "rows.csv").write_text(f"question,answer\nWhen?,{cell}\nThen?,{cell}\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(2 * f'{{"question": "When?", "answer": "{cell}"}}\n', encoding="utf-8")
    for name in ("rows.csv", "rows.jsonl"):
        assert [row["answer"] for row in load(tmp_path / name)] == [cell, cell]


def test_late_and_unread_columns_do_not_matter(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d", "note": {"x": [1]}, "year": 7}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [row["year"] for row in load(tmp_path / "rows.jsonl")] == [None, 7]


MESSAGES = [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize("row", [ROWS[0], {"messages": MESSAGES}, {"prompt": MESSAGES, "completion": MESSAGES}])
def test_one_row_is_a_file(tmp_path: Path, row: Any) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(row, indent=1), encoding="utf-8")
    assert load(tmp_path / "rows.json") == [row]


REFUSED = {
    "latin1": ("rows.jsonl", TEXT.replace("Ž", "é").encode("latin-1", "replace"), "line 1.*0xe9.*Windows-1252.*UTF-8"),
    "utf-16 without a mark": ("rows.jsonl", TEXT.encode("utf-16-le"), "UTF-(8|16)"),
    "broken line": ("rows.jsonl", (TEXT + '{"question": "CANARY\n').encode(), "line 3"),
    "trailing comma": ("rows.jsonl", TEXT.replace("}\n", "},\n").encode(), "line 1"),
    "wrapped": ("rows.json", json.dumps({"version": 1, "data": ROWS}).encode(), "'data'.*jq"),
    "columns": ("rows.json", json.dumps({"question": ["CANARY"], "answer": ["b"]}).encode(), "columns"),
    "objects by name": ("rows.json", json.dumps({"CANARY": ROWS[0], "b": ROWS[1]}).encode(), r"2 objects.*jq"),
    "semicolons": ("rows.csv", b"question;answer\nCANARY;b\n", "header has no ',' but ';'"),
    "commas in tsv": ("rows.tsv", b"question,answer\nCANARY,b\n", r"header has no '\\t' but ','"),
    "a sheet": ("rows.xlsx", b"CANARY", r"ending '\.xlsx'.*read_excel"),
    "packed": ("rows.jsonl.zst", b"CANARY", r"ending '\.zst'.*unzstd"),
    "list of numbers": ("rows.json", b"[1, 2]", "row 0 is a number"),
    "no objects": ("rows.jsonl", b'"CANARY"\n[1]\n', "row 0 is a text"),
    "mixed kinds": ("rows.jsonl", (TEXT + '{"question": "Q", "answer": 7}').encode(), "row 2 has a number in 'answer'"),
    "unclosed quote": ("rows.csv", b'question,answer\na,"CANARY\n', "line 2"),
    "too many cells": ("rows.csv", b"question,answer\na,b,CANARY\n", "line 2 has 3 cells"),
    "changed gzip": ("rows.jsonl.gz", gzip.compress(TEXT.encode(), mtime=0)[:12] + bytes(40), "rows.jsonl.gz"),
    "damaged gzip": ("rows.jsonl.gz", gzip.compress(TEXT.encode(), mtime=0)[:20], "rows.jsonl.gz"),
    "damaged parquet": ("rows.parquet", b"PAR1CANARY", "rows.parquet"),
    "binary": ("rows.jsonl", bytes(range(256)), "rows.jsonl"),
    "text": ("rows.txt", b"CANARY", r"ending '\.txt'.*\.jsonl"),
    "deep": ("rows.json", b"[" * 100_000, "nested|JSON"),
    "deep line": ("rows.jsonl", TEXT.encode() + b'{"a": ' + b"[" * 100_000, "line 3 is nested"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert "rows" in str(caught.value)
    assert "CANARY" not in str(caught.value)
    assert caught.value.argument == "forget"


def test_a_folder_is_refused_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match=r"folder.*a\.jsonl"):
        load(tmp_path)


@pytest.mark.parametrize("cell", [None, 7, ["CANARY"], {"CANARY": 1}, True])
def test_a_cell_of_another_kind_is_named_by_row_and_never_shown(tokenizer_dir: str, cell: Any) -> None:
    rows = [{"question": "CANARY", "answer": cell}]
    data = ForgetRetain(rows, ROWS, tokenizer=tokenizer_dir)
    with pytest.raises(DataError, match=r"row 0 of the forget set has .* in 'answer'") as caught:
        data.setup("fit")
    assert "CANARY" not in str(caught.value)


def test_a_chat_without_an_answer_is_refused_with_what_to_do(tokenizer_dir: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "CANARY"}]}]
    with pytest.raises(DataError, match=r"row 0 of the forget set has no message of the assistant's.*remove") as caught:
        ForgetRetain(rows, ROWS, tokenizer=tokenizer_dir).setup("fit")
    assert "CANARY" not in str(caught.value)


def test_a_forget_set_that_is_to_be_kept_is_refused(tokenizer_dir: str) -> None:
    more = [{"question": "More?", "answer": "Yes."}]
    with pytest.raises(DataError, match="all 2 forget rows") as caught:
        ForgetRetain(ROWS, [*more, *ROWS], tokenizer=tokenizer_dir).setup("fit")
    assert caught.value.argument == "retain"
    with pytest.warns(UserWarning, match=r"1 of 3 forget rows.*row 0\.") as warned:
        ForgetRetain([*ROWS[:1], *more, *more], ROWS, tokenizer=tokenizer_dir).setup("fit")
    assert not any("CANARY" in str(warning.message) for warning in warned)
    # To fine-tune a model on both sets is no contradiction.
    with pytest.warns(UserWarning, match="2 of 2"):
        ForgetRetain(ROWS, ROWS, tokenizer=tokenizer_dir, train_on="all").setup("fit")


def test_refusals_are_lines_and_nothing_else_ends_one(tmp_path: Path) -> None:
    file = tmp_path / "refusals.txt"
    file.write_bytes("I\u2028cannot\x0c say.\nNo.\r\n\n".encode())
    assert read_refusals(str(file)) == ["I\u2028cannot\x0c say.", "No."]
    file.write_bytes("Désolé.".encode("latin-1"))
    with pytest.raises(DataError, match=r"refusals\.txt.*UTF-8"):
        read_refusals(str(file))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([["x"], None, ["y"]], "row 1 .* no wrong answer in 'perturbed_answer'"),
        ([["x"], [], ["y"]], "row 1 .* no wrong answer in 'perturbed_answer'"),
        ([["x"], ["y", None], ["z"]], "row 1 .* null in 'perturbed_answer'"),
        ([["x"], ["y"], ["z", " "]], "row 2 .* a text in 'perturbed_answer'"),
        (["x", "y", None], "row 2 .* no wrong answer"),
    ],
)
def test_wrong_answers_are_in_all_rows_or_in_none(
    write_rows: Callable[..., str], tokenizer: Any, wrong: list[Any], message: str
) -> None:
    rows = [{"question": f"CANARY {n}", "answer": "a", "perturbed_answer": texts} for n, texts in enumerate(wrong)]
    file = write_rows("rows.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        QABenchmark(file, file).load(tokenizer)
    assert caught.value.argument == "wrong_column"
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("empty", [None, []])
def test_without_any_wrong_answer_there_is_no_truth_ratio(
    write_rows: Callable[..., str], tokenizer: Any, empty: Any
) -> None:
    rows = [{"question": f"{n}?", "answer": "a", "perturbed_answer": empty} for n in range(2)]
    file = write_rows("rows.jsonl", rows)
    streams = QABenchmark(file, file).load(tokenizer)
    assert all("wrong" not in example.sequences for example in streams["forget"].examples)


def test_local_files_need_no_cache_and_leave_none(tmp_path: Path) -> None:
    """Neither a cache that cannot be written stops a run, nor does a row survive in one."""
    (tmp_path / "rows.jsonl").write_text(TEXT, encoding="utf-8")
    (tmp_path / "home").mkdir()
    code = "import sys; from lit_unlearn.data.source import Source; print(len(Source(sys.argv[1]).load('forget')))"
    for cache in ("/proc/nowhere", str(tmp_path / "cache")):
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HOME": cache, "HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "rows.jsonl")],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.stdout.split() == ["2"], done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file() and b"CANARY" in path.read_bytes()]
    assert left == [tmp_path / "rows.jsonl"]


@pytest.mark.parametrize("case", ["latin1", "wrapped", "unclosed quote"])
def test_the_command_line_names_the_file_and_the_key(
    tmp_path: Path, model_dir: str, case: str, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    from lit_unlearn import cli

    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "retain.jsonl").write_text(TEXT, encoding="utf-8")
    arguments = ["fit", "--config=own_data.yaml", f"--model.lm.model={model_dir}", "--data.retain=retain.jsonl"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, f"--data.forget={name}", "--trainer.accelerator=cpu"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert name in error
    assert "data.forget" in error
    assert message.partition(".*")[0].split("|")[0] in error
    assert "Traceback" not in error
