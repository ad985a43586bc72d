"""Folders that are written as a whole: whose they are, replacing them, and locks."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_unlearn.errors import ConfigError, OccupiedError
from lit_unlearn.utils.io import (
    check_writable,
    describe_os_error,
    expand_path,
    file_digest,
    output_errors,
    resolve_path,
)

try:
    import fcntl
except ImportError:  # Windows, where there are no locks then
    fcntl = None  # type: ignore[assignment]

DIGEST_FILE = "files.sha256"
# Lines that begin so are comments to `sha256sum -c`. Without it, a list of the user's own would pass for ours.
_MARK = "# lit-unlearn wrote these files, and replaces them as long as they are unchanged"
_DIGEST_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_LIST_OF_BOTH = f".{DIGEST_FILE}.both"  # of the files before and after, while the ones replace the others
_STAGING = re.compile(r"\.unfinished-\d+")
# A model folder without them does not load.
_ENTRY_FILES = ("config.json", "adapter/adapter_config.json")
_CLOCK_TICK = 10**8  # nanoseconds, more than the resolution of any file system's times but FAT's

_known_digests: dict[tuple[int, int, int, int], str] = {}
_held_folders: set[tuple[int, int]] = set()  # that this process has locked, by device and inode


def check_export_target(
    target: Path, inputs: Iterable[str | Path | None] = (), owner: object = None, argument: str | None = None
) -> None:
    """Refuse to write a folder as a whole unless all of it is ours.

    It is if it is absent, empty, or if each file in it is listed with its digest in its own ``files.sha256``, which this
    package writes. Links are followed.

    Args:
        target: The folder.
        inputs: Models and tokenizers that are read, by name: the folders among them, and those above, are never written.
            Neither are the working directory and those above.
        owner: The object whose argument the target is, for the error.
        argument: Name of that argument.

    Raises:
        OccupiedError: If the folder must not be written.
    """
    folder = resolve_path(target)
    problem = None
    if os.path.lexists(folder) and not folder.is_dir():
        problem = "is no folder"
    elif _contains(folder, Path.cwd()):
        problem = "is the working directory, or contains it"
    elif any(_contains(folder, expand_path(name)) for name in inputs if name is not None):
        problem = "is the folder of the model or tokenizer that is read, or contains it"
    elif foreign := _find_foreign_file(folder):
        problem = f"holds files that this package did not write, or that were changed since, such as '{foreign}'"
    if problem:
        message = f"'{target}' {problem}, so it is not replaced: choose another folder, one that is empty or not there."
        raise OccupiedError(message, owner=owner, argument=argument)


def _contains(folder: Path, other: Path) -> bool:
    """Return whether a folder is the other one or lies above it; links, and disks that are mounted twice, are seen through."""
    if not folder.is_dir() or not other.is_dir():
        return False
    resolved = resolve_path(other)
    return any(folder.samefile(parent) for parent in (resolved, *resolved.parents))


def _find_foreign_file(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    digests = read_digests(folder)
    if not digests and os.path.lexists(folder / DIGEST_FILE):
        return DIGEST_FILE
    for name, path in iterate_files(folder):
        if not _is_ours(name, path, digests):
            return name
    return None


def _is_ours(name: str, path: Path, digests: Mapping[str, Iterable[str]]) -> bool:
    """Return whether a file is listed and unchanged."""
    # A link could lead to a file elsewhere. This package writes none.
    is_file = path.is_file() and not path.is_symlink()
    return is_file and name in digests and _digest_once(path) in digests[name]


def iterate_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of everything in a folder that is no folder, but its list of digests and unfinished files."""

    def give_up(error: OSError) -> None:
        raise OccupiedError(f"'{error.filename}' cannot be read: {error.strerror}.") from error

    for parent, folders, names in os.walk(folder, onerror=give_up):
        is_top = Path(parent) == folder
        if is_top:
            folders[:] = [name for name in folders if not _STAGING.fullmatch(name)]
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*names, *links]):
            if not (is_top and name == DIGEST_FILE):
                path = Path(parent) / name
                yield path.relative_to(folder).as_posix(), path


