"""Choose the command, and end with the exit code of what went wrong."""

from __future__ import annotations

import difflib
import importlib
import os
import select
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lit_unlearn import __version__
from lit_unlearn.errors import (
    ConfigError,
    LitUnlearnError,
    MissingFileError,
    OutputError,
    ProcessLostError,
    StoppedBySignal,
)
from lit_unlearn.utils.io import NO_SPACE, describe_os_error, expand_home, is_file, read_yaml_text

_STDOUT = 1
_CONFIG_OPTIONS = ("--config", "-c")
_PACKAGE = Path(__file__).parents[1]
# The wheel has them inside the package, the source tree beside it.
CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

HELP = """\
usage: lit-unlearn COMMAND [options]

Removes selected training examples from a language model while keeping its loss on the remaining data below a bound you choose.

train:
  fit         unlearn (or, with LitFinetune, fine-tune) as --config FILE says
  plan        show the memory and the steps that such a fit would need, before anything is loaded
  validate    measure the forget and retain sets and the slack of every constraint
  test        run the suite, or with LitEvaluate a benchmark on any model
  sweep       run fit, and what measures its model, for every combination of a grid: seeds, methods, any setting; resumable

evaluate:
  evaluate    run a benchmark on a model: the short form of `test --config eval/tofu.yaml …`
  compare     show results of benchmarks side by side, over seeds with intervals and tests, and draw them
  depth       score how deep unlearning went, layer by layer, between target and retain-only model
  judge       let a language model grade the answers in a results file
  attack      try to bring the forget set back: relearning, rounding, other prompts; a table and a picture
  audit       measure a model against a policy of thresholds: pass, fail or not decidable, and a page that says why
  verify      compute again what an export or an audit claims
  ledger      show the deletion requests in a ledger, and which model comes from which
  inspect     ask models the same questions; show answers and token probabilities side by side
  plot        draw a run: retention and its bound, the multiplier, forgetting, tokens before and after

export:
  export      make a Hugging Face model directory, with its record of the deletion, from any checkpoint
  clean       remove what a run left that holds examples or copies of the model; keep model and record

prepare:
  data        show how files of rows are read: format, counts, token lengths, the first example, overlaps
  prepare     make rows with a model: alternate answers, a retain set, unseen rows, paraphrases
  methods     list the forgetting methods: formula, requirements, paper, configuration file
  tokenizer   train a small tokenizer on a data module's texts, for models made from scratch
  completion  print the completion script of a shell

`lit-unlearn COMMAND --help` lists the options. A --config that is no local file is looked up among the packaged ones.
exit codes: 0 success; 1 the run failed, or missed what `report` requires; 2 nothing was started, because a setting, a
file or a model cannot be used; 3 an audit is not decidable; 130, 143 and 138 stopped by Ctrl-C, SIGTERM and SIGUSR1.
"""

TRAINER_COMMANDS = ("fit", "validate", "test")
COMMANDS = (
    *TRAINER_COMMANDS,
    *(
        "attack",
        "audit",
        "clean",
        "compare",
        "completion",
        "data",
        "depth",
        "evaluate",
        "export",
        "inspect",
        "judge",
        "ledger",
        "methods",
    ),
    *("plan", "plot", "prepare", "sweep", "tokenizer", "verify"),
)


