"""What a run achieved: one file, and a table for people."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.evaluation.tables import report_table
from lit_unlearn.training import LitLanguageModel, LitUnlearn, Measurement
from lit_unlearn.utils.io import write_json


class RunReport(Callback):
    """Measures the model before and after, on every row of every stream: ``report.json`` and a table.

    "After" is the model that the run keeps (see ``LitUnlearn``'s ``keep``).

    Args:
        dirpath: Folder of the file; ``None`` for the logger's.
        require_feasible: Whether the fit fails if the kept model violates a constraint on its whole stream.
        max_forget_probability: The fit fails if the forget rows' answer probability ends above it; ``None`` for no
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
        self._failures: list[str] = []
        self._before: dict[str, Any] = {}
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the reference model, unless a checkpoint brought its values."""
        self._started = time.monotonic()
        if not self._before and isinstance(pl_module, LitLanguageModel):
            self._before = {"values": pl_module.measure(), "multipliers": _multipliers(pl_module)}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures again, writes the file and prints the table."""
        if not isinstance(pl_module, LitLanguageModel):
            return
        rank_zero_info(f"fit: {trainer.global_step} steps in {time.monotonic() - self._started:.1f} s")
        content = self._content(trainer, pl_module)
        self._failures = self._check(content)
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)  # asks the first process
        if trainer.is_global_zero:
            write_json(folder / "report.json", content)
            print(report_table(content))
            rank_zero_info(f"report: {folder / 'report.json'}")
        if isinstance(pl_module, LitUnlearn) and (lesson := _lesson(content, pl_module)):
            rank_zero_warn(lesson)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fails the fit if it missed what was required; everything is written by now.

        Raises:
            RuntimeError: If the run misses a requirement.
        """
        if self._failures:
            raise RuntimeError("\n".join(self._failures))

    def _content(self, trainer: L.Trainer, module: LitLanguageModel) -> dict[str, Any]:
        kept = Measurement(trainer.global_step, module.measure())
        if isinstance(module, LitUnlearn):
            kept = module.best or kept
        constraints = {}
        for name, multiplier in _multipliers(module).items():
            values = {key: kept.values.get(f"constraint/{name}/{key}") for key in ("value", "slack")}
            constraints[name] = {
                **values,
                "epsilon": module.constraints[name].epsilon,  # type: ignore[union-attr, index]
                "multiplier_before": self._before["multipliers"][name],
                "multiplier_after": multiplier,
            }
        return {
            "steps": trainer.global_step,
            "kept_step": kept.step,
            "before": self._before["values"],
            "after": kept.values,
            "constraints": {name: c for name, c in constraints.items() if c["value"] is not None},
        }

    def _check(self, content: dict[str, Any]) -> list[str]:
        failures = []
        for name, constraint in content["constraints"].items():
            if self.require_feasible and not constraint["slack"] >= 0:
                failures.append(
                    f"constraint '{name}' is violated on its whole stream: {constraint['value']:.4g} > epsilon "
                    f"{constraint['epsilon']:.4g}; train longer, raise the multiplier's `lr`, or allow more."
                )
        probability = content["after"].get("forget/probability")
        limit = self.max_forget_probability
        if limit is not None and not (probability is not None and probability <= limit):
            failures.append(
                f"forgetting did not happen: the forget rows' answer probability ended at {probability} (limit {limit}); "
                "train longer or allow a larger epsilon."
            )
        return failures

    def state_dict(self) -> dict[str, Any]:
        """The values of the reference model, for a run that is resumed."""
        return self._before

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._before = state_dict


def _lesson(content: dict[str, Any], module: LitUnlearn) -> str | None:
    """What to do otherwise, where a run kept a model that breaks a bound, or one that forgot hardly anything."""
    if module.excess(content["after"]) > 0:
        if module.keep == "last":
            return "the last model, which `model.keep: last` keeps, breaks a bound; `best` would look for one that does not."
        return (
            f"no model that was measured holds every constraint: the run keeps the least violating one, of step "
            f"{content['kept_step']}. Train longer, raise the multipliers' `lr` or `init`, or allow a larger epsilon."
        )
    before, after = (content[time].get("forget/probability", 0.0) for time in ("before", "after"))
    if after <= before / 2:
        return None
    if content["kept_step"] < content["steps"]:
        reason = (
            "Later models forgot more and broke a bound: train longer, so that λ can bring them back, or allow more"
        )
    else:
        reason = "No bound was in the way: raise `model.optimizer.init_args.lr` (tenfold, say), or train longer"
    return f"hardly anything was forgotten: the forget answers' probability went from {before:.4g} to {after:.4g}. {reason}."


def _multipliers(module: LitLanguageModel) -> dict[str, float]:
    if not isinstance(module, LitUnlearn):
        return {}
    return {name: constraint.multiplier.value for name, constraint in module.constraints.items()}
