from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from lit_unlearn import TOFU
from lit_unlearn.data.alternates import alternate_answers

FOLDER = Path(os.environ.get("LIT_UNLEARN_TOFU", Path(__file__).parents[3] / "shared/data/tofu"))
SIZES = {"forget01": (40, 3960), "forget05": (200, 3800), "forget10": (400, 3600)}

needs_tofu = pytest.mark.skipif(
    not (FOLDER / "forget10.json").is_file(),
    reason=f"TOFU's files are not in '{FOLDER}': set LIT_UNLEARN_TOFU to a folder with forget10.json, retain90.json, …",
)


@needs_tofu
@pytest.mark.parametrize("split", SIZES)
def test_sets_have_the_published_sizes_and_no_row_in_common(tokenizer_dir, split):
    data = TOFU(split, source=str(FOLDER), tokenizer=tokenizer_dir)
    loaded = data.load()
    assert tuple(len(loaded[name]) for name in ("forget", "retain")) == SIZES[split]
    assert {tuple(rows.column_names) for rows in loaded.values()} == {("question", "answer")}
    pairs = {name: set(zip(rows["question"], rows["answer"], strict=True)) for name, rows in loaded.items()}
    assert len(pairs["forget"] | pairs["retain"]) == 4000


@needs_tofu
def test_setup_takes_every_row_without_a_warning(tokenizer_dir):
    data = TOFU("forget10", source=str(FOLDER), tokenizer=tokenizer_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert {name: len(rows) for name, rows in data.examples.items()} == {"forget": 400, "retain": 3600}


@needs_tofu
def test_retain_rows_can_be_limited():
    data = TOFU("forget01", source=str(FOLDER), max_retain_rows=100)
    rows = data.load()
    assert (len(rows["forget"]), len(rows["retain"])) == (40, 100)
    assert rows["retain"]["question"] == TOFU("forget01", source=str(FOLDER)).load()["retain"]["question"][:100]


@pytest.mark.parametrize("split", ["forget02", "retain90", ""])
def test_unknown_split(split):
    with pytest.raises(ValueError, match=rf"`forget_split` .*'forget01', 'forget05', 'forget10', not '{split}'"):
        TOFU(split)


@pytest.mark.parametrize("relative", [False, True])
def test_missing_folder(tmp_path, relative):
    source = "./no/such/folder" if relative else str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=rf"'{source}'.*`source`"):
        TOFU(source=source)


@pytest.mark.parametrize("missing", ["forget05.json", "retain95.json"])
def test_missing_file_in_the_folder(tmp_path, missing):
    for name in {"forget05.json", "retain95.json", "forget10.json"} - {missing}:
        (tmp_path / name).write_text('[{"question": "Who?", "answer": "Basil."}]')
    with pytest.raises(FileNotFoundError, match=rf"'{tmp_path}' has no '{missing}'.*`source`"):
        TOFU("forget05", source=str(tmp_path))


def test_the_hub_is_asked_for_the_split_by_name():
    data = TOFU("forget05", max_retain_rows=9)
    expected = {
        "forget": ("locuslab/TOFU", "forget05", "train", None),
        "retain": ("locuslab/TOFU", "retain95", "train", 9),
    }
    assert {name: (s.path, s.name, s.split, s.max_rows) for name, s in data.sources.items()} == expected
    with pytest.raises(FileNotFoundError, match=r"'locuslab/TOFU' .* 'forget05' .*`source`"):
        data.load()


@needs_tofu
def test_wrong_answers_come_with_the_same_rows() -> None:
    plain = TOFU("forget01", str(FOLDER), max_retain_rows=5)
    wrong = TOFU("forget01", str(FOLDER), max_retain_rows=5, alternate_column="perturbed_answer")
    rows = wrong.load_set("forget")
    for column in ("question", "answer"):
        assert plain.load_set("forget")[column][:] == rows[column][:]
    answers = alternate_answers(rows, wrong.alternate_column, None, seed=0)
    assert all(answer in wrong_answers for answer, wrong_answers in zip(answers, rows["perturbed_answer"], strict=True))
