"""Time the start of the command line, beside a plain `LightningCLI`.

    python -m benchmarks.startup

Every command runs in a fresh process, in turn with the others. Two commands are compared by the median of their ratio
within a round.

- ``--version`` and ``--help`` should answer within 0.2 and 1 second.
- ``fit --print_config`` builds the parsers of all subcommands and prints the defaults. Its peer is a script of three
  lines: `LightningCLI` with any `LightningModule` and `LightningDataModule` by class name, as here, which imports nothing
  but lightning. Ours should take at most 1.2 times as long, although it also imports this package with its callbacks,
  plots and transformers. A second peer imports transformers' auto classes too, as every language model's script does.
- The last command also reads a complete configuration. It has no peer, because a plain CLI has no such classes.

The first round warms the disk cache and does not count, unless you ask otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, format_machine
from benchmarks.timing import median_ratio, take_turns
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.utils.io import write_json

PEER = """
import lightning as L
from lightning.pytorch.cli import LightningCLI
{imports}
LightningCLI(L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
    auto_configure_optimizers=False)
"""
OURS, PLAIN = "lit-unlearn fit --print_config", "LightningCLI fit --print_config"
WITH_TRANSFORMERS = "LightningCLI and transformers, fit --print_config"
BOUNDS = {"lit-unlearn --version": 0.2, "lit-unlearn --help": 1.0}
RATIO = 1.2


def list_commands() -> dict[str, list[str]]:
    """Return the commands to time, by name."""
    # The installed script does the same; a checkout need not have it.
    ours = [sys.executable, "-c", "from lit_unlearn.cli import main; main()"]
    plain = [sys.executable, "-c", PEER.format(imports="")]
    transformers_import = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    with_transformers = [sys.executable, "-c", PEER.format(imports=transformers_import)]
    print_config = ["fit", "--print_config"]
    return {
        "lit-unlearn --version": [*ours, "--version"],
        "lit-unlearn --help": [*ours, "--help"],
        OURS: [*ours, *print_config],
        PLAIN: [*plain, *print_config],
        WITH_TRANSFORMERS: [*with_transformers, *print_config],
        f"{OURS} --config demo/unlearn.yaml": [*ours, *print_config, "--config", "demo/unlearn.yaml"],
    }


def time_command(command: list[str]) -> float:
    """Run a command in a fresh process and return its seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    elapsed = time.perf_counter() - start
    # A command that fails early would be the fastest.
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return elapsed


def time_commands(rounds: int, warm_up_rounds: int = 1) -> dict[str, Any]:
    """Time all commands, and compare them with their bounds."""
    turns = {name: partial(time_command, command) for name, command in list_commands().items()}
    seconds = {name: values[warm_up_rounds:] for name, values in take_turns(warm_up_rounds + rounds, turns).items()}
    ratios = {
        PLAIN: median_ratio(seconds[OURS], seconds[PLAIN]),
        WITH_TRANSFORMERS: median_ratio(seconds[OURS], seconds[WITH_TRANSFORMERS]),
    }
    within = {}
    for name, bound in BOUNDS.items():
        within[name] = statistics.median(seconds[name]) <= bound
    within[OURS] = ratios[PLAIN] <= RATIO
    return {"seconds": seconds, "ratios": ratios, "within": within}


def format_report(results: dict[str, Any]) -> str:
    """Format the result of `time_commands` as a table with lines of text below it."""
    rows = []
    for name, seconds in results["seconds"].items():
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}"])
    verdicts = {name: "within" if is_within else "NOT within" for name, is_within in results["within"].items()}
    lines = [format_table(rows, ["command, seconds", "median", "least", "most"]), ""]
    for name, bound in BOUNDS.items():
        lines.append(f"{name}: {verdicts[name]} {bound} s")
    plain, with_transformers = results["ratios"][PLAIN], results["ratios"][WITH_TRANSFORMERS]
    lines.append(
        f"{OURS}: {plain:.2f} × LightningCLI's, {verdicts[OURS]} {RATIO}; {with_transformers:.2f} × with transformers"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of all commands that count (default 9)")
    parser.add_argument("--warm_up_rounds", type=int, default=1, help="turns before that do not count (default 1)")
    parser.add_argument("--output", type=Path, default="build/bench/startup.json", help="file for the results")
    options = parser.parse_args(arguments)
    # Before the commands: the load should be that of the other programs.
    facts = describe_machine("cpu")
    print(format_machine(facts), end="\n\n")
    results = {"machine": facts, **time_commands(options.rounds, options.warm_up_rounds)}
    print(format_report(results))
    write_json(options.output, results)
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
