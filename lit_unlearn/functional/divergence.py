"""How far a next-token distribution is from another one, in nats per token."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_unlearn.functional.chunks import upcast
from lit_unlearn.functional.margin import logit_margin

Direction = Literal["uniform_to_model", "model_to_uniform"]


def kl_to_uniform(logits: Tensor, direction: Direction = "uniform_to_model") -> Tensor:
    """KL divergence between the next-token distribution p and the uniform U: the entropy-maximising forgetting loss.

    Args:
        logits: Scores before softmax, shape ``(N, V)``, any float dtype.
        direction: ``"uniform_to_model"`` is KL(U, p) = logsumexp z - mean z - log V, unbounded: it punishes every word
            that the model rules out. ``"model_to_uniform"`` is KL(p, U) = log V - H(p), at most log V: it stops
            pulling once the model is confident.

    Returns:
        Shape ``(N,)``, float32 or wider, in nats; up to rounding non-negative and zero for uniform p only. Neither
        direction exceeds ``logit_margin``.

    Raises:
        ValueError: If ``direction`` is another word.

    Reference:
        Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models", ICLR 2025, arXiv 2410.08109.

    Example:
        >>> kl_to_uniform(torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
        tensor([0.0000, 0.4338])
        >>> kl_to_uniform(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), "model_to_uniform")
        tensor([0.0000, 0.3278])
    """
    z = upcast(logits)
    if direction == "uniform_to_model":
        return z.logsumexp(dim=-1) - z.mean(dim=-1) - math.log(z.shape[-1])
    if direction == "model_to_uniform":
        logp = z.log_softmax(dim=-1)
        return math.log(z.shape[-1]) + (logp.exp() * logp).sum(dim=-1)
    raise ValueError(
        f"direction must be one of {get_args(Direction)}, got {direction!r}; 'uniform_to_model' is KL(U, p), "
        "'model_to_uniform' is log V - H(p)."
    )


def uniformity(logits: Tensor) -> Tensor:
    """Three views of how uniform the next-token distribution is: the certificate that forgetting is reported with.

    Args:
        logits: Scores before softmax, shape ``(N, V)`` with ``V > 1``, any float dtype.

    Returns:
        Shape ``(N, 3)``, float32 or wider. Columns: logit margin in nats (0 = uniform), normalised entropy H / log V
        (1 = uniform), KL(U, p) in nats (0 = uniform).

    Example:
        >>> uniformity(torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
        tensor([[0.0000, 1.0000, 0.0000],
                [1.0000, 0.5271, 0.4338]])
    """
    entropy = 1 - kl_to_uniform(logits, "model_to_uniform") / math.log(logits.shape[-1])
    return torch.stack([logit_margin(logits), entropy, kl_to_uniform(logits)], dim=-1)
