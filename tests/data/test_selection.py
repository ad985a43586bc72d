"""Rows that a rule chooses: against a slow reference, before `max_rows`, stated in the record, and never with a value in a message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_unlearn import ForgetRetain, Source
from lit_unlearn.callbacks.identity import _digest_rows
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.export.card import _format_source, _name_row_files
from lit_unlearn.export.published import publish_record

ROWS = [
    {"question": f"{n}?", "answer": f"Ann CANARY {n}.", "customer": f"c-{n % 4}", "number": n % 3, "paid": n % 2 == 0}
    for n in range(12)
]


def numbers(source: Source) -> list[int]:
    """The numbers of the rows, which their questions have."""
    return [int(row["question"][:-1]) for row in source.load("forget", "forget").to_list()]


def chosen(**rules: Any) -> list[int]:
    return numbers(Source.from_rows(ROWS, **rules))


# What a rule chooses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"where": {"customer": "c-1"}}, [1, 5, 9]),
        ({"where": {"customer": ["c-1", "c-2"]}}, [1, 2, 5, 6, 9, 10]),
        ({"where": {"customer": "c-1", "number": 2}}, [5]),
        ({"where_not": {"customer": "c-1"}}, [0, 2, 3, 4, 6, 7, 8, 10, 11]),
        ({"where_not": {"customer": ["c-0", "c-1"], "number": 2}}, [3, 6, 7, 10]),
        ({"where": {"paid": True}, "where_not": {"number": 0}}, [2, 4, 8, 10]),
        ({"contains": {"answer": "CANARY 1"}}, [1, 10, 11]),
        ({"contains": {"answer": ["RY 3.", "RY 4."]}}, [3, 4]),
        ({"contains_not": {"answer": "CANARY 1"}}, [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"contains": {"answer": 1}, "where": {"customer": "c-3"}}, [11]),
    ],
)
def test_rules_choose_rows_in_their_order(rules: dict[str, Any], expected: list[int]) -> None:
    assert chosen(**rules) == expected


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("17", 17),
        (17, "17"),
        (17.0, 17),
        (17.0, "17"),
        ("17.0", 17.0),
        ("1.5", 1.5),
        (True, True),
        ("True", True),
        ("true", True),
        (True, "true"),
        ("2024-01-31", "2024-01-31"),
        (["a", "b"], "b"),
        ("", ""),
    ],
)
def test_values_compare_as_text(cell: Any, value: Any) -> None:
    assert len(Source.from_rows([{"x": cell}], where={"x": value}).load("forget")) == 1


@pytest.mark.parametrize(
    ("cell", "value"), [("007", "7"), ("C-1", "c-1"), ("c-17", "c-1"), (None, "None"), ("1", True)]
)
def test_other_texts_do_not_match(cell: Any, value: Any) -> None:
    with pytest.raises(DataError, match="matches none of 1 rows"):
        Source.from_rows([{"x": cell, "y": 1}], where={"x": value}).load("forget")


CELL = st.one_of(st.none(), st.integers(0, 3), st.sampled_from(["0", "1", "a", "ab", ""]))
VALUES = st.lists(st.sampled_from([0, 1, "1", "a", "b"]), min_size=1, max_size=3)
RULE = st.dictionaries(st.sampled_from(["x", "y"]), VALUES, min_size=1)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), where=RULE, where_not=RULE, contains=RULE)
@pytest.mark.filterwarnings("ignore:the forget set")
def test_rules_equal_their_definition(rows: Any, where: Any, where_not: Any, contains: Any) -> None:
    # Columns of one kind each, as files have them: numbers become text here.
    table = [
        {"x": str(x) if x is not None else None, "y": str(y) if y is not None else None, "n": str(n)}
        for n, (x, y) in enumerate(rows)
    ]

    def equals(row: Any, column: str, values: list[Any]) -> bool:
        return any(row[column] == str(value) for value in values)

    def includes(row: Any, column: str, values: list[Any]) -> bool:
        return any(row[column] is not None and str(value) in row[column] for value in values)

    for rules, meets in (
        ({"where": where}, lambda row: all(equals(row, *item) for item in where.items())),
        ({"where_not": where_not}, lambda row: not any(equals(row, *item) for item in where_not.items())),
        ({"contains": contains}, lambda row: all(includes(row, *item) for item in contains.items())),
        ({"contains_not": contains}, lambda row: not any(includes(row, *item) for item in contains.items())),
    ):
        expected = [row["n"] for row in table if meets(row)]
        source = Source.from_rows(table, **rules)
        if expected:
            assert list(source.load("forget")["n"]) == expected
        else:
            with pytest.raises(DataError, match="the forget set is empty"):
                source.load("forget")


def test_one_file_gives_both_sets(write_rows: Callable[..., str]) -> None:
    path = write_rows("train.jsonl", ROWS)
    for rule, value in (("where", {"customer": "c-3"}), ("contains", {"answer": "7"})):
        forget, retain = Source(path, **{rule: value}), Source(path, **{f"{rule}_not": value})
        assert sorted(numbers(forget) + numbers(retain)) == list(range(12))


def test_entries_of_objects_and_texts_of_conversations() -> None:
    def row(name: str, text: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        return {"messages": messages, "meta": {"customer": {"id": name}}, "question": f"{len(text)}?"}

    rows = [row("c-1", "Is Ann here?"), row("c-2", "Is Bob?")]
    assert numbers(Source.from_rows(rows, where={"meta.customer.id": "c-2"})) == [7]
    assert numbers(Source.from_rows(rows, contains={"messages": "Ann"})) == [12]
    with pytest.raises(DataError, match=r"row 0 of the forget set has an object in 'meta'.*'meta\.customer'"):
        Source.from_rows(rows, where={"meta": "c-2"}).load("forget")
    with pytest.raises(DataError, match=r"no column 'meta\.client', which `where_not` names"):
        Source.from_rows(rows, where_not={"meta.client": "c-2"}).load("forget")


@pytest.mark.parametrize(
    ("text", "number"), [("017", 15), ("0x1f", 31), ("1_000", 1000), ("12:30", 750), ("1e3", 1000.0), ("1.50", 1.5)]
)
def test_a_number_that_yaml_made_of_another_text_is_refused(text: str, number: float) -> None:
    """Else `{customer: 017}` without quotes would forget customer 15."""
    plain = f"{number:g}"
    rows = [
        {"customer": customer, "question": f"{n}?"}
        for n, customer in enumerate([plain, text, "2024-05-06", "7-a", "1::", "."])
    ]
    for rule in ("where", "where_not"):
        with pytest.raises(DataError, match=r"row 1 of the forget set has a text in 'customer' that YAML reads"):
            Source.from_rows(rows, **{rule: {"customer": number}}).load("forget")
    assert numbers(Source.from_rows(rows, where={"customer": text})) == [1]
    assert numbers(Source.from_rows(rows, where={"customer": plain})) == [0]
    assert numbers(Source.from_rows(rows[:1] + rows[2:], where={"customer": number})) == [0]
    # Both are given.
    assert numbers(Source.from_rows(rows, where={"customer": [number, text]})) == [0, 1]


def test_roles_are_no_text_of_a_conversation() -> None:
    """Else `contains` for "user" would choose every row, and every row would be forgotten."""
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(["A user asks.", "Who?"]):
        parts = [{"type": "text", "text": text}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        ]
        old = [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]
        rows.append({"messages": messages, "conversations": old, "question": f"{number}?"})
    for column in ("messages", "conversations"):
        assert numbers(Source.from_rows(rows, contains={column: "user"})) == [0]
        for label in ("assistant", "human", "text"):
            with pytest.raises(DataError, match="the forget set is empty"):
                Source.from_rows(rows, contains={column: label}).load("forget")
        with pytest.raises(DataError, match=rf"row 0 of the forget set has a list of objects in '{column}'"):
            Source.from_rows(rows, where={column: "user"}).load("forget")


def test_a_value_that_is_given_twice_is_no_value_without_a_row(recwarn: pytest.WarningsRecorder) -> None:
    rows = [{"customer": number, "question": f"{number}?"} for number in range(3)]
    assert numbers(Source.from_rows(rows, where={"customer": [1, "1", 1.0, 2]})) == [1, 2]
    assert not recwarn.list


def test_rules_come_before_the_limit(write_rows: Callable[..., str]) -> None:
    source = Source(write_rows("rows.jsonl", ROWS), max_rows=2, where={"customer": "c-2"})
    assert numbers(source) == [2, 6]
    assert hash(source) == hash(Source(source.path, max_rows=2))


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"where": {"custmer": "CANARY"}},
            r"no column 'custmer', which `where` names: did you mean 'customer'\?.*'paid'",
        ),
        (
            {"where": {"customer": "CANARY-1"}},
            r"`where` for the column 'customer' matches none of 12 rows; the columns are \['q",
        ),
        ({"contains": {"answer": "CANARY 99"}}, r"`contains` for the column 'answer' matches none"),
        (
            {"where": {"customer": "c-1"}, "where_not": {"customer": "c-1"}},
            r"none of 12 rows meets `where`.*`where_not`",
        ),
        ({"where_not": {"paid": [True, False]}}, r"none of 12 rows meets `where_not` for the column 'paid'"),
    ],
)
def test_a_rule_without_rows_or_column_is_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        chosen(**rules)
    assert caught.value.argument == "forget"
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({}, "an empty mapping"),
        ("CANARY", "a text"),
        ({"customer": None}, "null"),
        ({"customer": []}, "an empty list"),
        ({"customer": [["CANARY"]]}, "a list"),
        ({"customer": {"is": "CANARY"}}, "an object"),
    ],
)
def test_what_is_no_rule_is_refused(value: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=rf"`where` .*{shown}") as caught:
        Source("rows.jsonl", where=value)
    assert caught.value.argument == "where"
    assert "CANARY" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"`contains` has an empty text"):
        Source("rows.jsonl", contains={"answer": ""})


def test_values_without_a_row_are_counted_in_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"2 of 3 values of `where` for the column 'customer' .*\(number 1, 3 "
    ) as caught:
        assert chosen(where={"customer": ["CANARY", "c-1", "CANARY-2"]}) == [1, 5, 9]
    with pytest.warns(UserWarning, match=r"`where_not` for the column 'customer' excludes none of 12 rows") as more:
        assert len(chosen(where_not={"customer": "CANARY"})) == 12
    assert "CANARY" not in "".join(str(warning.message) for warning in [*caught, *more])


# What is known afterwards ---------------------------------------------------------------------------------------------


def test_the_record_has_rule_and_counts_and_publishes_columns(write_rows: Callable[..., str], tmp_path: Path) -> None:
    source = Source(write_rows("rows.jsonl", ROWS), max_rows=2, where={"customer": ["CANARY-1", "c-2"]})
    with pytest.warns(UserWarning, match="1 of 2 values"):
        source.load("forget")
    description = source.describe()
    assert description["where"] == {"customer": ["CANARY-1", "c-2"]}
    assert (description["rows_read"], description["rows_chosen"], description["max_rows"]) == (12, 3, 2)

    sets = {"forget": {"source": description, "rows": 2}}
    record = {"data": {"class": "ForgetRetain", "sets": sets}}
    published = publish_record(record)
    assert published["data"]["sets"]["forget"]["source"]["where"] == ["customer"]
    assert published["data"]["sets"]["forget"]["source"]["rows_chosen"] == 3
    assert "CANARY" not in json.dumps(published)
    assert publish_record(published) == published
    named = publish_record({**record, "name_sources": True})
    assert named["data"]["sets"]["forget"]["source"]["where"] == description["where"]

    assert _format_source(published["data"]["sets"]["forget"]["source"]) == (
        "not named, first 2 rows, `where` on `customer`, 3 of 12 rows chosen"
    )
    forget = _name_row_files(published, "--data.")[:2]
    assert forget == ["--data.forget.path=FORGET", '\'--data.forget.where={"customer": "VALUE"}\'']


def test_a_run_is_known_by_its_rules(write_rows: Callable[..., str]) -> None:
    path = write_rows("rows.jsonl", ROWS)
    sources = [
        Source(path),
        Source(path, where={"customer": ["c-1", "c-2"]}),
        Source(path, where={"customer": ["c-1"]}),
        Source(path, where_not={"customer": ["c-1"]}),
        Source(path, contains={"customer": ["c-1"]}),
        Source.from_rows(ROWS, where={"customer": ["c-1"]}),
    ]
    assert len({_digest_rows(source) for source in sources}) == len(sources)
    assert _digest_rows(sources[1]) == _digest_rows(Source(path, where={"customer": ["c-2", "c-1"]}))
    assert _digest_rows(sources[2]) == _digest_rows(Source(path, where={"customer": "c-1"}))


def test_a_run_is_resumed_with_the_same_rule_only(write_rows: Callable[..., str], tokenizer_dir: str) -> None:
    path = write_rows("rows.jsonl", ROWS)

    def ready(customer: str) -> ForgetRetain:
        sets = (Source(path, **{rule: {"customer": customer}}) for rule in ("where", "where_not"))
        data = ForgetRetain(*sets, tokenizer=tokenizer_dir)
        data.setup("fit")
        return data

    data = ready("c-1")
    assert [len(data.examples[name]) for name in ("forget", "retain")] == [3, 9]
    ready("c-1").load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="rows: was "):
        ready("c-2").load_state_dict(data.state_dict())
