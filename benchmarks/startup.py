"""How long the command line takes before it does anything, beside a plain `LightningCLI`.

    python -m benchmarks.startup

Every command runs in a fresh process; they take turns. Of two commands the median of the ratio within a round counts.

- ``--version`` and ``--help`` are to answer within 0.2 and 1 second.
- ``fit --print_config`` builds the parsers of all subcommands and prints the defaults. Its peer is a script of three
  lines: `LightningCLI` with any `LightningModule` and `LightningDataModule` by class name, as here, and nothing but
  lightning imported. Ours is to take at most 1.2 times as long, though it also imports this package with its callbacks,
  pictures and transformers. A second peer imports transformers' auto classes too, as every language model's script does.
- The last command also reads a whole configuration. It has no peer, for a plain CLI has no such classes.

The first round warms the disk cache and does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from benchmarks.timing import alternate, machine, machine_line, median_ratio, table, write_json

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


def commands() -> dict[str, list[str]]:
    ours = [sys.executable, "-c", "from lit_unlearn.cli import main; main()"]  # what the installed script does
    peers = {PLAIN: "", WITH_TRANSFORMERS: "from transformers import AutoModelForCausalLM, AutoTokenizer"}
    show = ["fit", "--print_config"]
    return {
        **{name: [*ours, name.split()[1]] for name in BOUNDS},
        OURS: [*ours, *show],
        **{name: [sys.executable, "-c", PEER.format(imports=imports), *show] for name, imports in peers.items()},
        f"{OURS} --config demo/unlearn.yaml": [*ours, *show, "--config", "demo/unlearn.yaml"],
    }


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    elapsed = time.perf_counter() - start
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return elapsed


def measure(rounds: int) -> dict[str, Any]:
    """Seconds of each round, and what the bounds say of them."""
    turns = alternate(1 + rounds, {name: partial(seconds, command) for name, command in commands().items()})
    counted = {name: values[1:] for name, values in turns.items()}
    ratios = {name: median_ratio(counted[OURS], counted[name]) for name in (PLAIN, WITH_TRANSFORMERS)}
    within = {name: statistics.median(counted[name]) <= bound for name, bound in BOUNDS.items()}
    return {"seconds": counted, "ratios": ratios, "within": {**within, OURS: ratios[PLAIN] <= RATIO}}


def report(results: dict[str, Any]) -> str:
    times = results["seconds"]
    rows = [[name, f"{statistics.median(of):.2f}", f"{min(of):.2f}", f"{max(of):.2f}"] for name, of in times.items()]
    lines = [table(["command, seconds", "median", "least", "most"], rows), ""]
    for name, bound in BOUNDS.items():
        lines.append(f"{name}: {'within' if results['within'][name] else 'NOT within'} {bound} s")
    plain, transformers = results["ratios"][PLAIN], results["ratios"][WITH_TRANSFORMERS]
    verdict = "within" if results["within"][OURS] else "NOT within"
    lines.append(f"{OURS}: {plain:.2f} × LightningCLI's, {verdict} {RATIO}; {transformers:.2f} × with transformers")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of all commands that count (default 9)")
    parser.add_argument("--output", default="build/bench/startup.json")
    options = parser.parse_args(arguments)
    facts = machine("cpu")
    print(machine_line(facts), end="\n\n")
    results = {"machine": facts, **measure(options.rounds)}
    print(report(results))
    write_json(results, options.output)
    print(f"\nwritten to {options.output}")
    return results


if __name__ == "__main__":
    main()
