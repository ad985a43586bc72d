"""The command line. This file imports nothing heavy: ``--version`` and ``--help`` answer at once."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lit_unlearn import __version__

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
"""

_TRAINER = ("fit", "validate", "test")
_OWN = ("compare", "completion", "export", "inspect", "judge", "methods", "plot", "tokenizer")


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
        try:
            _run(find_configs(arguments))
        except (ValueError, LookupError, OSError, RuntimeError) as error:
            from lit_unlearn.cli.errors import is_nested, shorten

            message = str(error.args[0] if isinstance(error, KeyError) else error)  # KeyError shows a repr
            if not (_is_ours(error) or is_nested(message)):
                raise
            sys.exit(f"lit-unlearn: error: {shorten(message) if is_nested(message) else message}")


def _run(arguments: list[str]) -> None:
    command, *rest = arguments
    if command in _TRAINER:
        importlib.import_module("lit_unlearn.cli.trainer").run(arguments)
    elif command in _OWN:
        importlib.import_module(f"lit_unlearn.cli.{command}").run(rest)
    else:
        near = difflib.get_close_matches(command, (*_TRAINER, *_OWN), n=1)
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
