"""``lit-unlearn fit|validate|test``: LightningCLI with this package's classes and defaults."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lit_unlearn.data
import lit_unlearn.module  # noqa: F401  (imported, so that short class names resolve)
from lit_unlearn.callbacks import ExportModel, ProgressBar, RunPicture, RunReport

_USAGE = "lit-unlearn fit --config FILE [--config OVERLAY] [--model.… VALUE] [--data.… VALUE] [--trainer.… VALUE]"


class UnlearnCLI(LightningCLI):
    """LightningCLI that knows `LitUnlearn` as the default model and ends a fit with report, picture and export."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run and the defaults of short runs."""
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(RunPicture, "picture")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.set_defaults(
            {
                "model": {"class_path": "lit_unlearn.module.LitUnlearn"},
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs", "name": "unlearn"},
                },
                "trainer.log_every_n_steps": 1,  # λ and slack of every step
                "trainer.num_sanity_val_steps": 0,  # the report measures everything before the first step
                "trainer.enable_model_summary": False,  # one line says it
            }
        )

    def before_instantiate_classes(self) -> None:
        """Moves the Trainer's clipping flag to the module, where manual optimisation needs it."""
        config = self.config[self.subcommand]
        if config.trainer.gradient_clip_val is not None:
            config.model.init_args.gradient_clip_val = config.trainer.gradient_clip_val
            config.trainer.gradient_clip_val = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the progress bar, unless there is another one or none is wanted."""
        config = self.config_init[self.subcommand].trainer
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.enable_progress_bar is not False and not any(isinstance(c, BaseProgressBar) for c in callbacks):
            callbacks = [*callbacks, ProgressBar()]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def after_fit(self) -> None:
        """Fails the command if the run missed what the report was told to require."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunReport) and callback.failures:
                sys.exit("lit-unlearn: " + "\n".join(callback.failures))


def run(arguments: list[str]) -> None:
    """Parses and runs one command."""
    UnlearnCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs=_parser_settings(),
        args=arguments,
    )


def _parser_settings() -> dict[str, Any]:
    return {"usage": _USAGE}
