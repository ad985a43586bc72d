"""The report of a run: one JSON file, and a table on the terminal."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.callbacks.advice import rounds_steps_away
from lit_unlearn.callbacks.damage import find_damage
from lit_unlearn.callbacks.run_state import get_constraints, get_multipliers, measure_kept_model
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.errors import RequirementNotMet
from lit_unlearn.evaluation.tables import report_table
from lit_unlearn.evaluation.verdict import (
    FORGOTTEN,
    MAX_FORGET_PROBABILITY,
    NOT_DECIDABLE,
    decide,
    explain_verdict,
    get_slack,
    is_feasible,
)
from lit_unlearn.export.record import digest_examples
from lit_unlearn.plotting.run_log import REPORT_FILE
from lit_unlearn.training import LitUnlearn, Measurement
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.io import expand_home, read_json, write_json
from lit_unlearn.utils.validation import check_number

_MIB = 2**20
_UNKNOWN_ROWS = (
    "The likely reason why the model does not know these rows in this prompt is that it was fine-tuned with another one: "
    "look at it with `lit-unlearn inspect`, and set the data's `chat` or `template`. If the model never saw the rows, there is nothing to "
    "unlearn."
)


@dataclass
class Report:
    """Result of a fit, as ``report.json`` has it. Printed, it is a table.

    Args:
        steps: Optimizer steps that were taken.
        kept_step: Optimizer steps that the kept model had taken.
        before: Values of the model before the first step by ``<stream>/<metric>``, over all examples of every stream.
        after: The same values of the kept model.
        constraints: By name, ``value``, ``slack`` and ``epsilon`` of the kept model, ``multiplier_before`` and
            ``multiplier_after`` of the run, and the ``stream``.
        seconds: Duration of the fit, with the measurement before the first step, without the one after the last; NaN, as
            the memory, if the run was interrupted at its end, and another process wrote the report.
        peak_memory_mib: Largest memory of any process: of its tensors on the GPU, or resident since the process began.
        peak_memory_device: Where that memory is, ``"cuda"`` or ``"cpu"``.
        verdict: ``"forgotten"``, ``"not forgotten"`` or ``"not decidable"``, see `lit_unlearn.evaluation.verdict.decide`;
            ``None`` for fine-tuning.
        max_forget_probability: The threshold of the verdict.
        keep: ``"best"`` or ``"last"``, as for `LitUnlearn`.
        damage: Where the run ended, see `StopAtDamage`; ``None`` if it measured no damage.
        example: ``tokens`` of the first forget example and which of them are ``supervised``; only if the data module's
            ``show_example`` is true, because it is text of a row.
        data: By stream, its number of examples as ``rows`` and the ``sha256`` of their tokens, as in the record of an export; empty
            for a data module of another kind.
    """

    steps: int
    kept_step: int
    before: dict[str, float]
    after: dict[str, float]
    constraints: dict[str, dict[str, Any]]
    seconds: float = math.nan
    peak_memory_mib: float = math.nan
    peak_memory_device: str = ""
    verdict: str | None = None
    max_forget_probability: float = MAX_FORGET_PROBABILITY
    keep: str = "best"
    example: dict[str, list[Any]] | None = None
    damage: dict[str, Any] | None = None
    # Reports of earlier versions lack it.
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def violated(self) -> list[str]:
        """Names of the constraints that the kept model violates."""
        return [
            name for name, values in self.constraints.items() if not is_feasible(values["value"], values["epsilon"])
        ]

    @classmethod
    def read(cls, path: Path | str) -> Report:
        """Read a report."""
        return cls(**read_json(Path(path)))

    def write(self, path: Path | str) -> None:
        """Write the report as JSON."""
        write_json(Path(path), dataclasses.asdict(self))

    def __str__(self) -> str:
        return report_table(dataclasses.asdict(self))


class RunReport(Callback):
    """Measure the model before and after a fit on every example of every stream: ``report.json`` and a table.

    "After" is the model that the run keeps (see ``LitUnlearn``'s ``keep``). `report` is the result of the last fit.

    Args:
        dirpath: Folder of the file; ``None`` for the run's.
        require_feasible: Whether the fit fails if the kept model violates a constraint on its whole stream.
        max_forget_probability: The forget set counts as forgotten if its mean answer probability was above this number
            before, and is not any more; see ``Report.verdict``.
        require_forgotten: Whether the fit fails unless the verdict is "forgotten".

    Raises:
        ConfigError: If ``max_forget_probability`` is not between 0 and 1.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        require_feasible: bool = False,
        max_forget_probability: float = MAX_FORGET_PROBABILITY,
        require_forgotten: bool = False,
    ) -> None:
        check_number(self, "max_forget_probability", max_forget_probability, at_least=0, below=1)
        self.dirpath = None if dirpath is None else expand_home(dirpath)
        self.require_feasible = require_feasible
        self.max_forget_probability = max_forget_probability
        self.require_forgotten = require_forgotten
        self.report: Report | None = None
        self._failures: list[str] = []
        self._before: dict[str, Any] = {}
        self._file: str | None = None  # of the start that trained last
        self._start_time = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model before the first step, unless a checkpoint brought its values."""
        self._start_time, self._first_step = time.monotonic(), trainer.global_step
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # A resumed run begins with a model that has forgotten already: its first part measured the one before.
        if not self._before and isinstance(pl_module, LitLanguageModel):
            self._before = {"values": pl_module.measure(), "multipliers": get_multipliers(pl_module)}
        if isinstance(pl_module, LitLanguageModel) and not is_dry_run(trainer):
            # Absolute: the run may be resumed from another working directory.
            self._file = str(self._choose_file(trainer).absolute())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the kept model, write the file and print the table."""
        if not isinstance(pl_module, LitLanguageModel):
            return
        # Before the last measurement, so that runs compare by their training.
        seconds = time.monotonic() - self._start_time
        rank_zero_info(f"fit: {trainer.global_step - self._first_step} steps in {seconds:.1f} s")

        report = self._make_report(trainer, pl_module, measure_kept_model(pl_module), seconds)
        # Every process asks for the run's folder.
        self._publish(trainer, pl_module, report, None if is_dry_run(trainer) else self._choose_file(trainer))

    def finish(self, trainer: L.Trainer, module: LitUnlearn, kept: Measurement) -> None:
        """Report a run that was interrupted after its last checkpoint, before `on_train_end`; a collective call.

        Args:
            trainer: Of a fit that resumed the run, and had no step left.
            module: Of the run.
            kept: Measurement of the model that the run keeps.
        """
        # Not the folder of this start: the next one would not find the report there, and write another.
        name = self._file if self.dirpath is None else str(Path(self.dirpath) / REPORT_FILE)
        # A checkpoint of an earlier version does not say where the report was.
        if name is None or not self._before:
            return
        file = Path(name)
        # A run that was moved has its report somewhere else.
        was_moved = self.dirpath is None and not file.parent.is_dir()
        is_missing = not was_moved and not _is_report_of(file, trainer.global_step, kept.step)
        # The first process decides: the others may not see its disk.
        if not trainer.strategy.broadcast(is_missing):
            return

        report = self._make_report(trainer, module, kept, seconds=math.nan)
        # What the steps took is not known: this process has taken none.
        report.peak_memory_mib, report.peak_memory_device = math.nan, ""
        self._publish(trainer, module, report, file)

    def _choose_file(self, trainer: L.Trainer) -> Path:
        """Return the file of this start of the run; a collective call."""
        return Path(self.dirpath or find_run_folder(trainer)) / REPORT_FILE

    def _publish(self, trainer: L.Trainer, module: LitLanguageModel, report: Report, file: Path | None) -> None:
        """Print a report with its hints, and write it unless there is no file to write."""
        self.report = report
        self._failures = self.find_failures(report)
        if trainer.is_global_zero:
            print(report)
        if file is not None:
            if trainer.is_global_zero:
                report.write(file)
            rank_zero_info(f"report: {file}")

        if isinstance(module, LitUnlearn):
            for hint in _find_hints(report, module, rounds_steps_away(trainer)):
                rank_zero_warn(hint)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fail the fit if it missed a requirement. By now report, pictures and export are written.

        Raises:
            RequirementNotMet: If the kept model violates a constraint, or too little was forgotten.
        """
        if self._failures:
            raise RequirementNotMet("\n".join(self._failures))

    def _make_report(
        self, trainer: L.Trainer, module: LitLanguageModel, measurement: Measurement, seconds: float
    ) -> Report:
        constraints = {}
        for name, constraint in get_constraints(module).items():
            # Without validation examples of its stream, a constraint has no value to report.
            value = measurement.values.get(f"constraint/{name}/value")
            if value is not None:
                constraints[name] = {
                    "value": value,
                    "slack": get_slack(value, constraint.epsilon),
                    "epsilon": constraint.epsilon,
                    "stream": constraint.stream,
                    "multiplier_before": self._before["multipliers"][name],
                    "multiplier_after": constraint.multiplier.value,
                }
        device = trainer.strategy.root_device
        data = getattr(trainer, "datamodule", None)
        verdict, keep = None, "last"
        if isinstance(module, LitUnlearn):
            verdict = decide(self._before["values"], measurement.values, self.max_forget_probability)
            keep = module.keep
        return Report(
            steps=trainer.global_step,
            kept_step=measurement.step,
            before=self._before["values"],
            after=measurement.values,
            constraints=constraints,
            seconds=seconds,
            # The process that needs most decides whether a run fits.
            peak_memory_mib=max(gather_objects(_peak_memory_mib(device))),
            peak_memory_device="cuda" if device.type == "cuda" else "cpu",
            verdict=verdict,
            max_forget_probability=self.max_forget_probability,
            keep=keep,
            example=getattr(data, "shown_example", None),
            damage=find_damage(trainer),
            data=_describe_streams(data),
        )

    def find_failures(self, report: Report) -> list[str]:
        """Return which requirements a run missed, with what to do; empty if it met them all."""
        failures = []
        for name in report.violated if self.require_feasible else ():
            values = report.constraints[name]
            failures.append(
                f"constraint '{name}' is violated on its whole stream: {values['value']:.4g} > epsilon "
                f"{values['epsilon']:.4g}. Train longer, raise the multiplier's `lr`, or allow a larger `epsilon`."
            )

        if self.require_forgotten and report.verdict is not None and report.verdict != FORGOTTEN:
            explanation = explain_verdict(report.before, report.after, self.max_forget_probability)
            failures.append(
                f"the forget set must be forgotten (`require_forgotten`, by `max_forget_probability`), and is {explanation}. "
                f"{_find_remedy(report)}"
            )
        return failures

    def state_dict(self) -> dict[str, Any]:
        """Return the values before the first step, and where the report will be, for a run that is resumed."""
        return {**self._before, "file": self._file}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._before = dict(state_dict)
        # Missing in checkpoints of an earlier version.
        self._file = self._before.pop("file", None)


def _is_report_of(file: Path, steps: int, kept_step: int) -> bool:
    """Return whether a file is the report of a run that took these steps and kept this model."""
    # One that is damaged is of no run.
    with suppress(OSError, ValueError):
        report = read_json(file)
        return (report.get("steps"), report.get("kept_step")) == (steps, kept_step)
    return False


def _describe_streams(data: Any) -> dict[str, dict[str, Any]]:
    """Return rows and digest of every stream, by which two reports are known to be of the same examples."""
    streams = {}
    if isinstance(data, ForgetRetain):
        for name, examples in data.examples.items():
            streams[name] = {"rows": len(examples), "sha256": digest_examples(examples)}
    return streams


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS: see getrusage(2) of either.
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def _find_remedy(report: Report) -> str:
    if report.verdict == NOT_DECIDABLE:
        return _UNKNOWN_ROWS
    return "Train longer, raise the optimizer's `lr`, or allow a larger `epsilon`."


def _find_hints(report: Report, module: LitUnlearn, are_steps_lost: bool) -> list[str]:
    """Return what to change where nothing can be shown, a constraint is violated, or hardly anything was forgotten.

    Args:
        report: Of the run.
        module: Of the run.
        are_steps_lost: Whether most 16-bit weights were rounded back to where they were.
    """
    hints = []
    before, after = report.before.get("forget/probability"), report.after.get("forget/probability")
    is_unknown = before is not None and before <= report.max_forget_probability
    if is_unknown:
        hints.append(
            f"it cannot be shown that anything was forgotten: before unlearning, the forget set's answer probability was {before:.4g}"
            f", at most the {report.max_forget_probability:g} that counts as forgotten. {_UNKNOWN_ROWS}"
        )

    if module.excess(report.after) > 0:
        if report.damage is not None:
            hints.append(
                "the last model violates a constraint: the run ends at its limit of damage, whatever that costs."
            )
        elif module.keep == "last":
            hints.append(
                "the last model violates a constraint. `keep='best'` would keep one that does not, if there is one."
            )
        else:
            hints.append(
                f"no measured model satisfies every constraint: the run keeps the least violating one, of step "
                f"{report.kept_step}. Train longer, raise the multipliers' `lr` or `init`, or allow a larger `epsilon`."
            )
        # Without a feasible model, how much was forgotten is not meaningful.
        return hints

    # A higher learning rate would not help against rows that the model does not know.
    if is_unknown or before is None or after is None or after <= before / 2:
        return hints
    if report.damage is not None and report.damage["reached"]:
        reason = "The run ended at its limit of damage: the method forgets no more at that cost"
    elif report.kept_step < report.steps:
        reason = "Later models forgot more, but violated a constraint: train longer, or allow a larger `epsilon`"
    elif are_steps_lost:
        # Ten times the rate would still be lost, or break the constraint at once.
        reason = (
            "Most 16-bit weights did not move, because the steps are smaller than their spacing: set the Trainer's `precision` to "
            "'32-true' or 'bf16-mixed'"
        )
    else:
        reason = "No constraint prevented it: raise the optimizer's `lr` (try ten times as much), or train longer"
    hints.append(
        f"hardly anything was forgotten: the forget set's answer probability went from {before:.4g} to {after:.4g}. {reason}."
    )
    return hints
