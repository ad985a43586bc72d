"""Checkpoints that an interrupted run resumes from."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.callbacks.run_state import check_on_first_process
from lit_unlearn.training.run_folder import find_checkpoint_folder, is_dry_run
from lit_unlearn.utils.io import check_writable, expand_home, lock_folder, output_errors, remove_if_empty

_INTERRUPTED = 130  # exit code, as a shell has it for Ctrl-C


class ResumeCheckpoint(ModelCheckpoint):
    """Keep the newest checkpoint of a run, from which ``--ckpt_path last`` resumes after an interruption.

    Ctrl-C ends the run after the current step, with a checkpoint and the command that resumes from it; a second Ctrl-C
    ends it at once. The previous checkpoint is removed once the new one is complete. The folder is the same for every
    start of a run, whereas the logger begins a new version; so the same command with ``--ckpt_path last`` resumes,
    however often the run is stopped.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints, beside the one at the end of every epoch; ``None``
            for that one only.
        dirpath: Folder; ``None`` for ``checkpoints`` in the folder of all starts of the run.
    """

    def __init__(self, every_n_train_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__(
            None if dirpath is None else expand_home(str(dirpath)),
            filename="last-{step}",  # the prefix that Lightning looks for
            every_n_train_steps=every_n_train_steps,
        )
        self._is_interrupted = False
        self._previous_handler: Any = None
        self._lock: ExitStack | None = None  # of the folder, on the first process

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the folder, the same on every process, and keep other runs out of it.

        Raises:
            ConfigError: If the folder cannot be written.
            OccupiedError: If another run is writing it.
        """
        self.dirpath = trainer.strategy.broadcast(self._find_folder(trainer))
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not is_dry_run(trainer):
            check_on_first_process(trainer, self._take_folder)

    def _take_folder(self) -> None:
        self._release_folder()
        folder = Path(str(self.dirpath))
        check_writable(folder, owner=self, argument="dirpath")
        self._lock = ExitStack()
        with output_errors(folder):
            if not folder.exists():
                self._lock.callback(remove_if_empty, folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(lock_folder(folder))
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
        """Handle Ctrl-C from now on."""
        super().on_train_start(trainer, pl_module)
        self._check_space(trainer, pl_module)
        self._is_interrupted = False
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._note_interrupt)

    def _check_space(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse a disk that the trained weights alone would not fit on; the optimizer's state comes on top."""
        if is_dry_run(trainer):
            return
        size = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
        folder = Path(str(self.dirpath))
        check_on_first_process(trainer, lambda: check_writable(folder, size, owner=self, argument="dirpath"))

    def _note_interrupt(self, *_: Any) -> None:
        # The step is not cut short: the weights would be between two steps, and other processes would wait forever.
        self._restore_handler()
        self._is_interrupted = True
        rank_zero_info("\nCtrl-C: the run stops after this step, with a checkpoint; press again to stop now, without")

    def _restore_handler(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the previous handler of Ctrl-C."""
        super().on_train_end(trainer, pl_module)
        self._restore_handler()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handler of Ctrl-C."""
        super().on_exception(trainer, pl_module, exception)
        self._restore_handler()
        self._release_folder()

    def _stop_if_interrupted(self, trainer: L.Trainer) -> None:
        """End every process if one of them was interrupted.

        Raises:
            SystemExit: With the exit code of an interruption.
        """
        # Collective: a process that stopped alone would leave the others waiting for it.
        stops = trainer.strategy.reduce_boolean_decision(self._is_interrupted, all=False)
        has_finished = trainer.global_step >= trainer.estimated_stepping_batches
        if not stops or has_finished:
            return
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        resume = f"`{_resuming_command()}`" if _is_command() else "ckpt_path='last'"
        rank_zero_info(f"stopped after step {trainer.global_step}: {self.best_model_path}; resume with {resume}")
        raise SystemExit(_INTERRUPTED)

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
            # A sharded checkpoint is a folder. Its `meta.pt` is written last, so without it the checkpoint is incomplete.
            file = path / "meta.pt" if path.is_dir() else path
            if file.is_file():
                written[path] = file.stat().st_mtime_ns
        return {str(max(written, key=lambda path: written[path]))} if written else set()

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
        """Save every `every_n_train_steps`, and stop if Ctrl-C was pressed.

        The last step of an epoch is saved in `on_train_epoch_end`, after validation, so that a resumed run does not skip it.
        """
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._stop_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save when the epoch and its validation have finished."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_if_interrupted(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the checkpoint to remove next; of a folder that this run does not write to, nothing is removed."""
        if Path(state_dict["dirpath"]).absolute() == Path(str(self.dirpath)).absolute():
            self.best_model_path = state_dict["best_model_path"]


def _is_command() -> bool:
    return Path(sys.argv[0]).name in ("lit-unlearn", "__main__.py")


def _resuming_command() -> str:
    last = [] if "--ckpt_path" in " ".join(sys.argv) else ["--ckpt_path=last"]
    return shlex.join(["lit-unlearn", *sys.argv[1:], *last])
