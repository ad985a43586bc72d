"""Log-probabilities of the supervised tokens, the material of every likelihood-based objective."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_unlearn.functional.chunks import (
    add_product,
    can_accumulate,
    check_head,
    entries_per_chunk,
    get_gradient_buffer,
    matmul_dtype,
    upcast,
)

KEEP_BUDGET = 2**24
"""Elements of the logits that backward need not compute again: 64 MiB in float32, a matrix product less for them."""

_NEVER = torch.iinfo(torch.int64).min


def token_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the log-probability of each label, not reduced: NLL negates it, likelihood-based forgetting weighs it.

    Args:
        logits: Scores before softmax that predict the label, shape ``(N, V)``, any float dtype.
        labels: Token ids in ``[0, V)``, shape ``(N,)``, int64. Ignored tokens have been dropped.

    Returns:
        Shape ``(N,)``, float32 or wider, in nats, at most 0.

    Raises:
        ValueError: If ``labels`` has another shape, or holds an id outside ``[0, V)``. Values are checked on the CPU
            only: reading them on a GPU would stall it, and there the kernel's own bounds check stops the run.

    Example:
        >>> token_logp(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([-0.6931])
    """
    _check_labels(labels, logits.shape[0], logits.shape[-1])
    # Fused: a third of the time of gather - logsumexp on CPU.
    # No label is ignored: by default -100 would silently give 0.
    return -F.cross_entropy(upcast(logits), labels, reduction="none", ignore_index=_NEVER)


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Compute ``token_logp(hidden @ weight.T + bias, labels)`` without ever holding the ``(N, V)`` logits.

    The head is cut along the vocabulary, with a running maximum and sum per token. So each row of the weight is read
    once a pass, and its gradient is one product over all tokens that is written where it belongs. Three head matrix
    products for the first ``KEEP_BUDGET`` logits, whose exponentials are kept, and four beyond; one without gradients.

    Args:
        hidden: Final hidden states that predict the label, shape ``(N, D)``; ``N`` may be 0.
        weight: Head weight, shape ``(V, D)``; may differ from ``hidden`` in dtype, as under autocast. If frozen, no
            ``(V, D)`` buffer is made.
        labels: Token ids in ``[0, V)``, shape ``(N,)``, int64. Ignored tokens have been dropped.
        bias: Head bias, shape ``(V,)``, or ``None``.
        chunk_size: Vocabulary entries per chunk; ``None`` chooses from a budget. Does not change the values.
        accumulate: Whether backward adds the weight's gradient to ``weight.grad`` itself, where ``weight`` is a leaf,
            which saves a ``(V, D)`` buffer. Autograd then sees no gradient of ``weight``: its hooks do not run and
            ``torch.autograd.grad`` finds none. Not for DDP or FSDP, which wait for those hooks.

    Returns:
        Shape ``(N,)``, float32 or wider, in nats, at most 0; differentiable once.

    Raises:
        ValueError: If ``chunk_size`` is below 1, shapes do not match, or a label is outside ``[0, V)`` (the latter on
            the CPU only, see ``token_logp``; elsewhere the value is nan).

    Reference:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867.

    Example:
        >>> linear_token_logp(torch.zeros(2, 4), torch.zeros(10, 4), torch.tensor([3, 7]))  # uniform: -log 10
        tensor([-2.3026, -2.3026])
    """
    check_head(hidden, weight, bias)
    _check_labels(labels, hidden.shape[0], weight.shape[0])
    size = entries_per_chunk(hidden, weight, chunk_size)
    direct = can_accumulate(weight, accumulate)
    # Read here, because inside an autograd function gradients are never enabled.
    keep = KEEP_BUDGET if torch.is_grad_enabled() else 0
    output = _LinearTokenLogp.apply(hidden, weight, bias, labels, size, keep, direct)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class _LinearTokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        size: int,
        keep: int,
        accumulate: bool,
    ) -> Tensor:
        ctx.dtype, ctx.size, ctx.leaf = matmul_dtype(hidden, weight), size, weight if accumulate else None
        ctx.kept, ctx.tops = {}, {}
        room = keep if any(ctx.needs_input_grad) else 0
        inputs = hidden.to(ctx.dtype)
        chosen = upcast(inputs.new_full(labels.shape, torch.nan))
        # Not -inf: where a bias of -inf bars a whole chunk, -inf - -inf would be nan.
        top = torch.full_like(chosen, torch.finfo(chosen.dtype).min)
        total = torch.zeros_like(chosen)
        for start in range(0, weight.shape[0], size):
            scores = _compute_logits(inputs, weight, bias, slice(start, start + size))
            column, inside = _locate_labels(labels, start, scores.shape[1])
            chosen = torch.where(inside, scores.gather(1, column).squeeze(1), chosen)
            # The online softmax of Milakov and Gimelshein: a sum under the old maximum is rescaled to the new one.
            before, top = top, torch.maximum(top, scores.amax(dim=1))
            scores.sub_(top.unsqueeze(1)).exp_()
            total = total * (before - top).exp() + scores.sum(dim=1)
            ctx.tops[start] = top
            room -= scores.numel()
            if room >= 0:
                ctx.kept[start] = scores
            # Otherwise it would live on while the next chunk is made.
            del scores
        # In this order no result exceeds 0: the logarithm is at least 0, the difference at most.
        logp = (chosen - top) - total.log()
        ctx.save_for_backward(hidden, weight, bias, labels, top + total.log(), logp)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normalizer, logp = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = upcast(torch.zeros_like(hidden)) if needs_hidden else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        # Not the saved tensor, of which a hook may have made a copy.
        leaf = weight if ctx.leaf is None else ctx.leaf
        grad_weight, started = get_gradient_buffer(leaf, ctx.leaf is not None) if needs_weight else (None, False)
        # Not p - 1, which has no digits left for a confident token.
        at_label = -grad * torch.expm1(logp)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.to(ctx.dtype)
            for start in range(0, weight.shape[0], ctx.size):
                entries = slice(start, start + ctx.size)
                # Popped, so that memory is given back on the way; a second backward pass computes them again.
                scores, top = ctx.kept.pop(start, None), ctx.tops[start]
                # Under the maximum that this chunk saw in forward: bit for bit what was kept.
                if scores is None:
                    scores = _compute_logits(inputs, weight, bias, entries).sub_(top.unsqueeze(1)).exp_()
                scores.mul_((-grad * (top - normalizer).exp()).unsqueeze(1))
                column, inside = _locate_labels(labels, start, scores.shape[1])
                value = torch.where(inside, at_label, scores.gather(1, column).squeeze(1))
                scores.scatter_(1, column, value.unsqueeze(1))
                if grad_bias is not None:
                    grad_bias[entries] = scores.sum(dim=0)
                scores = scores.to(ctx.dtype)
                if grad_hidden is not None:
                    add_product(grad_hidden, scores, weight[entries].to(ctx.dtype), started=True)
                if grad_weight is not None:
                    add_product(grad_weight[entries], scores.T, inputs, started)
                del scores
        if ctx.leaf is not None:
            ctx.leaf.grad, grad_weight = grad_weight, None
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, *[None] * 4


def _compute_logits(inputs: Tensor, weight: Tensor, bias: Tensor | None, entries: slice) -> Tensor:
    """Return the logits of some vocabulary entries, ``(N, v)``, float32 or wider, in new memory."""
    offsets = None if bias is None else bias[entries].to(inputs.dtype)
    return upcast(F.linear(inputs, weight[entries].to(inputs.dtype), offsets))


def _locate_labels(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Return each label's column in a chunk, ``(N, 1)``, and whether it is inside, ``(N,)``; any column if not."""
    column = labels - start
    return column.clamp(0, count - 1).unsqueeze(1), (column >= 0) & (column < count)


def _check_labels(labels: Tensor, count: int, vocabulary: int) -> None:
    if labels.shape != (count,):
        raise ValueError(
            f"expected one label per row of logits, shape ({count},); got {tuple(labels.shape)}. "
            "Select the same supervised tokens from the logits and the labels."
        )
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise ValueError(
            f"expected labels in [0, {vocabulary}), got values from {int(labels.min())} to {int(labels.max())}. Drop "
            "ignored tokens (-100) before calling, keep = labels >= 0, and check that tokenizer and model agree."
        )
