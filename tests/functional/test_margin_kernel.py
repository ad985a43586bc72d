"""The margin's Triton kernel, run by Triton's interpreter on the CPU, beside the plain form."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from lit_unlearn import LanguageModel, LogitMargin
from lit_unlearn.functional import linear_logit_margin

# Triton decides at its import, which is torch's, whether kernels are compiled for a GPU or interpreted.
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs triton, and TRITON_INTERPRET=1 in the environment: make kernel",
        allow_module_level=True,
    )
pytest.importorskip("triton", reason="needs triton: make kernel")

from lit_unlearn.functional import margin_kernel
from lit_unlearn.functional.margin import _argmax_and_mean

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows, vocabulary, width: below, at and beyond the blocks, and none that they divide.
SHAPES = [(1, 1, 1), (3, 7, 5), (64, 128, 64), (65, 300, 70), (2, 1000, 130)]


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter is slow; and so one part has several blocks.
    monkeypatch.setattr(margin_kernel, "PARTS", 2)


def head(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, vocabulary, width = shape
    draw = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(rows, width, generator=draw).to(dtype)
    weight = torch.randn(vocabulary, width, generator=draw).to(dtype)
    return hidden, weight, torch.randn(vocabulary, generator=draw).to(dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finds_the_largest_logit(dtype: torch.dtype, shape: tuple[int, int, int], bias: bool) -> None:
    hidden, weight, offsets = head(shape, dtype, bias)
    exact = hidden.double() @ weight.double().T + (0 if offsets is None else offsets.double())
    index, mean = _argmax_and_mean(hidden, weight, offsets, 7, kernel=True)
    # Sums in another order: of logits that are equal to so many digits, any is right.
    assert (exact.max(dim=1).values - exact.gather(1, index[:, None])[:, 0]).max() <= 1e-5 * exact.abs().max()
    plain_index, plain_mean = _argmax_and_mean(hidden, weight, offsets, 7)
    torch.testing.assert_close(mean, plain_mean, rtol=1e-5, atol=1e-6)
    if dtype == torch.float32:
        assert torch.equal(index, plain_index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equal_logits_is_taken(dtype: torch.dtype) -> None:
    # Small whole numbers are exact in every dtype. Entries 2 and 250 are in the same part, 2 and 399 in different ones.
    weight = torch.zeros(400, 3, dtype=dtype)
    weight[[2, 250, 399], 0] = 2
    weight[[130, 131, 260], 1] = 3
    hidden = torch.eye(3, dtype=dtype)
    assert _argmax_and_mean(hidden, weight, None, 400, kernel=True)[0].tolist() == [2, 130, 0]
    # Where every entry is barred, the first is as good as any.
    assert (
        _argmax_and_mean(hidden, weight, weight.new_full((400,), -torch.inf), 400, kernel=True)[0].tolist() == [0] * 3
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margin_and_gradients_are_those_of_the_plain_form(dtype: torch.dtype) -> None:
    results = []
    for kernel in (False, True):
        hidden, weight, offsets = head((9, 150, 20), dtype, bias=True)
        assert offsets is not None
        # So far apart that rounding cannot change which is the largest.
        offsets[::7] += 50 * torch.arange(len(offsets[::7])).to(dtype)
        for tensor in (hidden, weight, offsets):
            tensor.requires_grad_()
        margin = linear_logit_margin(hidden, weight, offsets, kernel=kernel)
        margin.square().mean().backward()
        results.append([margin, hidden.grad, weight.grad, offsets.grad])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_rows_and_wide_numbers() -> None:
    hidden, weight, _ = head((5, 9, 4), torch.float32, bias=False)
    assert linear_logit_margin(hidden[:0], weight, kernel=True).shape == (0,)
    # Wider than the kernel's sums: the plain form.
    wide = linear_logit_margin(hidden.double(), weight.double(), kernel=True)
    assert torch.equal(wide, linear_logit_margin(hidden.double(), weight.double()))


def test_a_model_uses_it_where_it_is_told_to(tiny_lm: type[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    lm.load(torch.float32)
    ids = torch.arange(3, 12)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    expected = lm.loss(LogitMargin(), batch)
    calls, find = [], margin_kernel.find_largest
    monkeypatch.setattr(margin_kernel, "find_largest", lambda *head: calls.append(head) or find(*head))
    assert lm.loss(LogitMargin(), batch) == expected
    assert not calls
    lm.margin_kernel = True
    torch.testing.assert_close(lm.loss(LogitMargin(), batch), expected)
    assert calls
