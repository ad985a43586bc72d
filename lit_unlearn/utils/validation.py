"""Checks of arguments that the user sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_unlearn.errors import ConfigError


def check_at_least(minimum: int, owner: object, **arguments: int) -> None:
    """Raise ConfigError unless every argument is ``minimum`` or more."""
    for name, value in arguments.items():
        if value < minimum:
            raise ConfigError(f"`{name}` must be at least {minimum}, not {value}.", owner=owner, argument=name)


def check_choice(choices: Sequence[str], owner: object, **arguments: str) -> None:
    """Raise ConfigError unless every argument is one of the choices."""
    for name, value in arguments.items():
        if value not in choices:
            expected = ", ".join(map(repr, choices))
            raise ConfigError(f"`{name}` must be one of {expected}, not {value!r}.", owner=owner, argument=name)


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
