"""Sources of rows: a file, a saved data set, a data set on the hub, or rows in memory; all of its rows, or those a rule chooses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.files import (
    FILE_TYPES,
    build_table,
    describe_kind,
    describe_other_file,
    find_saved_dataset,
    read_rows,
    read_saved_dataset,
    row_type,
)
from lit_unlearn.data.selection import RULES, Rule, check_rule, describe_rules, select_rows
from lit_unlearn.errors import ConfigError, DataError, MissingFileError
from lit_unlearn.models.hub import check_hub
from lit_unlearn.utils.io import expand_home, expand_path, file_digest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """The place that the rows of one set are read from.

    A rule chooses rows by what stands in a column, so that one training file gives both sets: ``where`` for the forget set, and
    ``where_not`` with the same columns and values for the retain set. Values are compared as text: 17 equals ``"17"``. In place
    of one value, a list of values can be given, of which any will do. Write ``metadata.customer`` for an entry in a column of
    objects. A row without a value has none of the values.

    Args:
        path: A JSON, JSON lines, CSV, TSV or Parquet file, which except for the last may end in ``.gz``; a folder that
            ``datasets`` wrote with ``save_to_disk``; or the name of a data set on the hub.
        name: Configuration of a hub data set.
        split: Split of a hub data set, or of a saved ``DatasetDict``.
        max_rows: Number of rows to read, from the first one on, after the rules are applied; ``None`` for all.
        where: Values by column, all of which a row must have.
        where_not: Values by column, none of which a row may have.
        contains: Texts by column, all of which a row must contain, anywhere in the column; in a conversation, in any message.
        contains_not: Texts by column, none of which a row may contain.

    Raises:
        ConfigError: If a rule is empty, or has something else than texts, numbers, true or false.

    Example:
        >>> rows = [{"text": "Ann pays.", "customer": "c-17"}, {"text": "Bob pays.", "customer": "c-18"}]
        >>> Source.from_rows(rows, where={"customer": "c-17"}).load("forget")["text"][0]
        'Ann pays.'
    """

    path: str
    name: str | None = None
    split: str = "train"
    max_rows: int | None = None
    where: Rule | None = field(default=None, hash=False)
    where_not: Rule | None = field(default=None, hash=False)
    contains: Rule | None = field(default=None, hash=False)
    contains_not: Rule | None = field(default=None, hash=False)
    # Not arguments: jsonargparse would offer them as YAML keys. See `from_rows`, and `load`, which counts.
    rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False, repr=False, hash=False)
    counts: Mapping[str, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand_home(self.path))
        for rule in RULES:
            check_rule(rule, getattr(self, rule), self)

    @property
    def rules(self) -> dict[str, dict[str, list[str]]]:
        """The rules that are given, by name, with the values of each column as texts."""
        return describe_rules({rule: getattr(self, rule) for rule in RULES})

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], path: str = "in memory", **settings: Any) -> Source:
        """Return a source of rows that are in memory already.

        Args:
            rows: A ``datasets.Dataset``, or a dict per row.
            path: What records and messages call the rows.
            **settings: ``max_rows`` and rules, as for `Source`.

        Example:
            >>> Source.from_rows([{"question": "Who?", "answer": "Ada."}]).load("forget")["answer"][0]
            'Ada.'
        """
        source = cls(path, **settings)
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
            DataError: If the set is empty, the file cannot be read, or a rule names no column or matches no row.
        """
        from datasets import Dataset

        if self.rows is None:
            rows = self._load_from_disk_or_hub(name, argument)
        else:
            # Texts, whatever format was set for training in another program.
            rows = self.rows.with_format(None) if isinstance(self.rows, Dataset) else self._build_table(name, argument)
        if self.rules and len(rows):
            num_rows = len(rows)
            rows = select_rows(rows, {rule: getattr(self, rule) for rule in RULES}, name, argument)
            object.__setattr__(self, "counts", {"rows_read": num_rows, "rows_chosen": len(rows)})
        if self.max_rows is not None:
            rows = rows.select(range(min(self.max_rows, len(rows))))
        if len(rows) == 0:
            raise DataError(f"the {name} set is empty: '{self.path}' has no rows.", argument=argument)
        return rows

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, the sha256 of their file and the rules, for records: never the rows themselves."""
        if (digest := self.digest()) is not None:
            description: dict[str, Any] = {"path": self.path, "max_rows": self.max_rows, "sha256": digest}
            if Path(self.path).is_dir():
                description["split"] = self.split
        else:
            split = self.split if self.rows is None else None
            description = {"path": self.path, "name": self.name, "split": split, "max_rows": self.max_rows}
        return {**description, **self.rules, **(self.counts or {})}

    def digest(self) -> str | None:
        """Return the sha256 of a file, or of the lines that ``sha256sum *.arrow`` prints for a saved data set; else ``None``."""
        if self.rows is not None:
            return None
        path = Path(self.path)
        if path.is_file():
            return file_digest(path)
        folder = find_saved_dataset(path, self.split)
        if folder is None:
            return None
        lines = [f"{file_digest(file)}  {file.name}\n" for file in sorted(folder.glob("*.arrow"))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

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
            rows = read_saved_dataset(path, self.split, name, argument)
            if rows is not None:
                return rows
            files = sorted(file.name for file in path.iterdir() if row_type(file) is not None)
            message = f"the {name} set '{self.path}' is a folder: give one file ({types}); in it are {files or 'none'}."
            raise DataError(message, argument=argument)
        if path.is_file():
            raise DataError(f"the {name} set's file {describe_other_file(path)}", argument=argument)
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


def digest_if_whole(description: Mapping[str, Any]) -> str | None:
    """Return the sha256 of the file that `Source.describe` described, unless only some of its rows were read.

    For these it would stand for the others as well.
    """
    is_part = description.get("max_rows") is not None or any(rule in description for rule in RULES)
    return None if is_part else description.get("sha256")


if TYPE_CHECKING:
    Rows = Source | str | Path | Iterable[Mapping[str, Any]]
    """A set as users give it: a file, a hub name, a `Source`, a ``datasets.Dataset`` or a dict per row."""
else:
    # What a configuration can hold. With iterables, jsonargparse takes a source with a mistyped key or value for a list of rows,
    # `[{"wher": …}]`, and the mistake is not reported. `Source` comes first: after `str`, jsonargparse dumps it as one, and the
    # dumped configuration cannot be read again. Without `Path`, jsonargparse reads a file of rows as if it were a configuration,
    # and a table becomes the text of the setting.
    Rows = Source | str | Path


def to_source(rows: Rows, argument: str) -> Source:
    """Return the source of a set as a user gave it."""
    if isinstance(rows, Source):
        return rows
    if isinstance(rows, str | Path):
        return Source(str(rows))
    conversion = _find_conversion(rows, argument)
    if conversion or not isinstance(rows, Iterable):
        keys = f" with the keys {list(rows)}" if isinstance(rows, Mapping) else ""
        raise ConfigError(
            f"`{argument}` must be a file, a hub name, a `Source`, a `datasets.Dataset` or a list of dicts, not a "
            f"{type(rows).__name__}{keys}{conversion}.",
            argument=argument,
        )
    return Source.from_rows(rows)


def _find_conversion(rows: Any, argument: str) -> str:
    """Return how a known kind of object becomes rows, as the end of a message."""
    # A data frame of pandas, and one of polars. Both are iterable, over the names of their columns.
    if hasattr(rows, "iterrows"):
        return f": give `{argument}.to_dict('records')`"
    if hasattr(rows, "iter_rows"):
        return f": give `{argument}.to_dicts()`"
    if not isinstance(rows, Mapping):
        return ""
    values = list(rows.values())
    if values and all(hasattr(value, "column_names") for value in values):
        return f": give one of its splits, such as `{argument}[{next(iter(rows))!r}]`"
    if values and all(isinstance(value, list) for value in values):
        return f": if these are columns, give `datasets.Dataset.from_dict({argument})`"
    return ": if it is one row, give a list of it"


def find_local_folder(source: str, benchmark: str) -> Path | None:
    """Return the folder with a benchmark's files, or ``None`` if ``source`` is a hub name."""
    folder = expand_path(source)
    # No hub name begins with "." or "/". Asked for one, the hub's error would not mention a folder.
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".")):
        message = f"there is no folder '{source}' with {benchmark}'s files: check `source`."
        raise MissingFileError(message, argument="source")
    return folder if folder.is_dir() else None


def find_file(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """Return the first file of some names, in the first folder that has one."""
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def read_columns(source: Source, benchmark: str, name: str, *columns: str, argument: str = "source") -> list[list[str]]:
    """Read the texts in some columns of every row of a benchmark's set.

    Args:
        source: Where the rows are.
        benchmark: Its name, for messages.
        name: Name of the set, for messages.
        *columns: The columns.
        argument: The benchmark's argument that the source was made from, for errors.

    Raises:
        MissingFileError: If there is no such file, and no data set of that name can be reached.
        DataError: If a row has no text in one of them; the message names the row.
    """
    texts = []
    for number, row in enumerate(source.load(name, argument).to_list()):
        for column in columns:
            if not isinstance(row.get(column), str):
                kind = describe_kind(row[column]) if column in row else "none"
                raise DataError(
                    f"row {number} of {benchmark}'s {name} set has no text in '{column}': got {kind}; its columns are {sorted(row)}."
                )
        texts.append([row[column] for column in columns])
    return texts
