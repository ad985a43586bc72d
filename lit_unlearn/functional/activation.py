"""Distances between activations, for methods that misdirect or preserve what a layer computes."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional.chunks import upcast


def activation_distance(states: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared difference of a layer's output from a target, token by token.

    Args:
        states: Output of the layer, shape ``(N, D)``, any float dtype.
        target: Activation it is compared with, shape ``(N, D)`` or ``(D,)``.

    Returns:
        Shape ``(N,)``, float32 or wider: the mean over the ``D`` components, as published code has it, so that widths
        compare.

    Reference:
        Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024, arXiv
        2403.03218.

    Example:
        >>> import torch
        >>> activation_distance(torch.tensor([[1.0, 1.0], [3.0, 0.0]]), torch.tensor([1.0, 0.0]))
        tensor([0.5000, 2.0000])
    """
    return (upcast(states) - upcast(target)).square().mean(dim=-1)
