"""Embeddings whose gradient is added to `.grad` by the lookup itself."""

from __future__ import annotations

import pytest
import torch
from allocations import peak_bytes
from torch.nn import functional as F

from lit_unlearn.functional.embedding import lookup

IDS = torch.tensor([[3, 0, 3], [1, 6, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("is_started", [False, True])
def test_adds_what_autograd_would(dtype: torch.dtype, padding_idx: int | None, is_started: bool) -> None:
    weight, cotangent = torch.randn(7, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(F.embedding(IDS, weight, padding_idx), weight, cotangent)
    before = torch.ones_like(weight) if is_started else None
    weight.grad = before
    values = lookup(IDS, weight, padding_idx)
    assert torch.equal(values, weight[IDS])
    values.backward(cotangent)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected + 1 if is_started else expected)
    assert before is None or weight.grad is before


def test_needs_no_second_gradient() -> None:
    weight = torch.randn(50_000, 8, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    size = weight.numel() * weight.element_size()
    assert peak_bytes(lambda: lookup(IDS, weight).sum().backward()) < size / 100
    assert peak_bytes(lambda: F.embedding(IDS, weight).sum().backward()) >= size


@pytest.mark.parametrize("weight", [torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)])
def test_other_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"float32"):
        lookup(torch.tensor([0]), weight)
