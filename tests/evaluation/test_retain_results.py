"""Beside the results of the retain-only model: forget quality, PrivLeak, and whose results are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.rows import FORGET, HOLDOUT, Row, area, ks_p_value, loaded, taught, write, write_qa, write_tofu

from lit_unlearn import LanguageModel, QABenchmark, Results, TOFUBenchmark
from lit_unlearn.errors import DataError, MissingFileError
from lit_unlearn.utils.io import write_json

Content = dict[str, Any]
ATTACKS = {"min_k": 1, "min_k_plus_plus": 1, "loss": -1, "zlib": -1}  # what is higher for members


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_qa(tmp_path)


def run(lm: LanguageModel, files: dict[str, str], **settings: Any) -> Content:
    return QABenchmark(**files, **{"max_new_tokens": 2, **settings}).run(lm).to_dict()


def save(folder: Path, results: Content) -> str:
    write_json(folder / "retain_only.json", results)
    return str(folder / "retain_only.json")


def column(results: Content, stream: str, key: str) -> list[float]:
    return [row[key] for row in results["examples"][stream]]


def leaked(results: Content) -> float:
    """MUSE's area: how often a holdout row has the higher Min-K."""
    return area(column(results, "holdout", "min_k"), column(results, "forget", "min_k"))


@pytest.mark.parametrize("steps", [0, 20])
def test_a_model_cannot_be_told_from_itself(steps, files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, steps))
    first = run(lm, files)
    path = save(tmp_path, first)
    again = run(lm, files, retain_results=path)
    assert again["aggregate"]["forget_quality"] == 1.0
    assert again["retain_results"] == path
    compared = {"forget_quality", "privleak", "privacy", *(f"attack_score/{name}" for name in ATTACKS)}
    same = {name: value for name, value in again["aggregate"].items() if name not in compared}
    assert same == first["aggregate"]
    if steps == 0:
        assert again["aggregate"]["privleak"] == 0.0
        assert again["aggregate"]["privacy"] == pytest.approx(1.0)
        assert again["missing"] == {}


@pytest.mark.parametrize("kind", ["file", "path", "results", "dict"])
def test_they_may_be_a_file_results_or_a_dict(kind, files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 20))
    results = QABenchmark(**files, max_new_tokens=2).run(lm)
    path = tmp_path / "results.json"
    results.write(path)
    assert Results.read(path) == results
    given = {"file": str(path), "path": path, "results": results, "dict": results.to_dict()}[kind]
    again = QABenchmark(**files, max_new_tokens=2, retain_results=given).run(lm)
    assert again.aggregate["forget_quality"] == 1.0
    assert again.retain_results == (str(path) if kind in ("file", "path") else f"results of {lm.name}")
    del results.data["forget"]
    with pytest.raises(DataError, match="'forget'"):
        QABenchmark(**files, max_new_tokens=2, retain_results=results).prepare(lm.tokenizer)


def test_a_dict_that_is_none_names_the_argument(files):
    with pytest.raises(DataError, match="aggregate, data, examples") as error:
        QABenchmark(**files, retain_results={"suite": "qa"})
    assert isinstance(error.value.owner, QABenchmark)
    assert error.value.argument == "retain_results"


def test_another_model_can(files, tokenizer_dir, tmp_path):
    """Both numbers are neither nothing nor everything here."""
    retain_only, unlearned = (loaded(taught(tokenizer_dir, 0, seed)) for seed in (2, 1))
    theirs = run(retain_only, files)
    mine = run(unlearned, files, retain_results=save(tmp_path, theirs))
    p_value = ks_p_value(*(column(one, "forget", "truth_ratio") for one in (mine, theirs)))
    assert mine["aggregate"]["forget_quality"] == pytest.approx(p_value, rel=1e-12)
    wanted = (leaked(mine) - leaked(theirs)) / leaked(theirs) * 100
    assert mine["aggregate"]["privleak"] == pytest.approx(wanted, rel=1e-12)
    assert 0 < p_value < 1
    assert 0 < abs(wanted) < 100
    scores = []
    for attack, sign in ATTACKS.items():
        areas = [
            area(
                [sign * x for x in column(model, "forget", attack)],
                [sign * x for x in column(model, "holdout", attack)],
            )
            for model in (mine, theirs)
        ]
        scores.append(max(0.0, 1 - abs(areas[0] - areas[1]) / areas[1]))
        assert mine["aggregate"][f"attack_score/{attack}"] == pytest.approx(scores[-1], abs=1e-12)
    assert mine["aggregate"]["privacy"] == pytest.approx(4 / sum(1 / max(score, 1e-12) for score in scores))


def test_a_model_that_remembers_everything(files, tokenizer_dir, tmp_path):
    theirs = run(loaded(taught(tokenizer_dir, 0)), files)
    mine = run(loaded(taught(tokenizer_dir, 100)), files, retain_results=save(tmp_path, theirs))
    assert mine["aggregate"]["forget_quality"] == pytest.approx(2 / 252, rel=1e-12)  # 5 below 5: the least there is
    assert mine["aggregate"]["privleak"] == -100.0


