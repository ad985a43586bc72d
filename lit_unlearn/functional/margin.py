"""The logit margin, the forgetting loss of constrained entropic unlearning, and its closed-form gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_unlearn.functional.chunks import (
    can_accumulate,
    check_head,
    entries_per_chunk,
    get_gradient_buffer,
    matmul_dtype,
    upcast,
)


def logit_margin(logits: Tensor) -> Tensor:
    """Compute the largest minus the mean logit of each row: zero exactly for a uniform next-token distribution.

    It bounds what the model still prefers: ``log V - H(p) <= margin`` and ``KL(uniform, p) <= margin``, in nats.

    Args:
        logits: Scores before softmax, shape ``(N, V)``, any float dtype.

    Returns:
        Shape ``(N,)``, float32 or wider, non-negative; unchanged when a constant is added to a row.

    Reference:
        Entesari et al., "Constrained Entropic Unlearning", NeurIPS 2025, arXiv 2506.05314.

    Example:
        >>> logit_margin(torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
        tensor([0., 1.])
    """
    z = upcast(logits)
    # `max`, not `amax`: it gives a tied gradient to one index, as the chunked form does.
    # Clamped: the mean of equal numbers can exceed them by a rounding error, and its fractional power would be nan.
    return (z.max(dim=-1).values - z.mean(dim=-1)).clamp_min(0)


def linear_logit_margin(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    accumulate: bool = False,
    kernel: bool = False,
) -> Tensor:
    """Compute ``logit_margin(hidden @ weight.T + bias)`` with one head matrix product in forward and none in backward.

    Only the largest logit and the mean matter, and the mean of the logits is ``hidden`` times the mean row of the
    weight. So forward searches the maximum over chunks of the vocabulary, and the gradient is a gather, an index-add
    and a rank-one term::

        margin    = h . (w_max - w_mean) + b_max - b_mean
        d/dh      = w_max - w_mean
        d/dw_v    = (1[v is the maximum] - 1/V) h

    Args:
        hidden: Final hidden states, shape ``(N, D)``; ``N`` may be 0.
        weight: Head weight, shape ``(V, D)``; may differ from ``hidden`` in dtype, as under autocast. If frozen, no
            ``(V, D)`` buffer is made.
        bias: Head bias, shape ``(V,)``, or ``None``.
        chunk_size: Vocabulary entries per chunk; ``None`` chooses from a budget. Does not change the values.
        accumulate: Whether backward adds the weight's gradient to ``weight.grad`` itself, which saves a ``(V, D)``
            buffer; see ``linear_token_logp``.
        kernel: Whether a Triton kernel searches the maximum, which writes no logits at all. It has been compared with the
            default in Triton's interpreter, and measured on no GPU.

    Returns:
        Shape ``(N,)``, float32 or wider, non-negative, differentiable once. The maximum is searched in the precision
        of the matrix product; the value is computed in the wider one, so it is at least as exact as the dense form.

    Raises:
        ValueError: If ``chunk_size`` is below 1 or shapes do not match.
        ImportError: If the ``kernel`` is asked for and triton is not installed.

    Reference:
        Entesari et al., "Constrained Entropic Unlearning", NeurIPS 2025, arXiv 2506.05314.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 2.0]])
        >>> linear_logit_margin(hidden, weight, chunk_size=2)  # the logits of the two tokens are the columns of weight
        tensor([1., 2.])
    """
    check_head(hidden, weight, bias)
    size = entries_per_chunk(hidden, weight, chunk_size)
    direct = can_accumulate(weight, accumulate)
    output = _LinearLogitMargin.apply(hidden, weight, bias, size, direct, kernel)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class _LinearLogitMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int, accumulate: bool, kernel: bool
    ) -> Tensor:
        index, mean = _argmax_and_mean(hidden, weight, bias, size, kernel)
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight, bias, index, mean)
        ctx.hidden_dtype, ctx.leaf = hidden.dtype, weight if accumulate else None
        margin = (hidden.to(mean.dtype) * (weight[index].to(mean.dtype) - mean)).sum(dim=-1)
        if bias is not None:
            wide = bias.to(mean.dtype)
            margin = margin + (wide[index] - wide.mean())
        # A maximum is no less than the mean: anything below zero is rounding.
        return margin.clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index, mean = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = grad_weight = grad_bias = None
        column = grad.unsqueeze(-1)
        if needs_hidden:
            grad_hidden = (column * (weight[index].to(mean.dtype) - mean)).to(ctx.hidden_dtype)
        if needs_weight:
            # Not the saved tensor, of which a hook may have made a copy.
            leaf = weight if ctx.leaf is None else ctx.leaf
            grad_weight = _scatter_centred(*get_gradient_buffer(leaf, ctx.leaf is not None), column * hidden, index)
            if ctx.leaf is not None:
                ctx.leaf.grad, grad_weight = grad_weight, None
        if needs_bias:
            grad_bias = _scatter_centred(*get_gradient_buffer(bias, False), grad, index)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _argmax_and_mean(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int, kernel: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the index of each row's largest logit, ``(N,)``, first on ties, and the weight's mean row, ``(D,)``."""
    dtype = matmul_dtype(hidden, weight)
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    inputs, vocabulary = hidden.to(dtype), weight.shape[0]
    # Triton's products sum in float32.
    if kernel and dtype != torch.float64:
        from lit_unlearn.functional.margin_kernel import find_largest

        return find_largest(inputs, weight.to(dtype), bias), weight.mean(dim=0, dtype=wide)
    best = inputs.new_full((len(inputs),), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    total = weight.new_zeros(weight.shape[1], dtype=wide)
    for start in range(0, vocabulary, size):
        entries = weight[start : start + size]
        offsets = None if bias is None else bias[start : start + size].to(dtype)
        value, column = F.linear(inputs, entries.to(dtype), offsets).max(dim=-1)
        # Strictly, so that the first of equal maxima stays.
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, column + start, index)
        total += entries.sum(dim=0, dtype=wide)
    return index, total / vocabulary


def _scatter_centred(total: Tensor, started: bool, rows: Tensor, index: Tensor) -> Tensor:
    """Sum over n ``(one_hot(index[n]) - 1/V)`` times ``rows[n]``, added to ``total`` (V, ...) if that is ``started``.

    Tokens that share an entry are added up before the result is rounded to ``total``'s dtype: adding them one by one to
    a half precision buffer would lose most of them, and a wide ``(V, D)`` buffer would double the memory.
    """
    shared = rows.sum(dim=0) / -len(total)
    # Any one of the tokens that share an entry numbers their group. Not `unique`: the CPU would wait for the number of entries.
    token_of_entry = index.new_empty(len(total))
    token_of_entry[index] = torch.arange(len(index), device=index.device)
    group = token_of_entry[index]
    # Tokens of a group write the same sum to their entry.
    sums = torch.zeros_like(rows).index_add_(0, group, rows)[group]
    sums += shared
    if started:
        sums += total[index]
        total += shared
    else:
        total.copy_(shared)
    total[index] = sums.to(total.dtype)
    return total