class CommandFailed(SystemExit):
    """Ends the process with an exit code; its text is the message, for those who call `main` in Python."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: Arguments after the program's name; ``None`` for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A user's own classes are named by their import path. At the end: a file there must not hide a library.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    if arguments in (["--version"], ["-V"]):
        print(f"lit-unlearn {__version__}")
    elif not arguments or arguments[0] in ("--help", "-h"):
        print(HELP, end="")
    else:
        _run_with_exit_code(arguments)


def _run_with_exit_code(arguments: list[str]) -> None:
    try:
        try:
            with _signals_raise():
                _run_command(find_configs(arguments))
        finally:
            # Here, where a broken pipe can be caught: Python's own flush at exit comes too late.
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _exit_interrupted(stop)
    except SystemExit as end:
        # The Trainer ends with 1.
        if isinstance(end.__context__, KeyboardInterrupt):
            _exit_interrupted(end.__context__)
        raise
    except BrokenPipeError:
        # If stdout is open, it was another pipe, and so a bug.
        if not _stdout_is_closed():
            raise
        # The flush at exit would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        sys.exit(1)
    except LitUnlearnError as error:
        _exit_with_error(error)
    except RuntimeError as error:
        _exit_if_process_lost(error)
        raise
    except OSError as error:
        # A full disk can show anywhere, in the loggers for example. Every other exception is a bug, and keeps its traceback.
        if error.errno not in NO_SPACE:
            raise
        place = f"'{error.filename}'" if error.filename else "a file"
        _exit_with_error(OutputError(f"{place} cannot be written: {describe_os_error(error)}"))


def _exit_if_process_lost(error: RuntimeError) -> None:
    # torch raised it, so importing torch costs nothing now; of another error, nothing is imported.
    if "torch" not in sys.modules:
        return
    from lit_unlearn.utils.distributed import is_lost_process

    if is_lost_process(error):
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        message = (
            f"another process of the run has ended, or cannot be reached ({reason}). What it printed last says why. Then start the "
            "run again on all nodes, with --ckpt_path=last to continue from its newest checkpoint."
        )
        _exit_with_error(ProcessLostError(message))


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Make SIGTERM and SIGUSR1 raise, as Ctrl-C does, so that the other processes of a run are ended as well.

    A fit that takes steps puts its own handlers in their place, see `ResumeCheckpoint`.
    """

    def stop(number: int, _: object) -> NoReturn:
        raise StoppedBySignal(number)

    previous: dict[int, Any] = {}
    # Python allows signal handlers in the main thread only. What a caller handles or ignores is left to them.
    if threading.current_thread() is threading.main_thread():
        # Once interrupted, Lightning ignores Ctrl-C for good.
        previous[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for handled, handler in previous.items():
            signal.signal(handled, handler)


def _exit_interrupted(stop: KeyboardInterrupt) -> NoReturn:
    print(f"lit-unlearn: {str(stop) or 'interrupted'}", file=sys.stderr)
    sys.exit(stop.exit_code if isinstance(stop, StoppedBySignal) else 128 + signal.SIGINT)


def _exit_with_error(error: LitUnlearnError) -> NoReturn:
    message = f"lit-unlearn: error: {error}"
    if error.keys:
        message += f"\n  set in the configuration: {', '.join(f'`{key}`' for key in error.keys)}"
    print(message, file=sys.stderr)
    raise CommandFailed(message, error.exit_code)


def print_warning(message: str) -> None:
    """Print a warning of a command, which has no logger."""
    print(f"lit-unlearn: warning: {message}", file=sys.stderr)


def _stdout_is_closed() -> bool:
    # As after `| head`: nothing reads what is printed any more.
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run_command(arguments: list[str]) -> None:
    command, *options = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`lit-unlearn --help` lists them."
        raise ConfigError(f"there is no command '{command}': {hint}")
    # Before anything heavy is imported: a mistyped file name is told within a tenth of a second.
    for _, _, config in _iterate_configs(options):
        check_config(config)
    if command in TRAINER_COMMANDS:
        importlib.import_module("lit_unlearn.cli.trainer").run(arguments)
    else:
        importlib.import_module(f"lit_unlearn.cli.{command}").run(options)


# Configuration files --------------------------------------------------------------------------------------------------


def find_configs(arguments: list[str]) -> list[str]:
    """Replace every ``--config`` that is no local file by the packaged file of that name, where there is one."""
    replaced = list(arguments)
    for position, prefix, name in _iterate_configs(arguments):
        replaced[position] = prefix + find_config(name)
    return replaced


def _iterate_configs(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield the position of every ``--config``'s value, what precedes it in the same argument, and the value."""
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in _CONFIG_OPTIONS and equals:
            yield position, f"{option}=", value
        elif position and arguments[position - 1] in _CONFIG_OPTIONS:
            yield position, "", argument


def find_config(name: str) -> str:
    """Return the path of a configuration: a local file or, where there is none, the packaged one; else the name."""
    name = expand_home(name)
    if is_file(name):
        return name
    for folder in CONFIGS:
        candidate = str(folder / name.removeprefix("configs/"))
        if is_file(candidate):
            return candidate
    return name


def list_packaged_configs() -> list[str]:
    """Return the names of all packaged configuration files, such as ``demo/unlearn.yaml``."""
    names: set[str] = set()
    for folder in CONFIGS:
        names.update(file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml"))
    # A policy is for `--policy` and `--audit.policy`, a sweep for the command of that name.
    return sorted(name for name in names if not name.startswith(("policy/", "sweep/")))


def check_config(value: str) -> None:
    """Refuse a configuration that cannot be read, before anything heavy is imported.

    Args:
        value: Given to ``--config``: a file, or YAML itself.

    Raises:
        ConfigError: With line and column of what is no YAML.
        MissingFileError: With the nearest packaged name.
    """
    import yaml

    try:
        is_path = is_file(value)
        content = yaml.safe_load(read_yaml_text(value))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{value}{position}: {error.problem} {error.context or ''}".strip()) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{value}' is no YAML file: {str(error).splitlines()[0]}") from None
    if is_path and not isinstance(content, dict | None):
        raise ConfigError(f"'{value}' has no settings: expected `key: value` lines, not a {type(content).__name__}")
    if not is_path and not isinstance(content, dict):
        raise MissingFileError(
            f"there is no configuration file '{value}'{_suggest_config(value)}\n"
            f"  looked in {Path.cwd()} and among the packaged ones in {next(filter(Path.is_dir, CONFIGS))}"
        )


def _suggest_config(value: str) -> str:
    names = list_packaged_configs()
    # `npo.yaml` is close to many names, but there is one file that is called so.
    same_file = [name for name in names if name.endswith(f"/{value}")]
    near = same_file or difflib.get_close_matches(value.removeprefix("configs/"), names, n=1)
    return f": did you mean '{near[0]}'?" if near else ""