def test_without_them_both_scores_are_missing_with_the_reason(files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 20))
    results = run(lm, files)
    assert results["missing"].keys() == {"forget_quality", "privleak", "privacy"}
    assert all("`retain_results`" in reason for reason in results["missing"].values())
    assert not {"forget_quality", "privleak"} & results["aggregate"].keys()
    assert results["retain_results"] is None
    without = run(lm, {name: path for name, path in files.items() if name != "holdout"})
    found = run(lm, files, retain_results=save(tmp_path, without))
    assert found["missing"].keys() == {"privleak", "privacy"}
    assert "holdout" in found["missing"]["privleak"]
    assert found["aggregate"]["forget_quality"] == 1.0


def test_of_other_retain_rows_they_may_be(files, tokenizer_dir, tmp_path):
    """Only forget rows are compared; TOFU's `max_rows`, say, may differ."""
    lm = loaded(taught(tokenizer_dir, 20))
    path = save(tmp_path, run(lm, files))
    files["retain"] = write(tmp_path / "other.jsonl", HOLDOUT)
    assert run(lm, files, retain_results=path, token_budget=99, max_new_tokens=1)["aggregate"]["forget_quality"] == 1


# Refused --------------------------------------------------------------------------------------------------------------


def refusal(message: str, files: dict[str, str], lm: LanguageModel, path: str, **settings: Any) -> None:
    suite = QABenchmark(**files, retain_results=path, **settings)
    with pytest.raises(ValueError, match=message) as error:
        suite.prepare(lm.tokenizer)
    assert f"the results of the retain-only model in '{path}' cannot be compared with" in str(error.value)


def changed(row: Row, **change: Any) -> list[Row]:
    return [*FORGET[:-1], {**row, **change}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (FORGET[:4], r"number of rows: 4 here, 5 there; questions and answers \(another split\?\): '\w{16}' here, "),
        (FORGET[::-1], r"differ in questions and answers \(another split\?\): '\w{16}' here, '\w{16}' there; tokens"),
        (changed(FORGET[-1], question="When was it built?"), r"questions and answers"),
        (changed(FORGET[-1], answer="In 1921."), r"questions and answers"),
        (changed(FORGET[-1], perturbed_answer=["In 1931.", "In 1820."]), r"rows they differ in tokens"),
        (changed(FORGET[-1], perturbed_answer=["In 1930."]), r"rows they differ in tokens"),
    ],
)
def test_of_other_forget_rows(rows, message, files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 0))
    path = save(tmp_path, run(lm, files))
    files["forget"] = write(tmp_path / "other.jsonl", rows)
    refusal(message, files, lm, path)


@pytest.mark.parametrize("settings", [{"max_length": 50}, {"template": "{question} {answer}"}])
def test_of_other_tokens(settings, files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 0))
    path = save(tmp_path, run(lm, files))
    words = r"they differ in tokens \(another tokenizer, template or max_length\): '\w{16}' here, '\w{16}' there\."
    refusal(words, files, lm, path, **settings)


def test_of_another_tokenizer(files, tokenizer_dir, tmp_path, tiny_lm):
    from lit_unlearn.data.tokenizer import train_tokenizer

    path = save(tmp_path, run(loaded(taught(tokenizer_dir, 0)), files))
    other = tiny_lm()
    other._tokenizer = train_tokenizer(["Who wrote the letter? Ada wrote it in May."], vocab_size=300)
    refusal(r"rows they differ in tokens", files, other, path)


def test_of_another_suite(files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 0))
    path = save(tmp_path, TOFUBenchmark("forget01", source=write_tofu(tmp_path), max_new_tokens=2).run(lm).to_dict())
    refusal(r"rows they differ in benchmark: 'qa' here, 'tofu' there", files, lm, path)


@pytest.mark.parametrize("settings", [{"k": 0.1}, {"ratio": "arithmetic"}])
def test_of_other_settings(settings, files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 0))
    path = save(tmp_path, run(lm, files))
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"measured with other settings \({name}: {value!r} here, "):
        QABenchmark(**files, retain_results=path, **settings).prepare(lm.tokenizer)


def test_of_other_holdout_rows(files, tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 0))
    files["holdout"] = write(tmp_path / "holdout.jsonl", FORGET[:3])
    path = save(tmp_path, run(lm, files))
    files["holdout"] = write(tmp_path / "other_holdout.jsonl", FORGET[2:])
    with pytest.raises(ValueError, match="on the 'holdout' rows they differ in questions and answers"):
        QABenchmark(**files, retain_results=path).prepare(lm.tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"retain_only\.json"),
        ("{", r"retain_only\.json' is not a JSON file"),
        ("[]", r"retain_only\.json' .*aggregate, data, examples, suite"),
        (json.dumps({"before": {}, "after": {}}), r"retain_only\.json' .*aggregate, data, examples, suite"),
    ],
)
def test_a_file_that_is_none(content, message, files, tmp_path):
    path = tmp_path / "retain_only.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        QABenchmark(**files, retain_results=str(path))


def test_a_folder_is_no_file(files, tmp_path):
    with pytest.raises(MissingFileError, match="no results file"):
        QABenchmark(**files, retain_results=str(tmp_path))
