"""Facts about a running fit that several callbacks ask for; a module that is no `LitLanguageModel` has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import lightning as L

from lit_unlearn.dual import Constraint
from lit_unlearn.errors import LitUnlearnError
from lit_unlearn.evaluation.verdict import MAX_FORGET_PROBABILITY
from lit_unlearn.training import LitUnlearn, Measurement
from lit_unlearn.training.module import LitLanguageModel


def get_constraints(module: L.LightningModule) -> dict[str, Constraint]:
    """Return the constraints by name; none while fine-tuning."""
    return module.constraints if isinstance(module, LitUnlearn) else {}


def get_multipliers(module: L.LightningModule) -> dict[str, float]:
    """Return every constraint's λ by name."""
    return {name: constraint.multiplier.value for name, constraint in get_constraints(module).items()}


def measure_kept_model(module: LitLanguageModel) -> Measurement:
    """Return the values of the model that the run would keep now, and its step; every process must call this."""
    module.measure()
    last = module.evaluator.last
    # `measure` comes first: the last model may turn out to be the best.
    best = module.best if isinstance(module, LitUnlearn) else None
    return best or last or Measurement(module.global_step, {})


def may_have_new_best(module: L.LightningModule, trainer: L.Trainer) -> TypeGuard[LitUnlearn]:
    """Return whether the validation whose last batch this is, or that has just ended, may have found the best model so far."""
    is_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
    return is_fit and isinstance(module, LitUnlearn) and module.keep == "best" and module.evaluator.has_finished


def check_on_first_process(trainer: L.Trainer, check: Callable[[], None]) -> None:
    """Call a function on the first process, and raise its error on every process; a collective call.

    Raises:
        LitUnlearnError: The one that the function has raised.
    """
    error: LitUnlearnError | None = None
    if trainer.is_global_zero:
        try:
            check()
        except LitUnlearnError as raised:
            error = raised
    # Not the error itself: its owner may be as large as the model.
    failure: Any = trainer.strategy.broadcast(error and (type(error), str(error), error.argument))
    if error is not None:
        raise error
    if failure is not None:
        kind, message, argument = failure
        raise kind(message, argument=argument)


def find_threshold(trainer: L.Trainer) -> float:
    """Return the answer probability up to which the run calls its forget set forgotten."""
    # Of any callback that has one: `RunReport` comes above this module.
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        threshold = getattr(callback, "max_forget_probability", None)
        if threshold is not None:
            return float(threshold)
    return MAX_FORGET_PROBABILITY
