"""Checkpoints that an interrupted run resumes from."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.callbacks.identity import find_differences, identify_run
from lit_unlearn.callbacks.run_state import check_on_first_process
from lit_unlearn.callbacks.signals import SignalWatch, replace_signal_handling
from lit_unlearn.errors import StoppedBySignal
from lit_unlearn.training.checkpoint_files import SHARDED_MARK, check_sharding, open_checkpoint
from lit_unlearn.training.run_folder import find_checkpoint_folder, is_dry_run
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.folders import hold_folder
from lit_unlearn.utils.io import check_writable, expand_home, output_errors


class ResumeCheckpoint(ModelCheckpoint):
    """Keep the newest checkpoint of a run, from which ``--ckpt_path last`` resumes after an interruption.

    Ctrl-C, SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint and the command that resumes from it; a
    second signal ends it at once. The previous checkpoint is removed once the new one is complete. The folder is the same for
    every start of a run, whereas the logger begins a new version; so the same command with ``--ckpt_path last`` resumes,
    however often the run is stopped. A checkpoint there of another base model, other rows, another seed or kind of module
    is skipped.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints, beside the one at the end of every epoch; ``None``
            for that one only.
        dirpath: Folder; ``None`` for ``checkpoints`` in the folder of all starts of the run. Loggers whose ``name`` is a
            project with many runs, as W&B's, have one for every run: give such a run an id of its own to resume it.
    """

    def __init__(self, every_n_train_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__(
            None if dirpath is None else expand_home(str(dirpath)),
            filename="last-{step}",  # the prefix that Lightning looks for
            every_n_train_steps=every_n_train_steps,
        )
        self._signals = SignalWatch()
        self._identity: dict[str, str] = {}
        self._lock: ExitStack | None = None  # of the folder, on the first process

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the folder, the same on every process, and keep other runs out of it.

        Raises:
            ConfigError: If the folder cannot be written.
            OccupiedError: If another run is writing it.
        """
        self.dirpath = trainer.strategy.broadcast(self._find_folder(trainer))
        super().setup(trainer, pl_module, stage)
        replace_signal_handling(trainer)
        if stage == "fit" and not is_dry_run(trainer):
            check_on_first_process(trainer, self._take_folder)

    def _take_folder(self) -> None:
        self._release_folder()
        folder = Path(str(self.dirpath))
        self._lock = ExitStack()
        self._lock.enter_context(hold_folder(folder, owner=self, argument="dirpath"))
        with output_errors(folder):
            # Of a run that was killed while it wrote.
            for path in folder.glob(f".*{self.FILE_EXTENSION}.unfinished"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _release_folder(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let other runs have the folder."""
        super().teardown(trainer, pl_module, stage)
        self._release_folder()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle Ctrl-C, SIGTERM and SIGUSR1 from now on."""
        super().on_train_start(trainer, pl_module)
        self._check_space(trainer, pl_module)
        self._identity = identify_run(trainer)
        self._signals.start()

    def _check_space(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse a disk that the trained weights alone would not fit on; the optimizer's state comes on top."""
        if is_dry_run(trainer):
            return
        size = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
        folder = Path(str(self.dirpath))
        check_on_first_process(trainer, lambda: check_writable(folder, size, owner=self, argument="dirpath"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the previous handlers."""
        super().on_train_end(trainer, pl_module)
        self._signals.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        super().on_exception(trainer, pl_module, exception)
        self._signals.stop()
        self._release_folder()

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        """End every process if one of them got a signal to stop.

        Raises:
            SystemExit: With the exit code of the signal.
        """
        # Collective: a process that stopped alone would leave the others waiting for it.
        stops = trainer.strategy.reduce_boolean_decision(self._signals.first is not None, all=False)
        has_finished = trainer.global_step >= trainer.estimated_stepping_batches
        if not stops or has_finished:
            return
        # A scheduler may signal one process only.
        number = max(gather_objects(self._signals.first or 0))
        if is_dry_run(trainer):
            raise SystemExit(StoppedBySignal(number).exit_code)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        resume = f"`{self._resuming_command(trainer)}`" if _is_command() else f"ckpt_path={self.best_model_path!r}"
        rank_zero_info(f"stopped after step {trainer.global_step}: {self.best_model_path}; resume with {resume}")
        raise SystemExit(StoppedBySignal(number).exit_code)

    def _resuming_command(self, trainer: L.Trainer) -> str:
        # Where every start has a folder of its own, the next one would not find "last".
        checkpoint = self.best_model_path if _has_folder_per_start(trainer) else "last"
        arguments = []
        for position, argument in enumerate(sys.argv[1:]):
            is_value = sys.argv[position] == "--ckpt_path"
            if not is_value and argument.partition("=")[0] != "--ckpt_path":
                arguments.append(argument)
        return shlex.join(["lit-unlearn", *arguments, f"--ckpt_path={checkpoint}"])

    def _find_folder(self, trainer: L.Trainer) -> str | None:
        if self.dirpath is not None:
            return str(self.dirpath)
        folder = find_checkpoint_folder(trainer)
        return None if folder is None else str(folder)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        # Lightning calls this for "last", and would look in the new version's folder, where there is none yet.
        dirpath = self._find_folder(trainer)
        if dirpath is None:
            return set()
        folder = Path(dirpath)
        written: dict[Path, int] = {}
        for path in folder.glob("last-*.ckpt"):
            # A sharded checkpoint is a folder. Without its mark it is incomplete.
            file = path / SHARDED_MARK if path.is_dir() else path
            if file.is_file():
                written[path] = file.stat().st_mtime_ns

        identity = identify_run(trainer) if written else {}
        for path in sorted(written, key=lambda path: written[path], reverse=True):
            differences = find_differences(identity, _read_identity(path)) if identity else []
            if not differences:
                check_sharding(path, isinstance(trainer.strategy, ModelParallelStrategy))
                return {str(path)}
            rank_zero_info(f"skipped {path}: it is of another run, with another {', '.join(differences)}")
        rank_zero_info(f"there is no checkpoint of this run in {folder}: it starts at the beginning")
        return set()

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        # Also the one that was resumed: Lightning would leave it, so that every stop of a run would leave one more.
        return previous != current and Path(previous).absolute().parent == Path(str(self.dirpath)).absolute()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Flush the loggers after a checkpoint: a run that resumes does not log again what came before it."""
        # Only now: Lightning gives a step's values to the loggers after the hooks at its end, where checkpoints are made.
        if trainer.global_step == self._last_global_step_saved:
            for logger in trainer.loggers:
                logger.save()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_n_train_steps`, and stop if a signal asked for it.

        The last step of an epoch is saved in `on_train_epoch_end`, after validation, so that a resumed run does not skip it.
        """
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save when the epoch and its validation have finished."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_if_asked(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return which checkpoint to remove next, and which run this is."""
        return {**super().state_dict(), "identity": self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the checkpoint to remove next; of a folder that this run does not write to, nothing is removed."""
        if Path(state_dict["dirpath"]).absolute() == Path(str(self.dirpath)).absolute():
            self.best_model_path = state_dict["best_model_path"]


def _is_command() -> bool:
    return Path(sys.argv[0]).name in ("lit-unlearn", "__main__.py")


def _has_folder_per_start(trainer: L.Trainer) -> bool:
    """Return whether the logger's name is that of a project, as W&B's, and not that of the run."""
    return bool(trainer.loggers) and not isinstance(trainer.loggers[0], (CSVLogger, TensorBoardLogger))


def _read_identity(path: Path) -> dict[str, str]:
    """Return the identity in a checkpoint; empty if it was made by an earlier version."""
    for name, state in open_checkpoint(path).get("callbacks", {}).items():
        if name.startswith(ResumeCheckpoint.__name__):
            identity: dict[str, str] = state.get("identity", {})
            return identity
    return {}
