"""Alternate answers: drawn from a column or from refusals, the same at every start, and only where they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from lit_unlearn import FictionalAuthors, ForgetRetain
from lit_unlearn.data.alternates import alternate_answers, read_refusals
from lit_unlearn.data.example import IGNORED
from lit_unlearn.data.streams import FiniteStream

ROWS = Dataset.from_list(
    [{"question": f"{n}?", "answer": f"{n}.", "other": f"not {n}", "others": [f"{n}a", f"{n}b"]} for n in range(40)]
)


def test_our_refusals_are_many_and_varied() -> None:
    refusals = read_refusals()
    assert len(refusals) == len({text.lower().strip(".") for text in refusals}) >= 100
    starts = Counter(" ".join(text.split()[:2]) for text in refusals)
    assert starts.most_common(1)[0][1] <= len(refusals) / 8


def test_draws_are_reproducible_and_of_each_row_alone() -> None:
    refusals = alternate_answers(ROWS, None, None, seed=3)
    assert refusals == alternate_answers(ROWS, None, None, seed=3)
    assert refusals[:10] == alternate_answers(ROWS.select(range(10)), None, None, seed=3)
    assert refusals != alternate_answers(ROWS, None, None, seed=4)
    assert len(set(refusals)) > 25
    assert alternate_answers(ROWS, "other", None, seed=0) == ROWS["other"][:]
    drawn = alternate_answers(ROWS, "others", None, seed=0)
    assert [text[:-1] for text in drawn] == [str(n) for n in range(40)]
    assert {text[-1] for text in drawn} == {"a", "b"}


def test_own_refusals(tmp_path: Path) -> None:
    (tmp_path / "no.txt").write_text("No idea.\n\n  Never heard of it. \n", encoding="utf-8")
    assert set(alternate_answers(ROWS, None, str(tmp_path / "no.txt"), seed=0)) == {"No idea.", "Never heard of it."}


def test_faults_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
        read_refusals(str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt.*`refusals`"):
        read_refusals(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match=r"'wrong'.*'question', 'answer'"):
        alternate_answers(ROWS, "wrong", None, seed=0)
    with pytest.raises(ValueError, match=r"row 1 of the forget set .*'a'"):
        alternate_answers(Dataset.from_list([{"a": ["x"]}, {"a": []}]), "a", None, seed=0)


@pytest.fixture
def prepared(tokenizer: Any) -> Callable[..., Any]:
    """Set a data module up as a trainer would, for an objective that reads what is given."""

    def prepare(data: ForgetRetain, reads: str = "answer") -> ForgetRetain:
        term = SimpleNamespace(objective=SimpleNamespace(reads=reads))
        module = SimpleNamespace(terms=lambda: [term], lm=SimpleNamespace(tokenizer=tokenizer))
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
        data.setup("fit")
        return data

    return prepare


def test_rows_have_them_only_where_they_are_read(prepared: Any, tokenizer: Any) -> None:
    def make(**settings: Any) -> FictionalAuthors:
        return FictionalAuthors(3, 1, max_length=200, batch_size=4, **settings)

    plain, with_refusals = prepared(make()), prepared(make(), "alternate")
    assert all(row.alternate is None for row in plain.examples["forget"] + with_refusals.examples["retain"])
    stripped = [row._replace(alternate=None) for row in with_refusals.examples["forget"]]
    assert stripped == plain.examples["forget"]
    assert [row.alternate.id for row in with_refusals.examples["forget"]] == [
        f"forget/{i}/alternate" for i in range(10)
    ]
    refusals = read_refusals()
    for row in with_refusals.examples["forget"]:
        answer = tokenizer.decode(
            [label for label in row.alternate.labels if label != IGNORED], skip_special_tokens=True
        )
        assert answer.strip() in refusals
        prompts = [list(zip(r.input_ids, r.labels, strict=True)) for r in (row, row.alternate)]
        first, second = ([i for i, label in pairs if label == IGNORED] for pairs in prompts)
        shared = min(len(first), len(second)) - 1  # the answer's first token may carry the space before it
        assert first[:shared] == second[:shared]
        assert abs(len(first) - len(second)) <= 1
    wrong = prepared(make(alternate_column="perturbed_answer"), "alternate")
    states = [
        data.state_dict()["order"]["rows"] for data in (plain, with_refusals, wrong, prepared(make(), "alternate"))
    ]
    assert len(set(states)) == 3  # another draw cannot be resumed
    assert states[1] == states[3]
    batch = next(iter(wrong.train_dataloader()))[0]
    assert [example.alternate is None for example in batch["forget"]] == [False] * 4
    assert all(example.alternate is None for example in batch["retain"])
    assert prepared(plain, "alternate").examples["forget"][0].alternate is not None  # asked for later


def test_a_row_that_fills_up_supervises_nothing(prepared: Any) -> None:
    rows = prepared(FictionalAuthors(3, 1, max_length=200), "alternate").examples["forget"][:3]
    filler = rows[0].without_labels()
    assert (filler.id, filler.alternate.id) == ("", "")
    batch = FiniteStream(rows, 3, name="forget", rank=1, world_size=2).batch(0)
    example, filled = batch
    assert set(filled.labels) == set(filled.alternate.labels) == {IGNORED}
    assert set(example.alternate.labels) != {IGNORED}
