"""What people see while a run goes on."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """A plain bar with every multiplier and slack by its short name.

    Lightning's default, where rich is installed (transformers brings it), redraws so slowly that steps of a tiny model
    take several times as long.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        """``refresh_rate``: steps per update; ``None`` for every one on a terminal, every hundredth elsewhere."""
        super().__init__(refresh_rate or (1 if sys.stdout.isatty() else 100))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """λ and slack of every constraint, and what else asked for a place."""
        shown = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            kind, _, rest = name.partition("/")
            short = {"multiplier": f"λ {rest}", "constraint": f"slack {rest.partition('/')[0]}"}
            shown[short.get(kind, name)] = value
        shown.pop("v_num", None)
        return shown
