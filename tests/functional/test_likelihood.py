from __future__ import annotations

import pytest
import reference
import torch
from reference import HALF, LargestOutput, N, V, cotangent, make_head
from torch.nn import functional as F

from lit_unlearn.functional import linear_token_logp, token_logp

LABELS = torch.tensor([0, V - 1, 3, 3, 7, 1, 10])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, N + 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_dense_reference(dtype, tolerance, chunk_size, bias):
    head = make_head(dtype, bias)
    value, grads = reference.value_and_grads(
        lambda h, w, b: linear_token_logp(h, w, LABELS, b, chunk_size=chunk_size), head, cotangent()
    )
    want, want_grads = reference.value_and_grads(
        lambda *x: reference.token_logp(reference.head_logits(*x), LABELS), head, cotangent(), torch.float64
    )
    assert value.dtype == dtype
    assert reference.relative_error(value, want) < tolerance
    assert reference.relative_error(token_logp(F.linear(*head), LABELS), want) < tolerance
    for grad, want_grad in zip(grads, want_grads, strict=True):
        if grad is not None:
            assert grad.dtype == dtype
            assert reference.relative_error(grad, want_grad) < tolerance


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_naive(dtype):
    head, labels = make_head(dtype, n=64, d=32, v=200), torch.arange(64) * 3
    forms = {
        "ours": lambda h, w, b: linear_token_logp(h, w, labels, b, chunk_size=5),
        "naive": lambda h, w, b: F.linear(h, w, b).float().log_softmax(-1)[torch.arange(64), labels],
    }
    exact = reference.value_and_grads(
        lambda *x: reference.token_logp(reference.head_logits(*x), labels), head, cotangent(64), torch.float64
    )
    error = {}
    for name, form in forms.items():
        value, grads = reference.value_and_grads(form, head, cotangent(64))
        error[name] = [
            reference.relative_error(a, b) for a, b in zip([value, *grads], [exact[0], *exact[1]], strict=True)
        ]
    for ours, naive in zip(error["ours"], error["naive"], strict=True):
        assert ours <= 1.1 * naive  # each chunk's share of the weight gradient is rounded once more


def test_gradcheck():
    head = [x.requires_grad_() for x in make_head()]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_token_logp(h, w, LABELS, b, chunk_size=2), head)


def test_no_tokens():
    hidden, weight, bias = make_head(n=0)
    value = linear_token_logp(hidden.requires_grad_(), weight, LABELS[:0], bias)
    value.sum().backward()
    assert value.shape == (0,)
    assert hidden.grad.shape == hidden.shape


def test_never_allocates_the_logits():
    hidden, weight, bias = (x.requires_grad_() for x in make_head(n=64, d=4, v=50))
    with LargestOutput() as largest:
        linear_token_logp(hidden, weight, torch.zeros(64, dtype=torch.int64), bias, chunk_size=2).sum().backward()
    assert largest.numel <= 64 * 4


@pytest.mark.parametrize("bad", [-100, -1, V])
def test_labels_outside_the_vocabulary_are_refused(bad):
    labels = LABELS.clone()
    labels[3] = bad
    hidden, weight, bias = make_head()
    for compute in (
        lambda: token_logp(F.linear(hidden, weight, bias), labels),
        lambda: linear_token_logp(hidden, weight, labels, bias, chunk_size=2),
    ):
        with pytest.raises(ValueError, match=r"expected labels in \[0, 11\).*Drop ignored tokens"):
            compute()


def test_label_shape():
    with pytest.raises(ValueError, match=r"one label per row of logits, shape \(7,\); got \(3,\)"):
        token_logp(torch.zeros(N, V), LABELS[:3])
