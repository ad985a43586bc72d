"""What people see of a run: progress, report, picture."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.evaluation import picture, report
from lit_unlearn.module import LitLanguageModel, LitUnlearn, Measurement


class ProgressBar(TQDMProgressBar):
    """A plain bar with every multiplier and slack by its short name.

    Lightning's default, where rich is installed (transformers brings it), redraws so slowly that steps of a tiny model
    take several times as long.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        """``refresh_rate``: steps per update; ``None`` for every one on a terminal, every hundredth elsewhere."""
        super().__init__(refresh_rate or (1 if sys.stdout.isatty() else 100))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """λ and slack of every constraint, and what else asked for a place."""
        shown = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            kind, _, rest = name.partition("/")
            short = {"multiplier": f"λ {rest}", "constraint": f"slack {rest.partition('/')[0]}"}
            shown[short.get(kind, name)] = value
        shown.pop("v_num", None)
        return shown


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
            report.write_json(folder / "report.json", content)
            print(report.table(content))
            rank_zero_info(f"report: {folder / 'report.json'}")
        if isinstance(pl_module, LitUnlearn) and pl_module.excess(content["after"]) > 0:
            rank_zero_warn(
                f"no model that was measured holds every constraint: the run keeps the least violating one, of step "
                f"{content['kept_step']}. Train longer, raise the multipliers' `lr` or `init`, or allow a larger epsilon."
            )

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


def _multipliers(module: LitLanguageModel) -> dict[str, float]:
    if not isinstance(module, LitUnlearn):
        return {}
    return {name: constraint.multiplier.value for name, constraint in module.constraints.items()}
