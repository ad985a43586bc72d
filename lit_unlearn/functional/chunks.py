"""Run a token-wise function of the logits through the head in chunks, so that ``(N, V)`` logits never exist.

With 100k vocabulary entries the logits of a batch, their float32 copy and their gradient outweigh everything else
in a step. They are cheap to recompute, one matrix product per chunk, so nothing here keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOGIT_BUDGET = 2**23
"""Elements of a chunk of tokens, 32 MiB in float32. Each chunk reads the whole head: on CPU smaller ones are slower."""

ENTRY_BUDGET = 2**22
"""Elements of a chunk of vocabulary entries, 16 MiB in float32. Each is in one chunk: on CPU 2**24 is up to 40 % slower."""


def upcast(x: Tensor) -> Tensor:
    """Cast half precision to float32, because sums over a vocabulary overflow or stall in 8 or 11 bits.

    Args:
        x: Any shape and dtype.

    Returns:
        ``x`` as float32 if it was float16 or bfloat16, else ``x`` itself (float64 stays, so that gradcheck works).

    Example:
        >>> upcast(torch.zeros(2, dtype=torch.bfloat16)).dtype, upcast(torch.zeros(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def chunk_length(total: int, width: int, chunk_size: int | None = None, budget: int | None = None) -> int:
    """Return the rows per chunk such that a chunk stays within a budget and no chunk is a small remainder.

    Args:
        total: Rows to divide.
        width: Elements that one row costs.
        chunk_size: Rows per chunk if the caller has decided; ``None`` chooses.
        budget: Elements per chunk; ``None`` for ``LOGIT_BUDGET``.

    Returns:
        At least 1, also for ``total == 0``.

    Raises:
        ValueError: If ``chunk_size`` is below 1.

    Example:
        >>> chunk_length(total=300, width=128_256), chunk_length(total=300, width=128_256, chunk_size=7)
        (60, 7)
    """
    if chunk_size is not None:
        if chunk_size < 1:
            raise ValueError(
                f"chunk_size must be at least 1, got {chunk_size}; use None to choose it from the memory budget."
            )
        return chunk_size
    limit = max(1, (LOGIT_BUDGET if budget is None else budget) // max(1, width))
    # Divided evenly: a small remainder would read the whole head again for a few rows.
    chunks = max(1, -(-total // limit))
    return max(1, -(-total // chunks))


def entries_per_chunk(hidden: Tensor, weight: Tensor, chunk_size: int | None = None) -> int:
    """Return the vocabulary entries per chunk of a head that is cut along the vocabulary: each is read once a pass.

    A chunk is never made smaller than ``hidden``, which is there anyway: narrow matrix products are slow.
    ``chunk_size`` is the result if the caller has decided; ``None`` chooses from ``ENTRY_BUDGET``.

    Example:
        >>> entries_per_chunk(torch.zeros(300, 512), torch.zeros(1, 512).expand(128_256, 512))
        8016
    """
    # An entry costs N logits, and D elements where its row of the weight is cast.
    width = max(hidden.shape)
    return chunk_length(weight.shape[0], width, chunk_size, max(ENTRY_BUDGET, hidden.numel()))


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless hidden ``(N, D)``, weight ``(V, D)`` and bias ``(V,)`` or None form a head."""
    fits = hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            "expected hidden (N, D), weight (V, D) and bias (V,) or None; got "
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"bias {None if bias is None else tuple(bias.shape)}. "
            "Select the supervised tokens first, hidden[mask], and pass the head's weight untransposed."
        )


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which the head multiplies: autocast's if it is on, else the wider of the two operands.

    Casting explicitly, instead of leaving it to autocast, keeps autocast's weight cache out of it: a cast made inside
    an autograd function carries no gradient, and would be reused by the next dense layer that shares the weight.

    Example:
        >>> matmul_dtype(torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(3, 2))
        torch.float32
    """
    widest = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    # Autocast itself leaves float64 alone.
    if widest != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return widest


def get_gradient_buffer(parameter: Tensor, accumulate: bool) -> tuple[Tensor, bool]:
    """Return the memory for the gradient of a parameter: new memory, or ``parameter.grad`` to add to.

    Returns:
        The buffer, shaped like ``parameter``, and whether it holds a gradient already; if not, it is uninitialised.
    """
    if accumulate and parameter.grad is not None:
        return parameter.grad, True
    return torch.empty_like(parameter), False


def can_accumulate(weight: Tensor, accumulate: bool) -> bool:
    """Return whether the gradient can bypass autograd."""
    # A weight that was computed is no leaf: what it was computed from still needs the gradient.
    return accumulate and weight.is_leaf and weight.requires_grad


def add_product(total: Tensor, left: Tensor, right: Tensor, started: bool) -> None:
    """Add ``left @ right`` to ``total``, which may be wider than they are; replace it unless it is ``started``."""
    # Fused where the dtypes allow it, which saves the memory of the product.
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=int(started))
    elif started:
        total += left @ right
    else:
        total.copy_(left @ right)


def map_logits(
    function: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *token_args: Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """Apply a token-wise function to ``hidden @ weight.T + bias`` without ever holding the ``(N, V)`` logits.

    Four head matrix products instead of three (backward recomputes the logits), for a peak of a few chunks instead of
    several times the logits. Only the gradients that are asked for are computed; a frozen head costs no buffer (but a
    head of another dtype than the product's, as under autocast, is cast once per pass).

    Args:
        function: Called as ``function(logits, *args)`` with logits ``(n, V)``, float32 or wider, and the rows of
            ``token_args`` that belong to them; returns ``(n,)`` or ``(n, k)``. Must treat every token on its own, give
            the same result when called again, and leave the logits unchanged. It is called with ``n = 0`` if ``N = 0``.
        hidden: Final hidden states, shape ``(N, D)``.
        weight: Head weight, shape ``(V, D)``; may differ from ``hidden`` in dtype, as under autocast.
        bias: Head bias, shape ``(V,)``, or ``None``.
        *token_args: Constants per token, shape ``(N, ...)``; they get no gradient, nor does what ``function`` closes
            over.
        chunk_size: Tokens per chunk; ``None`` chooses from ``LOGIT_BUDGET``. Does not change the values.

    Returns:
        Shape ``(N,)`` or ``(N, k)``, differentiable once with respect to ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: If ``chunk_size`` is below 1, shapes do not match, or a token argument has not ``N`` rows.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 4.0]])
        >>> map_logits(lambda logits: logits.amax(dim=-1), hidden, weight, chunk_size=1)
        tensor([3., 5.])
    """
    check_head(hidden, weight, bias)
    for i, arg in enumerate(token_args):
        if arg.ndim == 0 or arg.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"expected every token argument to have {hidden.shape[0]} rows, one per row of hidden; argument {i} "
                f"has shape {tuple(arg.shape)}. Select the same tokens from it, or let the function close over it."
            )
    size = chunk_length(hidden.shape[0], weight.shape[0], chunk_size)
    constants = [arg.detach() for arg in token_args]
    output = _MapLogits.apply(function, size, hidden, weight, bias, *constants)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class _MapLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        size: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *token_args: Tensor,
    ) -> Tensor:
        device = hidden.device.type
        ctx.function, ctx.size, ctx.dtype = function, size, matmul_dtype(hidden, weight)
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(hidden, weight, bias, *token_args)
        head = _cast_head(ctx.dtype, weight, bias)
        outputs = []
        for rows in _iterate_slices(hidden.shape[0], size):
            logits = upcast(F.linear(hidden[rows].to(ctx.dtype), *head))
            outputs.append(function(logits, *(arg[rows] for arg in token_args)))
            # Otherwise it would live on while the next chunk is made.
            del logits
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *token_args = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[2:5]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _zeros_upcast(weight) if needs_weight else None
        grad_bias = _zeros_upcast(bias) if needs_bias else None
        # The caller's autocast may differ from the one in forward: only the function sees the latter, the rest none.
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast_head(ctx.dtype, weight, bias)
            for rows in _iterate_slices(hidden.shape[0], ctx.size):
                inputs = hidden[rows].to(ctx.dtype)
                logits = F.linear(inputs, *head).requires_grad_()
                with torch.enable_grad(), torch.autocast(**ctx.autocast):
                    output = ctx.function(upcast(logits), *(arg[rows] for arg in token_args))
                (grad,) = torch.autograd.grad(output, logits, grad_output[rows])
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head[0]
                if grad_weight is not None:
                    # Where the product is narrower than the sum it needs memory: in slabs, no second (V, D) tensor.
                    slab = chunk_length(*weight.shape) if grad_weight.dtype != grad.dtype else max(1, len(weight))
                    for entries in _iterate_slices(len(weight), slab):
                        add_product(grad_weight[entries], grad[:, entries].T, inputs, started=True)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0, dtype=grad_bias.dtype)
        return (
            None,
            None,
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None for _ in token_args),
        )


def _iterate_slices(total: int, size: int) -> Iterator[slice]:
    # One empty slice for total = 0: the output still needs its shape.
    for start in range(0, max(total, 1), size):
        yield slice(start, start + size)


def _cast_head(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _zeros_upcast(parameter: Tensor) -> Tensor:
    # Half precision would lose what is below the last bit of the running sum, chunk after chunk.
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
