"""What is wrong with the files or the settings of a question suite is said before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.rows import FORGET, RETAIN, Row, loaded, taught, write, write_qa

from lit_unlearn import LanguageModel, QABenchmark, Source
from lit_unlearn.errors import MissingFileError


def suite_of(folder: Path, forget: list[Row], retain: list[Row] = RETAIN, **settings: Any) -> QABenchmark:
    files = {"forget": write(folder / "forget.jsonl", forget), "retain": write(folder / "retain.jsonl", retain)}
    return QABenchmark(**files, **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "Who?", "answer": "Ada."}, {}, r"row 1 of the forget set has no text in 'question': .* got null"),
        ({"question": "Who?", "reply": "Ada."}, {}, r"row 1 of the forget set has no text in 'answer': .* got null"),
        ({"question": "Who?", "answer": None}, {}, r"has no text in 'answer': expected a string, got null"),
        ({"question": " ", "answer": "Ada."}, {}, r"has no text in 'question': expected a string, got an empty one"),
        ({"question": "Who?", "answer": "Ada."}, {"question_column": "q"}, r"row 0 of the forget set .* in 'q'"),
        ({"question": "Who?", "answer": "Ada."}, {"answer_column": "a"}, r"row 0 of the forget set .* in 'a'"),
        (
            {"question": "Who?", "answer": " "},
            {},
            r"row 1 of the forget set has no supervised token: its answer is empty",
        ),
        ({"question": "Who? " * 200, "answer": "Ada."}, {}, r"its prompt alone fills `max_length` \(512\)"),
    ],
)
def test_a_row_without_its_texts(row, settings, message, tmp_path, tokenizer):
    suite = suite_of(tmp_path, [{"question": "Where?", "answer": "Here."}, row], **settings)
    with pytest.raises(ValueError, match=message) as error:
        suite.prepare(tokenizer)
    if "has no text in" in str(error.value):
        assert "Set `question_column`, `answer_column` and `wrong_column`" in str(error.value)
        assert str(sorted({"question", "answer"} | row.keys())) in str(error.value)  # the columns that there are


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "`k`.*0"),
        ({"max_new_tokens": 0}, "`max_new_tokens`.*0"),
        ({"ratio": "harmonic"}, "`ratio`.*harmonic"),
        ({"template": "no"}, "`template`.*{question}.*{answer}"),
        ({"fluency_model": "./nowhere"}, r"'\./nowhere'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        suite_of(tmp_path, FORGET, **settings)


def test_a_model_that_is_not_there_is_named_by_the_benchmarks_argument(tmp_path):
    """The owner is the object that the configuration makes, whose key the command line then finds."""
    for argument in ("fluency_model", "reference_model"):
        with pytest.raises(MissingFileError) as refused:
            suite_of(tmp_path, FORGET, **{argument: "./nowhere"})
        assert type(refused.value.owner) is QABenchmark
        assert refused.value.argument == argument


def test_too_long_a_prompt_is_refused_before_anything_is_measured(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr("lit_unlearn.evaluation.benchmark.score_examples", None)
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        suite_of(tmp_path, FORGET, max_new_tokens=250).run(loaded(taught(tokenizer_dir, 0))).to_dict()


def test_a_number_is_no_text(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"row 0 of the retain set has no text in 'answer': .* got a number"):
        suite_of(tmp_path, FORGET, [{"question": "When?", "answer": 1920}]).prepare(tokenizer)


def test_a_wrong_answer_without_a_token(tmp_path, tokenizer):
    rows = [{"question": "Who?", "answer": "Ada.", "perturbed_answer": ["Bob.", ""]}]
    with pytest.raises(ValueError, match=r"row 0 of the forget set has an empty text in 'perturbed_answer'"):
        suite_of(tmp_path, rows).prepare(tokenizer)


def test_other_columns_give_the_same_values(tmp_path, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 20))
    wanted = suite_of(tmp_path, FORGET).run(lm).to_dict()
    names = {"question": "q", "answer": "a", "perturbed_answer": "w"}
    sets = ([{names[key]: value for key, value in row.items()} for row in rows] for rows in (FORGET, RETAIN))
    columns = {"question_column": "q", "answer_column": "a", "wrong_column": "w"}
    found = suite_of(tmp_path, *sets, **columns).run(lm).to_dict()
    assert found["aggregate"] == wanted["aggregate"]
    assert found["examples"] == wanted["examples"]
    assert found["data"] == wanted["data"]


@pytest.mark.parametrize("wrong_column", ["perturbed_answers", "paraphrased_answer"])
def test_a_misnamed_column_of_wrong_answers_is_reported_as_missing(wrong_column, tmp_path, tokenizer_dir):
    results = suite_of(tmp_path, FORGET, wrong_column=wrong_column).run(loaded(taught(tokenizer_dir, 20))).to_dict()
    assert results["missing"] == {"forget_quality": f"the forget rows have no '{wrong_column}'"}
    assert not any("truth_ratio" in name for name in results["aggregate"])
    assert not any("truth_ratio" in row for row in results["examples"]["forget"])


def test_sources_may_be_limited(tmp_path, tokenizer_dir):
    files = write_qa(tmp_path)
    suite = QABenchmark(Source(files["forget"], max_rows=2), Source(files["retain"], max_rows=1), max_new_tokens=4)
    results = suite.run(loaded(taught(tokenizer_dir, 20))).to_dict()
    assert {name: len(rows) for name, rows in results["examples"].items()} == {"forget": 2, "retain": 1}
    assert {name: data["rows"] for name, data in results["data"].items()} == {"forget": 2, "retain": 1}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_other_kinds_of_files(kind, tmp_path, tokenizer_dir):
    """A CSV file has one wrong answer at most, as text."""
    from datasets import Dataset

    rows = [{**row, "perturbed_answer": row["perturbed_answer"][0]} for row in FORGET]
    lm = loaded(taught(tokenizer_dir, 20))
    wanted = suite_of(tmp_path, rows).run(lm).to_dict()["examples"]["forget"]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        getattr(Dataset.from_list(rows), f"to_{kind}")(path)
    suite = QABenchmark(str(path), write(tmp_path / "retain.jsonl", RETAIN), max_new_tokens=4)
    assert suite.run(lm).to_dict()["examples"]["forget"] == wanted


def test_missing_and_empty_files(tmp_path, tokenizer):
    files = write_qa(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the retain set's file '.*nowhere.jsonl' does not exist"):
        QABenchmark(files["forget"], str(tmp_path / "nowhere.jsonl")).prepare(tokenizer)
    with pytest.raises(ValueError, match=r"the holdout set is empty"):
        QABenchmark(files["forget"], files["retain"], write(tmp_path / "empty.jsonl", [])).prepare(tokenizer)


def test_settings_out_of_range(tmp_path):
    files = write_qa(tmp_path)
    with pytest.raises(ValueError, match=r"`token_budget`.*0"):
        QABenchmark(**files, token_budget=0)


def test_a_model_without_a_tokenizer(tmp_path, tiny_lm):
    lm = tiny_lm()
    lm.load(torch.float32)
    with pytest.raises(ValueError, match="`tokenizer`"):
        QABenchmark(**write_qa(tmp_path)).run(LanguageModel.wrap(lm.model)).to_dict()


def test_rows_are_read_once(tmp_path, tokenizer, monkeypatch):
    suite = QABenchmark(**write_qa(tmp_path))
    streams = suite.prepare(tokenizer)
    monkeypatch.setattr(Source, "load", lambda *_: 1 / 0)
    assert suite.prepare(tokenizer) is streams
    assert {name: len(stream.examples) for name, stream in streams.items()} == {"forget": 5, "retain": 3, "holdout": 4}
    assert [example.prompt is None for example in streams["holdout"].examples] == [True] * 4  # nothing is generated
