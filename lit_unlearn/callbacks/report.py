"""The report of a run: one JSON file, and a table on the terminal."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.callbacks.run_state import get_constraints, get_multipliers, measure_kept_model
from lit_unlearn.errors import RequirementNotMet
from lit_unlearn.evaluation.tables import report_table
from lit_unlearn.training import LitUnlearn
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.io import read_json, write_json

_MIB = 2**20


@dataclass
class Report:
    """Result of a fit, as ``report.json`` has it. Printed, it is a table.

    Args:
        steps: Optimizer steps that were taken.
        kept_step: Optimizer steps that the kept model had taken.
        before: Values of the model before the first step by ``<stream>/<metric>``, over all examples of every stream.
        after: The same values of the kept model.
        constraints: By name, ``value``, ``slack`` and ``epsilon`` of the kept model, ``multiplier_before`` and
            ``multiplier_after`` of the run.
        seconds: Duration of the fit, with the measurement before the first step, without the one after the last.
        peak_memory_mib: Largest memory of any process: of its tensors on the GPU, or resident since the process began.
        peak_memory_device: Where that memory is, ``"cuda"`` or ``"cpu"``.
    """

    steps: int
    kept_step: int
    before: dict[str, float]
    after: dict[str, float]
    constraints: dict[str, dict[str, float]]
    seconds: float = math.nan
    peak_memory_mib: float = math.nan
    peak_memory_device: str = ""

    @property
    def violated(self) -> list[str]:
        """Names of the constraints that the kept model violates."""
        # NaN compares false with everything: a slack that is not a number is a violation.
        return [name for name, values in self.constraints.items() if not values["slack"] >= 0]

    @classmethod
    def read(cls, path: Path | str) -> Report:
        """Read a report; reports of earlier versions have no seconds and no memory."""
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
        dirpath: Folder of the file; ``None`` for the logger's.
        require_feasible: Whether the fit fails if the kept model violates a constraint on its whole stream.
        max_forget_probability: The fit fails if the forget set's answer probability ends above it; ``None`` for no
            such condition.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        require_feasible: bool = False,
        max_forget_probability: float | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.require_feasible = require_feasible
        self.max_forget_probability = max_forget_probability
        self.report: Report | None = None
        self._failures: list[str] = []
        self._before: dict[str, Any] = {}
        self._start_time = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model before the first step, unless a checkpoint brought its values."""
        self._start_time = time.monotonic()
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # A resumed run begins with a model that has forgotten already: its first part measured the one before.
        if not self._before and isinstance(pl_module, LitLanguageModel):
            self._before = {"values": pl_module.measure(), "multipliers": get_multipliers(pl_module)}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the kept model, write the file and print the table."""
        if not isinstance(pl_module, LitLanguageModel):
            return
        # Before the last measurement, so that runs compare by their training.
        seconds = time.monotonic() - self._start_time
        rank_zero_info(f"fit: {trainer.global_step} steps in {seconds:.1f} s")

        report = self._make_report(trainer, pl_module, seconds)
        self.report = report
        self._failures = self.find_failures(report)
        # `log_dir` asks the first process, so every process must get here.
        path = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir) / "report.json"
        if trainer.is_global_zero:
            report.write(path)
            print(report)
            rank_zero_info(f"report: {path}")

        if isinstance(pl_module, LitUnlearn):
            hint = _find_hint(report, pl_module)
            if hint is not None:
                rank_zero_warn(hint)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fail the fit if it missed a requirement. By now report, pictures and export are written.

        Raises:
            RequirementNotMet: If the kept model violates a constraint, or too little was forgotten.
        """
        if self._failures:
            raise RequirementNotMet("\n".join(self._failures))

    def _make_report(self, trainer: L.Trainer, module: LitLanguageModel, seconds: float) -> Report:
        measurement = measure_kept_model(module)
        constraints = {}
        for name, constraint in get_constraints(module).items():
            # Without validation examples of its stream, a constraint has no value to report.
            if f"constraint/{name}/value" in measurement.values:
                constraints[name] = {
                    "value": measurement.values[f"constraint/{name}/value"],
                    "slack": measurement.values[f"constraint/{name}/slack"],
                    "epsilon": constraint.epsilon,
                    "multiplier_before": self._before["multipliers"][name],
                    "multiplier_after": constraint.multiplier.value,
                }
        device = trainer.strategy.root_device
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

        limit = self.max_forget_probability
        probability = report.after.get("forget/probability", math.nan)
        if limit is not None and not probability <= limit:
            failures.append(
                f"too little was forgotten: the forget set's answer probability ended at {probability:.4g}, above "
                f"`max_forget_probability` ({limit}). Train longer or allow a larger `epsilon`."
            )
        return failures

    def state_dict(self) -> dict[str, Any]:
        """Return the values before the first step, for a run that is resumed."""
        return self._before

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._before = state_dict


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS: see getrusage(2) of either.
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def _find_hint(report: Report, module: LitUnlearn) -> str | None:
    """Return what to change where the kept model violates a constraint or has hardly forgotten anything."""
    # Ordered by what to do first: without a feasible model, how much was forgotten is not meaningful.
    if module.excess(report.after) > 0:
        if module.keep == "last":
            return "the last model violates a constraint. `keep='best'` would keep one that does not, if there is one."
        return (
            f"no measured model satisfies every constraint: the run keeps the least violating one, of step "
            f"{report.kept_step}. Train longer, raise the multipliers' `lr` or `init`, or allow a larger `epsilon`."
        )

    before = report.before.get("forget/probability", 0.0)
    after = report.after.get("forget/probability", 0.0)
    if after <= before / 2:
        return None
    if report.kept_step < report.steps:
        reason = "Later models forgot more, but violated a constraint: train longer, or allow a larger `epsilon`"
    else:
        reason = "No constraint prevented it: raise the optimizer's `lr` (try ten times as much), or train longer"
    return f"hardly anything was forgotten: the forget set's answer probability went from {before:.4g} to {after:.4g}. {reason}."
