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
from lit_unlearn.training import LitLanguageModel
from lit_unlearn.training.pace import Pace, format_seconds

_LINES_PER_RUN = 20
_STEPS_PER_LINE = 100  # of a run without an end
_LONG_PAUSE = 5.0  # seconds from which a validation is announced


class ProgressBar(TQDMProgressBar):
    """Show the step, the forget loss, every constraint's value against its epsilon, λ, and the time that is left.

    Whatever takes long is announced before it begins: the first measurement, and validations that take seconds. The time that
    is left includes the validations that are still to come.

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
        self._clock = RunClock()
        self._pace: Pace | None = None
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
        self._clock.start(trainer.global_step)
        # This is the first callback, and the others measure.
        if trainer.global_step == 0 and isinstance(pl_module, LitLanguageModel):
            rank_zero_info("measuring the model before the first step")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name the epoch, counted from 1."""
        super().on_train_epoch_start(trainer, pl_module)
        left = self._describe_time_left(trainer)
        self.train_progress_bar.set_description(
            f"epoch {trainer.current_epoch + 1} of {_format_count(trainer.max_epochs)}{left}"
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go on counting the time of steps."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._clock.go_on()

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
        times = f"{self._clock.seconds:.0f} s{self._describe_time_left(trainer)}"
        rank_zero_info(f"step {step} of {_format_count(total)}: {values} ({times})")

    def _describe_time_left(self, trainer: L.Trainer) -> str:
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if not math.isfinite(total):
            return ""
        # That of this very step, if there is one, is still to come.
        validations = _count_validations(trainer, int(total)) - _count_validations(trainer, step - 1)
        seconds = self._clock.estimate_left(step, int(total), validations)
        return f", about {format_seconds(seconds)} left" if seconds is not None and seconds >= 1 else ""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce a validation that may take long."""
        super().on_validation_start(trainer, pl_module)
        if trainer.sanity_checking:
            return
        is_fit = trainer.state.fn == "fit"
        pause = self._clock.last_pause if is_fit else None
        if is_fit:
            self._clock.pause()
        if not self._draws:
            self._pace = Pace("validation", sum(map(int, trainer.num_val_batches)))
            if pause is None or pause >= _LONG_PAUSE:
                place = f" after step {trainer.global_step}" if is_fit else ""
                duration = "" if pause is None else f", about {format_seconds(pause)}"
                rank_zero_info(f"validation{place}{duration}")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the bar, or now and then write a line."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._pace is not None:
            self._pace.count_batch()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        super().on_validation_end(trainer, pl_module)
        self._pace = None

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


class RunClock:
    """Tell the time of steps from that of everything between them, to estimate what is left.

    A resumed run counts what it does itself, so that nothing is estimated from time that another machine took.
    """

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Start anew, before the first measurement of a run that begins at a step."""
        self._first_step = step
        self._start = time.monotonic()
        self._steps_start: float | None = None
        self._pause_start: float | None = None
        self._pauses: list[float] = []

    def pause(self) -> None:
        """Note that a validation begins. What follows it, as an export, is counted with it."""
        self._pause_start = self._pause_start or time.monotonic()

    def go_on(self) -> None:
        """Note that a step begins."""
        now = time.monotonic()
        self._steps_start = self._steps_start or now
        if self._pause_start is not None:
            self._pauses.append(now - self._pause_start)
            self._pause_start = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def last_pause(self) -> float | None:
        """Seconds of the last validation; before there is one, of the measurement before the first step."""
        if self._pauses:
            return self._pauses[-1]
        return None if self._steps_start is None else self._steps_start - self._start

    def estimate_left(self, step: int, total: int, validations: int) -> float | None:
        """Return the seconds that are left; ``None`` before the first step.

        Args:
            step: Steps that were taken.
            total: Steps of the run.
            validations: Validations that are still to come.
        """
        if self._steps_start is None or step == self._first_step:
            return None
        end = self._pause_start or time.monotonic()
        seconds_per_step = (end - self._steps_start - sum(self._pauses)) / (step - self._first_step)
        return seconds_per_step * (total - step) + validations * (self.last_pause or 0.0)


def _count_validations(trainer: L.Trainer, step: int) -> int:
    """Return the number of validations of a fit up to a step, that of the step included."""
    interval, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if step <= 0 or interval is None or not trainer.enable_validation:
        return 0
    steps_per_epoch = trainer.num_training_batches
    if not math.isfinite(steps_per_epoch):
        return 0
    interval = min(interval, steps_per_epoch) if every else interval
    if every is None:
        return int(step // interval)
    epochs, rest = divmod(step, int(steps_per_epoch))
    validations = epochs // every * (steps_per_epoch // interval)
    if (epochs + 1) % every == 0:
        validations += rest // interval
    return int(validations)


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
