"""Checks of arguments that the user sets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

from lit_unlearn.errors import ConfigError


def list_names(name: str, names: Iterable[str]) -> str:
    """Return, for a message about a name that is unknown, those that are known, the nearest one first."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(map(repr, known)) or "none"
    return f"did you mean '{near[0]}'? There are {listed}" if near else f"there are {listed}"


def check_at_least(minimum: int, owner: object, **arguments: float) -> None:
    """Raise ConfigError unless every argument is a whole number of ``minimum`` or more."""
    for name, value in arguments.items():
        check_integer(owner, name, value, at_least=minimum)


def check_choice(choices: Sequence[str], owner: object, **arguments: str) -> None:
    """Raise ConfigError unless every argument is one of the choices."""
    for name, value in arguments.items():
        if value not in choices:
            expected = ", ".join(map(repr, choices))
            raise _refusal(owner, name, f"one of {expected}", value)


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
    raise _refusal(owner, argument, " and ".join(["finite", *ranges]), value)


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
    if not math.isfinite(value) or value != int(value) or value < at_least:
        raise _refusal(owner, argument, f"a whole number of at least {at_least}", value)
    return int(value)


def _refusal(owner: object, argument: str, expected: str, value: object) -> ConfigError:
    # The argument of a function has no owner.
    prefix = "" if owner is None else f"{type(owner).__name__}: "
    message = f"{prefix}`{argument}` must be {expected}, not {value!r}."
    return ConfigError(message, owner=owner, argument=argument)
