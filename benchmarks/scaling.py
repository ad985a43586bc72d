"""Measure the cost of a step of `LitUnlearn` as the work grows, and of the dual step and a second process.

    python -m benchmarks.scaling

From one small base (a Llama with random weights, examples as in `step.py`) one quantity at a time changes: examples per
batch, their length, the vocabulary, the number of constraints (each with a stream of its own). Time and extra memory are
defined as in `step.py`, but the memory of all rows of a table is measured in one further process, in turn.

Dual step: the same step with `DualAscent` and with `FixedMultiplier`, in turns. The median of the ratio should stay within
3 %; whether it does is printed, beside the time of `Constraint.update` alone.

Data parallel: the same global batches, of twice as many examples, on one process and on two, with DDP over gloo. The first
step's losses must agree to 1e-4, relative. Two processes with one thread each are compared with one process of one thread
(the gain from a second core) and of two threads (the same cores).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_parallel import format_processes, measure_processes
from benchmarks.machine import describe_machine, format_machine
from benchmarks.memory import PeakMemory, format_mib, return_freed_blocks_at_once, run_in_fresh_process
from benchmarks.random_llama import Shape, Step, build_model, count_tokens, make_steps, make_tiny_step
from benchmarks.step_variants import EPSILON, MULTIPLIER, count_gradient_bytes, make_unlearn_module, run_trainer
from benchmarks.timing import Clock, median_ratio, take_turns
from lit_unlearn import NLL, Constraint, DualAscent, FixedMultiplier, LitUnlearn
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.utils.io import write_json

BASE = Shape(16_000, hidden=256, intermediate=1024, layers=2, heads=4, kv_heads=4)
ORDERS = ("sequential", "joint")
DUAL_TOLERANCE = 0.03


@dataclass(frozen=True)
class Point:
    """One setting of every quantity that is varied."""

    shape: Shape = field(default=BASE)
    rows: int = 8
    scale: float = 1.0
    constraints: int = 1

    @property
    def retain_streams(self) -> list[str]:
        return ["retain", *(f"retain_{number}" for number in range(2, self.constraints + 1))]

    def make_steps(self, number: int) -> list[Step]:
        """Return a tiny step, in which the optimizer creates its state, and ``number`` steps to measure."""
        streams = ["forget", *self.retain_streams]
        steps = make_steps(self.shape, number, rows=self.rows, scale=self.scale, streams=streams)
        return [make_tiny_step(streams), *steps]

    def make_module(self, model: Any, order: str) -> LitUnlearn:
        constraints = {}
        for stream in self.retain_streams:
            constraints[stream] = Constraint(NLL(), EPSILON, DualAscent(**MULTIPLIER), stream=stream)
        return make_unlearn_module(model, constraints, passes=order)


def plan_sweeps(small: bool) -> dict[str, dict[str, Point]]:
    """Return the points of each table by row; ``small`` is for tests."""
    base = Point()
    rows, scales, vocabularies, constraints = [2, 4, 8, 16], [0.5, 1, 2, 4], [4_000, 16_000, 64_000], [1, 2, 3]
    if small:
        base = Point(replace(BASE, vocabulary=500, hidden=32, intermediate=64))
        rows, scales, vocabularies, constraints = [2], [2], [1_000], [1, 2]
    sweeps: dict[str, dict[str, Point]] = {
        "rows per batch": {},
        "length of rows": {},
        "vocabulary": {},
        "constraints": {},
    }
    for number in rows:
        sweeps["rows per batch"][str(number)] = replace(base, rows=number)
    for scale in scales:
        sweeps["length of rows"][f"× {scale}"] = replace(base, scale=scale)
    for vocabulary in vocabularies:
        shape = replace(base.shape, vocabulary=vocabulary)
        sweeps["vocabulary"][f"{vocabulary:,}"] = replace(base, shape=shape)
    for number in constraints:
        sweeps["constraints"][str(number)] = replace(base, constraints=number)
    return sweeps


# Sweeps ------------------------------------------------------------------------------------------------------------------


def measure_time(point: Point, rounds: int, number: int = 2) -> dict[str, Any]:
    """Measure the step seconds of both orders of passes, on one model."""
    steps = point.make_steps(number)
    model = build_model(point.shape)

    def measure_turn(module: LitUnlearn) -> float:
        gc.collect()
        clock = Clock()
        run_trainer(module, steps, clock)
        return statistics.fmean(clock.step_seconds())

    turns = {}
    for order in ORDERS:
        turns[order] = partial(measure_turn, point.make_module(model, order))
    seconds = take_turns(rounds, turns)
    # Step 0 is the tiny one, which is not timed.
    tokens = count_tokens(steps[1:]) / number
    orders = {}
    for order, values in seconds.items():
        median = statistics.median(values)
        orders[order] = {"seconds": median, "seconds_of_rounds": values, "tokens_per_second": tokens / median}
    return {**asdict(point), "tokens_per_step": tokens, "orders": orders}


def measure_memory(points: Sequence[Point], threads: int) -> list[dict[str, int | None]]:
    """Measure the extra memory of both orders of passes at every point; call this in a fresh process."""
    torch.set_num_threads(threads)
    return_freed_blocks_at_once()
    extra_bytes = []
    for point in points:
        extra_bytes.append({order: measure_extra_bytes(point, order) for order in ORDERS})
    return extra_bytes


def measure_extra_bytes(point: Point, order: str, number: int = 2) -> int | None:
    """Measure the extra memory of one order of passes."""
    model, memory = build_model(point.shape), PeakMemory(1, number)
    run_trainer(point.make_module(model, order), point.make_steps(number), memory)
    return memory.extra_bytes(count_gradient_bytes(model))


def measure_sweep(points: dict[str, Point], rounds: int, threads: int) -> dict[str, Any]:
    """Measure time and memory for the rows of one table."""
    # The process starts once per table: its start and its imports take longer than a small point.
    extra_bytes = run_in_fresh_process(measure_memory, list(points.values()), threads)
    results = {}
    for (label, point), extra in zip(points.items(), extra_bytes, strict=True):
        results[label] = {**measure_time(point, rounds), "extra_bytes": extra}
    return results


def format_sweep(name: str, results: dict[str, Any]) -> str:
    """Format the results of one sweep as a table."""
    headers = [name, "tokens/step"]
    for unit in ("ms/step", "tokens/s", "MiB"):
        headers += [f"{order} {unit}" for order in ORDERS]
    rows = []
    for label, point in results.items():
        milliseconds, rates, extra = [], [], []
        for order in ORDERS:
            milliseconds.append(f"{1e3 * point['orders'][order]['seconds']:.0f}")
            rates.append(f"{point['orders'][order]['tokens_per_second']:,.0f}")
            extra.append(format_mib(point["extra_bytes"][order]))
        rows.append([label, f"{point['tokens_per_step']:.0f}", *milliseconds, *rates, *extra])
    return format_table(rows, headers)


# The dual step -----------------------------------------------------------------------------------------------------------


def measure_dual_step(point: Point, rounds: int, number: int = 4) -> dict[str, Any]:
    """Measure the same step with a multiplier that is updated and with a fixed one."""
    steps, model = point.make_steps(number), build_model(point.shape)

    def measure_turn(module: LitUnlearn) -> float:
        clock = Clock()
        run_trainer(module, steps, clock)
        return statistics.median(clock.step_seconds())

    turns = {}
    for multiplier in (DualAscent(**MULTIPLIER), FixedMultiplier(MULTIPLIER["init"])):
        module = make_unlearn_module(model, {"nll": Constraint(NLL(), EPSILON, multiplier)})
        turns[type(multiplier).__name__] = partial(measure_turn, module)
    # The first round fills caches and does not count.
    take_turns(1, turns)
    seconds = take_turns(rounds, turns)
    ratio = median_ratio(seconds["DualAscent"], seconds["FixedMultiplier"])
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_of_rounds": seconds,
        "ratio": ratio,
        "within_tolerance": abs(ratio - 1) <= DUAL_TOLERANCE,
        "update_seconds": measure_update(),
    }


def measure_update(repeats: int = 1000) -> float:
    """Measure the mean seconds of one `Constraint.update`."""
    constraint = Constraint(NLL(), EPSILON, DualAscent(**MULTIPLIER))
    start = time.perf_counter()
    for _ in range(repeats):
        constraint.update(1.0, epoch=0)
    return (time.perf_counter() - start) / repeats


def format_dual_step(results: dict[str, Any]) -> str:
    """Format the result of `measure_dual_step` as a table with a line of text below it."""
    rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in results["seconds"].items()]
    verdict = "within" if results["within_tolerance"] else "NOT within"
    return (
        f"{format_table(rows, ['multiplier', 'ms/step'])}\n"
        f"DualAscent / FixedMultiplier: {results['ratio']:.4f}, {verdict} {DUAL_TOLERANCE:.0%}; "
        f"Constraint.update alone: {1e6 * results['update_seconds']:.1f} µs"
    )


# Command -----------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of both orders of passes (default 5)")
    parser.add_argument("--dual-rounds", type=int, default=15, help="turns with and without dual steps (default 15)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--small", action="store_true", help="toy sizes, only to show that the script works")
    parser.add_argument("--no-processes", action="store_true", help="do not measure data parallelism")
    parser.add_argument("--output", type=Path, default="build/bench/scaling.json", help="file for the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    # The imports' objects are never garbage, and there are enough of them to make the collections between turns slow.
    gc.freeze()
    results: dict[str, Any] = {"machine": describe_machine("cpu"), "sweeps": {}}
    plan = plan_sweeps(options.small)
    base = plan["constraints"]["1"]
    print(format_machine(results["machine"]))
    print(
        f"base: {base.shape}, {base.rows} rows per batch, one constraint; MiB beyond parameters, gradients, optimizer"
    )
    for name, points in plan.items():
        results["sweeps"][name] = measure_sweep(points, options.rounds, options.threads)
        print(f"\n{format_sweep(name, results['sweeps'][name])}", flush=True)
    results["dual_step"] = measure_dual_step(base, options.dual_rounds)
    print(f"\n{format_dual_step(results['dual_step'])}", flush=True)
    if not options.no_processes:
        results["processes"] = measure_processes(base.shape, rows=2 * base.rows, number=8)
        print(f"\n{format_processes(results['processes'])}")
    write_json(options.output, results)
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
