"""Run the cells of a sweep: one process at a time holds a cell, on any machine; what was interrupted continues.

A cell's folder has ``cell.jsonl``, which is its lock and its history: whoever holds the file appends a line at every change. The
last line counts. A line that a crash has torn is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_unlearn.cli.grid import CELL, MODEL, RUN, Cell, Command, list_setting_files
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.evaluation.results import find_damage_problem
from lit_unlearn.utils.folders import lock_file, remove_listed_files
from lit_unlearn.utils.io import output_errors, read_json

STATE_FILE, LOG_FILE, REPORT_FILE = "cell.jsonl", "log.txt", "report.json"
# Its module imports torch, which a sweep does not need.
AUDIT_FILE = "audit.json"
_RECORD_FILE = "unlearning.json"
_CHECKPOINTS = f"{RUN}/checkpoints"

Status = Literal["waiting", "unfinished", "done", "failed"]

RunCommand = Callable[[Sequence[str], Path, int], int]
"""Runs ``lit-unlearn`` with arguments, adds what it prints to a file, lets it inherit a lock, and returns its exit code."""

_NOTHING_STARTED = 2
_STOPPED = (130, 138, 143)  # by Ctrl-C, SIGUSR1, SIGTERM, as the command line ends then
_AUDIT_VERDICTS = {1: "fail", 3: "not decidable"}
_MAX_REASON = 200  # characters


@dataclass
class CellState:
    """What is known of a cell.

    Args:
        status: ``waiting`` before it was begun; ``unfinished`` while it runs, and after an interruption.
        reason: Why it failed, or by what it was interrupted.
        commands: What has ended, as the cell had it then; of a fit also what has begun.
        seconds: Of each command that has ended; of one that was interrupted, of its last start.
        digests: Of the files of settings that `commands` name, as they were then.
    """

    status: Status = "waiting"
    reason: str | None = None
    commands: list[list[str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


# States ---------------------------------------------------------------------------------------------------------------


def read_state(folder: Path) -> CellState:
    """Return the state of a cell, as far as it is written; another process may hold it."""
    try:
        return _parse_state((folder / STATE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return CellState()


def list_states(output: Path) -> Iterator[tuple[Path, CellState]]:
    """Yield the folder and the state of every cell that a sweep has begun, by name.

    Raises:
        DataError: If there is none.
    """
    files = sorted(output.glob(f"*/{STATE_FILE}"))
    if not files:
        raise DataError(f"'{output}' is no folder of a sweep: no folder in it has a {STATE_FILE}.")
    for file in files:
        yield file.parent, read_state(file.parent)


def _parse_state(content: bytes) -> CellState:
    state = CellState()
    for line in content.split(b"\n"):
        # What a crash has torn is no JSON; the line before it counts.
        with suppress(ValueError, TypeError):
            state = CellState(**json.loads(line))
    return state


def _write_state(descriptor: int, folder: Path, state: CellState) -> None:
    with output_errors(folder / STATE_FILE):
        # It may follow a torn line.
        os.write(descriptor, b"\n" + json.dumps(asdict(state), ensure_ascii=False).encode() + b"\n")
        os.fsync(descriptor)


def _read_held_state(descriptor: int) -> CellState:
    # Not by the path: on a network disk, what another machine has written shows for certain where it is locked.
    return _parse_state(os.pread(descriptor, os.fstat(descriptor).st_size, 0))


def check_unchanged(cell: Cell, state: CellState) -> None:
    """Refuse to continue a cell whose commands are others now: its results would be of two settings.

    Raises:
        ConfigError: With the arguments, or the file of settings, that differ.
    """
    remedy = "Choose another `output`, or remove the cell's folder."
    for command, begun in zip(cell.commands, state.commands, strict=False):
        changed = [argument for argument in command if argument not in begun]
        removed = [argument for argument in begun if argument not in command]
        if list(command) != begun:
            raise ConfigError(
                f"the cell '{cell.name}' was begun with another `{begun[0]}`: {' '.join(removed) or 'nothing'} then, "
                f"{' '.join(changed) or 'nothing'} now. {remedy}"
            )
    for file, digest in cell.digests.items():
        # Only of what has begun there is a digest; what a command that was taken out has left does not change.
        if state.commands and state.digests.get(file, digest) != digest:
            raise ConfigError(f"the cell '{cell.name}' was begun when '{file}' had another content. {remedy}")


# Running --------------------------------------------------------------------------------------------------------------


class Processes:
    """Run commands in processes of their own, and ask all of them to stop.

    Args:
        jobs: Commands side by side, which share the processors.
    """

    def __init__(self, jobs: int = 1) -> None:
        # `python -m` alone would put the working directory first, where a file could hide a library.
        self._environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        if jobs > 1:
            # All threads of all of them on the same cores are several times slower.
            threads = max(1, (os.cpu_count() or 1) // jobs)
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False
        self._guard = threading.Lock()

    def __call__(self, arguments: Sequence[str], log: Path, held: int) -> int:
        """Run ``lit-unlearn`` to its end."""
        with self._guard:
            if self._is_stopped:
                return _STOPPED[0]
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lit_unlearn", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    # If the sweep is killed and the command is not, the cell stays locked until the command has ended.
                    pass_fds=(held,),
                    # Ctrl-C is for the sweep, which passes on one signal: of two, a fit writes no checkpoint.
                    start_new_session=True,
                )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def stop(self) -> None:
        """Ask what runs to stop, a fit after its step and with a checkpoint; start nothing any more."""
        with self._guard:
            self._is_stopped = True
            running = list(self._running)
        if running:
            print(
                f"{len(running)} running commands are asked to stop: a fit ends after its step, with a checkpoint",
                flush=True,
            )
        for process in running:
            process.terminate()


def run_cells(
    cells: Sequence[Cell], output: Path, jobs: int, run_command: Processes, retry: bool = False
) -> Generator[tuple[Cell, CellState | None], None, None]:
    """Run what is left of some cells, several at a time, and yield each when it has ended.

    If this is interrupted, commands that run are asked to stop, and waited for.

    Args:
        cells: Of a sweep.
        output: Its folder.
        jobs: Cells at a time.
        run_command: Runs and stops commands.
        retry: Whether cells that have failed continue with the command that did.

    Yields:
        A cell with its state; ``None`` if another process holds it.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run_cell, cell, output / cell.name, run_command, retry): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        # First what waits: a worker whose command is stopped would begin the next cell.
        pool.shutdown(wait=False, cancel_futures=True)
        run_command.stop()
        try:
            pool.shutdown()
        except KeyboardInterrupt:
            # A second signal: a fit that gets one ends at once.
            run_command.stop()
        raise
    finally:
        pool.shutdown()


