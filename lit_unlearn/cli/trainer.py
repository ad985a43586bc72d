"""Run ``lit-unlearn fit|validate|test``: LightningCLI with this package's classes and defaults."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_unlearn import training  # noqa: F401
from lit_unlearn.callbacks import (
    AttachFiles,
    ExportModel,
    RunPicture,
    RunReport,
    StopAtDamage,
    default_callbacks,
    default_plugins,
)
from lit_unlearn.callbacks.audit import AuditPlan
from lit_unlearn.callbacks.signals import replace_signal_handling
from lit_unlearn.cli.keys import find_keys
from lit_unlearn.cli.main import TRAINER_COMMANDS
from lit_unlearn.cli.parser import ReadableErrors, explain, raise_typed_cause
from lit_unlearn.cli.settings import SaveSettings, check_constraint_names, check_trainer, format_settings
from lit_unlearn.data import base, fictional_authors, lume, muse, tofu  # noqa: F401  (imported, so that short class names resolve)
from lit_unlearn.errors import ConfigError, LitUnlearnError
from lit_unlearn.evaluation.harness import LMEvalBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.leakage import LeakBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.lume import LUMEBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.muse import MUSEBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.qa import QABenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.stress import StressBenchmark  # noqa: F401  (likewise)
from lit_unlearn.evaluation.tofu import TOFUBenchmark  # noqa: F401  (likewise)
from lit_unlearn.training.checkpoint_files import check_sharding, open_checkpoint
from lit_unlearn.training.run_folder import is_dry_run
from lit_unlearn.training.strategies import leave_process_group, shards
from lit_unlearn.utils.io import check_writable, expand_home


class Parser(ReadableErrors, LightningArgumentParser):
    """LightningArgumentParser with readable errors, and a ``--print_config`` in the order in which people read."""

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Return YAML, for people unless a flag of ``--print_config``, as in ``=skip_default``, asks for something else."""
        text: str = super().dump(namespace, *args, **kwargs)
        flags = getattr(getattr(self, "parent_parser", None), "print_config", {})
        if not flags or {"skip_default", "with_comments"} & flags.keys() or flags.get("skip_unset"):
            return text
        changed = super().dump(namespace, *args, **kwargs, skip_default=True)
        return format_settings(yaml.safe_load(text), yaml.safe_load(changed), text.partition("\n")[0])


@dataclass(frozen=True)
class Logs:
    """Folder of a run's numbers, as CSV and for TensorBoard: ``<save_dir>/<name>/version_<n>``, unless `trainer.logger` is set.

    Args:
        save_dir: Folder of all runs.
        name: Of the run; every start of it has its own version.
    """

    save_dir: str = "runs"
    name: str = "unlearn"

    def build_loggers(self) -> list[Logger]:
        """Return the loggers, which share a folder."""
        save_dir = expand_home(self.save_dir)
        table = CSVLogger(save_dir, self.name)
        return [table, TensorBoardLogger(save_dir, self.name, version=table.version)]


class UnlearnCLI(LightningCLI):
    """LightningCLI that knows `LitUnlearn` as the default model and ends a fit with report, picture and export.

    Args:
        commands: The commands to build parsers for. All three take three times as long as the one that runs.
        trainer_class: Has a method for each.
    """

    def __init__(self, commands: tuple[str, ...], trainer_class: type[L.Trainer] = L.Trainer) -> None:
        self._commands = commands
        try:
            super().__init__(
                L.LightningModule,
                trainer_class=trainer_class,
                subclass_mode_model=True,
                auto_configure_optimizers=False,
                parser_class=Parser,
                seed_everything_default=0,
                save_config_callback=SaveSettings,
            )
        except LitUnlearnError as error:
            # Whatever has raised it knows a Python argument; only here is known what the argument came from.
            if config := getattr(self, "config", None):
                error.keys = find_keys(config[config.subcommand].as_dict(), error)
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the commands, with the arguments of the Trainer's methods that are no options."""
        return {command: arguments for command, arguments in super().subcommands().items() if command in self._commands}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of every run and the defaults of short runs."""
        parser.add_class_arguments(Logs, "logs")
        parser.add_class_arguments(RunReport, "report")
        parser.add_class_arguments(RunPicture, "picture")
        parser.add_class_arguments(ExportModel, "export")
        parser.add_class_arguments(AttachFiles, "attach")
        parser.add_class_arguments(AuditPlan, "audit")
        parser.add_class_arguments(StopAtDamage, "damage")
        parser.set_defaults(
            {
                "model": {"class_path": "lit_unlearn.training.LitUnlearn"},
                # So that λ and slack of every step are drawn.
                "trainer.log_every_n_steps": 1,
                # The report measures everything before the first step.
                "trainer.num_sanity_val_steps": 0,
                # The module logs one line about the model.
                "trainer.enable_model_summary": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        # Lightning's own reads all weights in search of hyperparameters, which our modules do not save, and ends with a
        # traceback if the file is damaged.
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path in ("best", "hpc"):
            raise ConfigError(
                f"`ckpt_path={path}` is refused: a command knows of no earlier fit. Give a file, or `last` for the newest "
                "checkpoint of the same run.",
                argument="ckpt_path",
            )
        # With a colon it is an address, or a name in a registry.
        if path is None or path == "last" or ":" in path:
            return
        open_checkpoint(Path(path))
        strategy = self.config[self.config.subcommand].trainer.strategy
        check_sharding(Path(path), shards(strategy if isinstance(strategy, str) else strategy.class_path))

    def before_instantiate_classes(self) -> None:
        """Refuse Trainer flags that cannot work; move the clipping flag to the module, where it can."""
        config = self.config[self.subcommand]
        check_trainer(config.trainer)
        is_evaluation = config.model.class_path.endswith("LitEvaluate")
        if is_evaluation and "verbose" in config:
            # The benchmark prints its own table.
            config.verbose = False
        if config.get("data") is None and not is_evaluation:
            raise ConfigError(
                "`data` is missing: set it, for example to `{class_path: ForgetRetain, init_args: {forget: …, retain: …}}`. "
                "Only LitEvaluate, which runs a benchmark, needs none."
            )
        if config.trainer.gradient_clip_val is not None:
            config.model.init_args.gradient_clip_val = config.trainer.gradient_clip_val
            config.trainer.gradient_clip_val = None

    def instantiate_classes(self) -> None:
        """Build all objects, and turn a refusal of their arguments into a `ConfigError`."""
        # Not every exception: the bugs of a user's own class keep their traceback.
        with refusals_as_config_errors(ValueError, MisconfigurationException, OSError, ImportError):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer with loggers, and with the default callbacks and plugins that the configuration does not replace."""
        config = self.config_init[self.subcommand]
        if config.trainer.logger is None:
            kwargs["logger"] = config.logs.build_loggers()
        callbacks = _as_list(config.trainer.callbacks)
        if config.audit.policy is not None:
            callbacks.append(config.audit)
        if config.damage.measure is not None:
            # Before the report, which has its outcome.
            callbacks.append(config.damage)
        callbacks += default_callbacks(
            config.report,
            config.picture,
            config.export,
            config.attach,
            progress_bar=config.trainer.enable_progress_bar is not False,
            checkpoint=config.trainer.enable_checkpointing is not False,
            given=callbacks,
        )
        plugins = _as_list(config.trainer.plugins)
        plugins += default_plugins(plugins)
        with refusals_as_config_errors(Exception):
            trainer = super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        replace_signal_handling(trainer)
        if not is_dry_run(trainer):
            for logger in trainer.loggers:
                # The loggers' own refusals come later, and are tracebacks.
                if logger.save_dir is not None and "://" not in logger.save_dir:
                    owner = Logs if config.trainer.logger is None else type(logger)
                    check_writable(Path(logger.save_dir), owner=owner, argument="save_dir")
        return trainer