def read_digests(folder: Path) -> dict[str, set[str]]:
    """Return the digests that a folder's ``files.sha256`` lists, by file; empty if there is none of ours.

    A file that is being replaced has two.
    """
    try:
        mark, *lines = (folder / DIGEST_FILE).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    digests: dict[str, set[str]] = {}
    for line in lines if mark == _MARK else ():
        if match := _DIGEST_LINE.fullmatch(line):
            digests.setdefault(match[2], set()).add(match[1])
    return digests


def remove_listed_files(folder: Path) -> None:
    """Remove the files that a folder's ``files.sha256`` lists, and folders that are empty then. What is not ours stays."""
    digests = read_digests(folder)
    if not digests:
        return
    for name, path in list(iterate_files(folder)):
        if _is_ours(name, path, digests):
            path.unlink()
            remove_if_empty(path.parent)
    # Last, so that an interrupted removal can go on.
    (folder / DIGEST_FILE).unlink(missing_ok=True)
    remove_if_empty(folder)


def _write_digests(file: Path, digests: Mapping[str, Iterable[str]]) -> None:
    lines = [_MARK]
    for name in sorted(digests):
        lines += [f"{digest}  {name}" for digest in sorted(digests[name])]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _digest_once(path: Path) -> str:
    """Return the sha256 of a file, which is read again only if it may have changed: exports are many gigabytes."""
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key in _known_digests:
        return _known_digests[key]
    digest = file_digest(path)
    # Two changes within one tick of the file system's clock would have the same time.
    if time.time_ns() - status.st_mtime_ns > _CLOCK_TICK:
        _known_digests[key] = digest
    return digest


@contextmanager
def replace_folder(
    target: Path, inputs: Iterable[str | Path | None] = (), keeps_others: bool = False
) -> Iterator[Path]:
    """Yield a folder to write into, whose files replace those of the target when the block ends well.

    The target is replaced file by file, so that links to it and mounted disks stay. An interruption before the block has
    ended leaves the files that were there; one after it leaves a folder that does not load, and that `finish_replacement`
    completes.

    Args:
        target: The folder.
        inputs: As for `check_export_target`.
        keeps_others: Whether files of the target stay that have no successor.

    Raises:
        OccupiedError: If the target must not be written, or another process is writing it.
        OutputError: If it cannot be written.
    """
    check_export_target(target, inputs)
    folder = resolve_path(target)
    staging = folder / f".unfinished-{os.getpid()}"
    with output_errors(target):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            finish_replacement(folder)
            try:
                staging.mkdir()
                yield staging
                _seal(staging, folder, keeps_others)
                _put_in_place(staging, folder)
            finally:
                # What is sealed may have begun to take its place: then it is needed to complete that.
                if not (staging / DIGEST_FILE).is_file():
                    shutil.rmtree(staging, ignore_errors=True)
                if is_new:
                    remove_if_empty(folder)


def _seal(staging: Path, folder: Path, keeps_others: bool) -> None:
    """Give all new files the permissions that the umask asks for, and list them: from now on they are complete."""
    digests: dict[str, set[str]] = {}
    for name, path in iterate_files(folder) if keeps_others else ():
        digests[name] = {_digest_once(path)}
    staged = dict(iterate_files(staging))
    for name, path in staged.items():
        digests[name] = {_digest_once(path)}

    # safetensors creates its files for their owner alone. `open` has asked the umask for this one.
    draft = staging / f".{DIGEST_FILE}"
    _write_digests(draft, digests)
    for path in staged.values():
        shutil.copymode(draft, path)

    # While they take their places, old and new files are ours. From here on nothing needs space on the disk.
    for name, listed in read_digests(folder).items():
        digests.setdefault(name, set()).update(listed)
    _write_digests(staging / _LIST_OF_BOTH, digests)
    draft.replace(staging / DIGEST_FILE)


