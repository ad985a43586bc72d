"""Objectives on a model of 20 lines: values, gradients, and sums that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from lit_unlearn import NLL, Average, LogitMargin, Objective
from lit_unlearn.functional import logit_margin, token_logp
from lit_unlearn.lm import Alignment, SupervisedTokens, locate
from lit_unlearn.objectives.base import TokenModel

B, T, V = 3, 6, 11


class FakeModel:
    """`TokenModel` whose hidden states are the logits themselves."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.logits = (3 * torch.randn(B, T, V, generator=draw, dtype=torch.float64)).requires_grad_()

    def __call__(self, batch: dict[str, Tensor], alignment: Alignment = "next_token") -> SupervisedTokens:
        located = locate(batch, alignment)
        return located._replace(hidden=self.logits.view(-1, V)[located.hidden])

    def logit_margin(self, tokens: SupervisedTokens) -> Tensor:
        return logit_margin(tokens.hidden)

    def token_logp(self, tokens: SupervisedTokens) -> Tensor:
        return token_logp(tokens.hidden, tokens.labels)

    def map_logits(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        return function(tokens.hidden, *token_args)


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    """Row 0 has four labels, the first on its first token; row 1 has none; row 2 has two with a gap between."""
    labels = torch.tensor([[1, 2, 3, 4, -100, -100], [-100] * 6, [-100, -100, 5, -100, 7, -100]])
    return {"input_ids": torch.zeros(B, T, dtype=torch.int64)[rows], "labels": labels[rows]}


def states(alignment: Alignment) -> list[tuple[int, int, int]]:
    """(row, position of the state, label) of every supervised token, spelt out."""
    if alignment == "label":
        return [(0, 0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (2, 2, 5), (2, 4, 7)]
    return [(0, 0, 2), (0, 1, 3), (0, 2, 4), (2, 1, 5), (2, 3, 7)]


def evaluate(objective: Objective) -> tuple[Average, Tensor]:
    """The objective on the whole batch and the gradient of its mean with respect to the logits."""
    lm = FakeModel()
    average = objective(lm, lm(batch(), objective.alignment))
    average.mean().backward()
    return average, lm.logits.grad


def dense(loss: Callable[[Tensor, Tensor], Tensor], alignment: Alignment) -> tuple[Tensor, Tensor]:
    logits = FakeModel().logits
    values = [loss(logits[row, state][None], torch.tensor([label])) for row, state, label in states(alignment)]
    mean = torch.cat(values).mean()
    mean.backward()
    return mean, logits.grad


@pytest.mark.parametrize("alignment", ["next_token", "label"])
@pytest.mark.parametrize("power", [1, 2, 2.5])
def test_logit_margin_is_the_dense_margin(power, alignment):
    objective = LogitMargin(power, alignment)
    average, gradient = evaluate(objective)
    wanted, wanted_gradient = dense(lambda z, _: reference.logit_margin(z) ** power, alignment)
    assert average.count == len(states(alignment))
    torch.testing.assert_close(average.mean(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)


def test_label_alignment_is_every_label_unshifted():
    """As in the authors' public code: the mask `labels != -100` laid over the logits as it is."""
    rows, lm = batch(), FakeModel()
    average = LogitMargin(alignment="label")(lm, lm(rows, "label"))
    picked = lm.logits[rows["labels"] != -100]
    torch.testing.assert_close(average.mean(), (reference.logit_margin(picked) ** 2).mean(), rtol=1e-12, atol=0)


def test_nll_is_the_dense_nll():
    average, gradient = evaluate(NLL())
    wanted, wanted_gradient = dense(lambda z, label: -reference.token_logp(z, label), "next_token")
    assert average.count == 5
    torch.testing.assert_close(average.mean(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)


def test_defaults_are_the_papers():
    assert LogitMargin().power == 2
    assert LogitMargin().alignment == NLL().alignment == "next_token"
    assert LogitMargin.needs == NLL.needs == frozenset()


def test_uniform_logits_have_no_margin():
    lm = FakeModel()
    lm.logits = torch.full((B, T, V), 3.0, requires_grad=True)
    average = LogitMargin()(lm, lm(batch()))
    average.mean().backward()
    assert average.total.item() == 0
    assert not lm.logits.grad.any()


@pytest.mark.parametrize("power", [0, -1, -0.5, float("nan"), float("inf")])
def test_bad_power_is_refused(power):
    with pytest.raises(ValueError, match=rf"`power` must be a finite number above 0, not {power!r}"):
        LogitMargin(power)


@pytest.mark.parametrize("alignment", ["labels", "", None])
def test_bad_alignment_is_refused(alignment: Any):
    with pytest.raises(ValueError, match=rf"must be 'next_token' or 'label', not {alignment!r}"):
        LogitMargin(alignment=alignment)


@pytest.mark.parametrize("objective", [LogitMargin(), LogitMargin(1, "label"), NLL()])
def test_averages_add_exactly_over_micro_batches(objective):
    """Totals and counts of unequal parts, one without tokens, give the token mean of the whole and its gradient."""
    whole, gradient = evaluate(objective)
    lm = FakeModel()
    parts = []
    for row in range(B):
        located = locate(batch(slice(row, row + 1)), objective.alignment)
        parts.append(objective(lm, located._replace(hidden=lm.logits[row][located.hidden])))
    added = Average(torch.stack([part.total for part in parts]).sum(), sum(part.count for part in parts))
    assert parts[1].count == 0
    assert parts[1].total.item() == 0
    assert added.count == whole.count
    torch.testing.assert_close(added.mean(), whole.mean(), rtol=1e-14, atol=0)
    added.mean().backward()
    torch.testing.assert_close(lm.logits.grad, gradient, rtol=1e-14, atol=1e-16)
    means = torch.stack([part.mean() for part in parts if part.count])
    assert means.mean().item() != pytest.approx(whole.mean().item(), rel=1e-3)  # which weighs short answers more


def test_count_comes_from_the_labels_alone():
    """The module asks for it before any forward pass, when `hidden` holds indices."""
    for alignment in ("next_token", "label"):
        assert LogitMargin(alignment=alignment).count(locate(batch(), alignment)) == len(states(alignment))


def test_average_is_total_over_count():
    average = Average(torch.tensor(6.0, requires_grad=True), 4)
    assert average.mean().item() == 1.5
    average.mean().backward()
    assert average.total.grad.item() == 0.25


def test_a_users_objective_sees_the_model_by_the_protocol_only():
    class Entropy(Objective):
        def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
            return Average(lm.map_logits(reference.entropy, tokens).sum(), self.count(tokens))

    average, gradient = evaluate(Entropy())
    wanted, wanted_gradient = dense(lambda z, _: reference.entropy(z), "next_token")
    torch.testing.assert_close(average.mean(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)


def test_objective_without_forward_cannot_be_made():
    class Empty(Objective):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()
