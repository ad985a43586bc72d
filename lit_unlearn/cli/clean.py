"""Run ``lit-unlearn clean``: find and remove what a run left that holds examples or copies of the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import LitUnlearnError, MissingFileError
from lit_unlearn.plotting.run_log import PICTURE_FILE, REPORT_FILE
from lit_unlearn.utils.folders import DIGEST_FILE, is_staging, lock_folder, remove_if_empty
from lit_unlearn.utils.io import cache_folder, format_size, output_errors, write_json

_TOKEN_PICTURES = ("tokens.png", "tokens.svg", "tokens.pdf")
_CHECKPOINT = ".ckpt"
_OUR_CHECKPOINT = re.compile(r"last-step=\d+(-v\d+)?\.ckpt")
_UNFINISHED_CHECKPOINT = re.compile(r"\..+\.ckpt\.unfinished")
_EXAMPLE_IN_REPORT = "first forget example in the report"


class Leftover(NamedTuple):
    """One file or folder that holds examples or a copy of the model.

    Args:
        path: Where it is.
        content: What it holds, for people.
        size: In bytes.
    """

    path: Path
    content: str
    size: int


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn clean",
        description="Lists what a run left that holds examples or copies of the model: checkpoints, pictures of answers, results "
        "files, interrupted evaluations, and the example that report.json has if it was asked for. With --yes it is removed. "
        "The exported model, its record, the rest of report.json and the logged numbers stay, and so does every file that this "
        "package did not write.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of a run, or one above, such as runs/unlearn.")
    parser.add_argument("--yes", action="store_true", help="Remove it. Nothing can be resumed or drawn again then.")
    return parser


def run(arguments: list[str]) -> None:
    """List, and with ``--yes`` remove, what a run left."""
    options = build_parser().parse_args(arguments)
    if not options.run.is_dir():
        raise MissingFileError(f"there is no folder '{options.run}': give that of a run, such as runs/unlearn.")

    leftovers = list(find_leftovers(options.run))
    for leftover in leftovers:
        print(f"{format_size(leftover.size):>10}  {leftover.path}  ({leftover.content})")
    total = format_size(sum(leftover.size for leftover in leftovers))
    if not leftovers:
        print(f"nothing in '{options.run}' holds examples or copies of the model, beside exported models")
    elif options.yes:
        _remove(leftovers)
        print(f"removed: {len(leftovers)} files and folders, {total}")
    else:
        print(f"{len(leftovers)} files and folders, {total}; nothing was removed: add --yes to remove them")
    _mention_judge_cache()


def find_leftovers(folder: Path) -> Iterator[Leftover]:
    """Yield what holds examples or copies of the model in a folder and those below; links are not followed.

    A file counts only if its content shows that this package wrote it.
    """
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        for name in sorted(folders):
            content = _describe_folder(here / name)
            if content:
                folders.remove(name)
                yield Leftover(here / name, content, _measure(here / name))
        folders.sort()
        for name in sorted(names):
            content = _describe_file(here / name)
            if content:
                yield Leftover(here / name, content, _measure(here / name))


def _describe_folder(path: Path) -> str | None:
    """Return what a folder holds that is to be removed as a whole."""
    if path.is_symlink():
        return None
    if _UNFINISHED_CHECKPOINT.fullmatch(path.name):
        return "unfinished checkpoint"
    if path.suffix == _CHECKPOINT and _is_our_checkpoint(path):
        return "checkpoint"
    # With a list of digests it is complete, and the next run puts it into its place.
    if is_staging(path) and not (path / DIGEST_FILE).is_file():
        return "unfinished export"
    # An audit has folders in it, by model and attack.
    if path.suffix == ".partial" and all(_is_partial(file) for file in path.rglob("*") if not file.is_dir()):
        return "answers of an interrupted evaluation"
    return None


def _describe_file(path: Path) -> str | None:
    if path.is_symlink():
        return None
    if _UNFINISHED_CHECKPOINT.fullmatch(path.name):
        return "unfinished checkpoint"
    if path.suffix == _CHECKPOINT and _is_our_checkpoint(path):
        return "checkpoint"
    if path.name in _TOKEN_PICTURES and _is_picture_data(path.with_name(PICTURE_FILE)):
        return "picture of answers"
    if _is_picture_data(path):
        return "answers of the pictures"
    if path.suffix == ".json":
        content = _read_object(path)
        if {"suite", "aggregate", "examples", "data"} <= content.keys() and content["examples"]:
            return "results with the answers to every question"
        if path.name == REPORT_FILE and {"verdict", "constraints"} <= content.keys() and content.get("example"):
            return _EXAMPLE_IN_REPORT
    return None


def _is_our_checkpoint(path: Path) -> bool:
    # The part of a sharded checkpoint that is no weights is in this file.
    file = path / "meta.pt" if path.is_dir() else path
    if not zipfile.is_zipfile(file):
        # Neither is what torch writes.
        return False
    if _OUR_CHECKPOINT.fullmatch(path.name):
        return True
    # Of a `ModelCheckpoint` of the user's. Imports torch, which takes a second, only where there is one.
    from lit_unlearn.export.checkpoint import read_checkpoint

    try:
        read_checkpoint(file)
    except LitUnlearnError:
        return False
    return True


def _is_picture_data(file: Path) -> bool:
    return file.name == PICTURE_FILE and {"metrics", "before", "answers"} <= _read_object(file).keys()


def _is_partial(file: Path) -> bool:
    return file.suffix == ".json" and _read_object(file).keys() == {"key", "examples"}


def _read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _measure(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files)


def _remove(leftovers: list[Leftover]) -> None:
    with ExitStack() as locks:
        folders = dict.fromkeys(leftover.path.parent for leftover in leftovers)
        for folder in folders:
            # A run that goes on would miss its checkpoints.
            locks.enter_context(lock_folder(folder))
        for leftover in leftovers:
            with output_errors(leftover.path):
                _remove_one(leftover)
    for folder in folders:
        remove_if_empty(folder)


def _remove_one(leftover: Leftover) -> None:
    if leftover.content == _EXAMPLE_IN_REPORT:
        # The numbers in it stay.
        write_json(leftover.path, {**_read_object(leftover.path), "example": None})
    elif leftover.path.is_dir():
        shutil.rmtree(leftover.path)
    else:
        leftover.path.unlink()


def _mention_judge_cache() -> None:
    folder = cache_folder() / "judge"
    if folder.is_dir() and any(folder.iterdir()):
        print(
            f"not of this run alone, and kept: '{folder}' ({format_size(_measure(folder))}), questions and answers that "
            "`lit-unlearn judge` sent. Remove it by hand."
        )
