"""Divergences between next-token distributions, in nats per token."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_unlearn.functional.chunks import upcast
from lit_unlearn.functional.margin import logit_margin

Direction = Literal["uniform_to_model", "model_to_uniform"]


def kl_to_uniform(logits: Tensor, direction: Direction = "uniform_to_model") -> Tensor:
    """Compute the KL divergence between next-token distribution p and uniform U: the entropy-maximising forgetting loss.

    Args:
        logits: Scores before softmax, shape ``(N, V)``, any float dtype.
        direction: ``"uniform_to_model"`` is KL(U, p) = logsumexp z - mean z - log V, unbounded: it punishes every
            entry that the model rules out. ``"model_to_uniform"`` is KL(p, U) = log V - H(p), at most log V: it stops
            pulling once the model is confident.

    Returns:
        Shape ``(N,)``, float32 or wider, in nats; up to rounding non-negative and zero for uniform p only. Neither
        direction exceeds ``logit_margin``.

    Raises:
        ValueError: If ``direction`` is neither.

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
    """Compute three views of how uniform the next-token distribution is: the certificate that forgetting is reported with.

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


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Compute KL(p, q) of two next-token distributions: the nats that q loses of p, zero exactly where they agree.

    Args:
        p_logits: Scores before softmax, shape ``(N, V)``, any float dtype.
        q_logits: Likewise.

    Returns:
        Shape ``(N,)``, float32 or wider, in nats; up to rounding non-negative. An entry that p rules out adds nothing;
        one that q rules out and p does not makes it as good as infinite.

    Example:
        >>> kl(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        tensor([0.0000, 0.3278])
    """
    logp, logq = _finite_logp(p_logits), _finite_logp(q_logits)
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(dim=-1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of two next-token distributions: symmetric, and at most log 2.

    Args:
        p_logits: Scores before softmax, shape ``(N, V)``, any float dtype.
        q_logits: Likewise.

    Returns:
        (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, shape ``(N,)``, float32 or wider, in nats.

    Reference:
        Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory 1991; for
        unlearning Singh et al., "Unlearning That Lasts", 2025, arXiv 2509.02820.

    Example:
        >>> jensen_shannon(torch.tensor([[0.0, 0.0], [40.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 40.0]]))
        tensor([0.0000, 0.6931])
    """
    logp, logq = _finite_logp(p_logits), _finite_logp(q_logits)
    mixture = torch.logaddexp(logp, logq) - math.log(2)
    halves = [F.kl_div(mixture, log, reduction="none", log_target=True).sum(dim=-1) for log in (logp, logq)]
    return (halves[0] + halves[1]) / 2


def jensen_shannon_to_label(logp: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence between the next-token distribution and all mass on the label.

    It depends on the label's probability p alone: log 2 − ((1 + p) log(1 + p) − p log p) / 2. So no other logit is
    needed.

    Args:
        logp: Log-probability of each label, shape ``(N,)``, nats.

    Returns:
        Shape ``(N,)``, in nats, between 0 (p = 1) and log 2 (p = 0).

    Reference:
        Singh et al., "Unlearning That Lasts", 2025, arXiv 2509.02820.

    Example:
        >>> jensen_shannon_to_label(torch.tensor([1.0, 0.5, 1e-9]).log())
        tensor([0.0000, 0.2158, 0.6931])
    """
    # p = 0 is allowed, but 0 · −∞ is not a number.
    logp = logp.clamp_min(torch.finfo(logp.dtype).min)
    p = logp.exp()
    return math.log(2) - ((1 + p) * p.log1p() - p * logp) / 2


def undial(logits: Tensor, reference_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Compute the self-distillation loss towards the model before unlearning with the label's logit lowered.

    Args:
        logits: Scores before softmax, shape ``(N, V)``, any float dtype.
        reference_logits: The same of the model before unlearning; no gradient flows there.
        labels: Token ids in ``[0, V)``, shape ``(N,)``.
        beta: Amount by which the label's logit is lowered.

    Returns:
        Cross-entropy of the model under softmax(reference_logits − β · 1[label]), shape ``(N,)``, float32 or wider, nats.

    Reference:
        Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", NAACL
        2025, arXiv 2402.10052.

    Example:
        >>> same = torch.tensor([[0.0, 0.0]])
        >>> undial(same, same, torch.tensor([0]), beta=10.0), undial(torch.tensor([[0.0, 5.0]]), same, torch.tensor([0]), 10.0)
        (tensor([0.6931]), tensor([0.0069]))
    """
    teacher = upcast(reference_logits.detach())
    teacher = teacher.scatter_add(1, labels[:, None], teacher.new_full((len(labels), 1), -beta))
    return _cross_entropy(teacher.softmax(dim=-1), logits)


def ceu(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute cross-entropy unlearning: the target is the model's own distribution without the label.

    Args:
        logits: Scores before softmax, shape ``(N, V)`` with ``V > 1``, any float dtype.
        labels: Token ids in ``[0, V)``, shape ``(N,)``.

    Returns:
        Cross-entropy of the model under its own softmax with the label's logit at −∞ (a constant: no gradient flows
        there), shape ``(N,)``, float32 or wider, nats.

    Reference:
        Yang, "CE-U: Cross Entropy Unlearning", 2025, arXiv 2503.01224.

    Example:
        >>> ceu(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor([1.0986])
    """
    # The target is a constant in the paper: no gradient flows through it.
    teacher = upcast(logits.detach()).scatter(1, labels[:, None], -torch.inf)
    return _cross_entropy(teacher.softmax(dim=-1), logits)


def _finite_logp(logits: Tensor) -> Tensor:
    """Compute a log-softmax that is finite everywhere."""
    # An entry that is ruled out has log-probability −∞, and 0 · −∞ is not a number.
    logp = upcast(logits).log_softmax(dim=-1)
    return logp.clamp_min(torch.finfo(logp.dtype).min)


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(upcast(logits), target, reduction="none")
