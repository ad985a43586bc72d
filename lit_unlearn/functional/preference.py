"""Losses of whole answers and weights of single tokens, from log-probabilities alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def npo(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """Compute the loss of negative preference optimisation: ascent that fades as an answer becomes less likely than before.

    Args:
        logp: Log-probability of each answer, summed over its tokens, shape ``(S,)``, nats.
        reference_logp: The same under the model before unlearning.
        beta: Inverse temperature > 0. Towards 0 the gradient becomes that of ``logp`` itself, which is gradient ascent.

    Returns:
        −(2/β) log σ(−β (logp − reference_logp)), shape ``(S,)``, never negative.

    Reference:
        Zhang et al., "Negative Preference Optimization", COLM 2024, arXiv 2404.05868.

    Example:
        >>> import torch
        >>> npo(torch.tensor([-3.0, -90.0]), torch.tensor([-3.0, -3.0]), beta=0.1)
        tensor([1.3863e+01, 3.3314e-03])
    """
    return 2 / beta * F.softplus(beta * (logp - reference_logp))


def simnpo(logp: Tensor, lengths: Tensor, beta: float, delta: float) -> Tensor:
    """Compute NPO without a reference model: the reward is the answer's mean log-probability per token.

    Args:
        logp: Log-probability of each answer, summed over its tokens, shape ``(S,)``, nats.
        lengths: Tokens of each answer, shape ``(S,)``.
        beta: Inverse temperature > 0.
        delta: Margin of the reward, in nats per token.

    Returns:
        −(2/β) log σ(−β logp / length − β δ), shape ``(S,)``, never negative.

    Reference:
        Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024, arXiv
        2410.07163.

    Example:
        >>> import torch
        >>> simnpo(torch.tensor([-3.0, -90.0]), torch.tensor([10, 10]), beta=4.5, delta=0.0)
        tensor([1.0245e-01, 1.1452e-18])
    """
    return 2 / beta * F.softplus(beta * (logp / lengths + delta))


def dpo(alternate_gain: Tensor, forget_gain: Tensor, beta: float) -> Tensor:
    """Compute the loss of direct preference optimisation with the answer to forget as the rejected one.

    Args:
        alternate_gain: How far each preferred answer's log-probability is above that of the model before unlearning,
            shape ``(S,)``, nats.
        forget_gain: The same of the answer to forget.
        beta: Inverse temperature > 0.

    Returns:
        −(2/β) log σ(β (alternate_gain − forget_gain)), shape ``(S,)``, never negative. The factor 2 is that of the
        unlearning literature; it makes the gradient of the two answers that of ascent and descent at the start.

    Reference:
        Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv 2305.18290; for unlearning Zhang et al.,
        arXiv 2404.05868.

    Example:
        >>> import torch
        >>> dpo(torch.tensor([0.0, 30.0]), torch.tensor([0.0, -30.0]), beta=0.1)
        tensor([13.8629,  0.0495])
    """
    return 2 / beta * F.softplus(beta * (forget_gain - alternate_gain))


def wga_weight(logp: Tensor, beta: float) -> Tensor:
    """Compute the token weight of weighted gradient ascent: tokens that are forgotten already weigh little.

    Args:
        logp: Log-probability of each token, shape ``(N,)``, nats.
        beta: Exponent ≥ 0; 0 gives gradient ascent.

    Returns:
        p^β without gradient, shape ``(N,)``.

    Reference:
        Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025, arXiv
        2502.19301.

    Example:
        >>> import torch
        >>> wga_weight(torch.tensor([1.0, 0.25]).log(), beta=0.5)
        tensor([1.0000, 0.5000])
    """
    return (beta * logp.detach()).exp()


def satimp_weight(logp: Tensor, beta1: float, beta2: float) -> Tensor:
    """Compute the token weight by saturation and importance: forgotten and certain tokens both weigh little.

    Args:
        logp: Log-probability of each token, shape ``(N,)``, nats.
        beta1: Exponent ≥ 0 of the saturation p.
        beta2: Exponent ≥ 0 of the importance 1 − p.

    Returns:
        p^β₁ (1 − p)^β₂ without gradient, shape ``(N,)``.

    Reference:
        Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025, arXiv 2505.11953.

    Example:
        >>> import torch
        >>> satimp_weight(torch.tensor([1.0, 0.5]).log(), beta1=1.0, beta2=1.0)
        tensor([0.0000, 0.2500])
    """
    logp = logp.detach()
    # Not 1 − p, which has no digits left for a confident token.
    return (beta1 * logp).exp() * logp.expm1().abs().pow(beta2)
