from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import HALF, D, LargestOutput, N, V, cotangent, make_head
from torch import Tensor
from torch.nn import functional as F

from lit_unlearn.functional import linear_logit_margin, logit_margin


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.logit_margin(reference.head_logits(hidden, weight, bias))


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return logit_margin(F.linear(hidden, weight, bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, V, V + 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_dense_reference(dtype, tolerance, chunk_size, bias):
    head = make_head(dtype, bias)
    value, grads = reference.value_and_grads(
        lambda h, w, b: linear_logit_margin(h, w, b, chunk_size=chunk_size), head, cotangent()
    )
    want, want_grads = reference.value_and_grads(exact, head, cotangent(), torch.float64)
    assert value.dtype == dtype
    assert reference.relative_error(value, want) < tolerance
    assert reference.relative_error(logit_margin(F.linear(*head)), want) < tolerance
    for x, grad, want_grad in zip(head, grads, want_grads, strict=True):
        if x is not None:
            assert grad.dtype == dtype
            assert reference.relative_error(grad, want_grad) < tolerance


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_naive(dtype, bias):
    """The naive form in the same precision sets the scale: its logits are rounded, as ours are in the search."""
    hidden, weight, offsets = make_head(dtype, bias, n=64, d=32, v=200)
    head = (hidden + weight[:128:2], weight, offsets)  # one word leads clearly, so that only rounding differs
    assert torch.equal(F.linear(*head).argmax(dim=1), reference.head_logits(*head).argmax(dim=1))
    value, grads = reference.value_and_grads(
        lambda h, w, b: linear_logit_margin(h, w, b, chunk_size=33), head, cotangent(64)
    )
    rough, rough_grads = reference.value_and_grads(naive, head, cotangent(64))
    want, want_grads = reference.value_and_grads(exact, head, cotangent(64), torch.float64)
    assert value.dtype == torch.float32
    assert reference.relative_error(value, want) <= reference.relative_error(rough, want)
    for x, grad, rough_grad, want_grad in zip(head, grads, rough_grads, want_grads, strict=True):
        if x is not None:
            assert grad.dtype == dtype
            assert reference.relative_error(grad, want_grad) <= reference.relative_error(rough_grad, want_grad)


def test_half_weight_gradient_keeps_small_updates():
    """4096 tokens share the largest word: added one by one in bfloat16 the sum would stop growing at 256."""
    hidden = torch.ones(4096, 2, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_logit_margin(hidden, weight).sum().backward()
    assert weight.grad.tolist() == [[2048.0, 2048.0], [-2048.0, -2048.0]]


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    head = [x.requires_grad_() for x in make_head(bias=bias) if x is not None]
    assert torch.autograd.gradcheck(lambda *x: linear_logit_margin(*x, chunk_size=3), head)
    assert torch.autograd.gradcheck(lambda *x: linear_logit_margin(*x).square(), head)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_tie_takes_first_index_like_dense(chunk_size):
    hidden = torch.tensor([[1.0]])
    weights = [torch.tensor([[1.0], [3.0], [3.0], [3.0]], requires_grad=True) for _ in range(2)]
    linear_logit_margin(hidden, weights[0], chunk_size=chunk_size).sum().backward()
    naive(hidden, weights[1], None).sum().backward()
    assert torch.equal(weights[0].grad, weights[1].grad)
    assert weights[0].grad[1] == 0.75


def test_no_tokens():
    hidden, weight, bias = (x.requires_grad_() for x in make_head(n=0))
    value = linear_logit_margin(hidden, weight, bias)
    value.sum().backward()
    assert value.shape == (0,)
    assert hidden.grad.shape == (0, D)
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_requested_gradient(wanted):
    head = make_head()
    _, all_grads = reference.value_and_grads(linear_logit_margin, head, cotangent())
    head[wanted].requires_grad_()
    linear_logit_margin(*head).backward(cotangent())
    assert torch.equal(head[wanted].grad, all_grads[wanted])
    assert all(x.grad is None for i, x in enumerate(head) if i != wanted)


def test_no_gradient_requested():
    assert not linear_logit_margin(*make_head()).requires_grad


def test_never_allocates_the_logits_and_frozen_weight_no_buffer():
    hidden, weight, bias = make_head(n=64, d=4, v=50)
    hidden.requires_grad_()
    with LargestOutput() as frozen:
        linear_logit_margin(hidden, weight, bias, chunk_size=2).sum().backward()
    assert frozen.numel <= 64 * 4  # hidden and the rows gathered for it
    weight.requires_grad_()
    with LargestOutput() as trained:
        linear_logit_margin(hidden, weight, bias, chunk_size=2).sum().backward()
    assert trained.numel <= max(64 * 4, 50 * 4)  # far below 64 * 50


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_mixed_dtypes(hidden_dtype, enabled):
    hidden, weight, bias = make_head(torch.float32, n=64, d=32, v=200)
    hidden = hidden.to(hidden_dtype)

    def in_autocast(function):
        def run(*head):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return function(*head)

        return run

    head = (hidden, weight, bias)
    value, grads = reference.value_and_grads(in_autocast(linear_logit_margin), head, cotangent(64))
    want, want_grads = reference.value_and_grads(exact, head, cotangent(64), torch.float64)
    wide = head if enabled else (hidden.float(), weight, bias)  # outside autocast the dense form needs equal dtypes
    rough, rough_grads = reference.value_and_grads(in_autocast(naive), wide, cotangent(64))
    slack = 1e-6 if enabled else 5e-3  # a gradient that is returned as bfloat16 is rounded once
    assert value.dtype == torch.float32
    assert reference.relative_error(value, want) <= reference.relative_error(rough, want) + 1e-6
    for x, grad, rough_grad, want_grad in zip(head, grads, rough_grads, want_grads, strict=True):
        assert grad.dtype == x.dtype
        assert reference.relative_error(grad, want_grad) <= reference.relative_error(rough_grad, want_grad) + slack


def test_autocast_leaves_the_shared_head_trainable():
    """A cast cached inside an autograd function carries no gradient and would be reused by the next dense layer."""
    hidden, weight, _ = make_head(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_logit_margin(hidden, weight)
        assert F.linear(hidden, weight).requires_grad


def test_nan_is_not_hidden():
    hidden, weight, bias = make_head()
    hidden[2, 1] = torch.nan
    assert linear_logit_margin(hidden, weight, bias).isnan().tolist() == [n == 2 for n in range(N)]
    weight[3] = torch.nan
    assert linear_logit_margin(hidden, weight, bias).isnan().all()


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_bad_chunk_size(chunk_size):
    with pytest.raises(ValueError, match=rf"at least 1, got {chunk_size}; use None"):
        linear_logit_margin(*make_head(), chunk_size=chunk_size)


@pytest.mark.parametrize("shapes", [[(2, 3, D), (V, D), (V,)], [(N, D), (D, V), (V,)], [(N, D), (V, D), (V, 1)]])
def test_bad_shapes(shapes):
    with pytest.raises(ValueError, match=r"expected hidden \(N, D\), weight \(V, D\)"):
        linear_logit_margin(*(torch.zeros(s) for s in shapes))


ROWS = st.lists(st.integers(-3000, 3000).map(lambda i: i / 64), min_size=2, max_size=12)  # exact in binary


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(-1000, 1000))
def test_margin_properties(row, shift):
    z = torch.tensor([row], dtype=torch.float64)
    margin = logit_margin(z)
    assert margin.item() >= 0
    assert (margin.item() == 0) == (len(set(row)) == 1)
    assert torch.allclose(logit_margin(z + shift), margin, rtol=0, atol=1e-12)
    assert torch.allclose(linear_logit_margin(torch.ones(1, 1).double(), z.T, chunk_size=3), margin, rtol=0, atol=1e-12)
