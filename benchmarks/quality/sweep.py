"""Run the comparison of `protocol.py`, in units that continue after an interruption.

    python -m benchmarks.quality.sweep --tofu ../shared/data/tofu              # everything that has no result yet
    python -m benchmarks.quality.sweep --tofu DIR --methods pdu npo --seeds 0
    python -m benchmarks.quality.sweep --tofu DIR --only final/pdu-4-0 --again # one unit once more

Every unit (a model to fine-tune, a tuning run, a final run) is a process of its own with one thread. Its result is one line
of a JSON Lines file per stage in ``benchmarks/quality/results``, which is part of the repository; a unit that has a line is
not run again. Weights and logs are under ``build/quality``. The whole sweep takes about seven hours of one core, estimated
from the units run so far. The order makes a partial sweep useful: models and tuning, then all methods with seed 0, then the
other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.quality import protocol, tofu_models
from benchmarks.quality.results_files import RESULTS, Result, read_results, unit_name, write_result
from benchmarks.quality.run_unit import FINETUNE_STAGE, WORK_FOLDER, Unit
from benchmarks.quality.selection_rule import RETAIN_ONLY, choose_settings
from lit_unlearn.utils.io import read_json

STAGES = ("models", "tuning", "final", "calibrated", "bounds")


# The units of each stage -------------------------------------------------------------------------------------------------


def plan_models(seeds: Sequence[int]) -> Iterator[list[Unit]]:
    """Yield the units of all models in three groups, each of which needs the one before it.

    All models are fine-tuned; then the retain-only models are measured, and then the target models, which are compared
    with them.
    """
    targets = [Unit("models", "target", None, seed) for seed in seeds]
    retain_only = []
    for seed, size in itertools.product(seeds, protocol.SIZES):
        retain_only.append(Unit("models", RETAIN_ONLY, size, seed))
    yield [replace(unit, stage=FINETUNE_STAGE) for unit in (*targets, *retain_only)]
    yield retain_only
    yield targets


def plan_tuning(methods: Sequence[str]) -> list[Unit]:
    """Return the four tuning runs of every method."""
    units = []
    for method in methods:
        key, values = protocol.MAIN[method]
        for (i, rate), (j, value) in itertools.product(enumerate(protocol.RATES), enumerate(values)):
            settings = (f"--model.optimizer.init_args.lr={rate}", f"--{key}={value}", *protocol.ADAPTED.get(method, []))
            facts = {"method": method, "lr": rate, "main": {key: value}}
            units.append(Unit("tuning", f"{method}-{i}{j}", protocol.TUNED_SIZE, protocol.TUNED_SEED, settings, facts))
    return units


def plan_final(methods: Sequence[str], seeds: Sequence[int], results: Path) -> list[Unit]:
    """Return the runs of the chosen settings on every forget set and seed."""
    # The size that was tuned on comes first: with it alone there is a complete table.
    sizes = sorted(protocol.SIZES, key=lambda size: size != protocol.TUNED_SIZE)
    units = []
    for seed, size, method in itertools.product(seeds, sizes, methods):
        chosen = choose_settings(method, results).by_rule["unit"]
        units.append(Unit("final", method, size, seed, tuple(chosen["settings"]), chosen["facts"]))
    return units


def plan_calibrated(seeds: Sequence[int], results: Path) -> list[Unit]:
    """Return the runs of ``MatchUnseen`` with the settings chosen for PDU."""
    chosen = choose_settings("pdu", results).by_rule["unit"]
    units = []
    for seed, size, factor in itertools.product(seeds, protocol.SIZES, protocol.MATCHED):
        streams = json.dumps({"unseen": f"{WORK_FOLDER}/data/{size}/unseen.json"})
        settings = (
            *chosen["settings"],
            f"--data.streams={streams}",
            f"--model.forget.init_args.factor={factor}",
        )
        units.append(Unit("calibrated", f"match_{factor:g}", size, seed, settings, {"method": "match_unseen"}))
    return units


def plan_bounds(results: Path) -> list[Unit]:
    """Return the runs of PDU under several bounds from several first multipliers, and those of fixed weights."""
    chosen = choose_settings("pdu", results).by_rule["unit"]
    common = (f"--model.optimizer.init_args.lr={chosen['facts']['lr']}", "--model.keep=last")
    nll = "--model.constraints.nll"
    size, seed = protocol.TUNED_SIZE, protocol.TUNED_SEED

    units = []
    for bound, first, rate in itertools.product(protocol.BOUNDS, protocol.FIRST, protocol.DUAL_RATES):
        settings = (
            *common,
            f"{nll}.epsilon={json.dumps({'relative': bound})}",
            f"{nll}.multiplier.init_args.init={first}",
            f"{nll}.multiplier.init_args.lr={rate}",
        )
        facts = {"method": "pdu", "bound": bound, "first": first, "rate": rate}
        units.append(Unit("bounds", f"pdu_{bound:g}_{first}_{rate}", size, seed, settings, facts))
    for weight in protocol.WEIGHTS:
        fixed = json.dumps({"class_path": "FixedMultiplier", "init_args": {"weight": weight}})
        facts = {"method": "pdu", "weight": weight}
        units.append(Unit("bounds", f"fixed_{weight:g}", size, seed, (*common, f"{nll}.multiplier={fixed}"), facts))
    return units


# Running them ------------------------------------------------------------------------------------------------------------


def select_pending(units: Sequence[Unit], options: argparse.Namespace) -> list[Unit]:
    """Return the units that have no result yet (all with ``--again``), of those that ``--only`` names."""
    pending = []
    for unit in units:
        if unit.stage == FINETUNE_STAGE:
            # Another fine-tuning would invalidate every result that was measured with the model, so `--again` does none.
            is_done = tofu_models.is_finetuned(unit.size, unit.seed, options.work)
        else:
            names = [unit_name(result["unit"]) for result in read_results(options.results, unit.stage)]
            is_done = not options.again and unit_name(asdict(unit)) in names
        is_selected = not options.only or unit.name in options.only
        if is_selected and not is_done:
            pending.append(unit)
    return pending


def run_in_process(unit: Unit, work: Path) -> Result | None:
    """Run a unit in a fresh process and return its result; ``None`` if the process was interrupted or killed."""
    output = work / "units" / f"{unit.name}.json"
    # A result that an earlier sweep could not collect may be of other code.
    output.unlink(missing_ok=True)
    log = work / "log" / f"{unit.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)

    command = [sys.executable, "-m", "benchmarks.quality.run_unit", "--unit", json.dumps(asdict(unit))]
    command += ["--work", str(work), "--output", str(output)]
    with log.open("w", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=protocol.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    return read_json(output) if output.is_file() else None


def run_pending(units: Sequence[Unit], options: argparse.Namespace) -> None:
    """Run the pending units side by side and store each result as soon as it is there."""
    pending = select_pending(units, options)
    started = time.monotonic()
    pool = ThreadPoolExecutor(options.jobs)
    futures = {pool.submit(run_in_process, unit, options.work): unit for unit in pending}
    try:
        for number, future in enumerate(as_completed(futures), start=1):
            unit, result = futures[future], future.result()
            # Only this thread writes results files: units that end together cannot overwrite each other's lines.
            if result is not None and unit.stage != FINETUNE_STAGE:
                write_result(options.results, result)
            minutes = (time.monotonic() - started) / 60
            print(f"{number} of {len(pending)}, {minutes:.1f} min: {describe_outcome(unit, result)}", flush=True)
    finally:
        # After Ctrl-C, a plain shutdown would still run every unit that waits.
        pool.shutdown(cancel_futures=True)


def describe_outcome(unit: Unit, result: Result | None) -> str:
    """Return a line for the terminal."""
    if result is None:
        return f"{unit.name} was interrupted: no result"
    outcome = f"{unit.name} {result['total_seconds']:.0f} s"
    return f"{outcome}, FAILED: {result['error']}" if "error" in result else outcome


# Command -----------------------------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--methods", nargs="+", choices=protocol.MAIN, default=list(protocol.MAIN), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(protocol.SEEDS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--only", nargs="+", help="run only these units, such as final/pdu-4-0")
    parser.add_argument("--again", action="store_true", help="also run units that have a result, and replace it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="units side by side, with one thread each")
    parser.add_argument(
        "--work", type=Path, default=protocol.ROOT / "build/quality", help="folder for weights and logs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args(arguments)
    options.work, options.results = options.work.absolute(), options.results.absolute()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages in order; a later stage reads the results of the earlier ones."""
    options = parse_options(arguments)
    tofu_models.prepare_data(options.tofu.absolute(), options.work)
    if "models" in options.stages:
        for units in plan_models(options.seeds):
            run_pending(units, options)
    if "tuning" in options.stages:
        run_pending(plan_tuning(options.methods), options)
    if "final" in options.stages:
        run_pending(plan_final(options.methods, options.seeds, options.results), options)
    if "calibrated" in options.stages:
        run_pending(plan_calibrated(options.seeds, options.results), options)
    if "bounds" in options.stages:
        run_pending(plan_bounds(options.results), options)


if __name__ == "__main__":
    main()
