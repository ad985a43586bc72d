"""Sources of rows: a file, a data set on the hub, or rows in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.files import FILE_TYPES, build_table, read_rows, row_type
from lit_unlearn.errors import ConfigError, DataError, MissingFileError
from lit_unlearn.models.loading import check_hub
from lit_unlearn.utils.io import expand_home, expand_path, file_digest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """The place that the rows of one set are read from.

    Args:
        path: A JSON, JSON lines, CSV, TSV or Parquet file, perhaps with ``.gz``, or the name of a data set on the hub.
        name: Configuration of a hub data set.
        split: Split of a hub data set.
        max_rows: Number of rows to read, from the first one on; ``None`` for all.
    """

    path: str
    name: str | None = None
    split: str = "train"
    max_rows: int | None = None
    # Not an argument: jsonargparse would offer it as a YAML key. See `from_rows`.
    rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False, repr=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand_home(self.path))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], path: str = "in memory") -> Source:
        """Return a source of rows that are in memory already.

        Args:
            rows: A ``datasets.Dataset``, or a dict per row.
            path: What records and messages call the rows.

        Example:
            >>> Source.from_rows([{"question": "Who?", "answer": "Ada."}]).load("forget")["answer"][0]
            'Ada.'
        """
        source = cls(path)
        # A generator could be read only once, and rows are read again when a trainer starts anew.
        rows = rows if hasattr(rows, "column_names") else list(rows)
        object.__setattr__(source, "rows", rows)
        return source

    def load(self, name: str, argument: str = "path") -> Dataset:
        """Read the rows.

        Args:
            name: Name of the set, for messages.
            argument: The argument that the source was given as, for errors; see `lit_unlearn.errors.arguments_of`.

        Raises:
            MissingFileError: If there is no such file, and no hub data set of that name can be reached.
            DataError: If the set is empty, or the file cannot be read.
        """
        from datasets import Dataset

        if self.rows is None:
            rows = self._load_from_disk_or_hub(name, argument)
        else:
            rows = self.rows if isinstance(self.rows, Dataset) else self._build_table(name, argument)
        if self.max_rows is not None:
            rows = rows.select(range(min(self.max_rows, len(rows))))
        if len(rows) == 0:
            raise DataError(f"the {name} set is empty: '{self.path}' has no rows.", argument=argument)
        return rows

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, and the sha256 of a file, for records: never the rows themselves."""
        if self.rows is None and Path(self.path).is_file():
            return {"path": self.path, "max_rows": self.max_rows, "sha256": file_digest(Path(self.path))}
        split = self.split if self.rows is None else None
        return {"path": self.path, "name": self.name, "split": split, "max_rows": self.max_rows}

    def _build_table(self, name: str, argument: str) -> Dataset:
        rows: list[Any] = list(self.rows or ())
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                kind = type(row).__name__
                raise DataError(f"row {number} of the {name} set is a {kind}, not a dict.", argument=argument)
        try:
            return build_table(rows)
        except DataError as error:
            raise DataError(f"the {name} set cannot be used: {error}.", argument=argument) from error

    def _load_from_disk_or_hub(self, name: str, argument: str) -> Dataset:
        path = Path(self.path)
        types = ", ".join(FILE_TYPES)
        if row_type(path) is not None and not path.is_dir():
            if not path.is_file():
                message = f"the {name} set's file '{self.path}' does not exist: check `{argument}`."
                raise MissingFileError(message, argument=argument)
            return read_rows(path, name, argument)
        if path.is_dir():
            files = sorted(file.name for file in path.iterdir() if row_type(file) is not None)
            message = f"the {name} set '{self.path}' is a folder: give one file ({types}); in it are {files or 'none'}."
            raise DataError(message, argument=argument)
        if path.is_file():
            message = (
                f"the {name} set's file '{self.path}' has the ending '{path.suffix}', but rows are read from {types}."
            )
            raise DataError(message, argument=argument)
        return self._load_from_hub(name, argument)

    def _load_from_hub(self, name: str, argument: str) -> Dataset:
        from datasets import load_dataset

        check_hub(self.path)
        try:
            return load_dataset(self.path, self.name, split=self.split)
        except PermissionError as error:
            message = (
                f"the {name} set '{self.path}' cannot be kept on this machine ({error}): set HF_HOME to a folder that you may "
                "write."
            )
            raise DataError(message, argument=argument) from error
        except Exception as error:
            raise MissingFileError(
                f"the {name} set '{self.path}' is neither a file ({', '.join(FILE_TYPES)}) nor a data set on the hub with "
                f"configuration {self.name!r} and split {self.split!r}: check `{argument}`. The reason given: {error}",
                argument=argument,
            ) from error


# `Source` comes first: after `str`, jsonargparse dumps it as one, and the dumped configuration cannot be read again.
Rows = Source | str | Path | Iterable[Mapping[str, Any]]
"""A set as users give it: a file, a hub name, a `Source`, a ``datasets.Dataset`` or a dict per row."""


def to_source(rows: Rows, argument: str) -> Source:
    """Return the source of a set as a user gave it."""
    if isinstance(rows, Source):
        return rows
    if isinstance(rows, str | Path):
        return Source(str(rows))
    # A `datasets.DatasetDict` is a mapping of splits.
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        keys = f" with the keys {list(rows)}" if isinstance(rows, Mapping) else ""
        raise ConfigError(
            f"`{argument}` must be a file, a hub name, a `Source`, a `datasets.Dataset` or a list of dicts, not a "
            f"{type(rows).__name__}{keys}.",
            argument=argument,
        )
    return Source.from_rows(rows)


def find_local_folder(source: str, benchmark: str) -> Path | None:
    """Return the folder with a benchmark's files, or ``None`` if ``source`` is a hub name."""
    folder = expand_path(source)
    # No hub name begins with "." or "/". Asked for one, the hub's error would not mention a folder.
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".")):
        message = f"there is no folder '{source}' with {benchmark}'s files: check `source`."
        raise MissingFileError(message, argument="source")
    return folder if folder.is_dir() else None
