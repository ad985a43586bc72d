"""One file at a time: links are followed, what is no file is refused, and a file that came in between stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_unlearn.errors import ConfigError, OccupiedError
from lit_unlearn.utils.folders import remove_listed_files, replace_folder
from lit_unlearn.utils.io import atomic_file, check_output_file, is_file


def refuse_links(source: Path, target: Path) -> None:
    """What a disk without hard links does."""
    raise PermissionError(1, "Operation not permitted")


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "rows.jsonl", tmp_path / "rows.jsonl"
    target.write_text("before", encoding="utf-8")
    link.symlink_to(target)
    with atomic_file(link) as file:
        file.write_text("after", encoding="utf-8")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "after"
    assert [path.name for path in target.parent.iterdir()] == ["rows.jsonl"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match="is a device or a pipe"):
            check_output_file(tmp_path / name, argument="output")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_came_in_between_stays(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)
    target = tmp_path / "rows.jsonl"

    def write() -> None:
        with atomic_file(target, may_replace=False) as file:
            file.write_text("of hours", encoding="utf-8")
            target.write_text("of somebody else", encoding="utf-8")

    with pytest.raises(OccupiedError, match="was not there at the start") as error:
        write()
    assert target.read_text(encoding="utf-8") == "of somebody else"
    (kept,) = [path for path in tmp_path.iterdir() if path != target]
    assert kept.read_text(encoding="utf-8") == "of hours"
    assert f"'{kept}'" in str(error.value)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_leaves_nothing_beside_it(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_links)
    with atomic_file(tmp_path / "rows.jsonl", may_replace=False) as file:
        file.write_text("rows", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_only_files_that_are_listed_and_unchanged_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replace_folder(folder) as staging:
        for name in ("weights", "edited", "sub/more"):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(name, encoding="utf-8")
    (folder / "edited").write_text("by the user", encoding="utf-8")
    (folder / "mine").write_text("of the user", encoding="utf-8")
    remove_listed_files(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["edited", "mine"]
    remove_listed_files(tmp_path / "missing")


@pytest.mark.parametrize("text", ["{a: 1}" * 100, "a\0b", "missing.yaml"])
def test_any_text_can_be_asked_whether_it_is_a_file(text: str) -> None:
    assert not is_file(text)
