"""Where the rows of a set come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Where the rows of one set come from.

    Args:
        path: A JSON, JSON lines, CSV or Parquet file, or the name of a data set on the hub.
        name: Configuration of a hub data set.
        split: Split of a hub data set.
        max_rows: Only the first so many rows; ``None`` for all.
    """

    path: str
    name: str | None = None
    split: str = "train"
    max_rows: int | None = None

    def load(self, role: str) -> Dataset:
        """Reads the rows.

        Args:
            role: Name of the set, for messages.

        Raises:
            FileNotFoundError: If there is no such file, and no hub data set of that name can be reached.
            ValueError: If the set is empty, or the file cannot be read.
        """
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError

        path = Path(self.path)
        file_type = _FILE_TYPES.get(path.suffix.lower())
        if file_type is not None:
            if not path.is_file():
                raise FileNotFoundError(f"the {role} set's file '{path}' does not exist: check `data.{role}`.")
            if path.stat().st_size == 0:
                raise ValueError(f"the {role} set is empty: '{path}' has no rows.")
            try:
                rows = load_dataset(file_type, data_files=str(path), split="train")
            except (DatasetGenerationError, ValueError) as error:
                raise ValueError(
                    f"the {role} set is empty or unreadable: '{path}' has no rows, or is no {file_type} file. The reason "
                    f"given: {error.__cause__ or error}"
                ) from error
        else:
            try:
                rows = load_dataset(self.path, self.name, split=self.split)
            except (OSError, ValueError) as error:  # the hub's errors derive from these
                raise FileNotFoundError(
                    f"the {role} set '{self.path}' is neither a file ({', '.join(_FILE_TYPES)}) nor a data set that the "
                    f"hub answers to with configuration {self.name!r} and split {self.split!r}. The reason given: {error}"
                ) from error
        rows = rows if self.max_rows is None else rows.select(range(min(self.max_rows, len(rows))))
        if len(rows) == 0:
            raise ValueError(f"the {role} set is empty: '{self.path}' has no rows.")
        return rows
