"""What a run will do, and which of its settings are known to hurt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.dual import Constraint, FixedMultiplier
from lit_unlearn.training import LitLanguageModel, LitUnlearn

_FEWEST_MOVES = 10
_UNUSED = 0.25  # of what epsilon allows beyond the reference loss, at most, in every step of an epoch


class RunAdvice(Callback):
    """Says once, before the first step, how the run goes; and warns, with what to change, of settings that hurt.

    Before the first step: an epsilon below the loss before unlearning; a λ that will move fewer than ten times. After
    an epoch: a λ at its cap while the bound is broken; slack that λ is too slow to use.
    """

    def __init__(self) -> None:
        self._opened = False
        self._said: set[tuple[str, str]] = set()
        self._references: dict[str, float] = {}
        self._values: dict[str, list[float]] = {}  # of every step of this epoch
        self._multipliers: dict[str, float] = {}  # when it began

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier fit."""
        self._opened, self._said = False, set()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the first epoch: by now every epsilon is measured."""
        if not self._opened and isinstance(pl_module, LitLanguageModel):
            self._opened = True
            rank_zero_info(f"run: {_plan(trainer)}")
            if isinstance(pl_module, LitUnlearn):
                self._open(trainer, pl_module)
        if isinstance(pl_module, LitUnlearn):
            self._values = {name: [] for name in pl_module.constraints}
            self._multipliers = {name: c.multiplier.value for name, c in pl_module.constraints.items()}

    def _open(self, trainer: L.Trainer, module: LitUnlearn) -> None:
        if trainer.global_step == 0:
            measured = module.measure()
            names = {name: f"constraint/{name}/value" for name in module.constraints}
            self._references = {name: measured[key] for name, key in names.items() if key in measured}
        for name, constraint in _moving(module):
            epsilon, reference = constraint.epsilon, self._references.get(name)
            if epsilon is not None and reference is not None and epsilon < reference:
                self._say(
                    name,
                    "below",
                    f"epsilon {epsilon:.4g} is below {reference:.4g}, the value before unlearning: the run must improve what "
                    "it should only keep, and λ grows until it does. Unless that is what you want, set `epsilon: {relative: "
                    f"0.5}}`, or a number above {reference:.4g}.",
                )
            moves = _moves(trainer, constraint)
            if moves < _FEWEST_MOVES:
                self._say(
                    name,
                    "moves",
                    f"λ will move {moves:.0f} times, too few to find its place. Raise `trainer.max_epochs`, lower "
                    "`data.batch_size` or the constraint's `warmup_epochs`, or set `update_every: step`.",
                )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes what the step measured."""
        for name, values in self._values.items():
            values.append(float(trainer.callback_metrics.get(f"constraint/{name}/value", math.nan)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks back on the epoch."""
        if not isinstance(pl_module, LitUnlearn):
            return
        for name, constraint in _moving(pl_module):
            values, epsilon = self._values.get(name), constraint.epsilon
            if not values or epsilon is None or trainer.current_epoch < constraint.warmup_epochs:
                continue
            cap, now = getattr(constraint.multiplier, "max", None), constraint.multiplier.value
            if cap is not None and now >= cap and values[-1] > epsilon:
                self._say(
                    name,
                    "cap",
                    f"λ is at its cap of {cap:.4g} and the bound is broken ({values[-1]:.4g} > {epsilon:.4g}): it cannot "
                    "rise any more. Raise the multiplier's `max` (null: none), or lower `model.optimizer.init_args.lr`.",
                )
            ends = pl_module.forget.unseen is not None  # forgetting that has an end need not use what is allowed
            if not ends and self._is_slow(trainer, name, epsilon, now):
                self._say(
                    name,
                    "slack",
                    f"no step of epoch {trainer.current_epoch + 1} used a quarter of what epsilon allows ({max(values):.4g} of "
                    f"{epsilon:.4g}), and λ ({now:.4g}) falls too slowly to use it before the run ends. For more forgetting, "
                    "raise `model.optimizer.init_args.lr`, or the multiplier's `lr`, or lower its `init`.",
                )

    def _is_slow(self, trainer: L.Trainer, name: str, epsilon: float, now: float) -> bool:
        """Whether the epoch left nearly all slack unused, and λ will not even have halved by the end of the run."""
        reference = self._references.get(name, epsilon)
        unused = max(self._values[name]) < reference + _UNUSED * (epsilon - reference)
        left = (trainer.max_epochs or 0) - trainer.current_epoch - 1
        fall = (self._multipliers[name] - now) * left
        return unused and now > 0 and left > 0 and fall < now / 2

    def _say(self, name: str, what: str, text: str) -> None:
        if (name, what) not in self._said:
            self._said.add((name, what))
            rank_zero_warn(f"constraint '{name}': {text}")

    def state_dict(self) -> dict[str, Any]:
        """What was measured before unlearning."""
        return {"references": self._references}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._references = state_dict["references"]


def _moving(module: LitUnlearn) -> Iterator[tuple[str, Constraint]]:
    """The constraints whose multiplier answers to what is measured."""
    return ((n, c) for n, c in module.constraints.items() if not isinstance(c.multiplier, FixedMultiplier))


def _moves(trainer: L.Trainer, constraint: Constraint) -> float:
    """Dual steps in the whole run."""
    steps, per_epoch = trainer.estimated_stepping_batches, trainer.num_training_batches
    if constraint.update_every == "epoch":
        return max(0, math.ceil(steps / per_epoch) - 1 - constraint.warmup_epochs)  # taken when the next one begins
    return max(0, steps - constraint.warmup_epochs * per_epoch)


def _plan(trainer: L.Trainer) -> str:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    steps, per_epoch = trainer.estimated_stepping_batches, trainer.num_training_batches
    rows = ""
    if getattr(data, "train_on", None) == "pairs":
        rows = f", each of {data.batch_size} forget and {data.retain_batch_size} retain rows"
    elif hasattr(data, "batch_size"):
        rows = f", each of {data.batch_size} rows"
    devices = f"{trainer.world_size} × {trainer.strategy.root_device.type}"
    logs = f"; logs in {trainer.log_dir}" if trainer.loggers else ""
    at = f" from step {trainer.global_step} on" if trainer.global_step else ""
    return (
        f"{steps:.0f} steps, {per_epoch:.0f} per epoch{rows}{at}; {type(trainer.strategy).__name__} on {devices}, "
        f"{trainer.precision}{logs}"
    )
