"""Runs the comparison of `protocol.py`, in token_texts that continue after an interruption.

    python benchmarks/quality/sweep.py --tofu ../shared/data/tofu            # everything that is not there yet
    python benchmarks/quality/sweep.py --tofu DIR --methods pdu npo --seeds 0
    python benchmarks/quality/sweep.py --tofu DIR --only final/pdu-4-0 --again --results build/again   # one row, anew

Every unit (a model taught, a method tuned, a final run) is a process of its own with one thread, and a JSON file in
``benchmarks/quality/results``, which is kept in the repository; a unit whose file is there is not run again. Weights and logs
are under ``build/quality``. The whole is about seven hours of one core, going by the units run so far; the order is such
that a part is of use: models and tuning, then all methods with seed 0, then the other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import models
import protocol
from choose import chosen
from units import WORK_FOLDER, Unit, run

HERE = Path(__file__).parent
STAGES = ("models", "tuning", "final", "calibrated", "bounds")


def teaching(seeds: Sequence[int]) -> Iterator[list[Unit]]:
    """All models; then the retain-only ones measured, and then the targets, which are compared with them."""
    targets = [("target", None, seed) for seed in seeds]
    others = [("retain_only", size, seed) for seed in seeds for size in protocol.SIZES]
    yield [Unit("taught", *which) for which in (*targets, *others)]
    yield [Unit("models", *which) for which in others]
    yield [Unit("models", *which) for which in targets]


def tuning(methods: Sequence[str]) -> list[Unit]:
    """Four runs of every method."""
    units = []
    for method in methods:
        key, values = protocol.MAIN[method]
        for i, rate in enumerate(protocol.RATES):
            for j, value in enumerate(values):
                settings = (
                    f"--model.optimizer.init_args.lr={rate}",
                    f"--{key}={value}",
                    *protocol.ADAPTED.get(method, []),
                )
                facts = {"method": method, "lr": rate, "main": {key: value}}
                size, seed = protocol.TUNED_SIZE, protocol.TUNED_SEED
                units.append(Unit("tuning", f"{method}-{i}{j}", size, seed, settings, facts))
    return units


def final(methods: Sequence[str], seeds: Sequence[int], results: Path) -> list[Unit]:
    """The chosen settings on every forget set and seed."""
    units = []
    for seed in seeds:
        for size in (protocol.TUNED_SIZE, *(size for size in protocol.SIZES if size != protocol.TUNED_SIZE)):
            for method in methods:
                best = chosen(method, results)["rule"]["unit"]
                units.append(Unit("final", method, size, seed, tuple(best["settings"]), best["facts"]))
    return units


def calibrated(seeds: Sequence[int], results: Path) -> list[Unit]:
    """Matching under the bound of PDU, as that was chosen."""
    best = chosen("pdu", results)["rule"]["unit"]
    units = []
    for seed, size, factor in itertools.product(seeds, protocol.SIZES, protocol.MATCHED):
        streams = json.dumps({"unseen": f"{WORK_FOLDER}/data/{size}/unseen.json"})
        own = (f"--data.streams={streams}", f"--model.forget.init_args.factor={factor}")
        facts = {"method": "match_unseen"}
        units.append(Unit("calibrated", f"match_{factor:g}", size, seed, (*best["settings"], *own), facts))
    return units


def bounds(results: Path) -> list[Unit]:
    """PDU under several bounds from several starts, and fixed weights in its place."""
    best = chosen("pdu", results)["rule"]["unit"]
    common = (f"--model.optimizer.init_args.lr={best['facts']['lr']}", "--model.keep=last")
    nll, size, seed = "--model.constraints.nll", protocol.TUNED_SIZE, protocol.TUNED_SEED
    units = []
    for bound, first, rate in itertools.product(protocol.BOUNDS, protocol.FIRST, protocol.DUAL_RATES):
        facts = {"method": "pdu", "bound": bound, "first": first, "rate": rate}
        epsilon, start = json.dumps({"relative": bound}), f"{nll}.multiplier.init_args"
        settings = [f"{nll}.epsilon={epsilon}", f"{start}.init={first}", f"{start}.lr={rate}"]
        units.append(Unit("bounds", f"pdu_{bound:g}_{first}_{rate}", size, seed, (*common, *settings), facts))
    for weight in protocol.WEIGHTS:
        facts = {"method": "pdu", "weight": weight}
        fixed = json.dumps({"class_path": "FixedMultiplier", "init_args": {"weight": weight}})
        units.append(Unit("bounds", f"fixed_{weight:g}", size, seed, (*common, f"{nll}.multiplier={fixed}"), facts))
    return units


def do(unit: Unit, work: Path, results: Path) -> tuple[Unit, float, str | None]:
    import torch

    torch.set_num_threads(1)
    done = run(unit, work, results)
    return unit, done["total_seconds"], done.get("error")


def go(units: Sequence[Unit], options: argparse.Namespace) -> None:
    """Runs what is not there yet, side by side."""
    left = [unit for unit in units if options.again or not (options.results / unit.file).is_file()]
    if options.only:
        left = [unit for unit in left if Path(unit.file).with_suffix("").as_posix() in options.only]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lit_unlearn.cli.trainer", "transformers", "peft", "units"])
    started = time.monotonic()
    work: Callable[[Unit], tuple[Unit, float, str | None]] = partial(do, work=options.work, results=options.results)
    with context.Pool(options.jobs, maxtasksperchild=1) as pool:
        for number, (unit, seconds, error) in enumerate(pool.imap_unordered(work, left), start=1):
            minutes = (time.monotonic() - started) / 60
            print(
                f"{number} of {len(left)}, {minutes:.1f} min: {unit.file} {seconds:.0f} s{f', FAILED: {error}' if error else ''}",
                flush=True,
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--methods", nargs="+", choices=protocol.MAIN, default=list(protocol.MAIN), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(protocol.SEEDS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--only", nargs="+", help="units by name, such as final/pdu-4-0")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="units side by side, a thread each")
    parser.add_argument(
        "--work", type=Path, default=protocol.ROOT / "build/quality", help="folder for weights and logs"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results files")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.work, options.results = options.work.absolute(), options.results.absolute()
    models.prepare(options.tofu.absolute(), options.work)
    if "models" in options.stages:
        for units in teaching(options.seeds):
            go(units, options)
    if "tuning" in options.stages:
        go(tuning(options.methods), options)
    if "final" in options.stages:
        go(final(options.methods, options.seeds, options.results), options)
    if "calibrated" in options.stages:
        go(calibrated(options.seeds, options.results), options)
    if "bounds" in options.stages:
        go(bounds(options.results), options)


if __name__ == "__main__":
    main()