@contextmanager
def refusals_as_config_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds within the block into a `ConfigError` that names the setting."""
    try:
        yield
    except LitUnlearnError:
        raise
    except kinds as error:
        raise_typed_cause(error)
        raise ConfigError(explain(str(error))) from error


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [*value] if isinstance(value, list) else [value]


def build_parsers(
    cli_class: type[UnlearnCLI] = UnlearnCLI, commands: tuple[str, ...] = TRAINER_COMMANDS, **settings: Any
) -> dict[str, LightningArgumentParser]:
    """Return the parsers of commands that are built on a Trainer's, for shell completion.

    Args:
        cli_class: Whose commands they are.
        commands: Their names.
        **settings: Further arguments of ``cli_class``.
    """

    class ParsersBuilt(Exception):
        """Ends LightningCLI, which would go on to run a command."""

    class ParserBuilder(cli_class):  # type: ignore[valid-type, misc]
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            raise ParsersBuilt(self._subcommand_parsers)

    try:
        ParserBuilder(commands, **settings)
    except ParsersBuilt as built:
        parsers: dict[str, LightningArgumentParser] = built.args[0]
    return parsers


def run(arguments: list[str]) -> None:
    """Parse and run one command."""
    silence_libraries()
    # Where LightningCLI, and the processes that it may start, look for them.
    sys.argv[1:] = arguments
    check_constraint_names(arguments)
    try:
        UnlearnCLI((arguments[0],))
    finally:
        leave_process_group()


_CHATTER = re.compile(
    r"\s*(\[rank: \d+\] )?(GPU available|TPU available|💡 Tip|Seed set to|Loading `train_dataloader`|`Trainer\.|Restored all"
    # The command line says itself how it ended.
    r"|Detected KeyboardInterrupt"
    r"|Initializing distributed: |-+\ndistributed_backend="
    # Transformers' schedules import peft, which imports bitsandbytes.
    r"|Failed to load CPU gemm_4bit_forward)"
)
_CHATTERERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "bitsandbytes.backends.cpu.ops",
)
_IRRELEVANT_WARNINGS = (
    "LeafSpec",
    "does not have many workers",
    "pre-optimization state was saved",
    "dataloader is not resum",
    # The runs of a name share it.
    "Checkpoint directory .* exists and is not empty",
    # What is logged is the same on every process.
    "sync_dist=True",
    # Where the run starts instead is told by ResumeCheckpoint.
    "there is no last checkpoint available",
)
_format_warning = warnings.formatwarning


def silence_libraries() -> None:
    """Hide what libraries say of themselves, and make our warnings one line each."""
    # One line per phase and per warning is left; what libraries say of themselves is nothing that a user can act on.
    for name in _CHATTERERS:
        logging.getLogger(name).addFilter(lambda record: not _CHATTER.match(record.getMessage()))
    for message in _IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    warnings.formatwarning = _format_our_warnings
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _format_our_warnings(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    # Our warnings speak of settings: the line of our code that gives them would only distract.
    is_ours = issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1])
    return f"warning: {message}\n" if is_ours else _format_warning(message, category, filename, lineno, line)
