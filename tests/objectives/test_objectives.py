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
from torch import Tensor

from lit_unlearn import LogitMargin, Objective, objectives
from lit_unlearn.models import SupervisedTokens, locate
from lit_unlearn.objectives import CEU
from lit_unlearn.objectives.base import TokenModel

every_case = pytest.mark.parametrize("case", CASES)


def evaluate(objective: Objective) -> tuple[Tensor, Dense]:
    """The objective's values on all rows, and the gradients of their mean."""
    dense = draw()
    values = objective(FakeModel(), fill(located(objective), dense))
    values.mean().backward()
    return values, gradients(dense)


def evaluate_slowly(form: Form) -> tuple[Tensor, Dense]:
    dense = draw()
    values = form(dense)
    values.mean().backward()
    return values, gradients(dense)


def gradients(dense: Dense) -> Dense:
    assert dense.reference.grad is dense.reference_states.grad is None
    return Dense(*(torch.zeros_like(x) if x.grad is None else x.grad for x in dense))


def assert_same(actual: tuple[Tensor, Dense], wanted: tuple[Tensor, Dense], rtol: float = 1e-12) -> None:
    """Positions without a supervised token have a gradient of exactly zero on both sides."""
    (values, gradient), (wanted_values, wanted_gradient) = actual, wanted
    torch.testing.assert_close(values, wanted_values, rtol=rtol, atol=1e-3 * rtol)
    torch.testing.assert_close(values.mean(), wanted_values.mean(), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=10 * rtol, atol=1e-3 * rtol)
    for x, wanted_x in zip(gradient, wanted_gradient, strict=True):
        assert torch.equal(x.any(dim=-1), wanted_x.any(dim=-1))


def test_every_objective_has_a_slow_form():
    public = {getattr(objectives, name) for name in objectives.__all__}
    classes = {x for x in public if isinstance(x, type) and issubclass(x, Objective)}
    tested = {type(objective) for objective, _ in CASES.values()}
    assert {kind for kind in tested if kind.__module__.startswith("lit_unlearn.")} == classes - {Objective}


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
def test_micro_batches_add_up(case):
    """Sums and counts of unequal parts, one without tokens, give the mean of the full batch and its gradient."""
    objective, _ = CASES[case]
    full, dense = evaluate(objective), draw()
    parts = [objective(FakeModel(), fill(located(objective, [row]), dense)) for row in range(B)]
    counts = [objective.count(located(objective, [row])) for row in range(B)]
    assert [len(part) for part in parts] == counts
    assert counts[1] == 0
    loss = sum(part.sum() for part in parts) / sum(counts)
    loss.backward()
    torch.testing.assert_close(loss, full[0].mean(), rtol=1e-12, atol=0)
    assert_same((torch.cat(parts), gradients(dense)), full)
    if objective.per == "token" and counts[2]:
        means = torch.stack([part.mean() for part in parts if len(part)])
        assert means.mean().item() != pytest.approx(full[0].mean().item(), rel=1e-3)  # weighs short answers more


@every_case
def test_count_comes_from_the_labels_alone(case):
    """The module asks for it before any forward pass, when there are indices alone."""
    objective, form = CASES[case]
    tokens = located(objective)._replace(state=None, reference_logp=None, alternate=None)
    assert objective.count(tokens) == len(form(draw()))


def test_counts():
    """Two answers, of three and of two tokens, beside a row without any; their alternates have two and three."""
    answers = {"NPO", "SimNPO", "DPO", "MatchUnseen", "MatchCalibrated", "NLLFloor"}
    fewer = {"CEU": 3, "CEU, skip 2": 1}
    for case, (objective, _) in CASES.items():
        wanted = len(ROWS) if case in answers else 6 if case.endswith("label") else fewer.get(case, 5)
        assert objective.count(located(objective)) == wanted, case


@pytest.mark.parametrize(("skip", "left"), [(0, 5), (1, 3), (2, 1), (3, 0), (99, 0)])
def test_ceu_skips_the_start_of_every_answer_however_short(skip, left):
    dense = draw()
    values = CEU(skip)(FakeModel(), fill(located(CEU(skip)), dense))
    values.sum().backward()
    assert values.shape == (left,)
    assert dense.logits.grad.any(dim=-1).sum() == left
    assert values.all()


def test_ceu_tells_packed_answers_apart():
    """Three sequences in a row, of which the first has a gap in its labels and the second has none."""
    labels = torch.tensor([[-100, 1, -100, 2, 3, -100, -100, 4, 5, 6]])
    packed = {"input_ids": labels, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3]])}
    selected = CEU(1).select(locate(packed))
    assert selected.labels.tolist() == [2, 3, 5, 6]
    assert selected.state.tolist() == [2, 3, 7, 8]
    assert CEU(1).count(selected) == 4


def test_label_alignment_is_every_label_unshifted():
    """As in the authors' public code: the mask `labels != -100` laid over the logits as it is."""
    values, _ = evaluate(LogitMargin(alignment="label"))
    picked = draw().logits[:B][LABELS[:B] != -100]
    torch.testing.assert_close(values.mean(), (reference.logit_margin(picked) ** 2).mean(), rtol=1e-12, atol=0)


def test_uniform_logits():
    """Nothing is left to flatten: no margin, no divergence from uniform, and no gradient."""
    flat = draw()._replace(logits=torch.full((2 * B, T, V), 3.0, requires_grad=True))
    for case in ("LogitMargin", "KLToUniform", "KLToUniform, other"):
        objective, _ = CASES[case]
        loss = objective(FakeModel(), fill(located(objective), flat)).mean()
        (gradient,) = torch.autograd.grad(loss, flat.logits)
        assert abs(loss.item()) < 1e-6
        assert gradient.abs().max() < 1e-7
    ascent, _ = CASES["GradAscent"]
    assert ascent(FakeModel(), fill(located(ascent), flat)).mean().item() == pytest.approx(-math.log(V), rel=1e-6)


def test_a_users_objective_sees_the_model_by_the_protocol_only():
    class Entropy(Objective):
        def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
            return lm.map_logits(reference.entropy, tokens)

    def slowly(dense: Dense) -> Tensor:
        return torch.cat([reference.entropy(dense.logits[row, state][None]) for row, state, _ in supervised(range(B))])

    assert_same(evaluate(Entropy()), evaluate_slowly(slowly))


def test_objective_without_forward_cannot_be_made():
    class Empty(Objective):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()
