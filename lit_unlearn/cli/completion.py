"""Run ``lit-unlearn completion``: scripts with which a shell completes commands, options and their values."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import shtab

from lit_unlearn.cli.main import COMMANDS, TRAINER_COMMANDS, list_packaged_configs
from lit_unlearn.cli.parser import CommandParser

# shtab completes a file name where this is in the name of a function.
_BASH_CONFIGS = """\
_lit_unlearn_config_files() {{
  compgen -W "{names}" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -- "$1"
}}"""


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn completion",
        description="Prints a shell's completion script, for ~/.local/share/bash-completion/completions/lit-unlearn, "
        "_lit-unlearn in a folder of zsh's $fpath, or ~/.config/fish/completions/lit-unlearn.fish. What it offers is that of "
        "the installed version: print it again after an upgrade.",
    )
    parser.add_argument("shell", type=Literal["bash", "zsh", "fish"], help="The shell.")
    return parser


def run(arguments: list[str]) -> None:
    """Print the script."""
    options = build_parser().parse_args(arguments)
    print(build_script(options.shell))


def build_script(shell: str) -> str:
    """Return the script of ``bash``, ``zsh`` or ``fish``. It holds lists only, so that completing imports nothing."""
    from lit_unlearn.cli.trainer import build_parsers

    parsers: dict[str, Any] = {**build_parsers()}
    for command in COMMANDS:
        if command not in TRAINER_COMMANDS:
            parsers[command] = importlib.import_module(f"lit_unlearn.cli.{command}").build_parser()
    for command in (*TRAINER_COMMANDS, "plan"):
        _stop_at_nested_classes(parsers[command])

    root = CommandParser(prog="lit-unlearn")
    commands = root.add_subcommands()
    for command in COMMANDS:
        commands.add_subcommand(command, parsers[command], help=parsers[command].description)
        for action in parsers[command]._actions:
            if action.dest == "config":
                # Offers the packaged files, too, where shtab takes a function of the shell.
                action.complete = {**shtab.glob("*.yaml"), "bash": "_lit_unlearn_config_files"}
    packaged = [_BASH_CONFIGS.format(names=" ".join(list_packaged_configs()))] if shell == "bash" else []
    return str(root.get_completion_script(f"shtab-{shell}", preambles=packaged))


def _stop_at_nested_classes(parser: Any) -> None:
    """List the options of a benchmark or an optimizer without those of the one that it may have, as `StressBenchmark` does.

    jsonargparse goes down until Python's recursion limit, which made a script of 150 MB.
    """
    for action in parser._actions:
        if action.dest == "model":
            action.sub_add_kwargs["skip"] = {"benchmark", "optimizer"}
    from lightning.pytorch.cli import OptimizerCallable

    from lit_unlearn.evaluation.benchmark import Benchmark

    parser.add_subclass_arguments(Benchmark, "model.benchmark", skip={"benchmark"}, required=False)
    optimizer = parser.add_argument("--model.optimizer", type=OptimizerCallable)
    optimizer.sub_add_kwargs = {**getattr(optimizer, "sub_add_kwargs", {}), "skip": {"optimizer"}}
