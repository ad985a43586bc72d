"""A step's passes: every supervised token of every term once, whatever way it is divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn import (
    DPO,
    NLL,
    RMU,
    UNDIAL,
    ActivationMatch,
    IdkNLL,
    KLToReference,
    KLToTeacher,
    LanguageModel,
    LogitMargin,
)
from lit_unlearn.errors import BatchError
from lit_unlearn.training.forward_plan import ForwardPass, Term, build_forward_plan


def batch(lengths: list[int], first: int, left: bool = False) -> dict[str, Tensor]:
    """Padded rows; the last two thirds of a row are supervised, and its ids tell it apart."""
    width = max(lengths)
    shape = (len(lengths), width)
    made = {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.zeros(shape, dtype=torch.long)}
    made["labels"] = torch.full(shape, -100)
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if left else slice(length)
        ids = first + 20 * row + torch.arange(length)
        made["input_ids"][row, place], made["attention_mask"][row, place] = ids, 1
        made["labels"][row, place] = torch.where(torch.arange(length) < length // 3, -100, ids)
    return made


STEP = {"forget": batch([3, 9, 6, 4, 9], 10), "retain": batch([12, 5, 5], 200)}


@pytest.fixture
def lm(tiny_lm: Callable[..., LanguageModel]) -> LanguageModel:
    made = tiny_lm()
    made.load(torch.float32)
    return made


def terms(alignment: Any = "next_token") -> list[Term]:
    return [
        Term("forget", "forget", LogitMargin(alignment=alignment), 1.0),
        Term("nll", "retain", NLL(), 2.0),
        Term("again", "retain", NLL(), 3.0),
    ]


def read(passes: list[ForwardPass], terms: list[Term]) -> list[list[tuple[int, int]]]:
    """For each term the (state's token id, label) that it reads, over all passes."""
    seen: list[list[tuple[int, int]]] = [[] for _ in terms]
    for one in passes:
        ids = one.batch["input_ids"].flatten()
        for i, tokens in zip(one.terms, one.indices, strict=True):
            seen[i] += zip(ids[tokens.state].tolist(), tokens.labels.tolist(), strict=True)
    return [sorted(pairs) for pairs in seen]


@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3, 99])
@pytest.mark.parametrize("packs", [True, False])
def test_every_term_reads_its_tokens_once(
    order: Any, micro_batch_size: int | None, packs: bool, lm: LanguageModel
) -> None:
    lm.packs = packs
    passes = build_forward_plan(STEP, terms(), lm.packs, micro_batch_size, order)
    expected = [
        sorted(
            (ids[column - 1], label)
            for ids, labels in zip(part["input_ids"].tolist(), part["labels"].tolist(), strict=True)
            for column, label in enumerate(labels)
            if label != -100 and column > 0
        )
        for part in (STEP["forget"], STEP["retain"], STEP["retain"])
    ]
    assert read(passes, terms()) == expected
    if order == "joint" and packs:
        assert len(passes) == (1 if micro_batch_size is None else -(-5 // micro_batch_size))
        assert all(one.terms == [0, 1, 2] for one in passes)


def test_there_is_no_padding_to_work_on(lm: LanguageModel) -> None:
    tokens = sum(int(part["attention_mask"].sum()) for part in STEP.values())
    (one,) = build_forward_plan(STEP, terms(), lm.packs, None, "joint")
    assert one.batch["input_ids"].numel() == tokens
    forget, retain = build_forward_plan(STEP, terms(), lm.packs, None, "sequential")
    assert forget.batch["input_ids"].numel() == int(STEP["forget"]["attention_mask"].sum())
    assert (forget.terms, retain.terms) == ([0], [1, 2])  # both constraints on the stream share its pass


def test_a_prompt_that_all_examples_begin_with_stands_once(lm: LanguageModel) -> None:
    prompt, step = torch.arange(3, 15), {}
    for stream, rows in STEP.items():
        lead = prompt.expand(len(rows["labels"]), -1)
        parts = {"input_ids": lead, "attention_mask": torch.ones_like(lead), "labels": torch.full_like(lead, -100)}
        step[stream] = {key: torch.cat([part, rows[key]], dim=1) for key, part in parts.items()}
    for order in ("joint", "sequential"):
        apart = build_forward_plan(step, terms(), True, 3, order)  # type: ignore[arg-type]
        shared = build_forward_plan(step, terms(), True, 3, order, shares_prefix=True)  # type: ignore[arg-type]
        assert read(shared, terms()) == read(apart, terms())
        for with_shared, without in zip(shared, apart, strict=True):
            assert with_shared.batch["input_ids"].numel() < without.batch["input_ids"].numel()
            readers = [term.objective for term in terms()]
            for values, expected in zip(with_shared.run(lm, readers), without.run(lm, readers), strict=True):
                # The order of tokens depends on the rows.
                torch.testing.assert_close(values.sort().values, expected.sort().values)


def test_rows_of_equal_length_are_left_as_they_are(lm: LanguageModel) -> None:
    step = {"forget": batch([6, 6, 6], 10), "retain": batch([6, 6], 200)}
    for one in build_forward_plan(step, terms(), lm.packs, None, "sequential"):
        assert "attention_mask" in one.batch
        assert one.batch["input_ids"].shape[1] == 6


def test_passes_have_about_as_many_tokens(lm: LanguageModel) -> None:
    step = {"forget": batch([20, 2, 2, 2, 12, 4], 10), "retain": batch([5] * 6, 200)}
    for packs in (True, False):
        lm.packs = packs
        sizes = [
            int((one.batch["input_ids"] > 0).sum())
            for one in build_forward_plan(step, terms()[:1], lm.packs, 3, "sequential")
        ]
        assert sizes == [22, 20]


def test_left_padding_packs_alike(lm: LanguageModel) -> None:
    left = {"forget": batch([3, 9, 6, 4, 9], 10, left=True), "retain": batch([12, 5, 5], 200, left=True)}
    for order in ("joint", "sequential"):
        plans = [build_forward_plan(step, terms(), lm.packs, 2, order) for step in (STEP, left)]  # type: ignore[arg-type]
        assert [one.batch["input_ids"].tolist() for one in plans[0]] == [
            one.batch["input_ids"].tolist() for one in plans[1]
        ]


def test_alignments_may_differ_in_a_joint_pass(lm: LanguageModel) -> None:
    mixed = terms("label")
    assert read(build_forward_plan(STEP, mixed, lm.packs, None, "joint"), mixed) == read(
        build_forward_plan(STEP, mixed, lm.packs, None, "sequential"), mixed
    )


def test_a_stream_that_is_missing_is_named(lm: LanguageModel) -> None:
    with pytest.raises(BatchError, match=r"with 'retain' among its keys.*got \['forget'\]"):
        build_forward_plan({"forget": STEP["forget"]}, terms(), lm.packs, None, "joint")
    with pytest.raises(BatchError, match="a batch needs 'input_ids' and 'labels'"):
        build_forward_plan(
            {"forget": {"input_ids": STEP["forget"]["input_ids"]}}, terms()[:1], lm.packs, None, "sequential"
        )


# Pairs, needs and values of rows ---------------------------------------------------------------------------------------

PAIRS = {
    "forget": {**STEP["forget"], "alternate": batch([8, 3, 4, 5, 3], 400), "reference_logp": -torch.arange(5.0)},
    "retain": STEP["retain"],
}
PAIRS["forget"]["alternate"]["reference_logp"] = -10 - torch.arange(5.0)


@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 99])
@pytest.mark.parametrize("packs", [True, False])
def test_pairs_stay_together_with_their_values(
    order: Any, micro_batch_size: int | None, packs: bool, lm: LanguageModel
) -> None:
    lm.packs = packs
    mixed = [Term("forget", "forget", DPO(), 1.0), Term("idk", "forget", IdkNLL(), 1.0), *terms()[1:]]
    passes = build_forward_plan(PAIRS, mixed, lm.packs, micro_batch_size, order)
    found = {}
    for one in passes:
        ids = one.batch["input_ids"].flatten()
        for term, tokens in zip(one.terms, one.indices, strict=True):
            if term > 1:
                continue
            for kind, part in (("answer", tokens), ("alternate", tokens.alternate)):
                for place in range(0 if part is None else part.num_sequences):
                    states = ids[part.state[part.sequence == place]]
                    row = int(states[0] - (10 if kind == "answer" and term == 0 else 400)) // 20
                    assert int(part.examples[place]) == row  # rows are told apart by their ids
                    assert part.reference_logp[place] == (-row if kind == "answer" and term == 0 else -10 - row)
                    found[term, kind, row] = len(states)
    wanted = {(0, "answer", row): n - n // 3 for row, n in enumerate([3, 9, 6, 4, 9])}
    wanted |= {(0, "alternate", row): n - n // 3 for row, n in enumerate([8, 3, 4, 5, 3])}
    wanted |= {(1, "answer", row): n - n // 3 for row, n in enumerate([8, 3, 4, 5, 3])}
    assert found == wanted


def test_only_what_is_read_goes_through_the_model(lm: LanguageModel) -> None:
    (one,) = build_forward_plan(PAIRS, [Term("forget", "forget", IdkNLL(), 1.0)], lm.packs, None, "joint")
    assert one.batch["input_ids"].max() >= 400
    assert not ((one.batch["input_ids"] >= 10) & (one.batch["input_ids"] < 200)).any()


def test_streams_that_need_the_reference_model_have_passes_of_their_own(lm: LanguageModel) -> None:
    plan = [Term("forget", "forget", UNDIAL(), 1.0), Term("nll", "retain", NLL(), 1.0)]
    passes = build_forward_plan(STEP, plan, lm.packs, None, "joint")
    assert [(one.terms, one.reference) for one in passes] == [([1], False), ([0], True)]
    both = [plan[0], Term("kl", "retain", KLToReference(), 1.0)]
    assert [(one.terms, one.reference) for one in build_forward_plan(STEP, both, lm.packs, None, "joint")] == [
        ([0, 1], True)
    ]
    distilled = [Term("forget", "forget", KLToTeacher(), 1.0), both[1]]
    passes = build_forward_plan(STEP, distilled, lm.packs, None, "joint")
    assert [(one.terms, one.reference, one.teacher) for one in passes] == [([0], False, True), ([1], True, False)]
    same = [distilled[0], Term("kl", "forget", KLToReference(), 1.0)]
    (one,) = build_forward_plan(STEP, same, lm.packs, None, "joint")
    assert (one.terms, one.reference, one.teacher) == ([0, 1], True, True)
    deep = [Term("forget", "forget", RMU(layer=1), 1.0), Term("match", "retain", ActivationMatch(layer=0), 1.0)]
    assert [one.layers for one in build_forward_plan(STEP, deep, lm.packs, None, "joint")] == [{1}, {0}]


def test_a_pair_with_half_an_answer_is_refused(lm: LanguageModel) -> None:
    labels = PAIRS["forget"]["alternate"]["labels"].clone()
    labels[2] = -100
    half = {**PAIRS["forget"], "alternate": {**PAIRS["forget"]["alternate"], "labels": labels}}
    with pytest.raises(ValueError, match="some example has supervised tokens in only one of them"):
        build_forward_plan({"forget": half}, [Term("forget", "forget", DPO(), 1.0)], lm.packs, None, "joint")
    short = {key: value[:3] for key, value in PAIRS["forget"]["alternate"].items()}
    with pytest.raises(BatchError, match="reads alternate answers of the 'forget' examples, but the batch has none"):
        build_forward_plan(
            {"forget": {**half, "alternate": short}}, [Term("f", "forget", DPO(), 1.0)], lm.packs, None, "joint"
        )
