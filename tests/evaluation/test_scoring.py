"""Rows scored in batches, against the model's own logits, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.rows import Seen, look
from reference import LargestOutput
from torch import Tensor, nn

from lit_unlearn import LanguageModel
from lit_unlearn.data.example import Example
from lit_unlearn.evaluation.scoring import Scored, score_examples

LENGTHS = [7, 3, 12, 7, 5, 30, 2]
FIELDS = ("labels", "predictions", "logp", "mean", "std")
BUDGETS = {1: [1] * 7, 24: [1, 2, 3, 1], 50: [1, 4, 2], 8192: [7]}  # rows of the batches, the longest first


def draw(lengths: list[int] = LENGTHS) -> list[Example]:
    """Rows of which about a half is supervised, with a hole in longer ones."""
    numbers = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(2, 400, (length,), generator=numbers).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        if length > 10:
            labels[-3] = -100
        rows.append(Example(ids, labels))
    return rows


def spread(lm: LanguageModel, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Loads a model and moves every parameter, so that likely and unlikely words are far apart."""
    lm.load(dtype)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return lm


def slow(lm: LanguageModel, rows: list[Example]) -> list[Seen]:
    training = lm.training
    lm.eval()
    found = []
    for row in rows:
        whole = look(lm.model, row.input_ids, 1)
        chosen = [i for i, label in enumerate(row.labels[1:]) if label != -100]
        found.append(Seen(*([part[i] for i in chosen] for part in whole)))
    lm.train(training)
    return found


def check(scored: list[Scored], wanted: list[Seen], rel: float, abs: float = 0.0) -> None:
    assert len(scored) == len(wanted)
    for one, seen in zip(scored, wanted, strict=True):
        assert one.labels.tolist() == seen.labels
        assert one.predictions.tolist() == seen.predictions
        for field in FIELDS[2:]:
            assert getattr(one, field).dtype == np.float64
            assert getattr(one, field) == pytest.approx(np.array(getattr(seen, field)), rel=rel, abs=abs), field
        assert one.nll == pytest.approx(seen.nll, rel=rel, abs=abs)


@pytest.mark.parametrize("token_budget", BUDGETS)
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_float64_rows_equal_the_models_own_logits(tiny_lm, packs, token_budget):
    lm = spread(tiny_lm())
    assert lm.packs
    lm.packs = packs
    done: list[int] = []
    check(score_examples(lm, draw(), token_budget, done.append), slow(lm, draw()), rel=1e-11)
    assert done == BUDGETS[token_budget]
    assert len({token for one in slow(lm, draw()) for token in one.predictions}) > 5  # else a mix-up would not show


@pytest.mark.parametrize("token_budget", [1, 24, 8192])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt"])
def test_float32_and_other_families(tiny_lm, model_type, token_budget):
    """Gemma 2 has no linear head, OPT does not pack."""
    config = {"gemma2": {"head_dim": 16, "num_key_value_heads": 2}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
    lm = spread(tiny_lm(model_type=model_type, **config.get(model_type, {})), torch.float32)
    assert (lm.linear_head, lm.packs) == (model_type != "gemma2", model_type != "opt")
    check(score_examples(lm, draw(), token_budget), slow(lm, draw()), rel=1e-4, abs=1e-4)  # of logits near 50


def test_bfloat16_rows_alone_equal_the_models_own_logits(tiny_lm):
    """Logits are rounded to 8 bits, as the model rounds them; what is made of them is not."""
    lm = spread(tiny_lm(), torch.bfloat16)
    rows = draw()
    scored, wanted = score_examples(lm, rows, token_budget=1), slow(lm, rows)
    check(scored, wanted, rel=1e-5, abs=1e-5)
    for one in scored:
        assert one.nll == pytest.approx(-math.fsum(one.logp.tolist()) / len(one.logp), rel=1e-15)  # a float64 sum


def test_order_is_kept_and_rows_do_not_depend_on_each_other(tiny_lm):
    lm = spread(tiny_lm())
    rows = draw()
    together = score_examples(lm, rows)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 3], [5]):
        for i, one in zip(order, score_examples(lm, [rows[i] for i in order]), strict=True):
            for field in FIELDS:
                assert getattr(one, field) == pytest.approx(getattr(together[i], field), rel=1e-11)
    assert score_examples(lm, []) == []


