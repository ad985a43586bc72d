"""A run that is given again after it has finished: what is said, and whether that is a success."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.callbacks.export import ExportModel, is_export_of
from lit_unlearn.callbacks.report import Report, RunReport
from lit_unlearn.callbacks.run_state import get_constraints
from lit_unlearn.errors import ConfigError, RequirementNotMet
from lit_unlearn.evaluation.verdict import decide, get_slack
from lit_unlearn.export.record import RECORD_FILE, digest_export
from lit_unlearn.training import LitUnlearn
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import is_dry_run
from lit_unlearn.utils.io import read_json


class FinishedRun(Callback):
    """End a fit that has no step left: well if its export is there and is of this run, else with what to do.

    A script that always gives ``--ckpt_path last`` would otherwise take an exit code of 0 for a new model. If the run was
    interrupted between its last checkpoint and its end, report, record and ledger entry are written first.
    """

    def __init__(self) -> None:
        self._has_trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        self._has_trained = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the fit takes steps."""
        self._has_trained = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that there was nothing to do.

        Raises:
            ConfigError: If the settings left no step to take.
            RequirementNotMet: If the export of the finished run is not there, is another one, or misses what is required.
        """
        if self._has_trained or not isinstance(pl_module, LitLanguageModel):
            return
        step = trainer.global_step
        if step == 0:
            raise ConfigError(
                "the settings of the Trainer or of the data left no step to take, so there is no model to export."
            )
        exporter = next((c for c in trainer.callbacks if isinstance(c, ExportModel)), None)  # type: ignore[attr-defined]
        _finish_interrupted_run(trainer, pl_module, exporter)
        # One process looks, and all end alike.
        problem, folder = None, None
        if exporter is not None:
            folder = find_export(exporter)
            kept_step, checksum = _find_kept_model(trainer, pl_module, folder)
            if trainer.is_global_zero:
                record = exporter.state_dict()["record"]
                problem = find_export_problem(folder, record, step, kept_step, checksum)
            problem = trainer.strategy.broadcast(problem)
        place = f"; the model is in {folder}" if folder is not None and problem is None else ""
        rank_zero_info(f"already finished at step {step}: nothing to do{place}")
        if problem is not None:
            raise RequirementNotMet(f"{problem} {_describe_remedy(trainer, pl_module, exporter, folder)}")
        if folder is not None:
            failures = _find_missed_requirements(trainer, pl_module, folder)
            if failures:
                raise RequirementNotMet("\n".join(failures))


def _finish_interrupted_run(trainer: L.Trainer, module: LitLanguageModel, exporter: ExportModel | None) -> None:
    """Write what a run that was interrupted after its last checkpoint has not written at its end; a collective call."""
    folder = None if exporter is None else find_export(exporter)
    if folder is None or not isinstance(module, LitUnlearn) or module.best is None or is_dry_run(trainer):
        return
    # The last model is not measured now: `WeightAveraging` and the like exchange weights only while a fit takes steps.
    kept = module.best
    if module.keep == "last" and kept.step != trainer.global_step:
        return
    # At its end, a run may have measured and exported a better model, of which its last checkpoint does not know.
    is_there = trainer.is_global_zero and is_export_of(folder, kept)
    if not trainer.strategy.broadcast(is_there):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunReport | ExportModel):
            callback.finish(trainer, module, kept)


def _find_kept_model(trainer: L.Trainer, module: LitLanguageModel, folder: Path | None) -> tuple[int, str | None]:
    """Return step and checksum of the model that a finished run keeps; a collective call. The checksum may not be known."""
    best = module.best if isinstance(module, LitUnlearn) else None
    step = trainer.global_step
    # At its end, a run measures the last model if no validation has. It may have turned out to be the best one, of which the last
    # checkpoint does not know.
    is_last = False
    if trainer.is_global_zero and step != module.kept_step and folder is not None and (folder / RECORD_FILE).is_file():
        is_last = read_json(folder / RECORD_FILE).get("step") == step
    if trainer.strategy.broadcast(is_last):
        return step, module.lm.checksum()
    return module.kept_step, None if best is None else best.weights


def find_export(exporter: ExportModel) -> Path | None:
    """Return where a run's export should be, as the callback is configured now, or else as its checkpoint says."""
    folder = exporter.dirpath or exporter.earlier_folder
    return None if folder is None else Path(folder)


def find_export_problem(
    folder: Path | None, record: dict[str, Any], steps: int, kept_step: int, checksum: str | None = None
) -> str | None:
    """Return what keeps a folder from being the export of a finished run; ``None`` if it is.

    Args:
        folder: Where the export should be; ``None`` if nothing says where.
        record: The run's, from its checkpoint.
        steps: Steps that the run has taken.
        kept_step: Step of the model that it keeps.
        checksum: Of that model's weights; ``None`` if the checkpoint does not say.
    """
    if folder is None or not (folder / RECORD_FILE).is_file():
        return f"the run has finished, but there is no export with a record in '{folder}'."
    exported = read_json(folder / RECORD_FILE)
    expected: dict[str, Any] = {"steps": steps, "step": kept_step}
    if checksum is not None:
        expected["checksum"] = checksum
    for key, value in expected.items():
        if exported.get(key) != value:
            return f"the export in '{folder}' is not that of this run: its record has `{key}` {exported.get(key)}, not {value}."
    for key in ("model", "data"):
        if record and _identify(exported.get(key)) != _identify(record.get(key)):
            return f"the export in '{folder}' is not that of this run: its record has another `{key}`."
    if digest_export(folder) != exported["files"]:
        return (
            f"the files in '{folder}' are no longer those that the run exported: their sha256 differs from its record."
        )
    return None


def _identify(part: Any) -> Any:
    """Return the digests in a part of a record, by which a moved model or data file is still the same."""
    if not isinstance(part, dict):
        return part
    sets = {name: fields.get("sha256") for name, fields in part.get("sets", {}).items()}
    return part.get("weights"), sets


def _find_missed_requirements(trainer: L.Trainer, module: LitLanguageModel, folder: Path) -> list[str]:
    """Return which requirements the exported model misses: a run that ended with exit code 1 does so again."""
    reporter = next((c for c in trainer.callbacks if isinstance(c, RunReport)), None)  # type: ignore[attr-defined]
    if reporter is None:
        return []
    record = read_json(folder / RECORD_FILE)
    constraints = {}
    for name, constraint in get_constraints(module).items():
        value, epsilon = record["after"].get(f"constraint/{name}/value"), constraint.epsilon
        if value is not None and epsilon is not None:
            constraints[name] = {"value": value, "epsilon": epsilon, "slack": get_slack(value, epsilon)}
    report = Report(record["steps"], record["step"], record["before"], record["after"], constraints)
    if isinstance(module, LitUnlearn):
        report.max_forget_probability = reporter.max_forget_probability
        report.verdict = decide(report.before, report.after, reporter.max_forget_probability)
    return reporter.find_failures(report)


def _describe_remedy(trainer: L.Trainer, module: LitLanguageModel, exporter: Any, folder: Path | None) -> str:
    earlier = None if exporter is None else exporter.earlier_folder
    if (
        earlier is not None
        and folder is not None
        and Path(earlier).is_dir()
        and Path(earlier).resolve() != folder.resolve()
    ):
        return (
            f"It exported to '{earlier}': copy that. To train again, leave out `ckpt_path` or give another `logs.name`."
        )
    if module.kept_step == trainer.global_step and trainer.ckpt_path:
        return f"Make it with `lit-unlearn export {trainer.ckpt_path} {folder or 'DIR'}`."
    return "To train again, leave out `ckpt_path` or give another `logs.name`."
