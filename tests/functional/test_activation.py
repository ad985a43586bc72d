from __future__ import annotations

import pytest
import reference
import torch
from reference import HALF, cotangent

from lit_unlearn.functional import activation_distance


def make_states(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(7, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("one_target", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)],
)
def test_equals_reference(dtype, tolerance, one_target):
    states, target = make_states(dtype)
    pair = [states, target[0] if one_target else target]
    value, grads = reference.value_and_grads(activation_distance, pair, cotangent())
    want, want_grads = reference.value_and_grads(reference.activation_distance, pair, cotangent(), torch.float64)
    assert value.dtype == (torch.float32 if dtype in HALF else dtype)
    assert reference.relative_error(value, want) < min(tolerance, 2e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype
        assert reference.relative_error(grad, want_grad) < tolerance


def test_half_precision_neither_overflows_nor_stalls():
    """The square of 300 is out of float16's range, and 4096 equal terms are out of bfloat16's digits."""
    for dtype in HALF:
        states = torch.full((2, 4096), 300.0, dtype=dtype)
        assert activation_distance(states, torch.zeros(4096, dtype=dtype)).tolist() == [90_000.0, 90_000.0]


def test_zero_exactly_on_the_target():
    states, _ = make_states()
    value, grads = reference.value_and_grads(activation_distance, [states, states], cotangent())
    assert not value.any()
    assert not any(grad.any() for grad in grads)


def test_no_tokens():
    states, target = make_states()
    assert activation_distance(states[:0], target[:0]).shape == activation_distance(states[:0], target[0]).shape == (0,)
