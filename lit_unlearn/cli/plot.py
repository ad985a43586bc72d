"""``lit-unlearn plot``: the pictures of a run, from its files; also while it goes on, or after it was killed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_unlearn.plotting import NothingToDraw, draw_run, read_run
from lit_unlearn.plotting.run_log import METRICS, RECORD


def run(arguments: list[str]) -> None:
    """Draws a run and prints where the pictures are.

    Args:
        arguments: After the command's name.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If a file of the run is damaged.
        NothingToDraw: If there is nothing to draw.
    """
    parser = argparse.ArgumentParser(
        prog="lit-unlearn plot",
        description="Draws a run: its dual dynamics, its trajectory and, where `fit` recorded some, answers token by token.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=f"folder with {METRICS}, or with versions of it")
    parser.add_argument(
        "--format", nargs="+", choices=("png", "svg", "pdf"), default=["png", "svg"], help="of the pictures"
    )
    parser.add_argument("--output", type=Path, help="folder for the pictures (default: the run's)")
    options = parser.parse_args(arguments)
    folder = find_run(options.run)
    found = read_run(folder)
    for file in found.missing:
        _warn(f"'{file}' is missing, of a run that this one resumed: its steps are not drawn.")
    drawn = draw_run(found, options.output or folder, list(dict.fromkeys(options.format)))
    if all(isinstance(files, str) for files in drawn.values()):
        raise NothingToDraw(f"there is nothing to draw in '{folder}': {'; '.join(map(str, drawn.values()))}.")
    for name, files in drawn.items():
        if isinstance(files, str):
            _warn(f"no picture '{name}': {files}.")
        else:
            print("\n".join(map(str, files)))


def find_run(path: Path) -> Path:
    """The folder of a run.

    Args:
        path: It, its metrics file, or the folder of all its versions, of which the newest is taken.

    Raises:
        FileNotFoundError: If there is no run there.
    """
    if path.name == METRICS and path.is_file():
        return path.parent
    if _is_run(path):
        return path
    versions = [(folder.name.removeprefix("version_"), folder) for folder in path.glob("version_*") if _is_run(folder)]
    if numbered := [(int(number), folder) for number, folder in versions if number.isdecimal()]:
        return max(numbered)[1]
    below = [file for depth in (1, 2, 3) for file in path.glob(f"{'*/' * depth}{METRICS}")]
    newest = sorted(below, key=lambda file: file.stat().st_mtime, reverse=True)[:3]
    hint = f" There are runs in {', '.join(str(file.parent) for file in newest)}." if newest else ""
    what = "is no run" if path.exists() else "does not exist"
    raise FileNotFoundError(
        f"'{path}' {what}: expected is a folder with the {METRICS} that `lit-unlearn fit` writes, such as runs/unlearn/version_0, "
        f"or runs/unlearn for its newest version.{hint}"
    )


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / RECORD).is_file()


def _warn(message: str) -> None:
    print(f"lit-unlearn: warning: {message}", file=sys.stderr)
