"""Files of rows: read as they are written, without a cache, with the row or line named where one is wrong.

Text stays text: "1965-03-21" is no date, "None" no missing value. Nothing of the rows is kept on the disk, and no message shows
their text.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from datasets import Dataset

# With a byte order mark, the encoding is known; longer marks first, because one begins like another.
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32"}
_MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_rows(path: Path, name: str, argument: str | None = None) -> Dataset:
    """Read a JSON, JSON lines, CSV, TSV or Parquet file, which may be compressed with gzip.

    Args:
        path: The file.
        name: Name of the set, for messages.
        argument: The argument that the file was given as, for errors.

    Raises:
        DataError: If it cannot be read; the message names the line.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        if row_type(path) == ".parquet":
            import pyarrow.parquet

            return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
        return build_table(READERS[str(row_type(path))](read_text(path)))
    except DataError as error:
        raise DataError(f"the {name} set's file '{path}' cannot be read: {error}.", argument=argument) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # A damaged archive or Parquet file, or no right to read it.
        message = f"the {name} set's file '{path}' cannot be read: {error}. Check the file, or give another one."
        raise DataError(message, argument=argument) from error


def row_type(path: Path) -> str | None:
    """Return the ending that says how a file is read, without that of gzip; ``None`` if it is none of those known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    ending = suffixes[-1] if suffixes else ""
    return ending if ending in READERS or (ending == ".parquet" and path.suffix.lower() == ending) else None


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: If it is in another encoding.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.decompress(content)
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"it is not {encoding.upper()}: line {line} has the byte 0x{content[error.start]:02x}. It may be Windows-1252 or Latin-1: "
            "save it as UTF-8, for example with `iconv -f windows-1252 -t utf-8 OLD > NEW`"
        ) from error
    if "\0" in text[:1000]:
        raise DataError("it is no text, or UTF-16 without a byte order mark. Save it as UTF-8")
    return text


def read_text_file(path: Path, argument: str, what: str) -> str:
    """Read a text file that an argument names.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it cannot be read.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no {what} '{path}': check `{argument}`.", argument=argument)
    try:
        return read_text(path)
    except (DataError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"the {what} '{path}' cannot be read: {error}.", argument=argument) from error


# Formats --------------------------------------------------------------------------------------------------------------


def _read_json(text: str) -> list[dict[str, Any]]:
    """Read an object per line, or one list of objects; a list of texts, as MUSE's authors have them, is a column `text`."""
    if not text.strip():
        return []
    if text.lstrip().startswith("["):
        rows = _parse_json(text, 1)
        if all(isinstance(row, str) for row in rows):
            return [{"text": row} for row in rows]
        return _check_objects(rows)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        rows = [_parse_json(line, number) for number, line in lines]
    except DataError:
        # An object over several lines may be a whole file; if it is not, the line is to be named.
        try:
            rows = [json.loads(text)]
        except (ValueError, RecursionError):
            rows = []
        if not rows:
            raise
    if len(rows) == 1 and isinstance(rows[0], dict):
        _check_single_object(rows[0])
    return _check_objects(rows)


def _parse_json(text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"line {line} is no JSON ({error.msg}, column {error.colno}). Correct or remove it") from error
    except RecursionError as error:
        raise DataError(f"line {first_line} is nested too deeply. Correct or remove it") from error


def _check_objects(rows: Any) -> list[dict[str, Any]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f'row {number} is {describe_kind(row)}, not an object such as {{"question": …, "answer": …}}. Write '
                "one object per line, or a list of objects"
            )
    return rows  # type: ignore[no-any-return]


def _check_single_object(content: Mapping[str, Any]) -> None:
    """Refuse a file whose only object holds the rows, in place of being one."""
    values = list(content.values())
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not _is_conversation(value):
            raise DataError(
                f"it is one object with the keys {list(content)}, whose rows are under '{key}'. Write these alone, for example "
                f"with `jq -c '.{key}[]' OLD > NEW.jsonl`"
            )
    if len(values) > 1 and all(isinstance(value, list) and not _is_conversation(value) for value in values):
        raise DataError(
            f"it is one object of columns ({list(content)}), not rows. Write one object per row, for example "
            "`datasets.Dataset.from_dict(json.load(open(OLD))).to_json(NEW)`"
        )
    if len(values) > 1 and all(isinstance(value, dict) for value in values):
        # Their keys may be names, which messages do not show.
        raise DataError(
            f"it is one object of {len(values)} objects, not rows. Write these alone, for example with "
            "`jq -c '.[]' OLD > NEW.jsonl`"
        )


def _is_conversation(value: list[Any]) -> bool:
    """Return whether a list is the messages of a conversation, and so the content of one cell."""
    return all(isinstance(message, dict) and ("role" in message or "from" in message) for message in value)


def _read_separated(text: str, delimiter: str) -> list[dict[str, Any]]:
    """Read a table with a header; every cell is text."""
    # The default of 128 KiB is less than a chapter.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows = []
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                _check_separator(header, delimiter)
                if len(set(header)) < len(header):
                    raise DataError(f"two columns have the same name ({header}). Rename one")
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"the row that ends in line {reader.line_num} has {len(cells)} cells, but there are {len(header)} columns. "
                    "Put quotes around cells with the separator"
                )
            # Cells that are left out at the end have no value.
            rows.append(dict(zip(header, [*cells, *[None] * (len(header) - len(cells))], strict=True)))
    except csv.Error as error:
        raise DataError(
            f"the row that ends in line {reader.line_num} is damaged ({error}). Correct or remove it"
        ) from error
    return rows


