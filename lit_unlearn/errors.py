"""Errors that a user can act on. Each knows the exit code of the command that it ends.

Exit code 2: nothing was started, because a setting, a file or a model cannot be used. Exit code 1: a run failed, or missed what
it was required to reach. Exit code 3: an audit is not decidable. A signal's exit code is 128 and its number. Every other exception is a bug, and keeps its traceback.

Messages name the Python argument, as in "`max_length` must be at least 1, not 0". The command line adds the YAML key that led
there, which it finds by ``owner`` and ``argument``.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class LitUnlearnError(Exception):
    """Base of all errors that a user can act on.

    Args:
        message: What was expected, what arrived, what to do.
        owner: The object, or the class, whose argument is wrong; ``None`` if no argument is.
        argument: Name of that argument of ``owner``.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, owner: object = None, argument: str | None = None) -> None:
        super().__init__(message)
        self.owner = owner
        self.argument = argument
        self.keys: list[str] = []  # the YAML keys that the argument was set by, which only the command line knows

    def __str__(self) -> str:
        # A KeyError's own form would be a repr.
        return str(self.args[0])


class ConfigError(LitUnlearnError, ValueError):
    """A setting is out of range, unknown, or cannot work together with another one."""

    exit_code = 2


class DataError(LitUnlearnError, ValueError):
    """Rows cannot be used: a column is missing, an example has no supervised token, two sets do not fit."""

    exit_code = 2


class ModelError(LitUnlearnError, ValueError):
    """Weights, tokenizer, chat template or adapter cannot be used."""

    exit_code = 2


class CheckpointError(LitUnlearnError, ValueError):
    """A checkpoint is damaged, or belongs to another run."""

    exit_code = 2


class MissingFileError(LitUnlearnError, FileNotFoundError):
    """A file, a folder or a name on the hub is not there."""

    exit_code = 2


class OccupiedError(LitUnlearnError, FileExistsError):
    """A place to write to holds something that must not be replaced."""

    exit_code = 2


class BatchError(LitUnlearnError, ValueError):
    """A batch lacks what the objectives read."""


class DivergedError(LitUnlearnError, ValueError):
    """A loss or a gradient is not finite. The step was not taken."""


class RequirementNotMet(LitUnlearnError, RuntimeError):
    """The run has ended, and missed what it was required to reach."""


class NotDecidable(LitUnlearnError, RuntimeError):
    """An audit has ended, and neither passes nor fails: something could not be decided, or not be tested."""

    exit_code = 3


class OutputError(LitUnlearnError, OSError):
    """A file cannot be written, or an upload failed."""


class ProcessLostError(LitUnlearnError, RuntimeError):
    """Another process of a run has ended, or cannot be reached."""


class EndpointError(LitUnlearnError, ConnectionError):
    """A judge's endpoint refuses, cannot be reached, or answered no request."""


class StoppedBySignal(KeyboardInterrupt):
    """A signal ends the process at once, as Ctrl-C does: Lightning then ends the other processes of the run as well.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as a shell has it: 143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C


@contextmanager
def arguments_of(owner: object) -> Iterator[None]:
    """Make ``owner`` the owner of every error within the block that names an argument and has no owner yet.

    Functions that several classes share know the argument's name, but not whose it is.
    """
    try:
        yield
    except LitUnlearnError as error:
        if error.argument is not None and error.owner is None:
            error.owner = owner
        raise


@contextmanager
def reading(
    what: str,
    source: object,
    remedy: str,
    error: type[LitUnlearnError] = ConfigError,
    *,
    owner: object = None,
    argument: str | None = None,
) -> Iterator[None]:
    """Turn whatever another library raises within the block into one sentence.

    Use it around each call at set-up that reads something of the user's: only there is every exception about the input.

    Args:
        what: What is being read, such as ``"the tokenizer"``.
        source: Where it comes from.
        remedy: What to do, as a sentence.
        error: The class to raise.
        owner: The object whose argument the source is.
        argument: Name of that argument.

    Raises:
        LitUnlearnError: Of the class ``error``, with the last line of the reason.
    """
    try:
        yield
    except LitUnlearnError:
        raise
    except Exception as reason:
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        message = f"{what} '{source}' cannot be read: {lines[-1].strip().rstrip('.')}. {remedy}"
        raise error(message, owner=owner, argument=argument) from reason
