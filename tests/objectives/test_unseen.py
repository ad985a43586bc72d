"""Forgetting that ends where a row is as surprising as text that the model never saw."""

from __future__ import annotations

import pytest
import reference
import torch
from objectives.forms import ROWS, FakeModel, answer_logp, draw, fill, located, per_token, supervised

from lit_unlearn import LogitMargin, Unseen

MARGINS = per_token(lambda place: reference.logit_margin(place.z).square())


def evaluate(until: Unseen | None) -> tuple[float, torch.Tensor]:
    dense, objective = draw(), LogitMargin(until=until)
    average = objective(FakeModel(), fill(located(objective), dense))
    average.mean().backward()
    assert average.count == MARGINS(draw()).numel()  # what is left out counts as zero
    return average.total.item(), dense.logits.grad


def calibrated(by: str, level: float) -> Unseen:
    until = Unseen(by=by, factor=2.0)  # type: ignore[arg-type]
    LogitMargin(until=until).calibrate(level / 2)
    return until


def row_nll(row: int) -> float:
    return -answer_logp(draw(), row).item() / len(supervised([row]))


def test_before_the_level_is_measured_everything_is_to_be_forgotten():
    for by in ("row", "token"):
        assert evaluate(Unseen(by=by))[0] == evaluate(None)[0]  # type: ignore[arg-type]


def test_rows_beyond_the_level_are_left_out_with_their_gradient():
    nlls = sorted((row_nll(row), row) for row in ROWS)
    level = (nlls[0][0] + nlls[1][0]) / 2  # between the best known row and the others
    total, gradient = evaluate(calibrated("row", level))
    known = nlls[0][1]
    places = [(r, t) for r, t, _ in supervised([known])]
    dense = draw()
    wanted = sum(reference.logit_margin(dense.logits[r, t][None]).square().item() for r, t in places)
    assert total == pytest.approx(wanted, rel=1e-12)
    assert gradient[known].abs().sum() > 0
    assert all(gradient[row].abs().sum() == 0 for _, row in nlls[1:])


def test_tokens_beyond_the_level_are_left_out_one_by_one():
    places = [(r, t, label) for row in ROWS for r, t, label in supervised([row])]
    dense = draw()
    nlls = [-reference.token_logp(dense.logits[r, t][None], torch.tensor([label])).item() for r, t, label in places]
    level = sorted(nlls)[len(nlls) // 2] + 1e-9
    margins = [reference.logit_margin(dense.logits[r, t][None]).square().item() for r, t, _ in places]
    wanted = sum(margin for margin, nll in zip(margins, nlls, strict=True) if nll < level)
    assert evaluate(calibrated("token", level))[0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("settings", [{"by": "word"}, {"factor": 0.0}, {"factor": float("nan")}])
def test_what_is_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="must be 'row' or 'token' and `factor` above 0"):
        Unseen(**settings)
