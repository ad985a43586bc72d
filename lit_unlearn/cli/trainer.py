"""``lit-unlearn fit|validate|test``: LightningCLI with this package's classes and defaults."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

import lit_unlearn.data
import lit_unlearn.module  # noqa: F401  (imported, so that short class names resolve)
from lit_unlearn.callbacks import (
    AtomicCheckpointIO,
    ExportModel,
    ProgressBar,
    ResumeCheckpoint,
    RunAdvice,
    RunPicture,
    RunReport,
)
from lit_unlearn.cli.errors import shorten
from lit_unlearn.cli.settings import SaveSettings, check_trainer
from lit_unlearn.module.strategies import leave_process_group


class Parser(LightningArgumentParser):
    """Says what is wrong in a line or two, without the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the command with the innermost reason; the parsers of nested values raise instead, as they should."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"lit-unlearn: error: {shorten(message)}\n")


@dataclass(frozen=True)
class Logs:
    """Where a run's numbers go, as CSV and for TensorBoard: ``<save_dir>/<name>/version_<n>``, unless `trainer.logger` is set.

    Args:
        save_dir: Folder of all runs.
        name: Of the run; every start of it has a version of its own.
    """

    save_dir: str = "runs"
    name: str = "unlearn"

    def loggers(self) -> list[Logger]:
        """The loggers, which share a folder."""
        table = CSVLogger(self.save_dir, self.name)
        return [table, TensorBoardLogger(self.save_dir, self.name, version=table.version)]


class UnlearnCLI(LightningCLI):
    """LightningCLI that knows `LitUnlearn` as the default model and ends a fit with report, picture and export."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run and the defaults of short runs."""
        parser.add_class_arguments(Logs, "logs")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(RunPicture, "picture")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.set_defaults(
            {
                "model": {"class_path": "lit_unlearn.module.LitUnlearn"},
                "trainer.log_every_n_steps": 1,  # λ and slack of every step
                "trainer.num_sanity_val_steps": 0,  # the report measures everything before the first step
                "trainer.enable_model_summary": False,  # one line says it
            }
        )

    def before_instantiate_classes(self) -> None:
        """Refuses Trainer flags that cannot work; moves the clipping flag to the module, where it can."""
        config = self.config[self.subcommand]
        check_trainer(config.trainer)
        benchmark_only = config.model.class_path.endswith("LitEvaluate")
        if benchmark_only and "verbose" in config:
            config.verbose = False  # the benchmark prints its own table
        if config.get("data") is None and not benchmark_only:
            raise ValueError(
                "there are no rows: set `data`, such as `{class_path: ForgetRetain, init_args: {forget: …, retain: …}}`. Only "
                "LitEvaluate, which runs a benchmark, needs none."
            )
        if config.trainer.gradient_clip_val is not None:
            config.model.init_args.gradient_clip_val = config.trainer.gradient_clip_val
            config.trainer.gradient_clip_val = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds loggers, progress, resumable checkpoints and whole-or-absent writing, unless there are or shall be none."""
        config, logs = self.config_init[self.subcommand].trainer, self.config_init[self.subcommand].logs
        if config.logger is None:
            kwargs["logger"] = logs.loggers()
        callbacks, plugins = _listed(config.callbacks), _listed(config.plugins)
        if config.enable_progress_bar is not False and not _has(callbacks, BaseProgressBar):
            callbacks.append(ProgressBar())
        if not _has(callbacks, RunAdvice):
            callbacks.append(RunAdvice())
        if config.enable_checkpointing is not False and not _has(callbacks, ResumeCheckpoint):
            callbacks.append(ResumeCheckpoint())
        if not _has(plugins, CheckpointIO):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)


def _listed(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list) else [] if value is None else [value]


def _has(objects: list[Any], kind: type) -> bool:
    return any(isinstance(thing, kind) for thing in objects)


def run(arguments: list[str]) -> None:
    """Parses and runs one command."""
    _quieten()
    sys.argv[1:] = arguments  # where LightningCLI, and the processes it may start, look for them
    try:
        UnlearnCLI(
            L.LightningModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            seed_everything_default=0,
            save_config_callback=SaveSettings,
            save_config_kwargs={"overwrite": True},
        )
    finally:
        leave_process_group()


def _quieten() -> None:
    """Leaves one line per phase: drops Lightning's advertisements and a warning about its own code."""
    chatter = ("GPU available", "TPU available", "💡 Tip", "Seed set to", "Loading `train_dataloader`", "`Trainer.")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(chatter))
    for message in (
        "LeafSpec",
        "does not have many workers",
        "pre-optimization state was saved",
        "dataloader is not resum",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is the same on every process
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
