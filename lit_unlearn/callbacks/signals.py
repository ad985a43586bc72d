"""Signals that ask a run to stop: Ctrl-C, SIGTERM (a container or a scheduler ends) and SIGUSR1 (SLURM's time is nearly up)."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.errors import StoppedBySignal

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# `timeout` signals a process and then its whole group, which is one request in two signals.
_SECONDS_OF_ONE_REQUEST = 0.2


class SignalWatch:
    """Note the first signal that asks the process to stop; the second one ends it at once."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def first(self) -> int | None:
        """Number of the first signal since `start`; ``None`` before there is one."""
        return self._first

    def start(self) -> None:
        """Handle the signals from now on."""
        self._first = None
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread() and not self._previous:
            for number in _STOPPING:
                self._previous[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _: Any) -> None:
        # The step is not cut short: the weights would be between two steps, and other processes would wait forever.
        if self._first is None:
            self._first, self._time = number, time.monotonic()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            rank_zero_info(
                f"\n{name}: the run stops after this step, with a checkpoint; once more to stop now, without one"
            )
        elif time.monotonic() - self._time > _SECONDS_OF_ONE_REQUEST:
            self.stop()
            raise StoppedBySignal(number)


def replace_signal_handling(trainer: L.Trainer) -> None:
    """Keep the Trainer from handling SIGTERM and SLURM's signal, and from resuming what it would have saved then.

    Lightning ends a run with exit code 0 on SIGTERM. On SLURM it saves ``hpc_ckpt_*.ckpt`` in the working directory, whichever
    run that is of, starts the job again, and resumes from any such file that it finds.
    """
    trainer._signal_connector = _NoSignals(trainer)
    if not isinstance(trainer._checkpoint_connector, _OnlyNamedCheckpoints):
        trainer._checkpoint_connector = _OnlyNamedCheckpoints(trainer)


class _NoSignals(_SignalConnector):
    def register_signal_handlers(self) -> None:
        """Leave the handlers as they are."""


class _OnlyNamedCheckpoints(_CheckpointConnector):
    @property
    def _hpc_resume_path(self) -> None:
        return None
