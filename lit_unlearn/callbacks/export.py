"""Export of the model that a run keeps, with a record of how it was made."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_unlearn.callbacks.run_state import get_constraints, may_have_new_best, measure_kept_model
from lit_unlearn.errors import ConfigError
from lit_unlearn.export.hub import find_upload_problem, upload_export
from lit_unlearn.export.record import RECORD_FILE, Record, add_outcome, describe_run, summarize_results, write_record
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.strategies import whole_state
from lit_unlearn.utils.io import atomic_directory, check_export_target, read_json


class ExportModel(Callback):
    """Write the model that the run keeps as a Hugging Face directory: safetensors, tokenizer and model card.

    Whenever validation finds a better one (see ``LitUnlearn``'s ``keep``), it replaces the export, so that even a run
    that is stopped has left its best model so far. The card (``README.md``) records what was deleted from what, how, and
    what was achieved; ``unlearning.json`` is the same for programs. Checkpoints contain the record as well.

    Args:
        dirpath: Folder to write; ``None`` for ``model`` in the logger's folder. An earlier export there is replaced.
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
        self._is_finished = False
        self._record: Record = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an upload that cannot succeed, before anything is loaded.

        Raises:
            ConfigError: If the repository's name is not valid, or there is no token for the hub.
        """
        if stage == "fit" and self.push_to_hub is not None:
            problem = find_upload_problem(self.push_to_hub) if trainer.is_global_zero else None
            # Only the first process looks for a token, and all must stop.
            problem = trainer.strategy.broadcast(problem)
            if problem:
                raise ConfigError(problem, owner=self, argument="push_to_hub")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the folder, and record what is known of the run before its first step.

        Raises:
            OccupiedError: If the folder holds something that is not a model.
        """
        earlier_folder = self._folder
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)
        self._folder = str(Path(self.dirpath or earlier_folder or log_dir / "model"))
        self._exported_step = None
        self._is_finished = False
        check_export_target(Path(self._folder))

        if isinstance(pl_module, LitLanguageModel):
            earlier_record = self._record if trainer.global_step else None
            # Free with `RunReport`: the module measures each step's model once. Every process must take part.
            before = earlier_record.get("before", {}) if earlier_record is not None else pl_module.measure()
            if trainer.is_global_zero:
                self._record = describe_run(trainer, pl_module, before, earlier_record)

        trainer.strategy.barrier("export")
        # The best model of a resumed run may be in the folder of its first part, and no later one may be better.
        is_moved = earlier_folder is not None and Path(earlier_folder).is_dir() and not Path(self._folder).exists()
        if trainer.is_global_zero and is_moved:
            with atomic_directory(Path(self._folder)) as folder:
                shutil.copytree(str(earlier_folder), folder, dirs_exist_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the model if validation has just found the best one so far."""
        if may_have_new_best(pl_module, trainer):
            self._export_kept_model(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the last model, unless an earlier one is kept: its record is updated."""
        if not isinstance(pl_module, LitLanguageModel):
            return
        pl_module.measure()
        self._export_kept_model(trainer, pl_module)

        # An earlier export does not know how many steps followed, nor the λ that they ended with.
        folder = Path(str(self._folder))
        if (folder / RECORD_FILE).is_file() and trainer.is_global_zero:
            record = self._add_outcome(read_json(folder / RECORD_FILE), trainer, pl_module)
            write_record(folder, record)
        rank_zero_info(f"model: {self._folder}")
        self._is_finished = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Upload the export of a fit that ended well.

        Raises:
            OutputError: If the upload fails; the export is on the disk all the same.
        """
        # Not in `on_fit_end`, where `RunReport` fails a run that missed a requirement: after an exception Lightning calls no
        # `teardown`, so nothing is published then, in whatever order the callbacks are.
        if self.push_to_hub is not None and stage == "fit" and self._is_finished and trainer.is_global_zero:
            rank_zero_info(f"uploaded: {upload_export(Path(str(self._folder)), self.push_to_hub, self.private)}")

    def _export_kept_model(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        step = module.kept_step
        if step != trainer.global_step or step == self._exported_step:
            return
        rank_zero_info(f"exporting the model of step {step} to {self._folder}")
        # `log_dir` and `whole_state` are collective.
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)
        state = whole_state(module.lm)
        if trainer.is_global_zero:
            record = self._add_outcome(self._record, trainer, module)
            record["benchmarks"] = _read_benchmarks(log_dir, step, module)
            module.lm.save(str(self._folder), state, partial(write_record, record=record))
        trainer.strategy.barrier("export")
        self._exported_step = step

    def _add_outcome(self, record: Record, trainer: L.Trainer, module: LitLanguageModel) -> Record:
        measurement = measure_kept_model(module)
        states = {name: constraint.state_dict() for name, constraint in get_constraints(module).items()}
        steps = {"step": measurement.step, "kept_step": measurement.step, "steps": trainer.global_step}
        return add_outcome(record, measurement.values, states, **steps)

    def state_dict(self) -> dict[str, Any]:
        """Return where the export is, and what its record says of the run so far."""
        return {"folder": self._folder, "record": self._record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._folder, self._record = state_dict["folder"], state_dict.get("record", {})


def _read_benchmarks(folder: Path, step: int, module: LitLanguageModel) -> list[dict[str, Any]]:
    """Return the results of the fit's benchmark, if it was run on this very model."""
    if module.benchmark is None:
        return []
    file = folder / f"{module.benchmark.name}-step={step}.json"
    if not file.is_file():
        return []
    results = summarize_results(file)
    # The file may be of another run that logged to the same folder.
    weights = fingerprint(cast(nn.Module, module.lm.model))
    return [results] if results["model"]["weights"] == weights[:16] else []
