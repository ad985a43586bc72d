"""Optimizer and schedule as they are configured: how they are built for each fit, and what of them a resumed run changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L

from lit_unlearn.errors import ConfigError


class SharedFactory:
    """A function that deep copies of the module share, such as the copy that ``WeightAveraging`` makes.

    The command line's would drag the Trainer, its processes and their locks along.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, argument: Any) -> Any:
        """Build the optimizer from its parameters, or the schedule from its optimizer."""
        return self._make(argument)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFactory:
        return self


def count_steps(schedule: str, warmup_epochs: float, trainer: L.Trainer) -> tuple[int, int]:
    """Return the steps of the run, and those of a schedule's warm-up.

    Args:
        schedule: Its name, for errors.
        warmup_epochs: Passes over the forget set.
        trainer: With its loaders.

    Raises:
        ConfigError: If the run has no end.
    """
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ConfigError(
            f"the schedule '{schedule}' needs to know where the run ends: set `max_epochs` or `max_steps` as well "
            "(a run ends with what comes first), or leave out the module's `scheduler`.",
            owner=L.Trainer,
            argument="max_epochs",
        )
    return int(total), round(warmup_epochs * trainer.num_training_batches)


def apply_settings(trainer: L.Trainer, number: int, new: dict[str, Any], old: dict[str, Any]) -> None:
    """Apply what changed in one group of parameters since the checkpoint; the schedule's present factor stays.

    Args:
        trainer: Of the resumed run.
        number: Of the group.
        new: The settings of the optimizer as configured.
        old: The same in the checkpoint.
    """
    group = trainer.optimizers[0].param_groups[number]
    changed = {key: value for key, value in new.items() if value != old.get(key)}
    if "lr" in changed and old["lr"] > 0:
        changed |= {"lr": group["lr"] * new["lr"] / old["lr"], "initial_lr": new["lr"]}
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs[number] = new["lr"]
    group.update(changed)
