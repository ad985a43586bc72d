"""The meaning of a run's values, derived where it is shown: a value and the present threshold are all that is stored.

A slack or a verdict that was stored would be wrong as soon as a resumed run has another epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Verdict = Literal["forgotten", "not forgotten", "not decidable"]
FORGOTTEN: Verdict = "forgotten"
NOT_FORGOTTEN: Verdict = "not forgotten"
NOT_DECIDABLE: Verdict = "not decidable"

MAX_FORGET_PROBABILITY = 0.2
"""Mean answer probability of the forget set up to which it counts as forgotten, unless a run says otherwise."""

_PROBABILITY = "forget/probability"


def get_slack(value: float | None, epsilon: float | None) -> float | None:
    """Return epsilon − value; ``None`` if one of them is not known."""
    return None if value is None or epsilon is None else epsilon - value


def is_feasible(value: float | None, epsilon: float | None) -> bool:
    """Return whether a value was measured and is at most epsilon; one that is not a number is not."""
    # NaN compares false with everything.
    slack = get_slack(value, epsilon)
    return slack is not None and slack >= 0


def decide(before: Mapping[str, float], after: Mapping[str, float], threshold: float) -> Verdict:
    """Decide whether the forget set was forgotten.

    This says nothing of the constraints: a model may have forgotten everything, or nothing within its bounds.

    Args:
        before: Values before unlearning, with ``forget/probability``: the mean answer probability of the forget set.
        after: The same of the kept model.
        threshold: Largest probability of what counts as forgotten.

    Returns:
        ``"not decidable"`` if the probability was not measured or is not a number, or was not above the threshold before
        unlearning: the model does not know the rows in this prompt, so that nothing can be shown.
    """
    start, end = before.get(_PROBABILITY), after.get(_PROBABILITY)
    if start is None or end is None or not (math.isfinite(start) and math.isfinite(end)):
        return NOT_DECIDABLE
    if start <= threshold:
        return NOT_DECIDABLE
    return FORGOTTEN if end <= threshold else NOT_FORGOTTEN


def explain_verdict(before: Mapping[str, float], after: Mapping[str, float], threshold: float) -> str:
    """Return the verdict with the numbers and the threshold that it was decided by, as one clause.

    Example:
        >>> explain_verdict({"forget/probability": 0.9}, {"forget/probability": 0.01}, 0.2)
        'forgotten: the mean answer probability of the forget set went from 0.9 to 0.01 (at most 0.2 counts as forgotten)'
    """
    verdict = decide(before, after, threshold)
    start, end = before.get(_PROBABILITY), after.get(_PROBABILITY)
    if start is None or end is None:
        return f"{verdict}: the answer probability of the forget set was not measured (at most {threshold:g} counts as forgotten)"
    numbers = f"the mean answer probability of the forget set went from {start:.4g} to {end:.4g}"
    if verdict == NOT_DECIDABLE and start <= threshold:
        return (
            f"{verdict}: {numbers}, and was not above {threshold:g} before unlearning: in this prompt the model does not know the "
            "rows"
        )
    return f"{verdict}: {numbers} (at most {threshold:g} counts as forgotten)"


def explain_kept(kept_step: int, steps: int, keep: str, feasible: bool) -> str:
    """Return which model a run keeps, and why this one.

    Args:
        kept_step: Optimizer steps that it had taken.
        steps: Optimizer steps of the run.
        keep: As for `LitUnlearn`; ``"last"`` while fine-tuning.
        feasible: Whether it satisfies every constraint.
    """
    if keep == "last":
        reason = "the last model"
    elif feasible:
        reason = "of the feasible models, the one with the lowest forget objective"
    else:
        reason = "no measured model satisfies every constraint; this one violates them least"
    return f"kept: step {kept_step} of {steps} ({reason})"


def describe_damage(damage: Mapping[str, Any]) -> str:
    """Return the damage that a run ended at and its limit, as one clause.

    Args:
        damage: As a report or a record has it.

    Example:
        >>> damage = {"measure": "kl", "stream": "retain", "rows": 64, "limit": 0.01, "value": 0.0097}
        >>> describe_damage(damage)
        "KL to the reference model 0.0097 (limit 0.01 nats per token, on 64 rows of 'retain')"
    """
    measure = "KL to the reference model" if damage["measure"] == "kl" else "NLL"
    place = f"{damage['rows']} rows of '{damage['stream']}'"
    return f"{measure} {damage['value']:.4g} (limit {damage['limit']:.4g} nats per token, on {place})"
