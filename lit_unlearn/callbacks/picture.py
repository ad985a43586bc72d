"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.evaluation import picture
from lit_unlearn.module import LitUnlearn


class RunPicture(Callback):
    """Draws the run when it ends: λ, retain loss against epsilon, forgetting, from the CSV logger's files."""

    def __init__(self) -> None:
        self._earlier: list[str] = []  # the files of what this run resumed
        self._current: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where the metrics go."""
        folder = next((logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        self._current = folder and str(Path(folder).absolute() / "metrics.csv")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``run.png`` beside ``metrics.csv``."""
        if not trainer.is_global_zero or not isinstance(pl_module, LitUnlearn):
            return
        if self._current is None:
            rank_zero_info(
                "picture: none, because it is drawn from the metrics.csv of a CSVLogger; add one to the loggers"
            )
            return
        for logger in trainer.loggers:
            logger.save()
        files = [Path(file) for file in [*self._earlier, self._current]]
        target = files[-1].with_name("run.png")
        epsilons = {name: c.epsilon for name, c in pl_module.constraints.items() if c.epsilon is not None}
        picture.draw_run(files, target, epsilons)
        rank_zero_info(f"picture: {target}")

    def state_dict(self) -> dict[str, Any]:
        """Where the metrics up to here are."""
        return {"files": [*self._earlier, *filter(None, [self._current])]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._earlier = state_dict["files"]
