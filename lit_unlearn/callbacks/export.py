"""Export of the model that a run keeps, with a record of how it was made."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_unlearn.callbacks.run_state import (
    check_on_first_process,
    get_constraints,
    may_have_new_best,
    measure_kept_model,
)
from lit_unlearn.errors import ConfigError, OutputError
from lit_unlearn.export.hub import find_upload_problem, upload_export
from lit_unlearn.export.record import RECORD_FILE, Record, add_outcome, describe_run, summarize_results, write_record
from lit_unlearn.models.loading import fingerprint, weight_file_size
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.training.strategies import whole_state
from lit_unlearn.utils.io import (
    check_export_target,
    check_writable,
    expand_home,
    finish_replacement,
    lock_folder,
    output_errors,
    read_digests,
    read_json,
    remove_if_empty,
    replace_folder,
)


class ExportModel(Callback):
    """Write the model that the run keeps as a Hugging Face directory: safetensors, tokenizer and model card.

    Whenever validation finds a better one (see ``LitUnlearn``'s ``keep``), it replaces the export, so that even a run
    that is stopped has left its best model so far. The card (``README.md``) records what was deleted from what, how, and
    what was achieved; ``unlearning.json`` is the same for programs. Checkpoints contain the record as well.

    The folder is refused before the model is loaded if it holds anything but an earlier export, unchanged, or if another
    run is writing it. A dry run (``fast_dev_run``) exports nothing.

    Args:
        dirpath: Folder to write; ``None`` for ``model`` in the run's folder. An earlier export there is replaced.
        push_to_hub: Repository on the Hugging Face hub, ``name`` or ``owner/name``, that the export is uploaded to when
            the fit has ended well; ``None`` for none.
        private: Whether that repository, if it is made now, can be seen by its owner only.
    """

    def __init__(self, dirpath: str | Path | None = None, push_to_hub: str | None = None, private: bool = True) -> None:
        self.dirpath = None if dirpath is None else expand_home(str(dirpath))
        self.push_to_hub = push_to_hub
        self.private = private
        self._folder: str | None = None
        self._earlier_folder: str | None = None  # of the first part of a resumed run
        self._lock: ExitStack | None = None  # of the folder, on the first process
        self._exported_step: int | None = None
        self._is_finished = False
        self._record: Record = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder that must not be written, and an upload that cannot succeed, before anything is loaded.

        Raises:
            ConfigError: If the repository's name is not valid, there is no token for the hub, or the folder cannot be
                written.
            OccupiedError: If the folder holds something that is not ours, or another run is writing it.
        """
        if stage != "fit" or is_dry_run(trainer):
            return
        self._earlier_folder = None
        if self.push_to_hub is not None:
            problem = find_upload_problem(self.push_to_hub) if trainer.is_global_zero else None
            # Only the first process looks for a token, and all must stop.
            problem = trainer.strategy.broadcast(problem)
            if problem:
                raise ConfigError(problem, owner=self, argument="push_to_hub")
        if self.dirpath is not None:
            self._take_folder(trainer, pl_module, self.dirpath)

    def _take_folder(self, trainer: L.Trainer, module: L.LightningModule, folder: str) -> None:
        """Check and lock the folder, and finish what an interruption left in it; a collective call."""

        def take() -> None:
            self._release_folder()
            path, lm = Path(folder), getattr(module, "lm", None)
            inputs = [] if lm is None else [lm.name, lm.tokenizer_name]
            check_export_target(path, inputs, owner=self, argument="dirpath")
            # Both exports are on the disk while the new one replaces the old one.
            size = 0 if lm is None else weight_file_size(lm.name)
            check_writable(path, size, owner=self, argument="dirpath")
            self._lock = ExitStack()
            with output_errors(path):
                if not path.exists():
                    self._lock.callback(remove_if_empty, path)
                path.mkdir(parents=True, exist_ok=True)
                self._lock.enter_context(lock_folder(path))
                finish_replacement(path)

        check_on_first_process(trainer, take)
        self._folder = folder

    def _release_folder(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the folder, and record what is known of the run before its first step.

        Raises:
            OccupiedError: If the folder holds something that is not ours.
        """
        self._exported_step = None
        self._is_finished = False
        if is_dry_run(trainer):
            return
        if self.dirpath is None:
            # Only a checkpoint knows where the first part of a run exported to.
            folder = self._earlier_folder or str(find_run_folder(trainer) / "model")
            self._take_folder(trainer, pl_module, folder)

        if isinstance(pl_module, LitLanguageModel):
            earlier_record = self._record if trainer.global_step else None
            # Free with `RunReport`: the module measures each step's model once. Every process must take part.
            before = earlier_record.get("before", {}) if earlier_record is not None else pl_module.measure()
            if trainer.is_global_zero:
                self._record = describe_run(trainer, pl_module, before, earlier_record)

        trainer.strategy.barrier("export")
        if trainer.is_global_zero:
            self._copy_earlier_export(pl_module)

    def _copy_earlier_export(self, module: L.LightningModule) -> None:
        """Copy the model that the first part of a resumed run exported elsewhere: no later one may be better."""
        folder, earlier = Path(str(self._folder)), Path(self._earlier_folder or "")
        is_elsewhere = self._earlier_folder is not None and earlier.is_dir() and not earlier.samefile(folder)
        if not is_elsewhere or not self._is_kept_model(earlier, module):
            return
        with replace_folder(folder) as staging:
            for name in read_digests(earlier):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(earlier / name, staging / name)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the model if validation has just found the best one so far."""
        if may_have_new_best(pl_module, trainer) and not is_dry_run(trainer):
            self._export_kept_model(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the last model, unless an earlier one is kept: its record is updated."""
        if not isinstance(pl_module, LitLanguageModel) or is_dry_run(trainer):
            return
        pl_module.measure()
        self._export_kept_model(trainer, pl_module)

        def renew_record() -> None:
            folder = Path(str(self._folder))
            if not self._is_kept_model(folder, pl_module):
                earlier = f" to '{self._earlier_folder}'" if self._earlier_folder else ""
                raise OutputError(
                    f"the model that this run keeps, of step {pl_module.kept_step}, is not in '{folder}': it was to be exported"
                    f"{earlier} before the run was resumed, and is not there any more. Start a new run."
                )
            # An earlier export does not know how many steps followed, nor the λ that they ended with.
            record = self._add_outcome(read_json(folder / RECORD_FILE), trainer, pl_module)
            with replace_folder(folder, keeps_others=True) as staging:
                write_record(staging, record)

        check_on_first_process(trainer, renew_record)
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
        self._release_folder()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let other runs have the folder."""
        self._release_folder()

    def _is_kept_model(self, folder: Path, module: L.LightningModule) -> bool:
        """Return whether an export is of the model that this run keeps now."""
        if not (folder / RECORD_FILE).is_file() or not isinstance(module, LitLanguageModel):
            return False
        record = read_json(folder / RECORD_FILE)
        # The values before the first step tell runs apart. As text, because NaN is not equal to itself.
        before = [json.dumps(values.get("before"), sort_keys=True) for values in (record, self._record)]
        return before[0] == before[1] and record.get("step") == module.kept_step

    def _export_kept_model(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        step = module.kept_step
        if step != trainer.global_step or step == self._exported_step:
            return
        rank_zero_info(f"exporting the model of step {step} to {self._folder}")
        # Both are collective.
        run_folder = None if module.benchmark is None else find_run_folder(trainer)
        state = whole_state(module.lm)
        if trainer.is_global_zero:
            record = self._add_outcome(self._record, trainer, module)
            record["benchmarks"] = _read_benchmarks(run_folder, step, module)
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
        folder = None if self._folder is None else str(Path(self._folder).absolute())
        return {"folder": folder, "record": self._record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._earlier_folder, self._record = state_dict["folder"], state_dict.get("record", {})


def _read_benchmarks(folder: Path | None, step: int, module: LitLanguageModel) -> list[dict[str, Any]]:
    """Return the results of the fit's benchmark, if it was run on this very model."""
    if module.benchmark is None or folder is None:
        return []
    file = folder / f"{module.benchmark.name}-step={step}.json"
    if not file.is_file():
        return []
    results = summarize_results(file)
    # The file may be of another run that logged to the same folder.
    weights = fingerprint(cast(nn.Module, module.lm.model))
    return [results] if results["model"]["weights"] == weights[:16] else []
