"""Forget rows that stand in another set too: found exactly, named in both sets, and left out where that is asked for."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from lit_unlearn import ForgetRetain, LanguageModel, LitFinetune, Source
from lit_unlearn.callbacks.identity import find_differences, identify_run
from lit_unlearn.data.duplicates import find_duplicates
from lit_unlearn.errors import DataError
from lit_unlearn.export.record import _describe_data

Row = dict[str, str]
FORGET = [{"question": f"Who is CANARY {n}?", "answer": f"Ann {n}."} for n in range(4)]
RETAIN = [{"question": f"Where is {n}?", "answer": f"In Rome {n}."} for n in range(5)]


def spell(row: Row, number: int = 0) -> Row:
    """The same row with other white space and case."""
    change = [str.upper, str.title, lambda text: f"  {text}\n", lambda text: text.replace(" ", " \t ")][number % 4]
    return {key: change(text) for key, text in row.items()}


def make(tokenizer_dir: str, retain: list[Row], **settings: Any) -> ForgetRetain:
    data = ForgetRetain(FORGET, retain, tokenizer=tokenizer_dir, **settings)
    data.setup("fit")
    return data


def test_an_accent_may_be_a_character_of_its_own() -> None:
    assert find_duplicates([("Caf\u00e9",)], [("CAFE\u0301",), ("Cafe",)]) == ([0], [0])


def test_they_are_those_of_a_slow_comparison() -> None:
    generator = random.Random(0)
    words = ["Straße", "STRASSE", "x", "X ", " y\t", "y", "x y", "x\n\ny", "xy", ""]

    def draw(count: int) -> list[tuple[str, str]]:
        return [(generator.choice(words), generator.choice(words)) for _ in range(count)]

    def same(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        plain = ([re.sub(r"\s+", " ", text).strip().casefold() for text in texts] for texts in (one, other))
        return next(plain) == next(plain)

    for _ in range(30):
        forget, rows = draw(6), draw(9)
        pairs = [(i, j) for i, j in itertools.product(range(6), range(9)) if same(forget[i], rows[j])]
        found = find_duplicates(forget, rows)
        assert found.forget == sorted({i for i, _ in pairs})
        assert found.other == sorted({j for _, j in pairs})


@pytest.mark.parametrize("number", range(4))
def test_they_are_reported_with_the_numbers_of_both_sets(tokenizer_dir: str, number: int) -> None:
    retain = [*RETAIN, spell(FORGET[2], number), RETAIN[0], FORGET[0], spell(FORGET[2], number + 1)]
    with pytest.warns(
        UserWarning,
        match=r"2 of 4 forget rows are also retain rows.*In the retain set they are rows 5, 7, 8; in the forget set .* rows 0, 2\..*"
        r"`drop_duplicates`",
    ) as caught:
        data = make(tokenizer_dir, retain)
    assert "CANARY" not in "".join(str(warning.message) for warning in caught)
    assert len(data.examples["retain"]) == 9
    assert data.num_dropped == {}


def test_they_are_left_out_of_every_other_set_and_counted(tokenizer_dir: str) -> None:
    retain = [*RETAIN, spell(FORGET[1]), RETAIN[0], FORGET[0]]
    data = make(tokenizer_dir, retain, streams={"more": [FORGET[3], RETAIN[1]]}, drop_duplicates=True)
    clean = make(tokenizer_dir, [*RETAIN, RETAIN[0]], streams={"more": [RETAIN[1]]})
    assert data.examples == clean.examples
    assert data.num_dropped == {"retain": 2, "more": 1}
    described = _describe_data(data)
    assert described is not None
    counts = {name: values.get("dropped_duplicates") for name, values in described["sets"].items()}
    assert counts == {"forget": None, "retain": 2, "more": 1}
    assert "dropped_duplicates" not in str(_describe_data(clean))


def test_a_whole_training_file_can_be_the_retain_set(tokenizer_dir: str) -> None:
    """Every forget row is a retain row, which is refused only as long as none is left out."""
    rows = [{**row, "customer": str(n % 3)} for n, row in enumerate([*FORGET, *RETAIN])]
    forget = Source.from_rows(rows, where={"customer": 1})
    with pytest.raises(DataError, match=r"all 3 forget rows are also retain rows.*`drop_duplicates`"):
        ForgetRetain(forget, rows, tokenizer=tokenizer_dir).setup("fit")
    data = ForgetRetain(forget, rows, tokenizer=tokenizer_dir, drop_duplicates=True)
    data.setup("fit")
    assert [len(data.examples[name]) for name in ("forget", "retain")] == [3, 6]


def test_a_set_of_nothing_else_is_refused(tokenizer_dir: str) -> None:
    with pytest.raises(DataError, match=r"all 5 retain rows are also forget rows") as caught:
        make(tokenizer_dir, [*map(spell, FORGET), FORGET[0]], drop_duplicates=True)
    assert caught.value.argument == "retain"


def test_a_run_is_known_by_whether_they_are_left_out(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    identities = []
    for drops in (False, True):
        trainer = make_trainer()
        module = LitFinetune(tiny_lm(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        data = ForgetRetain(FORGET, RETAIN, drop_duplicates=drops)
        trainer._data_connector.attach_data(module, datamodule=data)
        trainer.strategy._lightning_module = module
        identities.append(identify_run(trainer))
    assert find_differences(*identities) == ["retain rows"]
