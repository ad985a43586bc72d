"""Folders that `save_to_disk` wrote, and objects of other libraries: read as they are, or refused with what to write."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lit_unlearn import ForgetRetain, Source
from lit_unlearn.callbacks.identity import _digest_rows
from lit_unlearn.errors import ConfigError, DataError

ROWS = [{"question": "Who is CANARY?", "answer": "Ann."}, {"question": "When?", "answer": "1965-03-21"}]
OTHER = [{"question": "Where?", "answer": "None"}]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(OTHER)).save_to_disk(tmp_path / "splits")
    return tmp_path


def test_folders_give_the_rows(saved: Path) -> None:
    assert Source(f"{saved}/one").load("forget").to_list() == ROWS
    assert Source(f"{saved}/splits").load("forget").to_list() == ROWS
    assert Source(f"{saved}/splits", split="test").load("forget").to_list() == OTHER
    assert Source(f"{saved}/splits/test").load("forget").to_list() == OTHER
    assert Source(f"{saved}/one", max_rows=1, contains={"answer": "1965"}).load("forget").to_list() == ROWS[1:]


def test_a_format_that_was_saved_with_the_rows_is_left_out(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "n": 1} for row in ROWS]).with_format("numpy")
    rows.save_to_disk(tmp_path / "one")
    for source in (Source(f"{tmp_path}/one"), Source.from_rows(rows)):
        assert {type(cell) for cell in source.load("forget")["n"]} == {int}
        assert {type(cell) for cell in source.load("forget")["answer"]} == {str}


def test_faults_are_named(saved: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'dev'; it has \['test', 'train'\].*`split`") as caught:
        Source(f"{saved}/splits", split="dev").load("forget", "forget")
    assert caught.value.argument == "forget"
    (tables := sorted((saved / "one").glob("*.arrow")))[0].write_bytes(b"CANARY")
    with pytest.raises(DataError, match=r"the forget set '.*one' cannot be read.*save_to_disk") as caught:
        Source(f"{saved}/one").load("forget", "forget")
    assert caught.value.argument == "forget"
    tables[0].unlink()
    with pytest.raises(DataError, match=r"'.*one' cannot be read"):
        Source(f"{saved}/one").load("forget")


def test_a_folder_is_known_by_its_rows(saved: Path) -> None:
    source, split = Source(f"{saved}/one"), Source(f"{saved}/splits", split="test")
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted((saved / "one").glob("*.arrow"))
    )
    assert source.describe()["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert split.describe()["split"] == "test"
    assert _digest_rows(split) != _digest_rows(Source(f"{saved}/splits"))
    # Folders are moved.
    shutil.move(f"{saved}/one", f"{saved}/elsewhere")
    assert _digest_rows(Source(f"{saved}/elsewhere")) == _digest_rows_of(ROWS, saved)


def _digest_rows_of(rows: list[dict[str, str]], folder: Path) -> str:
    Dataset.from_list(rows).save_to_disk(folder / "again", num_shards=2)
    return _digest_rows(Source(f"{folder}/again"))


def test_folders_need_no_cache_and_leave_none(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/proc/nowhere"))
    before = sorted(saved.rglob("*"))
    source = Source(f"{saved}/one", where={"answer": "Ann."}, max_rows=9)
    assert len(source.load("forget")) == 1
    assert sorted(saved.rglob("*")) == before


class Frame:
    """What a data frame of pandas looks like from outside: iterable over its columns."""

    def __iter__(self) -> Any:
        return iter(["question", "answer"])

    def iterrows(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("rows", "conversion"),
    [
        (Frame(), r"`forget\.to_dict\('records'\)`"),
        (DatasetDict(train=Dataset.from_list(ROWS)), r"`forget\['train'\]`"),
        ({"question": ["CANARY"], "answer": ["b"]}, r"`datasets\.Dataset\.from_dict\(forget\)`"),
        (ROWS[0], "give a list of it"),
    ],
)
def test_known_objects_are_refused_with_the_conversion(rows: Any, conversion: str) -> None:
    with pytest.raises(ConfigError, match=rf"`forget` must be .*{conversion}") as caught:
        ForgetRetain(rows, OTHER)
    assert caught.value.argument == "forget"
    assert "CANARY" not in str(caught.value)
