"""Slow, obvious float64 forms of the published formulas: what the package is compared with, in value and gradient.

Nothing here is imported from the package. ``z`` are dense logits of shape (N, V). The inputs and the tools that the
comparisons share are below the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

N, D, V = 7, 5, 11
HALF = [torch.float16, torch.bfloat16]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = hidden.double() @ weight.double().T
    return z if bias is None else z + bias.double()


def log_softmax(z: Tensor) -> Tensor:
    z = z.double()
    top = z.detach().amax(dim=1, keepdim=True)
    return z - top - (z - top).exp().sum(dim=1, keepdim=True).log()


def logit_margin(z: Tensor) -> Tensor:
    rows = []
    for row in z.double():
        rows.append(row[int(row.argmax())] - row.sum() / len(row))
    return torch.stack(rows)


def token_logp(z: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([row[int(label)] for row, label in zip(log_softmax(z), labels, strict=True)])


def entropy(z: Tensor) -> Tensor:
    logp = log_softmax(z)
    return -(logp.exp() * logp).sum(dim=1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p, q) of two tensors of log-probabilities."""
    return (logp.exp() * (logp - logq)).sum(dim=1)


def log_uniform(z: Tensor) -> Tensor:
    return torch.full_like(z, 1 / z.shape[1], dtype=torch.float64).log()


def kl_uniform_to_model(z: Tensor) -> Tensor:
    return kl(log_uniform(z), log_softmax(z))


def kl_model_to_uniform(z: Tensor) -> Tensor:
    return kl(log_softmax(z), log_uniform(z))


def kl_of_probabilities(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of one token, shape (V,), where words that p rules out add nothing."""
    seen = p > 0
    return (p[seen] * (p[seen] / q[seen]).log()).sum()


def jensen_shannon(z: Tensor, w: Tensor) -> Tensor:
    rows = []
    for p, q in zip(log_softmax(z).exp(), log_softmax(w).exp(), strict=True):
        mixture = (p + q) / 2
        rows.append((kl_of_probabilities(p, mixture) + kl_of_probabilities(q, mixture)) / 2)
    return torch.stack(rows)


def jensen_shannon_to_label(z: Tensor, labels: Tensor) -> Tensor:
    one_hot = torch.full_like(z, -torch.inf, dtype=torch.float64)
    for row, label in enumerate(labels):
        one_hot[row, int(label)] = 0.0
    return jensen_shannon(z, one_hot)


def cross_entropy(target: Tensor, z: Tensor) -> Tensor:
    """Of p under a distribution that is not differentiated."""
    return -(target.detach() * log_softmax(z)).sum(dim=1)


def undial(z: Tensor, z_ref: Tensor, labels: Tensor, beta: float) -> Tensor:
    """The teacher is the reference model with the label's logit lowered by beta."""
    lowered = z_ref.double().clone()
    for row, label in enumerate(labels):
        lowered[row, int(label)] -= beta
    return cross_entropy(log_softmax(lowered).exp(), z)


def ceu(z: Tensor, labels: Tensor) -> Tensor:
    """The teacher is the model itself, with the label's probability shared out to the other words in proportion."""
    rows = []
    for row, label in zip(z, labels, strict=True):
        others = [word for word in range(len(row)) if word != int(label)]
        target = torch.zeros(len(row), dtype=torch.float64)
        target[others] = log_softmax(row[others][None].detach())[0].exp()
        rows.append(cross_entropy(target[None], row[None])[0])
    return torch.stack(rows)


def log_sigmoid(x: Tensor) -> Tensor:
    return -(-x.double()).exp().log1p()  # of 1 / (1 + exp(-x))


def npo(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """Of whole answers: log-probabilities are summed over their tokens."""
    pairs = zip(logp, reference_logp, strict=True)
    return torch.stack([-2 / beta * log_sigmoid(-beta * (s - s_ref)) for s, s_ref in pairs])


def simnpo(logp: Tensor, lengths: Tensor, beta: float, delta: float) -> Tensor:
    pairs = zip(logp, lengths, strict=True)
    return torch.stack([-2 / beta * log_sigmoid(-beta * s / int(length) - beta * delta) for s, length in pairs])


def dpo(alternate_gain: Tensor, forget_gain: Tensor, beta: float) -> Tensor:
    """Gain: how far an answer's log-probability is above that under the reference model."""
    pairs = zip(alternate_gain, forget_gain, strict=True)
    return torch.stack([-2 / beta * log_sigmoid(beta * (gain - loss)) for gain, loss in pairs])


def wga_weight(logp: Tensor, beta: float) -> Tensor:
    """Numbers, through which nothing is differentiated."""
    return torch.tensor([math.exp(x) ** beta for x in logp.tolist()], dtype=torch.float64)


def satimp_weight(logp: Tensor, beta1: float, beta2: float) -> Tensor:
    p = [math.exp(x) for x in logp.tolist()]
    return torch.tensor([x**beta1 * (1 - x) ** beta2 for x in p], dtype=torch.float64)


def activation_distance(states: Tensor, target: Tensor) -> Tensor:
    """Mean over the components of the squared difference from a row of ``target``, or from the one row that it is."""
    targets = target.double().expand_as(states)
    pairs = zip(states.double(), targets, strict=True)
    return torch.stack([sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs])


def rmu_direction(width: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), scaled to length 1, in float32 as published code has them."""
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return u / u.square().sum().sqrt()


def make_head(
    dtype: torch.dtype = torch.float64, bias: bool = True, n: int = N, d: int = D, v: int = V
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (n, d), weight (v, d) and bias (v,) or None, always the same numbers."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(n, d), (v, d), (v,)]
    hidden, weight, offsets = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return hidden, weight, offsets if bias else None


def cotangent(n: int = N) -> Tensor:
    return torch.linspace(-1.0, 2.0, n, dtype=torch.float64)


class LargestOutput(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def value_and_grads(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    cotangent: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The value of ``function(*inputs)`` and the gradient of ``sum(cotangent * value)`` for every input.

    Inputs are copied, as ``dtype`` or as they are, so that the same tensors serve the reference and the tested form.
    """
    leaves: list[Any] = [None if x is None else x.detach().to(dtype or x.dtype, copy=True) for x in inputs]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    value = function(*leaves)
    value.backward(cotangent.to(value.dtype))
    return value.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))