def test_a_first_token_that_is_supervised_is_predicted_by_nothing(tiny_lm):
    lm = spread(tiny_lm())
    ids = [[5, 9, 3, 7], [8, 2]]
    scored = score_examples(lm, [Example(row, row) for row in ids])
    assert [one.labels.tolist() for one in scored] == [row[1:] for row in ids]
    check(scored, [look(lm.model, row, 1) for row in ids], rel=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_and_dropout_does_not_count(models, training):
    plain, dropout = (LanguageModel(models[name]) for name in ("plain", "dropout"))
    for lm in (plain, dropout):
        lm.load(torch.float64)
        lm.train(training)
    state = torch.random.get_rng_state()
    scored, wanted = score_examples(dropout, draw()), score_examples(plain, draw())
    for one, other in zip(scored, wanted, strict=True):
        for field in FIELDS:
            assert np.array_equal(getattr(one, field), getattr(other, field))
    assert {module.training for module in dropout.modules()} == {training}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in dropout.parameters())


def test_a_mode_comes_back_after_an_error(tiny_lm):
    lm = spread(tiny_lm())
    with pytest.raises(IndexError):
        score_examples(lm, [Example([100_000, 2], [-100, 2])])
    assert lm.training


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_logits_of_all_tokens_are_never_there(tiny_lm, packs):
    words, rows = 3000, draw([40, 39, 38])
    tokens = sum(label != -100 for row in rows for label in row.labels)
    lm = tiny_lm(vocab_size=words)
    lm.load(torch.float32)
    lm.packs = packs
    kept = score_examples(lm, rows)
    with LargestOutput() as whole:
        score_examples(lm, rows)
    lm.chunk_size = 4
    with LargestOutput() as chunked:
        again = score_examples(lm, rows)
    assert whole.numel == tokens * words  # fits the budget of a chunk
    assert chunked.numel == words * 32  # the head's weight, far more than a chunk of 4
    for one, other in zip(kept, again, strict=True):
        assert one.logp == pytest.approx(other.logp, rel=1e-5)


def with_bias(lm: LanguageModel, dtype: torch.dtype, change: Callable[[Tensor], Any]) -> LanguageModel:
    """The same model with a bias at its head."""
    lm.load(dtype)
    head = nn.Linear(32, lm.model.lm_head.out_features, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(lm.model.lm_head.weight)
        change(head.bias.zero_())
    lm.model.lm_head = head
    wrapped = LanguageModel.wrap(lm.model, lm.tokenizer)
    assert wrapped.linear_head
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_words_that_are_ruled_out_leave_mean_and_deviation_finite(tiny_lm, dtype):
    rows = [Example([5, 9, 30, 31, 32, 33], [-100, -100, 30, 31, 32, 33]), Example([7, 40, 41], [-100, 40, 41])]
    lm = with_bias(tiny_lm(), dtype, lambda bias: bias[50:350].fill_(-math.inf))
    scored = score_examples(lm, rows)
    check(scored, slow(lm, rows), rel=1e-11 if dtype == torch.float64 else 1e-5)
    assert all(np.isfinite(getattr(one, field)).all() for one in scored for field in FIELDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_certain_word_has_no_deviation_and_a_label_that_is_ruled_out_shows(tiny_lm, dtype):
    def only_nine(bias: Tensor) -> None:
        bias.fill_(-math.inf)[9] = 0.0

    lm = with_bias(tiny_lm(), dtype, only_nine)
    (one,) = score_examples(lm, [Example([5, 9, 30, 9], [-100, 9, 30, 9])])
    assert one.predictions.tolist() == [9, 9, 9]
    assert one.logp.tolist()[::2] == [0.0, 0.0]
    assert -math.inf < one.logp[1] < -1e37  # as good as impossible, and still a number for the scores
    assert one.mean.tolist() == [0.0, 0.0, 0.0]
    assert one.std.tolist() == [0.0, 0.0, 0.0]


def test_token_ids_are_whole_however_many_there_are(tiny_lm):
    """Predictions go through the same numbers as probabilities: float32 has every integer up to 2**24."""
    words = 70_001  # more than bfloat16 and float16 can count
    for dtype in (torch.float32, torch.bfloat16):
        lm = with_bias(tiny_lm(vocab_size=words), dtype, lambda bias: bias[-2].fill_(1e4))
        (one,) = score_examples(lm, [Example([5, words - 1, 3], [-100, words - 1, 3])])
        assert one.predictions.tolist() == [words - 2] * 2
        assert one.labels.tolist() == [words - 1, 3]
