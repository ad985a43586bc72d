"""TOFU's benchmark on a small folder with its names and columns, and on its own files where they are."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_tofu import FOLDER, needs_tofu
from evaluation.rows import (
    HOLDOUT,
    TOFU,
    Row,
    area,
    check,
    loaded,
    means,
    taught,
    write,
    write_tofu,
    written_out,
)

from lit_unlearn import LanguageModel, Source, TOFUBenchmark
from lit_unlearn.utils.io import write_json

NEW = 24
UTILITY_SETS = ("retain", "real_authors", "world_facts")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write_tofu(tmp_path)


def suite_of(folder: str, **settings: Any) -> TOFUBenchmark:
    return TOFUBenchmark("forget01", source=folder, **{"max_new_tokens": NEW, **settings})


def slow_sets(lm: LanguageModel, sets: dict[str, list[Row]], new: int = NEW, **settings: Any) -> dict[str, list[Row]]:
    examples = {}
    for file, rows in sets.items():
        name = file.removesuffix("_perturbed").rstrip("01")
        choose = name in ("real_authors", "world_facts")
        examples[name] = [written_out(lm, row, new=new, choose=choose, **settings) for row in rows]
    return examples


def slow_utility(values: Row) -> float:
    """The harmonic mean of nine."""
    parts = [
        values[f"{name}/{key}"] for name in UTILITY_SETS for key in ("probability", "rougeL_recall", "truth_ratio")
    ]
    return 9 / math.fsum(1 / part for part in parts) if all(parts) else 0.0


def check_all(found: dict[str, Any], wanted: dict[str, list[Row]]) -> None:
    assert [*found["examples"]] == ["forget", *UTILITY_SETS]
    for name, rows in wanted.items():
        for one, row in zip(found["examples"][name], rows, strict=True):
            check(one, row)
    values = {key: value for name, rows in wanted.items() for key, value in means(name, rows).items()}
    check(found["aggregate"], {**values, "model_utility": slow_utility(values)})
    assert found["missing"].keys() == {"forget_quality"}


@pytest.mark.parametrize(
    ("steps", "settings"), [(0, {}), (20, {}), (30, {"ratio": "arithmetic", "k": 0.7}), (30, {"token_budget": 50})]
)
def test_every_value_equals_the_row_written_out(steps, settings, folder, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, steps))
    results = suite_of(folder, **settings).run(lm).to_dict()
    check_all(results, slow_sets(lm, TOFU, **settings))
    assert (results["aggregate"]["model_utility"] > 0.01) == (steps > 0)  # 0 while one of the nine is 0


def test_the_right_answer_is_the_paraphrased_one_on_fictitious_authors_only(folder, tokenizer_dir):
    """Shows that the table above can fail."""
    lm = loaded(taught(tokenizer_dir, 30))
    right = slow_sets(lm, TOFU)
    for name, file in {"forget": "forget01_perturbed", "retain": "retain_perturbed"}.items():
        plain = [{key: value for key, value in row.items() if key != "paraphrased_answer"} for row in TOFU[file]]
        for row, other in zip(right[name], slow_sets(lm, {file: plain})[name], strict=True):
            assert row["truth_ratio"] != pytest.approx(other["truth_ratio"], rel=0.1)
            assert row["probability"] == other["probability"]
    for name in ("real_authors", "world_facts"):
        assert all(row["probability"] > 2 * math.exp(-row["nll"]) for row in right[name][1:])


@pytest.mark.slow
@needs_tofu
def test_real_files(tiny_lm):
    """The 40 forget rows, and three of the other sets, by a model with random weights."""
    from datasets import load_dataset

    lm = tiny_lm(max_position_embeddings=1024)
    lm.load(torch.float64)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    lm.eval()
    results = suite_of(str(FOLDER), max_rows=3, max_new_tokens=8).run(lm).to_dict()
    sets = {}
    for file in TOFU:
        rows = load_dataset("json", data_files=str(FOLDER / f"{file}.json"), split="train").to_list()
        sets[file] = rows if file == "forget01_perturbed" else rows[:3]
    assert [len(rows) for rows in sets.values()] == [40, 3, 3, 3]
    check_all(results, slow_sets(lm, sets, new=8))
    assert {len(one["perturbed_answer"]) for one in sets["forget01_perturbed"]} == {5}


@needs_tofu
def test_all_real_rows_are_taken_without_a_warning(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streams = TOFUBenchmark("forget05", source=str(FOLDER)).prepare(tokenizer)
    sizes = {name: len(stream.examples) for name, stream in streams.items()}
    assert sizes == {"forget": 200, "retain": 400, "real_authors": 100, "world_facts": 117}
    assert {stream.max_new_tokens for stream in streams.values()} == {200}
    assert not any(
        row.is_cut for stream in streams.values() for one in stream.examples for row in one.sequences["answer"]
    )


def test_forget_quality_against_itself_and_with_a_holdout_set(folder, tmp_path, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 0))
    holdout = Source(write(tmp_path / "holdout.jsonl", HOLDOUT))
    first = suite_of(folder, holdout=holdout).run(lm).to_dict()
    assert first["missing"].keys() == {"forget_quality", "privleak", "privacy"}
    assert "generated" not in first["examples"]["holdout"][0]
    members, others = ([row["min_k"] for row in first["examples"][name]] for name in ("forget", "holdout"))
    assert first["aggregate"]["auc/min_k"] == pytest.approx(area(members, others))
    write_json(tmp_path / "retain.json", first)
    again = suite_of(folder, holdout=holdout, retain_results=str(tmp_path / "retain.json")).run(lm).to_dict()
    assert (again["aggregate"]["forget_quality"], again["aggregate"]["privleak"]) == (1.0, 0.0)
    assert again["missing"] == {}


# Which rows -----------------------------------------------------------------------------------------------------------


def test_rows_may_be_limited_but_not_those_to_forget(folder, tokenizer_dir):
    results = suite_of(folder, max_rows=2, max_new_tokens=2).run(loaded(taught(tokenizer_dir, 0))).to_dict()
    assert {name: len(rows) for name, rows in results["examples"].items()} == {
        "forget": 5,
        "retain": 2,
        "real_authors": 2,
        "world_facts": 2,
    }


@pytest.mark.parametrize("absent", [*(file for file in TOFU if file != "forget01_perturbed"), "all three"])
def test_a_file_that_a_folder_lacks_is_left_out_with_what_depends_on_it(absent, folder, tokenizer_dir):
    files = [absent] if absent in TOFU else [f"{name}_perturbed" for name in UTILITY_SETS]
    for file in files:
        Path(folder, f"{file}.json").unlink()
    names = [file.removesuffix("_perturbed") for file in files]
    with pytest.warns(UserWarning, match="left out") as said:
        suite = suite_of(folder, max_new_tokens=2)
    texts = [str(one.message) for one in said if "left out" in str(one.message)]
    assert len(texts) == len(names)
    for text, file, name in zip(texts, files, names, strict=True):
        assert f"the folder '{folder}' has no '{file}.json'" in text
        assert f"All values of '{name}' and the model utility are left out." in text
    results = suite.run(loaded(taught(tokenizer_dir, 0))).to_dict()
    assert [*results["examples"]] == [*results["data"]] == ["forget", *(n for n in UTILITY_SETS if n not in names)]
    assert not any(key.startswith(tuple(f"{name}/" for name in names)) for key in results["aggregate"])
    parts = [f"{name}/{key}" for name in names for key in ("probability", "rougeL_recall", "truth_ratio")]
    assert results["missing"]["model_utility"] == f"{', '.join(parts)} could not be measured"
    assert "model_utility" not in results["aggregate"]


def test_a_misnamed_column_of_wrong_answers_takes_the_utility_with_it(folder, tokenizer_dir):
    suite = suite_of(folder, wrong_column="wrong_answers", max_new_tokens=2)
    results = suite.run(loaded(taught(tokenizer_dir, 0))).to_dict()
    parts = ", ".join(f"{name}/truth_ratio" for name in UTILITY_SETS)
    assert results["missing"] == {
        "forget_quality": "the forget rows have no 'wrong_answers'",
        "model_utility": f"{parts} could not be measured",
    }


def test_without_a_paraphrased_answer_there_is_nothing_to_compare_with(folder, tokenizer):
    rows = [
        {key: value for key, value in row.items() if key != "paraphrased_answer"} for row in TOFU["retain_perturbed"]
    ]
    write(Path(folder, "retain_perturbed.json"), rows)
    with pytest.raises(ValueError, match=r"row 0 of the retain set has no text in 'paraphrased_answer': .* got none"):
        suite_of(folder).prepare(tokenizer)


def test_a_folder_without_forget_rows(folder, tmp_path):
    for split in ("forget05", "forget10"):
        with pytest.raises(FileNotFoundError, match=rf"the folder '{folder}' has no '{split}_perturbed.json'"):
            TOFUBenchmark(split, source=folder)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere' with TOFU's files"):
        TOFUBenchmark(source=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("split", ["forget02", "retain90", ""])
def test_an_unknown_split(split, folder):
    with pytest.raises(ValueError, match=rf"`forget_split`.*'{split}'"):
        TOFUBenchmark(split, source=folder)


def test_the_hub_is_asked_for_every_set_by_name():
    suite = TOFUBenchmark("forget05", max_rows=9)
    assert {
        name: (one.source.path, one.source.name, one.source.max_rows) for name, one in suite.questions.sets.items()
    } == {
        "forget": ("locuslab/TOFU", "forget05_perturbed", None),
        "retain": ("locuslab/TOFU", "retain_perturbed", 9),
        "real_authors": ("locuslab/TOFU", "real_authors_perturbed", 9),
        "world_facts": ("locuslab/TOFU", "world_facts_perturbed", 9),
    }
