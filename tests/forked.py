"""Commands in processes of their own that start at once: forked from a process that has imported everything.

Such a process has its own pid, group, signals, exit code, output and working directory, as one that a shell starts. It skips
only the seconds of importing torch and Lightning. That the interpreter starts with nothing imported is shown elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from lit_unlearn.callbacks import picture

_CONTEXT = multiprocessing.get_context("forkserver")
# All that a fit imports on its way. Names alone: the server is another process.
_CONTEXT.set_forkserver_preload(
    [
        "lit_unlearn.cli.trainer",
        "lit_unlearn.cli.export",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer_utils",
        "peft",
        "datasets",
    ]
)


def _become_command(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with Path("log.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    picture.draw_run = lambda *_, **__: {}  # as in conftest.py
    sys.argv = ["lit-unlearn", *arguments]
    # As ``python -m lit_unlearn`` does it, so that Lightning knows how to start further processes.
    runpy.run_module("lit_unlearn", run_name="__main__", alter_sys=True)


def start_command(folder: Path, *arguments: str, **environment: str) -> BaseProcess:
    """Start ``lit-unlearn`` in a folder, as the leader of a group of its own; what it prints goes to ``log.txt`` there."""
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = _CONTEXT.Process(target=_become_command, args=(list(arguments), str(folder), merged), daemon=True)
    process.start()
    return process


def find_port() -> int:
    """Return a port that no process uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_pair(folder: Path, *arguments: str) -> list[BaseProcess]:
    """Start both processes of a run on two devices, as Lightning's launcher would from the first of them."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [start_command(folder, *arguments, **rendezvous, LOCAL_RANK=str(rank)) for rank in (0, 1)]


def printed(folder: Path) -> str:
    """Return what the commands in a folder have printed so far."""
    log = folder / "log.txt"
    return log.read_text("utf-8") if log.exists() else ""


def wait(process: BaseProcess, timeout: float) -> int | None:
    """Return the exit code of a process, which is minus the number of the signal that killed it; ``None`` if it still runs."""
    process.join(timeout)
    return process.exitcode


def run_pair(folder: Path, *arguments: str) -> tuple[list[int | None], str]:
    """Run both processes of a run on two devices to their ends and return their exit codes and what they printed."""
    before = len(printed(folder))
    codes = [wait(process, timeout=300) for process in start_pair(folder, *arguments)]
    return codes, printed(folder)[before:]


def run_command(folder: Path, *arguments: str, **environment: str) -> tuple[int | None, str]:
    """Run ``lit-unlearn`` to its end and return its exit code and what it printed."""
    before = len(printed(folder))
    code = wait(start_command(folder, *arguments, **environment), timeout=300)
    return code, printed(folder)[before:]


class ForkedCommands:
    """Stands for the processes of a sweep. For one cell at a time: threads that wait for processes take exit codes from each other.

    Args:
        **options: Further arguments, by the name of the command.
    """

    def __init__(self, **options: Sequence[str]) -> None:
        self.options = options

    def __call__(self, arguments: Sequence[str], log: Path, held: int) -> int:
        code, text = run_command(Path.cwd(), *arguments, *self.options.get(arguments[0], ()))
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
        assert code is not None, text
        return code

    def stop(self) -> None:
        pass
