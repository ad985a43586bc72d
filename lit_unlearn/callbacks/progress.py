"""What people see while a run goes on: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.training import LitUnlearn

_LINES = 20  # in a log file, of a whole run


class ProgressBar(TQDMProgressBar):
    """How far the run is, how much is forgotten, whether the bounds hold, and λ.

    Lightning's default, where rich is installed (transformers brings it), redraws so slowly that steps of a tiny model
    take several times as long; and off a terminal, every update of a bar is one more line.

    Args:
        refresh_rate: Steps between updates; ``None`` for every step on a terminal, and elsewhere for about twenty
            lines in the whole run.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        super().__init__(refresh_rate or 1)
        self._every = refresh_rate
        self._draws = sys.stdout.isatty()
        self._started = time.monotonic()
        self._first_step = 0
        if not self._draws:
            self.disable()

    def enable(self) -> None:
        """Shows bars again, which Lightning asks for on the first process; off a terminal there are none."""
        if self._draws:
            super().enable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Names the epoch as people count."""
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1} of {_count(trainer.max_epochs)}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the bar, or writes a line."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        total, step = trainer.estimated_stepping_batches, trainer.global_step
        every = self._every or max(1, -(-int(total) // _LINES) if total < float("inf") else 100)
        if not self._draws and (step % every == 0 or step == total):
            seconds = time.monotonic() - self._started
            left = seconds / (step - self._first_step) * (total - step)
            shown = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            ending = f" ({seconds:.0f} s" + (f", {left:.0f} s left)" if 0 < left < float("inf") else ")")
            rank_zero_info(f"step {step} of {_count(total)}: {shown}{ending}")

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What is shown, by its name: short, and in words where there is something to decide."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not isinstance(pl_module, LitUnlearn):
            asked = super().get_metrics(trainer, pl_module)
            return {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in asked.items() if n != "v_num"}
        shown: dict[str, Any] = {}
        if "forget/loss" in values:
            shown["forget loss"] = f"{values['forget/loss']:.3g}"
        if "val/forget/margin" in values:
            shown["forget margin"] = f"{values['val/forget/margin']:.3g}"
        for name, constraint in pl_module.constraints.items():
            value = values.get(f"constraint/{name}/value")
            if value is not None and constraint.epsilon is not None:
                verdict = "holds" if value <= constraint.epsilon else "BROKEN"
                shown[name] = f"{value:.3g} of {constraint.epsilon:.3g} {verdict}"
                shown[f"λ {name}"] = f"{values[f'multiplier/{name}']:.4g}"
        return shown


def _count(number: float | None) -> str:
    return "?" if number is None or number in (-1, float("inf")) else f"{number:.0f}"