def run_cell(cell: Cell, folder: Path, run_command: RunCommand, retry: bool = False) -> CellState | None:
    """Run what is left of a cell, unless another process does.

    Args:
        cell: The cell.
        folder: Its folder.
        run_command: Runs one command.
        retry: Whether a cell that has failed continues with the command that did.

    Returns:
        Its state afterwards; ``None`` if another process holds it.

    Raises:
        ConfigError: If it was begun with other commands.
    """
    with lock_file(folder / STATE_FILE) as held:
        if held is None:
            return None
        state = _read_held_state(held)
        check_unchanged(cell, state)
        # Commands may have been added to one that was done.
        is_done = state.status == "done" and len(state.seconds) >= len(cell.commands)
        if is_done or (state.status == "failed" and not retry):
            return state

        state.status, state.reason = "unfinished", None
        for command in cell.commands[len(state.seconds) :]:
            if not _run_next(cell, command, state, folder, run_command, held):
                return state
        _remove_weights(cell, folder)
        state.status = "done"
        _write_state(held, folder, state)
        return state


def _run_next(cell: Cell, command: Command, state: CellState, folder: Path, run_command: RunCommand, held: int) -> bool:
    """Run one command, write what came of it into the state, and return whether the cell continues."""
    is_fit = not state.seconds and command[0] == "fit"
    begun, ended = state.commands, state.commands[: len(state.seconds)]
    digests = {file: cell.digests[file] for file in list_setting_files(command)}
    # A fit that is resumed must be the same one. What measures its model may be corrected until it has ended.
    if is_fit:
        state.commands, state.digests = [list(command)], digests
    _write_state(held, folder, state)

    log = folder / LOG_FILE
    log_start = log.stat().st_size if log.exists() else 0
    audits = _list_audits(folder)
    started = time.monotonic()
    code = run_command([word.replace(CELL, str(folder)) for word in command], log, held)
    seconds = time.monotonic() - started
    # An audit that fails, or decides nothing, has measured: its verdict is a result of the cell. A crash ends with 1 as well.
    has_verdict = command[0] == "audit" and code in _AUDIT_VERDICTS
    if has_verdict:
        written = [file for file, _ in _list_audits(folder) - audits]
        # The code alone could be that of a ledger which could not be written.
        has_verdict = any(read_json(file)["verdict"] == _AUDIT_VERDICTS[code] for file in written)

    if code in _STOPPED or code < 0:
        # Also by the system, for want of memory: that says nothing of the method, and the next start tries again.
        state.reason = f"{command[0]} was interrupted (exit code {code})"
    elif code != 0 and not has_verdict:
        state.status, state.reason = "failed", _find_reason(command, code, log, log_start, folder)
        if code == _NOTHING_STARTED and not (folder / _CHECKPOINTS).exists():
            # It may be run with a corrected setting, unless that would resume from a checkpoint of this one.
            state.commands = begun
    elif is_fit and cell.is_matched and (problem := _find_damage_problem(folder)):
        state.status, state.reason = "failed", f"not at matched damage: {problem}"[:_MAX_REASON]
    else:
        state.commands = [*ended, list(command)]
        state.digests = {**state.digests, **digests}
        state.seconds.append(seconds)
    _write_state(held, folder, state)
    return state.reason is None


def _list_audits(folder: Path) -> set[tuple[Path, int]]:
    """Return the audits in a cell, each with the time at which it was written."""
    return {(file, file.stat().st_mtime_ns) for file in folder.rglob(AUDIT_FILE)}


def _find_reason(command: Command, code: int, log: Path, start: int, folder: Path) -> str:
    """Return why a command failed, from what it has printed: its error or, of a traceback, the last line."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("lit-unlearn: error: ")]
    line = (errors or lines or ["nothing was printed"])[-1].removeprefix("lit-unlearn: error: ")
    # Without this machine's folders.
    return f"{command[0]} ended with exit code {code}: {line.replace(str(folder), CELL)}"[:_MAX_REASON]


def _find_damage_problem(folder: Path) -> str | None:
    if not (folder / REPORT_FILE).is_file():
        return f"the fit left no {REPORT_FILE}"
    damage: dict[str, Any] | None = read_json(folder / REPORT_FILE).get("damage")
    return find_damage_problem(damage)


def _remove_weights(cell: Cell, folder: Path) -> None:
    """Remove what `keep` leaves out; the record stays."""
    if cell.keep == "all":
        return
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    if cell.keep == "results":
        record = folder / MODEL / _RECORD_FILE
        if record.is_file():
            shutil.copyfile(record, folder / _RECORD_FILE)
        # Not the folder: results may have been written to it.
        remove_listed_files(folder / MODEL)
