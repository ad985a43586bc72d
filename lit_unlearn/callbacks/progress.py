"""Progress of a run: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.callbacks.run_state import get_constraints
from lit_unlearn.dual import Constraint

_LINES_PER_RUN = 20
_STEPS_PER_LINE = 100  # of a run without an end


class ProgressBar(TQDMProgressBar):
    """Show the step, the forget loss, every constraint's value against its epsilon, and λ.

    Lightning's default, where rich is installed (transformers brings it), redraws so slowly that steps of a tiny model
    take several times as long; and off a terminal, every update of a bar is one more line.

    Args:
        refresh_rate: Steps between updates; ``None`` for every step on a terminal, and elsewhere for about twenty
            lines in the whole run.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        super().__init__(refresh_rate or 1)
        self._steps_per_line = refresh_rate
        self._draws = sys.stdout.isatty()
        self._start_time = time.monotonic()
        self._first_step = 0
        # In a log file, a bar would be a line per update.
        if not self._draws:
            self.disable()

    def enable(self) -> None:
        """Show bars again, as Lightning asks for on the first process; off a terminal there are none."""
        if self._draws:
            super().enable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._start_time = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name the epoch, counted from 1."""
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description(
            f"epoch {trainer.current_epoch + 1} of {_format_count(trainer.max_epochs)}"
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, or write a line."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._draws:
            return
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        steps_per_line = self._steps_per_line or _STEPS_PER_LINE
        if self._steps_per_line is None and math.isfinite(total):
            steps_per_line = max(1, math.ceil(total / _LINES_PER_RUN))
        if step % steps_per_line != 0 and step != total:
            return

        values = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
        # A resumed run counts its own steps only, so that the rest is not estimated from time that another run took.
        seconds = time.monotonic() - self._start_time
        seconds_left = seconds / (step - self._first_step) * (total - step)
        left = f", {seconds_left:.0f} s left" if 0 < seconds_left < math.inf else ""
        rank_zero_info(f"step {step} of {_format_count(total)}: {values} ({seconds:.0f} s{left})")

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the values to show by name, as short texts, with a verdict for every constraint."""
        constraints = get_constraints(pl_module)
        if not constraints:
            metrics = super().get_metrics(trainer, pl_module)
            metrics.pop("v_num", None)
            for name, metric in metrics.items():
                if isinstance(metric, float):
                    metrics[name] = f"{metric:.4g}"
            return metrics

        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown: dict[str, Any] = {}
        if "forget/loss" in values:
            shown["forget loss"] = f"{values['forget/loss']:.3g}"
        if "val/forget/margin" in values:
            shown["forget margin"] = f"{values['val/forget/margin']:.3g}"
        labels = _label_constraints(constraints)
        for name, constraint in constraints.items():
            value = values.get(f"constraint/{name}/value")
            if value is not None and constraint.epsilon is not None:
                shown[labels[name]] = _compare(value, constraint.epsilon)
                shown[f"λ {name}"] = f"{values[f'multiplier/{name}']:.4g}"
        return shown


def _label_constraints(constraints: Mapping[str, Constraint]) -> dict[str, str]:
    """Return labels such as "retain NLL", with the constraint's name where two would have the same."""
    labels = {name: f"{c.stream} {type(c.objective).__name__}" for name, c in constraints.items()}
    counts = Counter(labels.values())
    return {name: label if counts[label] == 1 else f"{label} '{name}'" for name, label in labels.items()}


def _compare(value: float, epsilon: float) -> str:
    if value <= epsilon:
        return f"{value:.3g} ≤ epsilon {epsilon:.3g} (feasible)"
    return f"{value:.3g} > epsilon {epsilon:.3g} (violated)"


def _format_count(number: float | None) -> str:
    # Lightning has -1 for "no limit", and infinity for what follows from it.
    is_known = number is not None and number != -1 and math.isfinite(number)
    return f"{number:.0f}" if is_known else "?"
