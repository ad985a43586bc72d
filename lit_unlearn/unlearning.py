"""The whole job in one call: load, unlearn under a bound, report, export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_unlearn.callbacks import ExportModel, RunReport, default_callbacks, default_plugins
from lit_unlearn.callbacks.report import Report
from lit_unlearn.callbacks.signals import replace_signal_handling
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Rows
from lit_unlearn.dual import Constraint, DualAscent, Multiplier, Relative
from lit_unlearn.errors import ConfigError
from lit_unlearn.models import LanguageModel
from lit_unlearn.objectives import NLL, LogitMargin, Objective
from lit_unlearn.training import LitUnlearn, Schedule
from lit_unlearn.utils.folders import check_export_target
from lit_unlearn.utils.io import expand_path


def unlearn(
    model: str | LanguageModel,
    forget: Rows,
    retain: Rows,
    output: str | Path = "unlearned",
    *,
    objective: Objective | None = None,
    epsilon: float | Relative | None = None,
    multiplier: Multiplier | None = None,
    lr: float = 1e-5,
    run_dir: str | Path | None = None,
    module: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> Report:
    """Remove the forget set from a model while its NLL on the retain set stays below a bound, and export the result.

    The defaults are those of ``configs/own_data.yaml``. For several constraints, or a method with needs of its own, compose
    `LitUnlearn`, `ForgetRetain` and a Trainer yourself.

    Args:
        model: Hub name or directory of a causal language model, or a `LanguageModel`.
        forget: Rows to forget: a file, a hub name, a ``datasets.Dataset``, a list of dicts or a `Source`.
        retain: Rows to keep, likewise.
        output: Directory for the model that the run keeps, with its record; an earlier export there is replaced.
        objective: Forgetting objective; ``None`` for `LogitMargin`.
        epsilon: Upper bound of the retain NLL, nats per token, or relative to the model before; ``None`` for ``Relative(0.1)``.
        multiplier: Policy for λ; ``None`` for ``DualAscent(lr=50, init=100)``.
        lr: Learning rate of AdamW: 1e-5 for models of a billion parameters and more, 1e-4 with LoRA, 1e-3 for tiny ones.
        run_dir: Directory for logs, report, pictures and checkpoints; ``None`` for ``<output>_run``.
        module: Further arguments of `LitUnlearn`, such as ``{"micro_batch_size": 4}``.
        data: Further arguments of `ForgetRetain`, such as ``{"batch_size": 8, "answer_column": "reply"}``.
        **trainer: Arguments of ``lightning.Trainer``, such as ``max_epochs``, ``precision`` and ``devices``.

    Returns:
        The run's report: values before and after, constraints, seconds. Printed, it is a table.

    Raises:
        LitUnlearnError: If a setting, a row or the model cannot be used; see ``lit_unlearn.errors``.

    Example:
        >>> from lit_unlearn import unlearn
        >>> report = unlearn("path/or/hub-name", "forget.jsonl", "retain.jsonl", max_epochs=20)  # doctest: +SKIP
        >>> report.after["forget/probability"], report.violated  # doctest: +SKIP
        (0.0005, [])
    """
    if "callbacks" in trainer or "logger" in trainer:
        raise ConfigError(
            "unlearn() brings its own `callbacks` and `logger`: compose a Trainer with `default_callbacks(given=…)` for others."
        )
    output = expand_path(output)
    lm = model if isinstance(model, LanguageModel) else LanguageModel(model)
    check_export_target(output, lm.inputs)  # before any work is done
    run_dir = Path(f"{output}_run") if run_dir is None else expand_path(run_dir)

    bound = Constraint(
        NLL(),
        Relative(0.1) if epsilon is None else epsilon,
        DualAscent(lr=50, init=100) if multiplier is None else multiplier,
        warmup_epochs=1,
    )
    lit_module = LitUnlearn(
        lm,
        LogitMargin() if objective is None else objective,
        {"nll": bound},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
        **{"scheduler": Schedule("linear", warmup_epochs=1), **(module or {})},
    )
    report = RunReport()
    settings = {
        "max_epochs": 20,
        # λ and slack of every step; the report measures everything before the first one.
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "logger": CSVLogger(run_dir.parent, run_dir.name),
        "callbacks": default_callbacks(
            report,
            export=ExportModel(output),
            progress_bar=trainer.get("enable_progress_bar") is not False,
            checkpoint=trainer.get("enable_checkpointing") is not False,
        ),
        "plugins": default_plugins(),
    }
    run = L.Trainer(**{**settings, **trainer})
    replace_signal_handling(run)
    run.fit(lit_module, datamodule=ForgetRetain(forget, retain, **(data or {})))
    if report.report is None:  # `fast_dev_run` and the like
        raise ConfigError("the Trainer's settings left no step to take: give `max_epochs` or `max_steps` above 0.")
    return report.report
