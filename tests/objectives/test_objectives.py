"""Objectives on a model of 20 lines: values, gradients, and sums that add up."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from objectives.forms import (
    CASES,
    LABELS,
    ROUNDING,
    ROWS,
    B,
    Dense,
    FakeModel,
    Form,
    T,
    V,
    draw,
    fill,
    located,
    supervised,
)

from lit_unlearn import Average, LogitMargin, Objective, objectives
from lit_unlearn.models import SupervisedTokens, locate
from lit_unlearn.objectives import CEU, SequenceObjective
from lit_unlearn.objectives.base import TokenModel

every_case = pytest.mark.parametrize("case", CASES)


def evaluate(objective: Objective) -> tuple[Average, Dense]:
    """The objective on all rows, and the gradients of its mean."""
    dense = draw()
    average = objective(FakeModel(), fill(located(objective), dense))
    average.mean().backward()
    return average, gradients(dense)


def evaluate_slowly(form: Form) -> tuple[Average, Dense]:
    dense = draw()
    values = form(dense)
    values.mean().backward()
    return Average(values.sum(), len(values)), gradients(dense)


def gradients(dense: Dense) -> Dense:
    assert dense.reference.grad is dense.reference_states.grad is None
    return Dense(*(torch.zeros_like(x) if x.grad is None else x.grad for x in dense))


def assert_same(actual: tuple[Average, Dense], wanted: tuple[Average, Dense], rtol: float = 1e-12) -> None:
    """Positions without a supervised token have a gradient of exactly zero on both sides."""
    (average, gradient), (wanted_average, wanted_gradient) = actual, wanted
    assert average.count == wanted_average.count
    torch.testing.assert_close(average.mean(), wanted_average.mean(), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=10 * rtol, atol=1e-3 * rtol)
    for x, wanted_x in zip(gradient, wanted_gradient, strict=True):
        assert torch.equal(x.any(dim=-1), wanted_x.any(dim=-1))


def test_every_objective_has_a_slow_form():
    public = {getattr(objectives, name) for name in objectives.__all__}
    classes = {x for x in public if isinstance(x, type) and issubclass(x, Objective)}
    assert {type(objective) for objective, _ in CASES.values()} == classes - {Objective, SequenceObjective}


def test_supervised_tokens_spelt_out():
    assert supervised(range(B)) == [(0, 0, 2), (0, 1, 3), (0, 2, 4), (2, 1, 5), (2, 3, 7)]
    assert supervised(range(B), "label") == [(0, 0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (2, 2, 5), (2, 4, 7)]
    assert supervised(range(B, 2 * B)) == [(3, 0, 6), (3, 1, 2), (5, 2, 8), (5, 3, 9), (5, 4, 3)]


@every_case
def test_value_and_gradient_are_those_of_the_slow_form(case):
    objective, form = CASES[case]
    actual = evaluate(objective)
    assert any(gradient.any() for gradient in actual[1])
    assert_same(actual, evaluate_slowly(form), ROUNDING.get(case, 1e-12))


@every_case
def test_averages_add_over_micro_batches(case):
    """Totals and counts of unequal parts, one without tokens, give the mean of the whole and its gradient."""
    objective, _ = CASES[case]
    whole, dense = evaluate(objective), draw()
    parts = [objective(FakeModel(), fill(located(objective, [row]), dense)) for row in range(B)]
    added = Average(torch.stack([part.total for part in parts]).sum(), sum(part.count for part in parts))
    assert (parts[1].total.item(), parts[1].count) == (0, 0)
    added.mean().backward()
    assert_same((added, gradients(dense)), whole)
    if not isinstance(objective, SequenceObjective) and parts[2].count:
        means = torch.stack([part.mean() for part in parts if part.count])
        assert means.mean().item() != pytest.approx(whole[0].mean().item(), rel=1e-3)  # weighs short answers more


@every_case
def test_count_comes_from_the_labels_alone(case):
    """The module asks for it before any forward pass, when `hidden` holds indices and nothing else is there."""
    objective, form = CASES[case]
    tokens = located(objective)._replace(hidden=None, reference_logp=None, alternate=None)
    assert objective.count(tokens) == len(form(draw()))


def test_counts():
    """Two answers, of three and of two tokens, beside a row without any; their alternates have two and three."""
    answers = {"NPO", "SimNPO", "DPO", "MatchUnseen"}
    fewer = {"CEU": 3, "CEU, skip 2": 1}
    for case, (objective, _) in CASES.items():
        wanted = len(ROWS) if case in answers else 6 if case.endswith("label") else fewer.get(case, 5)
        assert objective.count(located(objective)) == wanted, case


@pytest.mark.parametrize(("skip", "left"), [(0, 5), (1, 3), (2, 1), (3, 0), (99, 0)])
def test_ceu_skips_the_start_of_every_answer_however_short(skip, left):
    dense = draw()
    average = CEU(skip)(FakeModel(), fill(located(CEU()), dense))
    average.total.backward()
    assert average.count == left
    assert dense.logits.grad.any(dim=-1).sum() == left
    assert (average.total != 0) == (left > 0)


def test_ceu_tells_packed_answers_apart():
    """Three sequences in a row, of which the first has a gap in its labels and the second has none."""
    labels = torch.tensor([[-100, 1, -100, 2, 3, -100, -100, 4, 5, 6]])
    packed = {"input_ids": labels, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3]])}
    tokens = locate(packed)
    seen = []

    class Watched(FakeModel):
        def map_logits(self, function, tokens, *token_args):
            seen.extend(tokens.labels.tolist())
            return super().map_logits(function, tokens, *token_args)

    average = CEU(1)(Watched(), tokens._replace(hidden=torch.zeros(6, V)))
    assert seen == [2, 3, 5, 6]
    assert average.count == 4


def test_label_alignment_is_every_label_unshifted():
    """As in the authors' public code: the mask `labels != -100` laid over the logits as it is."""
    average, _ = evaluate(LogitMargin(alignment="label"))
    picked = draw().logits[:B][LABELS[:B] != -100]
    torch.testing.assert_close(average.mean(), (reference.logit_margin(picked) ** 2).mean(), rtol=1e-12, atol=0)