def _check_separator(header: list[str], delimiter: str) -> None:
    """Refuse a table with another separator, which would be one of a single column."""
    others = [mark for mark in ",;\t|" if mark != delimiter and mark in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"its header has no {delimiter!r} but {others[0]!r}. Separate cells with commas in a .csv file, with tabs in a .tsv file; "
            f"for example `pandas.read_csv(OLD, sep={others[0]!r}, dtype=str).to_json(NEW, orient='records', lines=True)`"
        )


READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": lambda text: _read_separated(text, ","),
    ".tsv": lambda text: _read_separated(text, "\t"),
}
FILE_TYPES = (*READERS, ".parquet")

# How files of other programs become one of these.
_CONVERSIONS = {
    ".xlsx": "pandas.read_excel(OLD, dtype=str).to_json(NEW, orient='records', lines=True)",
    ".arrow": "datasets.Dataset.from_file(OLD).to_json(NEW)",
    ".feather": "pandas.read_feather(OLD).to_json(NEW, orient='records', lines=True)",
    ".yaml": "json.dump(yaml.safe_load(open(OLD)), open(NEW, 'w'))",
}
_CONVERSIONS |= {".xls": _CONVERSIONS[".xlsx"], ".yml": _CONVERSIONS[".yaml"]}
_UNPACKERS = {".zst": "unzstd", ".xz": "unxz", ".bz2": "bunzip2", ".zip": "unzip"}


def describe_other_file(path: Path) -> str:
    """Return why a file is of no type that rows are read from and, where that is known, what to do."""
    ending = path.suffix.lower()
    remedy = ""
    if ending in _CONVERSIONS:
        remedy = f" Convert it, for example with `{_CONVERSIONS[ending]}`."
    elif ending in _UNPACKERS:
        remedy = f" Unpack it with `{_UNPACKERS[ending]} '{path.name}'`."
    return f"'{path}' has the ending '{path.suffix}', but rows are read from {', '.join(FILE_TYPES)}.{remedy}"


# Folders of `datasets` ------------------------------------------------------------------------------------------------


def find_saved_dataset(folder: Path, split: str) -> Path | None:
    """Return the folder of a split that ``save_to_disk`` wrote; a data set that was saved alone has no splits."""
    for candidate in (folder, folder / split):
        if (candidate / "state.json").is_file() and (candidate / "dataset_info.json").is_file():
            return candidate
    return None


def read_saved_dataset(folder: Path, split: str, name: str, argument: str | None = None) -> Dataset | None:
    """Read a folder that ``save_to_disk`` wrote; return ``None`` if it is another one.

    Args:
        folder: Of a ``datasets.Dataset`` or ``DatasetDict``.
        split: Which split, of a ``DatasetDict``.
        name: Name of the set, for messages.
        argument: The argument that the folder was given as, for errors.

    Raises:
        DataError: If there is no such split, or the folder is damaged.
    """
    from datasets import Dataset

    dataset = find_saved_dataset(folder, split)
    if dataset is None:
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if not splits:
            return None
        raise DataError(
            f"the {name} set '{folder}' has no split '{split}'; it has {splits}. Set `path` and `split`.",
            argument=argument,
        )
    try:
        # Read where it is, without a copy in a cache.
        return Dataset.load_from_disk(str(dataset)).with_format(None)
    except Exception as error:
        # Damaged JSON, missing or damaged tables: a library's own errors, of many types.
        raise DataError(
            f"the {name} set '{dataset}' cannot be read: {error}. Save it again with `save_to_disk`.", argument=argument
        ) from error


# Tables ---------------------------------------------------------------------------------------------------------------


def build_table(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Return a table of rows; a column that a row lacks has no value there.

    Raises:
        DataError: If the values of a column are of different kinds.
    """
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # All columns of all rows, in the order in which they come; `Dataset.from_list` takes those of the first row.
    columns = dict.fromkeys(chain.from_iterable(rows))
    arrays = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            arrays[str(column)] = pyarrow.array(values, from_pandas=False)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(_describe_mixture(str(column), values)) from error
    return Dataset(InMemoryTable(pyarrow.table(arrays)))


def _describe_mixture(column: str, values: Sequence[Any]) -> str:
    expected = None
    for number, value in enumerate(values):
        kind = describe_kind(value)
        if value is None:
            continue
        if expected is not None and kind != expected:
            return (
                f"row {number} has {kind} in '{column}', but the rows before it have {expected}. Write all in one way"
            )
        expected = kind
    return (
        f"entries within the values of '{column}' are of different kinds, such as a text in one place and a list in another. "
        "Write all in one way, for example every 'content' of a message as a text"
    )


def describe_kind(value: Any) -> str:
    """Return what kind of thing a cell holds, without showing it.

    Example:
        >>> describe_kind(None), describe_kind(1965), describe_kind(["Ann"])
        ('null', 'a number', 'a list')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "an empty text" if not value else "a text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Iterable):
        return "a list"
    return f"a {type(value).__name__}"
