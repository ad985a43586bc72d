"""Checks of numbers that the user sets."""

from __future__ import annotations

import math

from lit_unlearn.errors import ConfigError


def check_number(
    owner: object,
    argument: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value`` if it is finite and within its bounds.

    Args:
        owner: Object whose argument it is.
        argument: Name of the argument.
        value: The number to check.
        at_least: Smallest number allowed.
        above: Largest number not allowed.
        below: Smallest number not allowed above the range.

    Raises:
        ConfigError: If it is not finite or out of bounds.
    """
    if math.isfinite(value) and value >= at_least and above < value < below:
        return value

    bounds = {"above": above, "at least": at_least, "below": below}
    ranges = [f"{relation} {bound:g}" for relation, bound in bounds.items() if math.isfinite(bound)]
    expected = " and ".join(["finite", *ranges])
    raise ConfigError(
        f"{type(owner).__name__}: `{argument}` must be {expected}, not {value!r}.", owner=owner, argument=argument
    )


def check_integer(owner: object, argument: str, value: float, *, at_least: int = 0) -> int:
    """Return ``value`` as an int if it is a whole number that is large enough.

    Args:
        owner: Object whose argument it is.
        argument: Name of the argument.
        value: The number to check; 2.0 passes as 2, and 2.5 is refused instead of being cut.
        at_least: Smallest number allowed.

    Raises:
        ConfigError: If it has a fraction, is not finite or is too small.
    """
    check_number(owner, argument, value, at_least=at_least)
    if value != int(value):
        raise ConfigError(
            f"{type(owner).__name__}: `{argument}` must be a whole number, not {value!r}.",
            owner=owner,
            argument=argument,
        )
    return int(value)
