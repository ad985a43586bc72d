"""The command line. This file imports nothing heavy: ``--version`` and ``--help`` answer at once."""

from __future__ import annotations

import difflib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lit_unlearn import __version__

_STDOUT = 1
_CONFIG = ("--config", "-c")
_PACKAGE = Path(__file__).parents[1]
CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # the wheel's; the source tree's

HELP = """\
usage: lit-unlearn COMMAND [options]

Removes chosen rows from a language model: minimise the forgetting loss subject to retention loss <= epsilon.

run:
  fit         unlearn (or, with LitFinetune, teach) as --config FILE says
  validate    measure forget and retain rows and the constraints' slack
  test        run the suite, or with LitEvaluate a benchmark on any model

look:
  plot        draw a run: retention against its bound, the multiplier, forgetting, tokens before and after
  inspect     ask two models the same questions, and show answers and token probabilities side by side
  compare     print results of benchmarks side by side, and draw them
  judge       have a language model judge the answers in a results file
  methods     list the forgetting methods: formula, needs, paper, configuration file

take away:
  export      make a Hugging Face model directory, with its record of the deletion, of any checkpoint

prepare:
  tokenizer   train a small tokenizer on a data module's rows, for models made from scratch
  completion  print the completion script of a shell

`lit-unlearn COMMAND --help` lists the options; a --config that is no local file is looked up among the packaged ones.
exit codes: 0 done; 1 failed, or missed what `report` requires; 2 nothing started: the command or configuration is
wrong; 130 interrupted.
"""

TRAINER = ("fit", "validate", "test")
COMMANDS = (*TRAINER, "compare", "completion", "export", "inspect", "judge", "methods", "plot", "tokenizer")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; ``None`` for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for classes of one's own, named by their import path
    if arguments in (["--version"], ["-V"]):
        print(f"lit-unlearn {__version__}")
    elif not arguments or arguments[0] in ("--help", "-h"):
        print(HELP, end="")
    else:
        _run_safely(arguments)


def _run_safely(arguments: list[str]) -> None:
    """Exit codes as in `HELP`, and no trace for what the user can mend."""
    try:
        try:
            _run(find_configs(arguments))
        finally:
            sys.stdout.flush()  # here, where a broken pipe can be caught
    except KeyboardInterrupt:
        print("lit-unlearn: interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Trainer, which has said so, ends with 1
            sys.exit(130)
        raise
    except BrokenPipeError:
        if not _reader_has_gone():  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # for the flush at exit
        sys.exit(1)
    except Exception as error:
        from lit_unlearn.cli.errors import fail, mendable

        if (known := mendable(error)) is None:
            raise
        fail(*known)


def _reader_has_gone() -> bool:
    """Whether nobody reads what is printed any more, as after ``| head``."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(arguments: list[str]) -> None:
    command, *rest = arguments
    if configs := _configs(rest):
        from lit_unlearn.cli.errors import check_configs

        check_configs(configs, CONFIGS)
    if command in TRAINER:
        importlib.import_module("lit_unlearn.cli.trainer").run(arguments)
    elif command in COMMANDS:
        importlib.import_module(f"lit_unlearn.cli.{command}").run(rest)
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`lit-unlearn --help` lists them."
        print(f"lit-unlearn: error: there is no command '{command}': {hint}", file=sys.stderr)
        sys.exit(2)


def find_configs(arguments: list[str]) -> list[str]:
    """Replaces every ``--config`` that is no local file by the packaged file of that name, where there is one."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in _CONFIG and equals:
            found[i] = f"{option}={_packaged(value)}"
        elif i and arguments[i - 1] in _CONFIG:
            found[i] = _packaged(argument)
    return found


def _configs(arguments: list[str]) -> list[str]:
    given = [value for name, equals, value in (a.partition("=") for a in arguments) if name in _CONFIG and equals]
    return given + [value for name, value in pairwise(arguments) if name in _CONFIG]


def _packaged(name: str) -> str:
    if Path(name).is_file():
        return name
    for folder in CONFIGS:
        candidate = folder / name.removeprefix("configs/")
        if candidate.is_file():
            return str(candidate)
    return name


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code, with a message made for people."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)
