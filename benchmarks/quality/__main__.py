"""Compare methods: ``python -m benchmarks.quality --model small|smollm2|tofu-1b --tofu FOLDER``.

The protocol of each tier says what runs and how it is judged: `protocol` (small), `smollm2` and `tofu_1b`. ``small`` has options of
its own, see ``--model small --help``. Of the others, every stage is a file for ``lit-unlearn sweep``, which is written to
``build/quality/<tier>`` and run; then each of its cells is a line of ``benchmarks/quality/results/<tier>/<stage>.jsonl``. The same
command continues after an interruption, and may run several times at once. ``--list`` runs nothing and shows the cells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.quality import smollm2, sweep, tofu_1b
from benchmarks.quality.collecting import collect
from benchmarks.quality.measuring import ATTACKS_FILE
from benchmarks.quality.results_files import RESULTS, drop_failed
from benchmarks.quality.smollm2_sweeps import SmolLM2
from benchmarks.quality.tofu_1b import TOFU1B
from lit_unlearn.cli import main as run_lit_unlearn
from lit_unlearn.cli.grid import read_sweep
from lit_unlearn.utils.io import atomic_file

Tier = SmolLM2 | TOFU1B
TIERS: dict[str, type[SmolLM2] | type[TOFU1B]] = {"smollm2": SmolLM2, "tofu-1b": TOFU1B}
METHODS = {"smollm2": smollm2.METHODS, "tofu-1b": tofu_1b.METHODS}
SMALL = "small"

CELLS_FAILED = 1
"""Exit code of a sweep that ran to its end, some of its cells not."""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a tier on a real model."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=[SMALL, *TIERS], help="the tier")
    parser.add_argument("--tofu", default="locuslab/TOFU", help="folder with TOFU's files, or its name on the hub")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="run only these")
    parser.add_argument("--list", action="store_true", help="show the cells, and what is known of them")
    parser.add_argument(
        "--size", choices=smollm2.GRIDS, default="10", help="smollm2: number of authors, or full for a GPU"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds that judge; by default those of the protocol")
    parser.add_argument(
        "--sizes", nargs="+", type=int, metavar="AUTHORS", help="smollm2: forget sets; by default all of the protocol"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="by default those of the protocol")
    parser.add_argument(
        "--rate", type=float, help="smollm2: tokens per second of a fit, by which the number of methods is chosen"
    )
    parser.add_argument(
        "--entities", metavar="FILE", help="entities of TOFU's forget10, for the Unlearning Depth Score"
    )
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="tofu-1b: has the models in folders of their hub names"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--retry", action="store_true", help="run cells again that failed")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="folder of rows, models and sweeps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args(arguments)
    allowed = {"stages": TIERS[options.model].STAGES, "methods": METHODS[options.model]}
    for option, names in allowed.items():
        for name in getattr(options, option) or ():
            if name not in names:
                parser.error(f"--{option}: {options.model} has no '{name}', but {', '.join(names)}")
    sizes = smollm2.GRIDS[options.size].selection.sizes
    if not set(options.sizes or ()) <= set(sizes):
        parser.error(
            f"--sizes: with --size {options.size}, there are {', '.join(map(str, sizes))}, not {options.sizes}"
        )
    return options


def write_sweep(tier: Tier, stage: str) -> Path:
    """Write the file of a stage's sweep, and that of the attacks, which it may name."""
    sweep = tier.folder / f"{stage}.yaml"
    for file, content in {sweep: tier.build(stage), tier.folder / ATTACKS_FILE: tier.attacks}.items():
        with atomic_file(file) as unfinished:
            unfinished.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return sweep


def run_stage(tier: Tier, stage: str, options: argparse.Namespace) -> None:
    """Run what is left of a stage, and collect its results, also those of an interrupted one.

    Raises:
        SystemExit: If it was interrupted or refused, or later stages need a cell that is not done.
    """
    try:
        file = write_sweep(tier, stage)
    except ValueError as error:
        sys.exit(f"{stage}: {error}")
    command = ["sweep", str(file), f"--jobs={options.jobs}"]
    if options.retry:
        command.append("--retry")
    print(f"\n{stage}: lit-unlearn {' '.join(command)}", flush=True)
    try:
        run_lit_unlearn(command)
    except SystemExit as end:
        if end.code != CELLS_FAILED:
            raise
    finally:
        lines = collect(file, tier.results / f"{stage}.jsonl", tier.digest, tier.folder)
    if stage in tier.MAY_FAIL:
        return
    done = [line["cell"] for line in drop_failed(lines)]
    _, cells = read_sweep(str(file))
    missing = [cell.name for cell in cells if cell.name not in done]
    if missing:
        sys.exit(
            f"later stages need all cells of '{stage}', and these are not done: {'; '.join(missing)}. --retry runs them again."
        )


def list_stage(tier: Tier, stage: str) -> None:
    """Print the cells of a stage, or why they are not known yet."""
    try:
        file = write_sweep(tier, stage)
    except ValueError as error:
        print(f"\n{stage}: {error}")
        return
    print(f"\n{stage}: {file}", flush=True)
    run_lit_unlearn(["sweep", str(file), "--list"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages of a tier in their order: later ones read the models and the results of earlier ones."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    chosen, others = first.parse_known_args(arguments)
    if chosen.model == SMALL:
        sweep.main(others)
        return
    options = parse_options(arguments)
    tier = TIERS[options.model].from_options(options)
    stages = options.stages or tier.default_stages
    if options.list:
        for stage in stages:
            list_stage(tier, stage)
        return
    tier.write_inputs(options)
    for stage in tier.STAGES:
        if stage in stages:
            run_stage(tier, stage, options)


if __name__ == "__main__":
    main()