def _put_in_place(staging: Path, folder: Path) -> None:
    """Replace a folder's files by sealed ones. However often this is interrupted, it can be done again."""
    with suppress(FileNotFoundError):  # it is in its place already
        (staging / _LIST_OF_BOTH).replace(folder / DIGEST_FILE)
    digests, digests_of_both = read_digests(staging), read_digests(folder)
    staged = dict(iterate_files(staging))
    outdated = {}
    for name, path in iterate_files(folder):
        # Never a file that has come in between.
        if name in digests_of_both and name not in digests:
            outdated[name] = path

    # With files of two models, the folder must not load.
    for name in _ENTRY_FILES:
        if name in staged or name in outdated:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(staged, key=lambda name: (name in _ENTRY_FILES, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        staged[name].replace(folder / name)

    for path in outdated.values():
        path.unlink(missing_ok=True)
        remove_if_empty(path.parent)
    (staging / DIGEST_FILE).replace(folder / DIGEST_FILE)
    shutil.rmtree(staging)


def is_staging(path: Path) -> bool:
    """Return whether a folder is one that `replace_folder` collects new files in, within a folder of ours."""
    if not _STAGING.fullmatch(path.name) or not path.is_dir():
        return False
    return _find_foreign_file(path.parent) is None


def finish_replacement(folder: Path) -> None:
    """Complete, or else remove, what an interrupted `replace_folder` left in a folder of ours that this process has locked."""
    folder = resolve_path(folder)
    for staging in list(folder.glob(".unfinished-*")):
        if not _STAGING.fullmatch(staging.name) or not staging.is_dir():
            continue
        digests = read_digests(staging)
        is_complete = bool(digests)
        for name, listed in digests.items():
            # Either it is still to be moved, or it is in its place.
            candidates = [path for path in (staging / name, folder / name) if path.is_file()]
            is_complete = is_complete and any(_digest_once(path) in listed for path in candidates)
        if is_complete:
            _put_in_place(staging, folder)
        else:
            shutil.rmtree(staging)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    with suppress(OSError):  # it holds something, or is not there
        folder.rmdir()


@contextmanager
def lock_folder(folder: Path, owner: object = None, argument: str | None = None) -> Iterator[None]:
    """Keep other processes from writing a folder until the block ends, or this process does, in whatever way.

    Nothing is written: it is a lock of the system on the folder itself. Where there are none, as on some network disks,
    nothing is locked.

    Args:
        folder: Exists. Within the block, this process may lock it again.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument.

    Raises:
        OccupiedError: If another process holds it.
    """
    folder = resolve_path(folder)
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if fcntl is None or key in _held_folders:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _find_lock_holder(status.st_ino)
            message = f"another process{holder} is writing to '{folder}': choose another folder, or wait until it ends."
            raise OccupiedError(message, owner=owner, argument=argument) from None
        except OSError:
            pass  # no locks on this disk
        _held_folders.add(key)
        try:
            yield
        finally:
            _held_folders.discard(key)
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(file: Path) -> Iterator[int | None]:
    """Try to hold a file until the block ends: yield its descriptor, or ``None`` if another process holds it.

    Unlike `lock_folder`, it also works between machines that share a network disk, because NFS locks only what is open for
    writing. A process that inherits the descriptor holds the file as well, until it ends.

    Args:
        file: It is created with its folder, and stays: of a file that is removed, two processes could hold one each.

    Yields:
        Descriptor to read and append by. What the holder before has written is seen through it, on a network disk as well.

    Raises:
        ConfigError: If the disk has no locks.
        OutputError: If the file cannot be written.
    """
    with output_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        is_free = True
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
            except OSError as error:
                raise ConfigError(
                    f"the disk of '{file.parent}' has no locks ({describe_os_error(error)}) that would keep two processes from the "
                    "same work: choose a folder on another disk."
                ) from error
        yield descriptor if is_free else None
    finally:
        os.close(descriptor)


@contextmanager
def hold_folder(folder: Path, size: int = 0, owner: object = None, argument: str | None = None) -> Iterator[None]:
    """Create a folder, and lock it until the block ends; it is removed then if it is new and holds nothing.

    Args:
        folder: The folder.
        size: As for `check_writable`, like ``owner`` and ``argument``.
        owner: As there.
        argument: As there.

    Raises:
        ConfigError: If it cannot be written.
        OccupiedError: If another process holds it.
    """
    check_writable(folder, size, owner, argument)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"'{folder}' cannot be written to: {describe_os_error(error)} Choose another place."
        raise ConfigError(message, owner=owner, argument=argument) from error
    try:
        with lock_folder(folder, owner, argument):
            yield
    finally:
        if is_new:
            remove_if_empty(folder)


def _find_lock_holder(inode: int) -> str:
    """Return the process that holds a lock, as ``" 1234"``; nothing where the system does not tell."""
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    for line in lines:
        # "1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF"
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            return f" {fields[4]}"
    return ""
