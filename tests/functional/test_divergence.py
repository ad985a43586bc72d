from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import HALF, cotangent

from lit_unlearn.functional import kl_to_uniform, logit_margin, uniformity

ROWS = st.lists(st.integers(-3000, 3000).map(lambda i: i / 64), min_size=2, max_size=12)  # exact in binary
EXACT = {
    "uniform_to_model": reference.kl_uniform_to_model,
    "model_to_uniform": reference.kl_model_to_uniform,
}


def make_logits(dtype=torch.float64, scale=3.0):
    draw = torch.Generator().manual_seed(0)
    return (scale * torch.randn(7, 11, generator=draw, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("direction", EXACT)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half precision logits are exact inputs here; what is rounded to half is the gradient.
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)],
)
def test_equals_reference(direction, dtype, tolerance):
    z = make_logits(dtype)
    value, (grad,) = reference.value_and_grads(lambda x: kl_to_uniform(x, direction), [z], cotangent())
    want, (want_grad,) = reference.value_and_grads(EXACT[direction], [z], cotangent(), torch.float64)
    assert value.dtype == (torch.float32 if dtype in HALF else dtype)
    assert grad.dtype == dtype
    assert reference.relative_error(value, want) < min(tolerance, 2e-6)
    assert reference.relative_error(grad, want_grad) < tolerance


@pytest.mark.parametrize("direction", EXACT)
def test_gradcheck(direction):
    assert torch.autograd.gradcheck(lambda x: kl_to_uniform(x, direction), make_logits().requires_grad_())


def test_default_direction():
    assert torch.equal(kl_to_uniform(make_logits()), kl_to_uniform(make_logits(), "uniform_to_model"))


def test_unknown_direction():
    with pytest.raises(ValueError, match=r"'uniform_to_model', 'model_to_uniform'.*got 'forward'"):
        kl_to_uniform(make_logits(), "forward")


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_uniformity_columns(dtype):
    z = make_logits(dtype)
    columns = uniformity(z)
    want = [reference.logit_margin(z), reference.entropy(z) / math.log(11), reference.kl_uniform_to_model(z)]
    assert torch.allclose(columns.double(), torch.stack(want, dim=1), rtol=1e-5, atol=1e-6)
    assert uniformity(z[:0]).shape == (0, 3)


def test_uniform_distribution():
    assert torch.allclose(uniformity(torch.full((2, 50_000), 4.0)), torch.tensor([0.0, 1.0, 0.0]), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_certificates(row):
    """The margin bounds both divergences, and bounds KL(U, p) from below up to log V (proved for every V)."""
    z, slack = torch.tensor([row], dtype=torch.float64), 1e-12
    margin, log_v = logit_margin(z).item(), math.log(len(row))
    to_model, to_uniform = kl_to_uniform(z).item(), kl_to_uniform(z, "model_to_uniform").item()
    assert -slack <= to_uniform <= margin + slack  # log V - H(p)
    assert -slack <= to_model <= margin + slack
    assert to_model >= margin - log_v - slack
    assert (to_model < slack) == (len(set(row)) == 1)
    assert torch.allclose(uniformity(z + 17), uniformity(z), rtol=0, atol=1e-11)
