"""The model that a run keeps, as a directory to take away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.lm.files import check_export_target, fresh_directory
from lit_unlearn.module import LitLanguageModel, LitUnlearn
from lit_unlearn.module.strategies import whole_state


class ExportModel(Callback):
    """Writes the model that the run keeps as a Hugging Face directory: safetensors and tokenizer.

    Whenever validation finds a better one (see ``LitUnlearn``'s ``keep``), it replaces the export, so that even a run
    that is stopped has left its best model so far.

    Args:
        dirpath: Where to; ``None`` for ``model`` in the logger's folder. An earlier export there is replaced.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._folder: str | None = None
        self._exported_step: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fixes the folder; what a resumed run had exported elsewhere is copied there.

        Raises:
            FileExistsError: If the folder holds something that is not a model.
        """
        earlier = self._folder
        self._folder = str(Path(self.dirpath or earlier or Path(trainer.log_dir or trainer.default_root_dir) / "model"))
        self._exported_step = None
        check_export_target(Path(self._folder))
        trainer.strategy.barrier("export")
        if trainer.is_global_zero and earlier and Path(earlier).is_dir() and not Path(self._folder).exists():
            with fresh_directory(Path(self._folder)) as folder:
                shutil.copytree(earlier, folder, dirs_exist_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports if validation has just found the best model so far."""
        if trainer.state.fn == "fit" and isinstance(pl_module, LitUnlearn) and pl_module.keep == "best":
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the last model, unless an earlier one is to be kept."""
        if isinstance(pl_module, LitLanguageModel):
            pl_module.measure()
            self._export(trainer, pl_module)
            rank_zero_info(f"model: {self._folder}")

    def _export(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        kept = module.best.step if isinstance(module, LitUnlearn) and module.best else trainer.global_step
        if trainer.sanity_checking or kept != trainer.global_step or kept == self._exported_step:
            return
        state = whole_state(module.lm)
        if trainer.is_global_zero:
            module.lm.save(str(self._folder), state)
        trainer.strategy.barrier("export")
        self._exported_step = kept

    def state_dict(self) -> dict[str, Any]:
        """Where the export is."""
        return {"folder": self._folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._folder = state_dict["folder"]
