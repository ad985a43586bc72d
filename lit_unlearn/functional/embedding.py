"""Looking up embeddings with a gradient that goes directly where it belongs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def lookup(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Compute ``F.embedding(ids, weight, padding_idx)``, whose backward pass adds to ``weight.grad`` itself.

    Autograd would make a buffer for the whole ``(V, D)`` gradient and add it to the one that is there, for a few rows of it.
    With a head that is the embedding, that is the largest buffer of a step. As with ``accumulate`` of `linear_token_logp`,
    hooks of ``weight`` do not run: not for DDP or FSDP.

    Args:
        ids: Token ids in ``[0, V)``, any shape.
        weight: Embeddings, shape ``(V, D)``, a leaf that requires a gradient, float32 or wider: half precision would lose
            most of what is added row by row.
        padding_idx: Id whose embedding gets no gradient.

    Returns:
        Shape ``(*ids.shape, D)``.

    Raises:
        ValueError: If ``weight`` is no such leaf.

    Example:
        >>> weight = torch.eye(2).requires_grad_()
        >>> lookup(torch.tensor([1, 1]), weight).sum().backward()
        >>> weight.grad
        tensor([[0., 0.],
                [2., 2.]])
    """
    if not can_add_rows(weight):
        raise ValueError(
            "expected a leaf that requires a gradient, in float32 or float64; got "
            f"{weight.dtype}, is_leaf={weight.is_leaf}, requires_grad={weight.requires_grad}. Use F.embedding."
        )
    return cast(Tensor, _Lookup.apply(ids, weight, padding_idx))  # type: ignore[no-untyped-call]


def can_add_rows(weight: Tensor) -> bool:
    """Return whether `lookup` takes a weight."""
    return weight.is_leaf and weight.requires_grad and weight.dtype in (torch.float32, torch.float64)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        # Not a saved tensor, of which a hook may make a copy.
        ctx.leaf, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
        if ctx.leaf.grad is None:
            ctx.leaf.grad = torch.zeros_like(ctx.leaf)
        # Unlike `index_add_`, deterministic on a GPU as well.
        ctx.leaf.grad.index_put_((ids,), grad.to(ctx.leaf.dtype), accumulate=True)
        return None, None, None
