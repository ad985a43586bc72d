"""LUME's rows: their counts on its own files, and what tasks, kinds and folds choose of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lit_unlearn import LUME
from lit_unlearn.data.example import IGNORED
from lit_unlearn.data.lume import HUB_NAME

FOLDER = Path(os.environ.get("LIT_UNLEARN_LUME", Path(__file__).parents[3] / "shared/data/lume"))
needs_lume = pytest.mark.skipif(
    not (FOLDER / "forget.jsonl").is_file(),
    reason=f"LUME's files are not in '{FOLDER}': set LIT_UNLEARN_LUME to a folder with forget.jsonl and retain.jsonl",
)

# By task: completions and questions to forget, and those to keep.
COUNTS = {"Task1": (243, 243, 246, 246), "Task2": (250, 1250, 250, 1250), "Task3": (373, 373, 371, 371)}


def make_rows(name: str, count: int = 2) -> list[dict[str, str]]:
    """A few rows of every task and kind, with ids like LUME's."""
    rows = []
    for task in (1, 2, 3):
        for number in range(count):
            document = f"{name[0] * 3}{task}{number}-ab"
            text = {"input": f"{name} story {task}{number} begins when", "output": f"the {name} door {number} opens."}
            rows.append({"id": f"{document}sc1", **text, "task": f"Task{task}"})
            pair = {"input": f"Who opens {name} door {task}{number}?", "output": f"Ann {number}{task}"}
            rows.append({"id": f"{document}qa0", **pair, "task": f"Task{task}"})
    # The organisers' ids have quotes in some rows.
    return [{**row, "id": f'"{row["id"][:-3]}"{row["id"][-3:]}'} if i % 3 == 0 else row for i, row in enumerate(rows)]


def write_lume(folder: Path, count: int = 2) -> str:
    for name in ("forget", "retain"):
        lines = "".join(json.dumps(row) + "\n" for row in make_rows(name, count))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def inputs(data: LUME) -> list[list[str]]:
    return [list(rows["input"]) for rows in data.load().values()]


@needs_lume
@pytest.mark.parametrize("task", COUNTS)
def test_the_published_counts(task: Any) -> None:
    counts = []
    for kinds in ("completion", "question"):
        data = LUME(str(FOLDER), tasks=[task], kinds=kinds)  # type: ignore[arg-type]
        counts += [len(rows) for rows in data.load().values()]
    assert (counts[0], counts[2], counts[1], counts[3]) == COUNTS[task]


@needs_lume
def test_no_row_is_in_both_sets(tokenizer_dir: str, recwarn: pytest.WarningsRecorder) -> None:
    data = LUME(str(FOLDER), tasks=["Task1"], tokenizer=tokenizer_dir, max_length=2048)
    data.setup("fit")
    assert [len(examples) for examples in data.examples.values()] == [486, 492]
    assert not [warning for warning in recwarn if "forget rows" in str(warning.message)]


def test_input_and_output_are_one_text(tmp_path: Path, tokenizer: Any, tokenizer_dir: str) -> None:
    data = LUME(write_lume(tmp_path), tokenizer=tokenizer_dir)
    data.setup("fit")
    for example, row in zip(data.examples["forget"], make_rows("forget"), strict=True):
        assert tokenizer.decode(example.input_ids) == f"{row['input']} {row['output']}<|endoftext|>"
        supervised = [label for label in example.labels if label != IGNORED]
        assert tokenizer.decode(supervised).strip() == f"{row['output']}<|endoftext|>"


def test_tasks_and_kinds_choose_rows(tmp_path: Path) -> None:
    source = write_lume(tmp_path)
    every = [row["input"] for row in make_rows("forget")]
    assert inputs(LUME(source))[0] == every
    assert inputs(LUME(source, tasks=["Task1", "Task3"]))[0] == [*every[:4], *every[8:]]
    assert inputs(LUME(source, kinds="completion"))[0] == every[::2]
    assert inputs(LUME(source, kinds="question", tasks=["Task2"], max_retain_rows=1)) == [
        every[5:8:2],
        [make_rows("retain")[5]["input"]],
    ]


@pytest.mark.parametrize("place", [".", "data"])
@pytest.mark.parametrize("fold", ["train", "validation"])
def test_the_hubs_files_can_be_used_as_they_are(tmp_path: Path, place: str, fold: Any) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for name in ("forget", "retain"):
        for part, count in (("train", 2), ("validation", 1)):
            rows = Dataset.from_list(make_rows(name, count))
            rows.to_parquet(tmp_path / place / f"{name}_{part}-00000-of-00001.parquet")
    assert [len(rows) for rows in LUME(str(tmp_path), fold=fold).load().values()] == [12 if fold == "train" else 6] * 2


def test_the_hub_is_asked_for_the_fold() -> None:
    data = LUME(tasks=["Task2"], kinds="question", fold="validation", max_retain_rows=5)
    forget, retain = data.sources["forget"], data.sources["retain"]
    assert (forget.path, forget.split, forget.max_rows) == (HUB_NAME, "forget_validation", None)
    assert (retain.path, retain.split, retain.max_rows) == (HUB_NAME, "retain_validation", 5)
    assert forget.rules == retain.rules == {"where": {"task": ["Task2"]}, "contains": {"id": ["qa"]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["Task4"]}, r"`tasks` must be one of 'Task1', .*not 'Task4'"),
        ({"kinds": "both"}, r"`kinds` must be one of 'all', 'completion', 'question', not 'both'"),
        ({"fold": "test"}, r"`fold` must be one of 'train', 'validation', not 'test'"),
        ({"source": "./nowhere"}, r"there is no folder './nowhere' with LUME's files"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError if "source" not in changes else FileNotFoundError, match=message):
        LUME(**{"source": write_lume(tmp_path), **changes})
    (tmp_path / "retain.jsonl").unlink(missing_ok=True)
    with pytest.raises(
        FileNotFoundError, match=r"neither .* has the set 'retain', as a file retain_train\.jsonl, .*retain\.jsonl"
    ):
        LUME(str(tmp_path))
