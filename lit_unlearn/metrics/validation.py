"""Checks of the arrays that scores are computed from."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]


def numbers(name: str, values: ArrayLike, ndim: Literal[1, 2] = 1) -> Array:
    """Numbers as a float64 array, of a shape that is checked.

    Args:
        name: Of the argument, for the error.
        values: An array, nested lists, or a tensor of any dtype on any device.
        ndim: 1 for shape ``(n,)``, 2 for ``(n, k)``.

    Raises:
        ValueError: If they are no numbers, have another shape, or there is none.
    """
    shape = {1: "(n,)", 2: "(n, k)"}[ndim]
    values = values.detach().cpu().double() if isinstance(values, Tensor) else values  # numpy knows no bfloat16
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be numbers of shape {shape}: {error} Give an array, and fill up rows of unequal length."
        ) from error
    if array.ndim != ndim or not array.size:
        raise ValueError(
            f"`{name}` must have shape {shape} and hold at least one number, but its shape is {array.shape}: reshape "
            "it, or look for what left it empty."
        )
    return array


def finite(name: str, values: ArrayLike) -> Array:
    """Numbers of shape ``(n,)``, none of them NaN or infinite."""
    array = numbers(name, values)
    refuse(name, array, ~np.isfinite(array), "finite", "look for rows without tokens, or a model that diverged")
    return array


def checked_ratios(name: str, values: ArrayLike) -> Array:
    """Truth ratios of shape ``(n,)``: not negative, not NaN; infinity stands for a right answer that is ruled out."""
    array = numbers(name, values)
    refuse(name, array, ~(array >= 0), "at or above 0", "give the ratios, not their logarithms")
    return array


def refuse(name: str, array: Array, bad: NDArray[np.bool_], wanted: str, remedy: str) -> None:
    """Raises an error that shows the first bad number, if there is one.

    Args:
        name: Of the argument.
        array: Its numbers.
        bad: Which of them are bad, of the same shape.
        wanted: What they must be.
        remedy: What to do.
    """
    if bad.any():
        first = tuple(np.argwhere(bad)[0].tolist())
        raise ValueError(
            f"`{name}` must be {wanted}, but number {', '.join(map(str, first))} is {array[first]} ({bad.sum()} of "
            f"{bad.size} are bad): {remedy}."
        )
