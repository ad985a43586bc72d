"""Checkpoints to resume from."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class ResumeCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint of a run, for ``--ckpt_path last`` to go on from after an interruption.

    Ctrl-C ends the run after the step that is being taken, with a checkpoint and the command that goes on from it; a
    second Ctrl-C ends it at once. The old one is removed when the new one is whole. The folder is the same for every start of a run, whereas the
    logger begins a new version; so the same command with ``--ckpt_path last`` goes on, however often it is stopped.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints, beside the one at the end of every epoch; ``None``
            for that one only.
        dirpath: Folder; ``None`` for ``checkpoints`` in the logger's folder of all versions.
    """

    def __init__(self, every_n_train_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath,
            filename="last-{step}",  # Lightning looks for names that begin so
            every_n_train_steps=every_n_train_steps,
        )
        self._interrupted = False
        self._handler: Any = None  # of Ctrl-C, before this run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resolves the folder."""
        self.dirpath = trainer.strategy.broadcast(self._folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over Ctrl-C."""
        super().on_train_start(trainer, pl_module)
        self._interrupted = False
        if threading.current_thread() is threading.main_thread():  # no other may
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self._give_back()
        self._interrupted = True
        rank_zero_info("\nCtrl-C: the run stops after this step, with a checkpoint; again stops it at once, without")

    def _give_back(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives Ctrl-C back."""
        super().on_train_end(trainer, pl_module)
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        super().on_exception(trainer, pl_module, exception)
        self._give_back()

    def _stop_if_interrupted(self, trainer: L.Trainer) -> None:
        """Ends every process where one of them was interrupted.

        Raises:
            SystemExit: With 130, as a shell reports an interruption.
        """
        stop = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)
        if stop and trainer.global_step < trainer.estimated_stepping_batches:  # else it is through anyway
            if self._last_global_step_saved != trainer.global_step:
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            again = f"`{_same_command()}`" if _is_command() else "ckpt_path='last'"
            rank_zero_info(f"stopped after step {trainer.global_step}: {self.best_model_path}; go on with {again}")
            raise SystemExit(130)

    def _folder(self, trainer: L.Trainer) -> str:
        if self.dirpath is not None:
            return str(self.dirpath)
        logger = trainer.loggers[0] if trainer.loggers else None
        if logger is None or logger.save_dir is None:
            return str(Path(trainer.default_root_dir) / "checkpoints")
        return str(Path(logger.save_dir) / str(logger.name) / "checkpoints")

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:  # Lightning's, asked for "last"
        folder = Path(self._folder(trainer))
        whole = {path: path for path in folder.glob("last-*.ckpt") if path.is_file()}
        whole |= {path.parent: path for path in folder.glob("last-*.ckpt/meta.pt")}  # written last
        return {str(max(whole, key=lambda path: whole[path].stat().st_mtime_ns))} if whole else set()

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the one that was resumed, which Lightning would leave, so that every stop would leave one."""
        return previous != current and Path(previous).absolute().parent == Path(str(self.dirpath)).absolute()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Has the loggers write what they hold: a run that resumes does not log again what came before its checkpoint.

        Lightning hands a step's values to the loggers only after the hooks at its end, where checkpoints are made.
        """
        if trainer.global_step == self._last_global_step_saved:
            for logger in trainer.loggers:
                logger.save()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every so many steps; at an epoch's last step only below, lest a resumed run leave out its validation."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._stop_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves when the epoch and its validation are through."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_if_interrupted(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers which checkpoint to remove next."""
        if Path(state_dict["dirpath"]).absolute() == Path(str(self.dirpath)).absolute():
            self.best_model_path = state_dict["best_model_path"]


def _is_command() -> bool:
    return Path(sys.argv[0]).name in ("lit-unlearn", "__main__.py")


def _same_command() -> str:
    """The command that goes on from the newest checkpoint."""
    last = [] if any("--ckpt_path" in argument for argument in sys.argv) else ["--ckpt_path=last"]
    return shlex.join(["lit-unlearn", *sys.argv[1:], *last])
