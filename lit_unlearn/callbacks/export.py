"""The model that a run keeps, as a directory to take away, with a record of how it came about."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_unlearn.callbacks.report import RunReport
from lit_unlearn.export.hub import obstacle, upload
from lit_unlearn.export.record import RECORD, Record, benchmark, describe, with_outcome, write_record
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.training import LitLanguageModel, LitUnlearn
from lit_unlearn.training.strategies import whole_state
from lit_unlearn.utils.io import atomic_directory, check_export_target, read_json


class ExportModel(Callback):
    """Writes the model that the run keeps as a Hugging Face directory: safetensors, tokenizer and model card.

    Whenever validation finds a better one (see ``LitUnlearn``'s ``keep``), it replaces the export, so that even a run
    that is stopped has left its best model so far. The card (``README.md``) records what was deleted from what, how, and
    what was achieved; ``unlearning.json`` is the same for programs. Checkpoints carry what they need of it along.

    Args:
        dirpath: Where to; ``None`` for ``model`` in the logger's folder. An earlier export there is replaced.
        push_to_hub: Repository on the Hugging Face hub, ``name`` or ``owner/name``, that the export is uploaded to when
            the fit has ended well; ``None`` for none.
        private: Whether that repository, if it is made now, can be seen by its owner only.
    """

    def __init__(self, dirpath: str | Path | None = None, push_to_hub: str | None = None, private: bool = True) -> None:
        self.dirpath = None if dirpath is None else str(dirpath)
        self.push_to_hub = push_to_hub
        self.private = private
        self._folder: str | None = None
        self._exported_step: int | None = None
        self._record: Record = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses, before anything is loaded, to promise an upload that cannot be made.

        Raises:
            ValueError: If the repository's name is none, or there is no token for the hub.
        """
        if stage == "fit" and self.push_to_hub is not None:
            reason = trainer.strategy.broadcast(obstacle(self.push_to_hub) if trainer.is_global_zero else None)
            if reason:
                raise ValueError(reason)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fixes the folder, and what is known of the run before its first step.

        What a resumed run had exported elsewhere is copied to the folder.

        Raises:
            FileExistsError: If the folder holds something that is not a model.
        """
        earlier = self._folder
        self._folder = str(Path(self.dirpath or earlier or Path(trainer.log_dir or trainer.default_root_dir) / "model"))
        self._exported_step = None
        check_export_target(Path(self._folder))
        if trainer.is_global_zero and isinstance(pl_module, LitLanguageModel):
            self._record = describe(trainer, pl_module, self._record if trainer.global_step else None)
        trainer.strategy.barrier("export")
        if trainer.is_global_zero and earlier and Path(earlier).is_dir() and not Path(self._folder).exists():
            with atomic_directory(Path(self._folder)) as folder:
                shutil.copytree(earlier, folder, dirs_exist_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports if validation has just found the best model so far."""
        if trainer.state.fn == "fit" and isinstance(pl_module, LitUnlearn) and pl_module.keep == "best":
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the last model, unless an earlier one is to be kept, whose record is brought up to date."""
        if isinstance(pl_module, LitLanguageModel):
            pl_module.measure()
            self._export(trainer, pl_module)
            folder = Path(str(self._folder))
            if trainer.is_global_zero and (folder / RECORD).is_file():
                write_record(folder, self._with_outcome(read_json(folder / RECORD), trainer, pl_module))
            rank_zero_info(f"model: {self._folder}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Uploads the export; not if `RunReport`, which comes before, finds that the run misses a requirement.

        Raises:
            RuntimeError: If that fails; the export is on the disk all the same.
        """
        if self.push_to_hub is not None and trainer.is_global_zero and isinstance(pl_module, LitLanguageModel):
            rank_zero_info(f"uploaded: {upload(Path(str(self._folder)), self.push_to_hub, self.private)}")

    def _export(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        kept = module.kept_step
        if trainer.sanity_checking or kept != trainer.global_step or kept == self._exported_step:
            return
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # asks the first process
        state = whole_state(module.lm)
        if trainer.is_global_zero:
            record = {**self._record, "benchmarks": _benchmarks(log_dir, kept, module)}
            record = self._with_outcome(record, trainer, module)
            module.lm.save(str(self._folder), state, partial(write_record, record=record))
        trainer.strategy.barrier("export")
        self._exported_step = kept

    def _with_outcome(self, record: Record, trainer: L.Trainer, module: LitLanguageModel) -> Record:
        report = next((one for one in trainer.callbacks if isinstance(one, RunReport)), None)  # type: ignore[attr-defined]
        before = report.state_dict().get("values", {}) if report else {}
        kept = module.kept_step
        steps = {"step": kept, "kept_step": kept, "steps": trainer.global_step}
        if not isinstance(module, LitUnlearn):
            return with_outcome(record, before, module.measure(), {}, **steps)
        after = module.best.values if module.best else module.measure()
        state = {name: constraint.state_dict() for name, constraint in module.constraints.items()}
        return with_outcome(record, before, after, state, **steps)

    def state_dict(self) -> dict[str, Any]:
        """Where the export is, and what its record says of the run so far."""
        return {"folder": self._folder, "record": self._record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._folder, self._record = state_dict["folder"], state_dict.get("record", {})


def _benchmarks(folder: Path, step: int, module: LitLanguageModel) -> list[dict[str, Any]]:
    """What the benchmark measured on this very model, if it was run at this step."""
    if module.benchmark is None:
        return []
    file = folder / f"{module.benchmark.name}-step={step}.json"
    if not file.is_file():
        return []
    found = benchmark(file)
    weights = fingerprint(cast(nn.Module, module.lm.model))
    return [found] if found["model"]["weights"] == weights[:16] else []
