"""Slow, obvious float64 forms of the published formulas: what the package is compared with, in value and gradient.

Nothing here is imported from the package. ``z`` are dense logits of shape (N, V). The inputs and the tools that the
comparisons share are below the formulas.
"""

from __future__ import annotations

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
