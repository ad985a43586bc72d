"""Paths, files that are whole or absent, JSON, digests, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_unlearn.errors import ConfigError, LitUnlearnError, OccupiedError, OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk, a used up quota and a limit on the size of files."""


# Paths ----------------------------------------------------------------------------------------------------------------


def expand_home(path: str) -> str:
    """Return a path whose leading ``~`` is replaced by the user's home folder; any other text unchanged."""
    # Not `~name`: that may be a file.
    return str(Path(path).expanduser()) if path == "~" or path.startswith("~/") else path


def expand_path(path: str | Path) -> Path:
    """Return a path whose leading ``~`` is replaced by the user's home folder."""
    return Path(expand_home(str(path)))


def resolve_path(path: str | Path) -> Path:
    """Return the absolute path without ``~`` and links."""
    return Path(os.path.realpath(expand_home(str(path))))


def cache_folder() -> Path:
    """Return the folder of measurements that later runs use again: ``$LIT_UNLEARN_CACHE`` or ``~/.cache/lit_unlearn``."""
    return expand_path(os.environ.get("LIT_UNLEARN_CACHE") or "~/.cache/lit_unlearn")


# Files ----------------------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the content that `write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any], private: bool = False) -> None:
    """Write a JSON file; a half-written one never replaces a whole one. ``private`` is as for `atomic_file`."""
    with atomic_file(path, private) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


def is_file(text: str) -> bool:
    """Return whether a text is the path of a file. It may be longer than a path can be, or have any characters."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def read_yaml_text(config: str) -> str:
    """Return the text of a configuration, which is a file or YAML itself."""
    return Path(config).read_text(encoding="utf-8") if is_file(config) else config


@contextmanager
def atomic_file(target: Path, private: bool = False, may_replace: bool = True) -> Iterator[Path]:
    """Yield a file to write, which takes the target's place when the block ends, and is removed if it fails.

    Args:
        target: Final path; its folder is created. Of a link, the file that it leads to is written. The unfinished file has the same
            suffix.
        private: Whether only the user may read the file, and the folder if it is created now; by default the umask decides.
        may_replace: Whether a file that is there when the block ends is replaced.

    Raises:
        OutputError: If it cannot be written.
        OccupiedError: If a file is there that may not be replaced; the new one is kept beside it, and the message names it.
    """
    final = resolve_path(target)
    # Beside the target: a move from another disk would be a copy, which an interruption can cut.
    unfinished = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        with output_errors(target):
            final.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
            if private:
                os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT, 0o600))
            yield unfinished
            if may_replace:
                unfinished.replace(final)
            else:
                _publish_new(unfinished, final)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _publish_new(unfinished: Path, target: Path) -> None:
    """Give a finished file its name, unless another file has that name by now."""
    try:
        # At once: a check and a renaming would leave time between them.
        os.link(unfinished, target)
        return
    except FileExistsError:
        is_free = False
    except OSError:
        # The disk has no hard links.
        is_free = not os.path.lexists(target)
    kept = target if is_free else target.with_stem(f"{target.stem}-{os.getpid()}")
    unfinished.replace(kept)
    if not is_free:
        raise OccupiedError(
            f"'{target}' was not there at the start, and is now: what was to be written is in '{kept}'."
        )


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an `OSError` within the block into an `OutputError` that names the target."""
    try:
        yield
    except LitUnlearnError:
        raise
    except OSError as error:
        raise OutputError(f"'{target}' cannot be written: {describe_os_error(error)}") from error


def describe_os_error(error: OSError) -> str:
    """Return the reason of an `OSError` as a sentence, with what to do about a full disk."""
    reason = f"{error.strerror or error}."
    return f"{reason} Free some space, or write to another disk." if error.errno in NO_SPACE else reason


def check_writable(folder: Path, size: int = 0, owner: object = None, argument: str | None = None) -> None:
    """Refuse a folder that cannot be written to, as far as that can be known without writing; it need not exist yet.

    Args:
        folder: The folder.
        size: Bytes that must be free there.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument.

    Raises:
        ConfigError: If it is read-only, below a file, or too full.
    """
    existing = resolve_path(folder)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent

    problem = None
    if not existing.is_dir():
        problem = f"'{existing}' is no folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem = f"'{existing}' is read-only, or belongs to another user"
    elif (free := shutil.disk_usage(existing).free) < size:
        problem = f"it takes about {format_size(size)}, and {format_size(free)} are free"
    if problem:
        message = f"'{folder}' cannot be written to: {problem}. Choose another place"
        message += f" as `{argument}`." if argument else "."
        raise ConfigError(message, owner=owner, argument=argument)


def check_output_file(
    file: Path,
    owner: object = None,
    argument: str | None = None,
    is_ours: Callable[[Path], bool] | None = None,
) -> None:
    """Refuse a file that cannot be written, as far as that can be known without writing; it need not exist yet.

    Args:
        file: The file.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument.
        is_ours: Whether a file that is there may be replaced; ``None`` where nothing is.

    Raises:
        ConfigError: If it is a folder or a device, or its folder cannot be written to.
        OccupiedError: If it would replace a file of the user's.
    """
    if file.is_dir():
        message = f"'{file}' is a folder, and a file is to be written: give the path of one in it"
        message += f" as `{argument}`." if argument else "."
        raise ConfigError(message, owner=owner, argument=argument)
    if file.exists() and not file.is_file():
        message = (
            f"'{file}' is a device or a pipe, and a file is written and then given its name: give the path of a file"
        )
        message += f" as `{argument}`." if argument else "."
        raise ConfigError(message, owner=owner, argument=argument)
    check_writable(resolve_path(file).parent, owner=owner, argument=argument)
    if is_ours is not None and os.path.lexists(file) and not is_ours(file):
        message = f"'{file}' is there already, and may be a file of yours: give another"
        message += f" `{argument}`, or remove it." if argument else " one, or remove it."
        raise OccupiedError(message, owner=owner, argument=argument)


def format_size(size: float) -> str:
    """Return a number of bytes as people read it, such as ``1.6 GB``."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
