"""Checks of the arrays that scores are computed from."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lit_unlearn.errors import DataError

Array = NDArray[np.float64]


def read_numbers(name: str, values: ArrayLike, ndim: Literal[1, 2] = 1) -> Array:
    """Return an argument as a float64 array of shape ``(n,)``, or ``(n, k)`` if ``ndim`` is 2.

    Raises:
        DataError: If the values are not numbers, have another shape, or there is none.
    """
    shape = {1: "(n,)", 2: "(n, k)"}[ndim]
    # numpy has no bfloat16 and cannot read an accelerator's memory.
    values = values.detach().cpu().double() if isinstance(values, Tensor) else values
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"`{name}` must be numbers of shape {shape}: {error} Give an array, and fill up rows of unequal length."
        ) from error
    # The mean of no numbers would be NaN with a warning, and end up in a results file.
    if array.ndim != ndim or not array.size:
        raise DataError(
            f"`{name}` must have shape {shape} and hold at least one number, but its shape is {array.shape}: reshape "
            "it, or look for what left it empty."
        )
    return array


def read_finite(name: str, values: ArrayLike) -> Array:
    """Return an argument as numbers of shape ``(n,)``, none of them NaN or infinite."""
    array = read_numbers(name, values)
    refuse_bad(name, array, ~np.isfinite(array), "finite", "look for rows without tokens, or a model that diverged")
    return array


def read_ratios(name: str, values: ArrayLike) -> Array:
    """Return an argument as truth ratios of shape ``(n,)``, none of them negative or NaN."""
    array = read_numbers(name, values)
    # Infinity passes: it stands for a right answer that the model rules out. Negated, because NaN >= 0 is false.
    refuse_bad(name, array, ~(array >= 0), "at or above 0", "give the ratios, not their logarithms")
    return array


def refuse_bad(name: str, array: Array, bad: NDArray[np.bool_], expected: str, remedy: str) -> None:
    """Raise DataError with the first bad number of an argument, if there is one."""
    if bad.any():
        first = tuple(np.argwhere(bad)[0].tolist())
        raise DataError(
            f"`{name}` must be {expected}, but number {', '.join(map(str, first))} is {array[first]} ({bad.sum()} of "
            f"{bad.size} are bad): {remedy}."
        )


def read_shares(name: str, values: ArrayLike, ndim: Literal[1, 2] = 1) -> Array:
    """Return an argument as numbers from 0 to 1, of shape ``(n,)``, or ``(n, k)`` if ``ndim`` is 2."""
    array = read_numbers(name, values, ndim)
    # Negated, because comparisons with NaN are false.
    refuse_bad(name, array, ~((array >= 0) & (array <= 1)), "from 0 to 1", "give shares, not percentages")
    return array


def check_share(name: str, value: float) -> float:
    """Return an argument as a float if it is from 0 to 1.

    Raises:
        DataError: If it is not.
    """
    if not 0 <= value <= 1:
        message = f"`{name}` must be from 0 to 1, but is {value}: give a share, not a percentage."
        raise DataError(message, argument=name)
    return float(value)
