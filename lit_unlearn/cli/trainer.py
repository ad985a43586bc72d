"""``lit-unlearn fit|validate|test``: LightningCLI with this package's classes and defaults."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from lit_unlearn import training  # noqa: F401
from lit_unlearn.callbacks import (
    AtomicCheckpointIO,
    ExportModel,
    ProgressBar,
    ResumeCheckpoint,
    RunAdvice,
    RunPicture,
    RunReport,
)
from lit_unlearn.cli.errors import ReadableErrors
from lit_unlearn.cli.print_config import readable
from lit_unlearn.cli.settings import SaveSettings, check_trainer
from lit_unlearn.data import base, fictional_authors, muse, tofu  # noqa: F401  (imported, so that short class names resolve)
from lit_unlearn.evaluation.muse import MUSEBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.qa import QABenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.stress import StressBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.tofu import TOFUBenchmark  # noqa: F401  (likewise)
from lit_unlearn.training.strategies import leave_process_group


class Parser(ReadableErrors, LightningArgumentParser):
    """Says what is wrong in a line or two, and prints a configuration in the order in which people read it."""

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """YAML; that of `--print_config` is for people unless a flag, as in ``=skip_default``, asks for another."""
        text: str = super().dump(namespace, *args, **kwargs)
        printed = getattr(getattr(self, "parent_parser", None), "print_config", {})
        if not printed or {"skip_default", "with_comments"} & printed.keys() or printed.get("skip_unset"):
            return text
        changed = super().dump(namespace, *args, **kwargs, skip_default=True)
        return readable(yaml.safe_load(text), yaml.safe_load(changed), text.partition("\n")[0])


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
                "model": {"class_path": "lit_unlearn.training.LitUnlearn"},
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


_CHATTER = re.compile(
    r"(\[rank: \d+\] )?(GPU available|TPU available|💡 Tip|Seed set to|Loading `train_dataloader`|`Trainer\.|Restored all"
    r"|Initializing distributed: |-+\ndistributed_backend="
    r"|Failed to load CPU gemm_4bit_forward)"  # transformers' schedules import peft, which imports bitsandbytes
)
_CHATTERERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "bitsandbytes.backends.cpu.ops",
)
_format_warning = warnings.formatwarning


def _quieten() -> None:
    """Leaves one line per phase and per warning: drops what libraries say of themselves and nobody can act on."""
    for name in _CHATTERERS:
        logging.getLogger(name).addFilter(lambda record: not _CHATTER.match(record.getMessage()))
    for message in (
        "LeafSpec",
        "does not have many workers",
        "pre-optimization state was saved",
        "dataloader is not resum",
        "Checkpoint directory .* exists and is not empty",  # the runs of a name share it
        "sync_dist=True",  # what is logged is the same on every process
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    warnings.formatwarning = _one_line
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package without the place in its code, which says nothing to users."""
    ours = issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1])
    return f"warning: {message}\n" if ours else _format_warning(message, category, filename, lineno, line)