def test_uniform_logits():
    """Nothing is left to flatten: no margin, no divergence from uniform, and no gradient."""
    flat = draw()._replace(logits=torch.full((2 * B, T, V), 3.0, requires_grad=True))
    for case in ("LogitMargin", "KLToUniform", "KLToUniform, other"):
        objective, _ = CASES[case]
        average = objective(FakeModel(), fill(located(objective), flat))
        (gradient,) = torch.autograd.grad(average.mean(), flat.logits)
        assert abs(average.mean().item()) < 1e-6
        assert gradient.abs().max() < 1e-7
    ascent, _ = CASES["GradAscent"]
    assert ascent(FakeModel(), fill(located(ascent), flat)).mean().item() == pytest.approx(-math.log(V), rel=1e-6)


def test_average_is_total_over_count():
    average = Average(torch.tensor(6.0, requires_grad=True), 4)
    assert average.mean().item() == 1.5
    average.mean().backward()
    assert average.total.grad.item() == 0.25


def test_a_users_objective_sees_the_model_by_the_protocol_only():
    class Entropy(Objective):
        def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
            return Average(lm.map_logits(reference.entropy, tokens).sum(), self.count(tokens))

    def slowly(dense: Dense) -> torch.Tensor:
        return torch.cat([reference.entropy(dense.logits[row, state][None]) for row, state, _ in supervised(range(B))])

    assert_same(evaluate(Entropy()), evaluate_slowly(slowly))


def test_objective_without_forward_cannot_be_made():
    class Empty(Objective):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()
