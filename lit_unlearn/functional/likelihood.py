"""Log-probabilities of the supervised tokens, the material of every likelihood-based objective."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_unlearn.functional.chunks import map_logits, upcast

_NEVER = torch.iinfo(torch.int64).min


def token_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, not reduced: what NLL negates and what likelihood-based forgetting weighs.

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
    # Fused: a third of the time of gather - logsumexp on CPU. `ignore_index` out of the way, or -100 would pass for 0.
    return -F.cross_entropy(upcast(logits), labels, reduction="none", ignore_index=_NEVER)


def linear_token_logp(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, chunk_size: int | None = None
) -> Tensor:
    """``token_logp(hidden @ weight.T + bias, labels)`` without ever holding the ``(N, V)`` logits.

    Args:
        hidden: Final hidden states that predict the label, shape ``(N, D)``; ``N`` may be 0.
        weight: Head weight, shape ``(V, D)``; may differ from ``hidden`` in dtype, as under autocast.
        labels: Token ids in ``[0, V)``, shape ``(N,)``, int64. Ignored tokens have been dropped.
        bias: Head bias, shape ``(V,)``, or ``None``.
        chunk_size: Tokens per chunk; ``None`` chooses from a budget. Does not change the values.

    Returns:
        Shape ``(N,)``, float32 or wider, in nats, at most 0; differentiable once.

    Raises:
        ValueError: If ``chunk_size`` is below 1, shapes do not match, or a label is outside ``[0, V)`` (the latter on
            the CPU only, see ``token_logp``).

    Example:
        >>> linear_token_logp(torch.zeros(2, 4), torch.zeros(10, 4), torch.tensor([3, 7]))  # uniform: -log 10
        tensor([-2.3026, -2.3026])
    """
    return map_logits(token_logp, hidden, weight, bias, labels, chunk_size=chunk_size)


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
