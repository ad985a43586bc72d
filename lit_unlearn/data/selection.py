"""Choose the rows of a set by what stands in their columns, so that one file gives both the forget and the retain set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.files import describe_kind
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.utils.validation import list_names

if TYPE_CHECKING:
    from datasets import Dataset

# `None` is refused by `check_rule`; if the type did not have it, jsonargparse would make the text "None" of a null.
Value = None | str | int | float | bool
Rule = Mapping[str, Value | list[Value]]
"""A value, or a list of values of which any will do, by column."""

# Whatever YAML may take for a number: 017, 0x1f, 1_000, 12:30, 1e3, 1.50.
_NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FxX_.:+-]*")

RULES = ("where", "where_not", "contains", "contains_not")
"""Names of a `Source`'s rules, in the order in which they apply."""


@dataclass
class _Condition:
    """What a rule says about one column.

    Args:
        rule: Name of the rule.
        column: Name of the column, or of an entry in it.
        values: Of which any will do.
    """

    rule: str
    column: str
    values: Sequence[Value]

    def __post_init__(self) -> None:
        self.excludes = self.rule.endswith("_not")
        self.compares_whole_texts = self.rule.startswith("where")
        # By text, so that a list of thousands of customers is looked through once, and not for every row.
        self._numbers: dict[str, int] = {}
        for position, value in enumerate(self.values):
            # A value that is given twice, as lists of customers have them, counts as the first of the two.
            number = self._numbers.get(_cell_text(value), position)
            for text in _value_texts(value):
                self._numbers.setdefault(text, number)
        self._amounts = {
            value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def is_ambiguous(self, cell: Any) -> bool:
        """Return whether a text of a cell is no value of the rule, but was one before YAML made a number of it."""
        if not self._amounts or not isinstance(cell, str | list | tuple):
            return False
        texts = set(_iterate_texts(cell)) - self._numbers.keys()
        return any(_read_amount(text) in self._amounts for text in texts)

    @property
    def numbers(self) -> set[int]:
        """The numbers of the values, without those that repeat an earlier one."""
        return set(self._numbers.values())

    def __str__(self) -> str:
        return f"`{self.rule}` for the column '{self.column}'"

    def match(self, cell: Any) -> set[int]:
        """Return the numbers of the values that a cell has, or contains."""
        texts = set(_iterate_texts(cell))
        if self.compares_whole_texts:
            return {self._numbers[text] for text in texts & self._numbers.keys()}
        matched = set()
        for value_text, number in self._numbers.items():
            if any(value_text in text for text in texts):
                matched.add(number)
        return matched


def check_rule(rule: str, columns: Rule | None, owner: object) -> None:
    """Raise ConfigError unless a rule names at least one column, with something that can be compared as text.

    Args:
        rule: Name of the rule, which is an argument of ``owner``.
        columns: The rule itself.
        owner: For the error.
    """
    if columns is None:
        return
    # An empty rule would choose every row: for a forget set the opposite of what is meant.
    is_mapping = isinstance(columns, Mapping) and len(columns) > 0
    if not is_mapping:
        shown = "an empty mapping" if isinstance(columns, Mapping) else describe_kind(columns)
        raise ConfigError(
            f"`{rule}` must be a mapping from columns to values, such as {{customer: c-17}}, not {shown}.",
            owner=owner,
            argument=rule,
        )
    for column, values in columns.items():
        for value in _as_list(values) or [[]]:
            # An empty text is in every text.
            is_empty = value == "" and rule.startswith("contains")
            if is_empty or value is None or isinstance(value, Mapping | list | tuple):
                shown = "an empty list" if value == [] else describe_kind(value)
                raise ConfigError(
                    f"`{rule}` has {shown} for the column '{column}': give a text, a number, true or false, or a list of these.",
                    owner=owner,
                    argument=rule,
                )


def describe_rules(rules: Mapping[str, Rule | None]) -> dict[str, dict[str, list[str]]]:
    """Return the rules that are given, with their values as texts."""
    described: dict[str, dict[str, list[str]]] = {}
    for condition in _list_conditions(rules):
        described.setdefault(condition.rule, {})[condition.column] = list(map(_cell_text, condition.values))
    return described


def select_rows(rows: Dataset, rules: Mapping[str, Rule | None], name: str, argument: str) -> Dataset:
    """Return the rows that meet every rule, in their order.

    Args:
        rows: All rows of the source.
        rules: By name, see `RULES`.
        name: Name of the set, for messages.
        argument: The argument that the source was given as, for errors.

    Raises:
        DataError: If a column does not exist, or no row is left.
    """
    chosen = list(range(len(rows)))
    conditions = _list_conditions(rules)
    for condition in conditions:
        cells = _read_cells(rows, condition, name, argument)
        matches = [condition.match(cell) for cell in cells]
        _check_matches(matches, condition, rows, name, argument)
        # A row meets a condition by a match, or, where matches are excluded, by none.
        chosen = [number for number in chosen if bool(matches[number]) != condition.excludes]
    if not chosen:
        raise DataError(
            f"the {name} set is empty: none of {len(rows)} rows meets {' and '.join(map(str, conditions))} together; the columns "
            f"are {rows.column_names}.",
            argument=argument,
        )
    return rows.select(chosen)


def _list_conditions(rules: Mapping[str, Rule | None]) -> list[_Condition]:
    conditions = []
    for rule in RULES:
        for column, values in (rules.get(rule) or {}).items():
            conditions.append(_Condition(rule, str(column), _as_list(values)))
    return conditions


def _read_cells(rows: Dataset, condition: _Condition, name: str, argument: str) -> Sequence[Any]:
    """Return the cells of a column, or of an entry in a column of objects, which is named with a dot.

    Raises:
        DataError: If there is no such column or entry, or a whole object would be compared.
    """
    column, *keys = condition.column.split(".") if condition.column not in rows.column_names else [condition.column]
    cells: list[Any] = list(rows[column]) if column in rows.column_names else []
    for key in keys:
        objects = [cell if isinstance(cell, Mapping) else {} for cell in cells]
        cells = [cell.get(key) for cell in objects] if any(key in cell for cell in objects) else []
    if not cells:
        raise DataError(
            f"the {name} set has no column '{condition.column}', which `{condition.rule}` names: "
            f"{list_names(condition.column, rows.column_names)}.",
            argument=argument,
        )
    if condition.compares_whole_texts:
        for number, cell in enumerate(cells):
            place = f"row {number} of the {name} set"
            _check_comparable(cell, condition, place, argument)
            if condition.is_ambiguous(cell):
                raise DataError(
                    f"{place} has a text in '{condition.column}' that YAML reads as a number, and `{condition.rule}` has the same "
                    "number there, written in another way, so it may mean either of two rows, as 017 and 15 are one number in YAML: "
                    "give the text that stands in the file, in quotes.",
                    argument=argument,
                )
    return cells


def _check_comparable(cell: Any, condition: _Condition, place: str, argument: str) -> None:
    """Raise DataError if a cell has objects, of which no whole text could be compared with a value."""
    if isinstance(cell, Mapping):
        entry = f"{condition.column}.{next(iter(cell), 'key')}"
        problem, remedy = "an object", f"name an entry of it, such as '{entry}'"
    elif isinstance(cell, list | tuple) and any(isinstance(entry, Mapping) for entry in cell):
        # Of a conversation, every role would be one of the texts: `user` would choose every row.
        problem, remedy = "a list of objects", "look for a text in it with `contains` or `contains_not`"
    else:
        return
    raise DataError(
        f"{place} has {problem} in '{condition.column}', which `{condition.rule}` cannot compare with a text: {remedy}.",
        argument=argument,
    )


def _check_matches(matches: Sequence[set[int]], condition: _Condition, rows: Dataset, name: str, argument: str) -> None:
    """Refuse a condition that no row meets, and warn of values that occur in no row, because they may be mistyped.

    Raises:
        DataError: If no row meets the condition.
    """
    unmatched = condition.numbers.difference(*matches)
    if not unmatched:
        return
    # Never the values: they may be the names that are to be forgotten.
    hint = "Values are compared as text, upper and lower case apart; quote what YAML would change, such as '007'."
    if len(unmatched) < len(condition.numbers):
        numbers = ", ".join(str(number + 1) for number in sorted(unmatched)[:5])
        rank_zero_warn(
            f"the {name} set: {len(unmatched)} of {len(condition.numbers)} values of {condition} occur in none of {len(rows)} rows "
            f"(number {numbers}{', …' if len(unmatched) > 5 else ''} of the list). {hint}"
        )
    elif condition.excludes:
        rank_zero_warn(f"the {name} set: {condition} excludes none of {len(rows)} rows. {hint}")
    else:
        raise DataError(
            f"the {name} set is empty: {condition} matches none of {len(rows)} rows; the columns are {rows.column_names}. {hint}",
            argument=argument,
        )


# Text ----------------------------------------------------------------------------------------------------------------


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple | set | frozenset) else [values]


