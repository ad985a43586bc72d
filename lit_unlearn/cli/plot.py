"""Run ``lit-unlearn plot``: the pictures of a run, from its files; also while it is running, or after it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_unlearn.cli.main import print_warning
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import MissingFileError
from lit_unlearn.plotting import NothingToDraw, draw_run, read_run
from lit_unlearn.plotting.run_log import METRICS_FILE, PICTURE_FILE


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn plot",
        description="Draws a run: its dual dynamics, its trajectory and, where `fit` recorded some, answers token by token.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=f"Folder with {METRICS_FILE}, or with versions of it.")
    parser.add_argument(
        "--format", nargs="+", type=Literal["png", "svg", "pdf"], default=["png", "svg"], help="Of the pictures."
    )
    parser.add_argument("--output", type=Path, help="Folder for the pictures; by default the run's.")
    return parser


def run(arguments: list[str]) -> None:
    """Draw a run and print where the pictures are."""
    options = build_parser().parse_args(arguments)
    folder = find_run(options.run)
    run_log = read_run(folder)
    for file in run_log.missing:
        print_warning(f"'{file}' is missing, of a run that this one resumed: its steps are not drawn.")
    drawn = draw_run(run_log, options.output or folder, list(dict.fromkeys(options.format)))
    if all(isinstance(files, str) for files in drawn.values()):
        raise NothingToDraw(f"there is nothing to draw in '{folder}': {'; '.join(map(str, drawn.values()))}.")
    for name, files in drawn.items():
        if isinstance(files, str):
            # The reason why there is no picture.
            print_warning(f"no picture '{name}': {files}.")
        else:
            print("\n".join(map(str, files)))


def find_run(path: Path) -> Path:
    """Return the folder of a run.

    Args:
        path: It, its metrics file, or the folder of all its versions, of which the newest is taken.

    Raises:
        MissingFileError: If there is no run there.
    """
    if path.name == METRICS_FILE and path.is_file():
        return path.parent
    if _is_run(path):
        return path
    # By number, not by name or time: version_10 comes after version_9, and a resumed version may be written last.
    versions = {}
    for folder in path.glob("version_*"):
        number = folder.name.removeprefix("version_")
        if number.isdecimal() and _is_run(folder):
            versions[int(number)] = folder
    if versions:
        return versions[max(versions)]

    # A folder above the runs is the usual mistake: name some below it.
    nearby: list[Path] = []
    for pattern in (f"*/{METRICS_FILE}", f"*/*/{METRICS_FILE}", f"*/*/*/{METRICS_FILE}"):
        nearby += path.glob(pattern)
    newest = sorted(nearby, key=lambda file: file.stat().st_mtime, reverse=True)[:3]
    hint = f" There are runs in {', '.join(str(file.parent) for file in newest)}." if newest else ""
    problem = "is no run" if path.exists() else "does not exist"
    raise MissingFileError(
        f"'{path}' {problem}: expected a folder with the {METRICS_FILE} that `lit-unlearn fit` writes, such as "
        f"runs/unlearn/version_0, or runs/unlearn for its newest version.{hint}"
    )


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / PICTURE_FILE).is_file()
