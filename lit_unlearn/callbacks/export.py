"""Export of the model that a run keeps, with a record of how it was made."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lit_unlearn.callbacks.audit import describe_plan
from lit_unlearn.callbacks.damage import find_damage
from lit_unlearn.callbacks.run_state import (
    check_on_first_process,
    find_threshold,
    get_constraints,
    may_have_new_best,
    measure_kept_model,
)
from lit_unlearn.errors import ConfigError, OutputError
from lit_unlearn.export.hub import find_upload_problem, upload_export
from lit_unlearn.export.ledger import append_entry, check_ledger, describe_export
from lit_unlearn.export.record import (
    RECORD_FILE,
    Record,
    add_outcome,
    describe_run,
    find_chat_template,
    summarize_results,
    write_record,
)
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.training import LitUnlearn, Measurement
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.training.strategies import whole_state
from lit_unlearn.utils.folders import check_export_target, finish_replacement, hold_folder, read_digests, replace_folder
from lit_unlearn.utils.io import expand_home, output_errors, read_json
from lit_unlearn.utils.validation import check_choice

ExportDtype = Literal["float32", "bfloat16", "float16"]


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
        dtype: Of the weights; ``None`` for that of the base model's files. What a run measures are the weights rounded to it.
        name_sources: Whether card and record name the files of the rows, without their folders, and data sets on the hub. By
            default they have digests and numbers of rows alone.
        ledger: File of JSON lines to which a run that unlearned appends what it did, when it has finished; ``None`` for none.
        request: Who asked for the deletion, as the user calls it, for the ledger.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        push_to_hub: str | None = None,
        private: bool = True,
        dtype: ExportDtype | None = None,
        name_sources: bool = False,
        ledger: str | None = None,
        request: str | None = None,
    ) -> None:
        if dtype is not None:
            check_choice(get_args(ExportDtype), self, dtype=dtype)
        self.dtype = dtype
        self.dirpath = None if dirpath is None else expand_home(str(dirpath))
        self.push_to_hub = push_to_hub
        self.private = private
        self.name_sources = name_sources
        self.ledger = None if ledger is None else expand_home(ledger)
        self.request = request
        self.earlier_folder: str | None = None
        """Folder that the first part of a resumed run exported to."""
        self._folder: str | None = None
        self._lock: ExitStack | None = None  # of the folder, on the first process
        self._exported: Measurement | None = None
        self._is_finished = False
        self._problem: str | None = None
        self._record: Record = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be exported or uploaded before anything is loaded; have the run measure what will be exported.

        Raises:
            ConfigError: If the repository's name is not valid, there is no token for the hub, or the folder or the ledger
                cannot be written.
            DataError: If the ledger's file is another one.
            OccupiedError: If the folder holds something that is not ours, or another run is writing it.
        """
        if self.dtype is not None and isinstance(pl_module, LitLanguageModel):
            pl_module.evaluator.export_dtype = getattr(torch, self.dtype)
        if stage != "fit" or is_dry_run(trainer):
            return
        self.earlier_folder = None
        if self.push_to_hub is not None:
            problem = find_upload_problem(self.push_to_hub) if trainer.is_global_zero else None
            # Only the first process looks for a token, and all must stop.
            problem = trainer.strategy.broadcast(problem)
            if problem:
                raise ConfigError(problem, owner=self, argument="push_to_hub")
        if self.ledger is not None:
            # It is written when the run has ended: too late to learn that it cannot be.
            check_on_first_process(trainer, partial(check_ledger, Path(self.ledger), self))
        if self.dirpath is not None:
            self._take_folder(trainer, pl_module, self.dirpath)

    def _take_folder(self, trainer: L.Trainer, module: L.LightningModule, folder: str) -> None:
        """Check and lock the folder, and finish what an interruption left in it; a collective call."""

        def take() -> None:
            self._release_folder()
            path, lm = Path(folder), getattr(module, "lm", None)
            inputs = [] if lm is None else lm.inputs
            check_export_target(path, inputs, owner=self, argument="dirpath")
            # Both exports are on the disk while the new one replaces the old one.
            size = 0 if lm is None or lm.files is None else lm.files.export_size()
            self._lock = ExitStack()
            self._lock.enter_context(hold_folder(path, size, owner=self, argument="dirpath"))
            with output_errors(path):
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
        self._exported = None
        self._is_finished, self._problem = False, None
        if is_dry_run(trainer):
            return
        if self.dirpath is None:
            # Only a checkpoint knows where the first part of a run exported to.
            folder = self.earlier_folder or str(find_run_folder(trainer) / "model")
            self._take_folder(trainer, pl_module, folder)

        if isinstance(pl_module, LitLanguageModel):
            earlier_record = self._record if trainer.global_step else None
            # Free with `RunReport`: the module measures each step's model once. Every process must take part.
            before = earlier_record.get("before", {}) if earlier_record is not None else pl_module.measure()
            if trainer.is_global_zero:
                self._record = describe_run(trainer, pl_module, before, earlier_record)
                dtype = pl_module.evaluator.export_dtype or pl_module.lm.files_dtype
                self._record["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
                self._record["name_sources"] = self.name_sources
                # Of a resumed run it is what the first part had: later, thresholds could be chosen by what is known.
                plan = describe_plan(trainer) if earlier_record is None else earlier_record.get("audit")
                if plan is not None:
                    self._record["audit"] = plan
                self._record["max_forget_probability"] = find_threshold(trainer)

        if trainer.is_global_zero and not trainer.global_step:
            self._announce_replacement()
        trainer.strategy.barrier("export")
        if isinstance(pl_module, LitUnlearn) and pl_module.keep == "best" and pl_module.best is not None:
            if trainer.is_global_zero:
                self._copy_earlier_export(pl_module.best)
            self._drop_lost_best(trainer, pl_module, pl_module.best)

    def _announce_replacement(self) -> None:
        """Say that a run from the start will replace an export that is there already."""
        with suppress(OSError, ValueError):
            earlier = read_json(Path(str(self._folder)) / RECORD_FILE)
            rank_zero_info(
                f"'{self._folder}' has the model of an earlier run, of step {earlier.get('step')}: this run will replace it with its own at "
                "the first validation. To keep it, stop now and move it."
            )

    def _copy_earlier_export(self, best: Measurement) -> None:
        """Copy the model that the first part of a resumed run exported elsewhere: no later one may be better."""
        folder, earlier = Path(str(self._folder)), Path(self.earlier_folder or "")
        is_elsewhere = self.earlier_folder is not None and earlier.is_dir() and not earlier.samefile(folder)
        if not is_elsewhere or not is_export_of(earlier, best):
            return
        with replace_folder(folder) as staging:
            for name in read_digests(earlier):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(earlier / name, staging / name)

    def _drop_lost_best(self, trainer: L.Trainer, module: LitUnlearn, best: Measurement) -> None:
        """Let a resumed run look for another model to keep, if the best one so far is nowhere any more."""
        if self._has_export_of(best, trainer):
            self._exported = best
            return
        rank_zero_warn(
            f"the best model so far, of step {best.step}, is not at '{self._folder}' (any more): the run keeps the best of "
            "those that follow."
        )
        module.best = None

    def _has_export_of(self, measurement: Measurement, trainer: L.Trainer) -> bool:
        """Return whether the folder has the model that was measured; a collective call."""
        is_there = trainer.is_global_zero and is_export_of(Path(str(self._folder)), measurement)
        return bool(trainer.strategy.broadcast(is_there))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Export the model if the validation whose last batch this is has found the best one so far.

        Not when the validation has ended: callbacks such as ``WeightAveraging`` have restored the others by then.
        """
        if may_have_new_best(pl_module, trainer) and not is_dry_run(trainer):
            self._export_kept_model(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do the same where the loaders did not say which batch is the last."""
        if may_have_new_best(pl_module, trainer) and not is_dry_run(trainer):
            self._export_kept_model(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the last model, unless an earlier one is kept: its record is updated."""
        if not isinstance(pl_module, LitLanguageModel) or is_dry_run(trainer):
            return
        kept = measure_kept_model(pl_module)
        self._export_kept_model(trainer, pl_module)
        if not self._has_export_of(kept, trainer):
            self._problem = (
                f"the model that the run keeps, of step {kept.step}, is not at '{self._folder}'. Resume the run from the directory "
                "that it was started in and with the same `dirpath`, or make a model of its newest checkpoint: "
                "`lit-unlearn export CHECKPOINT DIR`."
            )
            return

        def conclude() -> None:
            self._add_to_ledger(self._renew_record(kept, trainer, pl_module))

        # Only the first process has the record.
        check_on_first_process(trainer, conclude)
        rank_zero_info(f"model: {self._folder}")
        self._is_finished = True

    def finish(self, trainer: L.Trainer, module: LitUnlearn, kept: Measurement) -> None:
        """Record the end of a run that was interrupted after its last checkpoint, in `on_train_end`; a collective call.

        The record of the export gets the run's number of steps, and the ledger its entry. What is there already stays.

        Args:
            trainer: Of a fit that resumed the run, and had no step left.
            module: Of the run.
            kept: Measurement of the model that the run keeps, which is the one in the folder.
        """
        # A checkpoint of an earlier version has no record.
        if not self._record:
            return
        folder = str(self.dirpath or self.earlier_folder)
        # A run that ended well and is given again comes here, too: nothing is locked or written then.
        is_recorded = trainer.is_global_zero and self._has_recorded_end(Path(folder), trainer.global_step)
        if trainer.strategy.broadcast(is_recorded):
            return
        if self.dirpath is None:
            self._take_folder(trainer, module, folder)

        def conclude() -> None:
            record = read_json(Path(folder) / RECORD_FILE)
            if record["steps"] < trainer.global_step:
                record = self._renew_record(kept, trainer, module)
            self._add_to_ledger(record)

        check_on_first_process(trainer, conclude)
        rank_zero_info(f"the end of the run had not been recorded, and is now: {folder}")
        self._is_finished = True

    def _has_recorded_end(self, folder: Path, steps: int) -> bool:
        """Return whether the export's record has all steps of the run, and the ledger has the export."""
        record = read_json(folder / RECORD_FILE)
        # More steps than these are of another run.
        return record["steps"] >= steps and self._is_in_ledger(record)

    def _renew_record(self, kept: Measurement, trainer: L.Trainer, module: LitLanguageModel) -> Record:
        """Write the record of the export again at the end of the run, and return it.

        An earlier export does not know how many steps followed, nor the λ that they ended with; nor, if the run was resumed,
        the present epsilon.
        """
        record = self._add_outcome(kept, trainer, module)
        folder = Path(str(self._folder))
        exported = read_json(folder / RECORD_FILE)
        record |= {"benchmarks": exported["benchmarks"], "files": exported["files"]}
        with replace_folder(folder, keeps_others=True) as staging:
            write_record(staging, record)
        return record

    def _add_to_ledger(self, record: Record) -> None:
        # A run that ended early, at its limit of damage for instance, ends again when it is given again.
        if self.ledger is not None and not self._is_in_ledger(record):
            append_entry(Path(self.ledger), describe_export(record, self.request))

    def _is_in_ledger(self, record: Record) -> bool:
        """Return whether the ledger has an entry of the exported weights for the request, or is to have none."""
        if self.ledger is None or record["kind"] != "unlearned":
            return True
        ledger = Path(self.ledger)
        if not ledger.is_file():
            return False
        entry = describe_export(record, self.request)
        # Not `read_ledger`: it refuses a ledger in which a line was changed, and a run appends to one all the same.
        for line in ledger.read_bytes().split(b"\n"):
            with suppress(ValueError):
                if _identify_entry(json.loads(line)) == _identify_entry(entry):
                    return True
        return False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fail the fit if the kept model is nowhere. By now everything else is written.

        Raises:
            OutputError: If it is not in the folder.
        """
        if self._problem is not None:
            raise OutputError(self._problem)

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
        """Let other runs have the folder, and say what is in it."""
        self._release_folder()
        # A run that has ended, and misses a requirement, has said it.
        if self._exported is not None and not self._is_finished:
            rank = "best" if isinstance(pl_module, LitUnlearn) else "newest"
            rank_zero_info(
                f"'{self._folder}' has the model of step {self._exported.step}, the {rank} of this run so far"
            )

    def _export_kept_model(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        kept = module.best if isinstance(module, LitUnlearn) else module.evaluator.last
        if kept is None or kept.step != trainer.global_step or kept is self._exported:
            return
        # The step alone does not tell: another callback may have exchanged the weights since they were measured.
        if kept.weights != module.lm.checksum():
            return
        rank_zero_info(f"exporting the model of step {kept.step} to {self._folder}")
        # These are collective.
        run_folder = None if module.benchmark is None else find_run_folder(trainer)
        weights = _fingerprint_export(module)
        state = whole_state(module.lm)
        if trainer.is_global_zero:
            record = self._add_outcome(kept, trainer, module)
            record["benchmarks"] = _read_benchmarks(run_folder, kept.step, module, weights)
            dtype = module.evaluator.export_dtype
            finish = partial(write_record, record=record)
            module.lm.save(str(self._folder), state, finish, dtype, find_chat_template(record))
        trainer.strategy.barrier("export")
        self._exported = kept

    def _add_outcome(self, kept: Measurement, trainer: L.Trainer, module: LitLanguageModel) -> Record:
        states = {name: constraint.state_dict() for name, constraint in get_constraints(module).items()}
        steps = {"step": kept.step, "kept_step": kept.step, "steps": trainer.global_step}
        record = {**self._record, "checksum": kept.weights}
        damage = find_damage(trainer)
        if damage is not None:
            record["damage"] = damage
        return add_outcome(record, kept.values, states, **steps)

    def state_dict(self) -> dict[str, Any]:
        """Return where the export is, and what its record says of the run so far."""
        # Absolute: the run may be resumed from another working directory.
        folder = None if self._folder is None else str(Path(self._folder).absolute())
        return {"folder": folder, "record": self._record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.earlier_folder, self._record = state_dict["folder"], state_dict.get("record", {})


def is_export_of(folder: Path, measurement: Measurement) -> bool:
    """Return whether an export is of the model that was measured."""
    # A record that is damaged or of an earlier version is of no known model.
    with suppress(OSError, ValueError):
        record = read_json(folder / RECORD_FILE)
        return (record.get("step"), record.get("checksum")) == (measurement.step, measurement.weights)
    return False


def _identify_entry(entry: Any) -> tuple[Any, ...]:
    """Return what tells an entry of a ledger from those of other models and requests."""
    if not isinstance(entry, dict):
        return ()
    return entry.get("kind"), entry.get("request"), entry.get("model")


def _fingerprint_export(module: LitLanguageModel) -> str | None:
    """Return what results of the exported weights know them by; ``None`` where the fit runs no benchmark."""
    if module.evaluator.benchmark_every_n_epochs is None:
        return None
    with module.evaluator.exported_weights():
        return fingerprint(cast(nn.Module, module.lm.model))


def _read_benchmarks(
    folder: Path | None, step: int, module: LitLanguageModel, weights: str | None
) -> list[dict[str, Any]]:
    """Return the results of the fit's benchmark, if it was run on this very model."""
    if module.benchmark is None or folder is None or weights is None:
        return []
    file = folder / f"{module.benchmark.name}-step={step}.json"
    if not file.is_file():
        return []
    results = summarize_results(file)
    # The file may be of another run that logged to the same folder.
    return [results] if results["model"]["weights"] == weights[:16] else []