def _cell_text(cell: Any) -> str:
    """Return a cell as it would stand in a file of texts."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    # The numbers of a column in which one is missing are often stored as 17.0.
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _value_texts(value: Value) -> set[str]:
    """Return the texts that equal a value, whose type YAML may have changed: a table may have True or true."""
    return {_cell_text(value), str(value)}


def _read_amount(text: str) -> float | None:
    """Return the number that YAML makes of a text without quotes; ``None`` if it makes none."""
    if not _NUMBER.fullmatch(text):
        return None
    with suppress(ValueError, yaml.YAMLError):
        value = yaml.safe_load(text)
        # The command line's YAML reads 1e3 as a number, too.
        return value if isinstance(value, int | float) else float(text)
    return None


def _iterate_texts(cell: Any) -> Iterator[str]:
    """Yield every text in a cell: of a conversation, those of its messages; of a missing value, none."""
    if isinstance(cell, Mapping):
        labels = _find_labels(cell)
        for key, entry in cell.items():
            if key not in labels:
                yield from _iterate_texts(entry)
    elif isinstance(cell, list | tuple):
        for entry in cell:
            yield from _iterate_texts(entry)
    elif cell is not None:
        yield _cell_text(cell)


def _find_labels(entries: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a message, or of a part of one, that are no text of it: every conversation would contain "user"."""
    if "role" in entries and "content" in entries:
        return ("role",)
    if "from" in entries and "value" in entries:
        return ("from",)
    return ("type",) if "text" in entries and entries.get("type") == "text" else ()
