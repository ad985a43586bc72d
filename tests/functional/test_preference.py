from __future__ import annotations

import math

import pytest
import reference
import torch

from lit_unlearn.functional import dpo, npo, satimp_weight, simnpo, wga_weight

LOGP = torch.tensor([-40.0, -12.5, -3.0, -0.25], dtype=torch.float64)  # of answers, before and after
OTHER = torch.tensor([-6.0, -20.0, -3.0, -9.0], dtype=torch.float64)
LENGTHS = torch.tensor([11, 3, 2, 1])
TOKENS = torch.tensor([-30.0, -4.0, -0.7, -1e-3], dtype=torch.float64)
COTANGENT = reference.cotangent(4)
ANSWERS = {
    "npo": (npo, reference.npo, [LOGP, OTHER], {}),
    "simnpo": (
        lambda s, beta, delta: simnpo(s, LENGTHS, beta, delta),
        lambda s, beta, delta: reference.simnpo(s, LENGTHS, beta, delta),
        [LOGP],
        {"delta": 0.3},
    ),
    "dpo": (dpo, reference.dpo, [LOGP, OTHER], {}),
}
every_answer_loss = pytest.mark.parametrize("name", ANSWERS)


def value_and_grads(function, inputs, **settings):
    return reference.value_and_grads(lambda *x: function(*x, **settings), inputs, COTANGENT)


@every_answer_loss
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_answer_losses_equal_reference(name, beta, dtype, tolerance):
    ours, slow, inputs, settings = ANSWERS[name]
    value, grads = value_and_grads(ours, [x.to(dtype) for x in inputs], beta=beta, **settings)
    want, want_grads = value_and_grads(slow, inputs, beta=beta, **settings)
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), want, rtol=tolerance, atol=0)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad.double(), want_grad, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.1, 4.5])
def test_npo_at_extremes(dtype, beta):
    """Grows like ascent, 2 nats per nat, where an answer is likelier than it was, and fades to nothing below."""
    gain = torch.tensor([-1e30, -1e4, -1.0, 0.0, 1.0, 1e4, 1e30], dtype=dtype)
    value, (grad, reference_grad) = reference.value_and_grads(
        lambda s, s_ref: npo(s, s_ref, beta), [gain, torch.zeros_like(gain)], torch.ones(7)
    )
    assert (value.diff() >= 0).all()
    assert (grad.diff() >= 0).all()
    assert torch.equal(reference_grad, -grad)
    torch.testing.assert_close(grad[[0, 1, 3, -2, -1]], torch.tensor([0, 0, 1, 2, 2], dtype=dtype))
    torch.testing.assert_close(value[[0, 1]], torch.zeros(2, dtype=dtype))
    torch.testing.assert_close(value[3].item(), 2 / beta * math.log(2))
    torch.testing.assert_close(value[[-2, -1]], 2 * gain[[-2, -1]])


def test_npo_becomes_ascent_for_small_beta():
    """To first order in beta: its gradient is 2 σ(beta · gain)."""
    for beta in (1e-3, 1e-6, 1e-9):
        _, (grad, _) = reference.value_and_grads(lambda *x: npo(*x, beta), [LOGP, OTHER], torch.ones(4))  # noqa: B023
        torch.testing.assert_close(grad, torch.ones_like(LOGP), rtol=0, atol=beta * 20)


def test_answer_losses_are_one_another():
    """DPO with an alternate that never moves is NPO; SimNPO is NPO of means from nothing; DPO starts at its bound."""
    torch.testing.assert_close(dpo(torch.zeros_like(LOGP), LOGP - OTHER, 0.1), npo(LOGP, OTHER, 0.1))
    torch.testing.assert_close(simnpo(LOGP, LENGTHS, 2.0, 0.0), npo(LOGP / LENGTHS, torch.zeros(4), 2.0))
    torch.testing.assert_close(simnpo(LOGP, LENGTHS, 2.0, 0.3), npo(LOGP / LENGTHS, torch.full((4,), -0.3), 2.0))
    value, (alternate, forget) = value_and_grads(dpo, [LOGP, LOGP], beta=0.1)
    torch.testing.assert_close(value, torch.full_like(LOGP, 20 * math.log(2)))
    torch.testing.assert_close((alternate, forget), (-COTANGENT, COTANGENT))  # descent on the one, ascent on the other


WEIGHTS = {
    "wga": (wga_weight, reference.wga_weight, [(0.0,), (0.5,), (1.0,), (2.0,)]),
    "satimp": (satimp_weight, reference.satimp_weight, [(0.0, 0.0), (5.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_equal_reference_and_stop_the_gradient(name):
    ours, slow, settings = WEIGHTS[name]
    for betas in settings:
        logp = TOKENS.clone().requires_grad_()
        weight = ours(logp, *betas)
        assert not weight.requires_grad
        torch.testing.assert_close(weight, slow(TOKENS, *betas), rtol=1e-12, atol=0)
        (weight * logp).backward(COTANGENT)
        torch.testing.assert_close(logp.grad, slow(TOKENS, *betas) * COTANGENT, rtol=1e-12, atol=0)


def test_weights_without_exponents_are_one():
    logp = torch.tensor([0.0, -1.0, -1e4])
    assert torch.equal(wga_weight(logp, 0.0), torch.ones(3))
    assert torch.equal(satimp_weight(logp, 0.0, 0.0), torch.ones(3))
    torch.testing.assert_close(satimp_weight(logp, 2.0, 0.0), wga_weight(logp, 2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_at_extremes(dtype):
    """1 − p keeps its digits for a confident token; what is forgotten weighs nothing, not even times its log p."""
    sure = torch.tensor([0.0, -1e-12, -1e-6], dtype=dtype)
    torch.testing.assert_close(satimp_weight(sure, 5.0, 1.0), -sure, rtol=1e-5, atol=0)
    torch.testing.assert_close(wga_weight(sure, 1.0), 1 + sure)
    gone = torch.tensor([-1e3, -1e4, -1e30], dtype=dtype)
    for weight in (wga_weight(gone, 1.0), satimp_weight(gone, 5.0, 1.0)):
        assert not (weight * gone).any()
