"""Advice about a run: settings that are known to hurt, named before they cost hours."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.callbacks.movement import WeightMovement
from lit_unlearn.callbacks.run_state import get_constraints, get_multipliers
from lit_unlearn.dual import Constraint, FixedMultiplier
from lit_unlearn.training import LitUnlearn
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run

_MIN_DUAL_STEPS = 10
_MIN_USED_SLACK = 0.25  # as a fraction of what epsilon allows beyond the value before unlearning


class RunAdvice(Callback):
    """Log what a run will do, and warn once of each setting that hurts, with what to change.

    Before the first step: an epsilon below the value before unlearning; a λ with fewer than ten dual steps. After an
    epoch: a λ at its cap while its constraint is violated; slack that λ falls too slowly to use. After the first step at the
    full learning rate: how many 16-bit weights it moved.
    """

    def __init__(self) -> None:
        self._is_opened = False
        self._warned: set[tuple[str, str]] = set()
        self._references: dict[str, float] = {}
        self._epoch_values: dict[str, list[float]] = {}
        self._epoch_multipliers: dict[str, float] = {}
        self.movement = WeightMovement()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the warnings of an earlier fit."""
        self.movement = WeightMovement()
        self._is_opened = False
        self._warned = set()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Describe the run before its first epoch, and start an empty record of this one."""
        # Not in `on_train_start`: relative epsilons are measured by the module's own, which comes after the callbacks'.
        if not self._is_opened and isinstance(pl_module, LitLanguageModel):
            self._is_opened = True
            rank_zero_info(f"run: {_describe_plan(trainer)}")
            self._check_settings(trainer, pl_module)
        self._epoch_values = {name: [] for name in get_constraints(pl_module)}
        self._epoch_multipliers = get_multipliers(pl_module)

    def _check_settings(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        # The value before unlearning; rewinding, which comes before the first step, has raised it on purpose.
        if trainer.global_step == 0 and not getattr(module, "rewind", 0):
            measured = module.measure()
            for name in get_constraints(module):
                if f"constraint/{name}/value" in measured:
                    self._references[name] = measured[f"constraint/{name}/value"]

        for name, constraint in _adaptive_constraints(module).items():
            epsilon, reference = constraint.epsilon, self._references.get(name)
            is_retention = constraint.stream != "forget"
            if is_retention and epsilon is not None and reference is not None and epsilon < reference:
                self._warn_once(
                    name,
                    "epsilon",
                    f"`epsilon` ({epsilon:.4g}) is below {reference:.4g}, the value before unlearning, so the run has to "
                    "improve what it should preserve, and λ grows until it does. Unless you want that, set `epsilon` to "
                    f"Relative(0.5), or to a number above {reference:.4g}.",
                )
            dual_steps = _count_dual_steps(trainer, constraint)
            if dual_steps < _MIN_DUAL_STEPS:
                self._warn_once(
                    name,
                    "dual steps",
                    f"there will be {dual_steps:.0f} dual steps, too few for λ to settle. Raise the Trainer's "
                    "`max_epochs`, lower the data's `batch_size` or the constraint's `warmup_epochs`, or set its "
                    "`update_every` to 'step'.",
                )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remember 16-bit weights, to see whether the step moves them."""
        if isinstance(pl_module, LitLanguageModel):
            self.movement.note_weights(pl_module.lm, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step's values, and say once how many 16-bit weights it moved."""
        message = self.movement.compare_weights(trainer.global_step)
        if message is not None:
            tell = rank_zero_warn if self.movement.is_small else rank_zero_info
            tell(message)
        for name, values in self._epoch_values.items():
            values.append(float(trainer.callback_metrics.get(f"constraint/{name}/value", math.nan)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the epoch's λ and slack."""
        for name, constraint in _adaptive_constraints(pl_module).items():
            epsilon = constraint.epsilon
            is_warmup = trainer.current_epoch < constraint.warmup_epochs
            if self._epoch_values.get(name) and epsilon is not None and not is_warmup:
                self._check_cap(name, constraint, epsilon)
                # Forgetting that ends by itself need not use all that epsilon allows; a constraint on it allows nothing.
                is_retention = constraint.stream != "forget"
                if is_retention and isinstance(pl_module, LitUnlearn) and not pl_module.forget.stops:
                    self._check_slack(trainer, name, constraint, epsilon)

    def _check_cap(self, name: str, constraint: Constraint, epsilon: float) -> None:
        value = self._epoch_values[name][-1]
        cap = getattr(constraint.multiplier, "max", None)
        if cap is not None and constraint.multiplier.value >= cap and value > epsilon:
            self._warn_once(
                name,
                "cap",
                f"λ is at its cap of {cap:.4g} and the constraint is violated ({value:.4g} > epsilon {epsilon:.4g}): λ "
                "cannot rise further. Raise the multiplier's `max` (None for no cap), or lower the optimizer's `lr`.",
            )

    def _check_slack(self, trainer: L.Trainer, name: str, constraint: Constraint, epsilon: float) -> None:
        # All steps of the epoch, since a single one near epsilon shows that the slack is being used.
        values, multiplier = self._epoch_values[name], constraint.multiplier.value
        reference = self._references.get(name)
        if reference is None:
            return
        is_unused = max(values) < reference + _MIN_USED_SLACK * (epsilon - reference)

        # Too slow: at this epoch's pace, λ will not even have halved by the end of the run.
        epochs_left = (trainer.max_epochs or 0) - trainer.current_epoch - 1
        expected_fall = (self._epoch_multipliers[name] - multiplier) * epochs_left
        is_slow = multiplier > 0 and epochs_left > 0 and expected_fall < multiplier / 2

        if is_unused and is_slow:
            self._warn_once(
                name,
                "slack",
                f"no step of epoch {trainer.current_epoch + 1} used a quarter of what `epsilon` allows ({max(values):.4g} "
                f"of {epsilon:.4g}), and λ ({multiplier:.4g}) falls too slowly to use it before the run ends. To forget "
                "more, raise the optimizer's `lr` or the multiplier's `lr`, or lower the multiplier's `init`.",
            )

    def _warn_once(self, name: str, topic: str, text: str) -> None:
        if (name, topic) not in self._warned:
            self._warned.add((name, topic))
            rank_zero_warn(f"constraint '{name}': {text}")

    def state_dict(self) -> dict[str, Any]:
        """Return the constraints' values before unlearning."""
        return {"references": self._references}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._references = state_dict["references"]


def rounds_steps_away(trainer: L.Trainer) -> bool:
    """Return whether a fit's steps were too small for its 16-bit weights, as its advice has found."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, RunAdvice) and callback.movement.is_small for callback in callbacks)


def _adaptive_constraints(module: L.LightningModule) -> dict[str, Constraint]:
    """Return the constraints whose λ is moved by what is measured."""
    constraints = get_constraints(module)
    return {name: c for name, c in constraints.items() if not isinstance(c.multiplier, FixedMultiplier)}


def _count_dual_steps(trainer: L.Trainer, constraint: Constraint) -> float:
    steps, steps_per_epoch = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not math.isfinite(steps):
        return math.inf
    if constraint.update_every == "epoch":
        # An epoch's dual step is taken when the next epoch begins, so the last epoch has none.
        return max(0, math.ceil(steps / steps_per_epoch) - 1 - constraint.warmup_epochs)
    return max(0, steps - constraint.warmup_epochs * steps_per_epoch)


def _describe_plan(trainer: L.Trainer) -> str:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    examples = ""
    if getattr(data, "train_on", None) == "pairs":
        examples = f", each of {data.batch_size} forget and {data.retain_batch_size} retain examples"
    elif hasattr(data, "batch_size"):
        examples = f", each of {data.batch_size} examples"
    resumed = f", resumed after step {trainer.global_step}" if trainer.global_step else ""
    devices = f"{trainer.world_size} × {trainer.strategy.root_device.type}"
    logs = f"; logs in {find_run_folder(trainer)}" if trainer.loggers and not is_dry_run(trainer) else ""
    steps = trainer.estimated_stepping_batches
    return (
        f"{f'{steps:.0f} steps' if math.isfinite(steps) else 'no limit of steps'}, {trainer.num_training_batches:.0f} per epoch{examples}{resumed}; "
        f"{type(trainer.strategy).__name__} on {devices}, {trainer.precision}{logs}"
    )
