"""What a step of `LitUnlearn` costs as the work grows, and what the dual step and a second process add.

    python -m benchmarks.scaling

From one small base (a Llama with random weights, batches as in `step.py`) one thing at a time changes: rows per batch,
length of the rows, vocabulary, number of constraints (each with a stream of its own). Time and extra memory are defined
as in `step.py`, but the memory of one table is measured in one further process, one row after the other.

Dual step: the same step with `DualAscent` and with `FixedMultiplier`, in turns; the median of the ratio is to stay within
3 %, and whether it did is printed. Beside it stands the time of `Constraint.update` alone.

Data parallel: the same global batches, of twice as many rows, on one process and on two, with DDP over gloo. The first
step's losses must agree to 1e-4, relative. Two processes with one thread each compare with one process of one thread
(what a second core brings) and of two threads (the same cores).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.data_parallel import measure_processes, processes_report
from benchmarks.random_llama import Shape, Step, build_model, make_steps, real_tokens, tiny_step
from benchmarks.step_variants import EPSILON, MULTIPLIER, fit, gradient_bytes, unlearn_module
from benchmarks.timing import (
    Clock,
    PeakMemory,
    alternate,
    apart,
    in_mib,
    machine,
    machine_line,
    measure_what_is_used,
    median_ratio,
    table,
    write_json,
)
from lit_unlearn import NLL, Constraint, DualAscent, FixedMultiplier, LitUnlearn

BASE = Shape(16_000, hidden=256, intermediate=1024, layers=2, heads=4, kv_heads=4)
ORDERS = ("sequential", "joint")
DUAL_TOLERANCE = 0.03


@dataclass(frozen=True)
class Point:
    """One setting of everything that is varied."""

    shape: Shape = field(default=BASE)
    rows: int = 8
    scale: float = 1.0
    constraints: int = 1

    @property
    def streams(self) -> list[str]:
        return ["forget", *self.retain_streams]

    @property
    def retain_streams(self) -> list[str]:
        return ["retain", *(f"retain {n}" for n in range(2, self.constraints + 1))]

    def steps(self, number: int) -> list[Step]:
        return make_steps(self.shape, number, rows=self.rows, scale=self.scale, streams=self.streams)

    def module(self, model: Any, passes: str) -> LitUnlearn:
        constraints = {s: Constraint(NLL(), EPSILON, DualAscent(**MULTIPLIER), stream=s) for s in self.retain_streams}
        return unlearn_module(model, constraints, passes=passes)


def sweeps(small: bool) -> dict[str, dict[str, Point]]:
    """For each table its rows; the toy version is for tests."""
    base = Point(replace(BASE, vocabulary=500, hidden=32, intermediate=64)) if small else Point()
    vocabularies = [1_000] if small else [4_000, 16_000, 64_000]
    return {
        "rows per batch": {str(n): replace(base, rows=n) for n in ([2] if small else [2, 4, 8, 16])},
        "length of rows": {f"× {n}": replace(base, scale=n) for n in ([2] if small else [0.5, 1, 2, 4])},
        "vocabulary": {f"{n:,}": replace(base, shape=replace(base.shape, vocabulary=n)) for n in vocabularies},
        "constraints": {str(n): replace(base, constraints=n) for n in ([1, 2] if small else [1, 2, 3])},
    }


# Sweeps ------------------------------------------------------------------------------------------------------------------


def measure(point: Point, rounds: int, number: int = 2) -> dict[str, Any]:
    """Time of both orders of passes."""
    steps = [tiny_step(point.streams), *point.steps(number)]
    model = build_model(point.shape)
    modules = {order: point.module(model, order) for order in ORDERS}

    def turn(order: str) -> float:
        gc.collect()
        clock = Clock()
        fit(modules[order], steps, clock)
        return statistics.fmean(clock.seconds)

    seconds = alternate(rounds, {order: partial(turn, order) for order in ORDERS})
    tokens = real_tokens(steps[1:]) / number
    return {
        **asdict(point),
        "tokens_per_step": tokens,
        "orders": {
            order: {
                "seconds": statistics.median(seconds[order]),
                "seconds_of_rounds": seconds[order],
                "tokens_per_second": tokens / statistics.median(seconds[order]),
            }
            for order in ORDERS
        },
    }


def measure_memory(points: Sequence[Point], threads: int, number: int = 2) -> list[dict[str, int | None]]:
    """Extra memory of both orders of passes at every point; call it in a fresh process."""
    torch.set_num_threads(threads)
    measure_what_is_used()
    return [{order: extra_memory(point, order, number) for order in ORDERS} for point in points]


def extra_memory(point: Point, order: str, number: int) -> int | None:
    model, memory = build_model(point.shape), PeakMemory(1, number)
    fit(point.module(model, order), [tiny_step(point.streams), *point.steps(number)], memory)
    return memory.extra(gradient_bytes(model))


def measure_sweep(points: dict[str, Point], rounds: int, threads: int) -> dict[str, Any]:
    """One table: time, and memory from another process."""
    memory = apart(measure_memory, list(points.values()), threads)
    return {
        label: {**measure(point, rounds), "extra_bytes": extra}
        for (label, point), extra in zip(points.items(), memory, strict=True)
    }


def sweep_table(name: str, points: dict[str, Any]) -> str:
    header = [name, "tokens/step"]
    header += [f"{order} {unit}" for unit in ("ms/step", "tokens/s", "MiB") for order in ORDERS]
    rows = []
    for label, point in points.items():
        orders = [point["orders"][order] for order in ORDERS]
        row = [label, f"{point['tokens_per_step']:.0f}", *(f"{1e3 * o['seconds']:.0f}" for o in orders)]
        row += [f"{o['tokens_per_second']:,.0f}" for o in orders]
        row += [in_mib(point["extra_bytes"][order]) for order in ORDERS]
        rows.append(row)
    return table(header, rows)


# The dual step -----------------------------------------------------------------------------------------------------------


def measure_dual(point: Point, rounds: int, number: int = 4) -> dict[str, Any]:
    """The same step with and without a multiplier that moves."""
    multipliers = {"DualAscent": DualAscent(**MULTIPLIER), "FixedMultiplier": FixedMultiplier(MULTIPLIER["init"])}
    steps, model = [tiny_step(), *point.steps(number)], build_model(point.shape)
    modules = {
        name: unlearn_module(model, {"nll": Constraint(NLL(), EPSILON, multiplier)})
        for name, multiplier in multipliers.items()
    }

    def turn(name: str) -> float:
        clock = Clock()
        fit(modules[name], steps, clock)
        return statistics.median(clock.seconds)

    turns = {name: partial(turn, name) for name in modules}
    alternate(1, turns)  # fills caches
    seconds = alternate(rounds, turns)
    ratio = median_ratio(seconds["DualAscent"], seconds["FixedMultiplier"])
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_of_rounds": seconds,
        "ratio": ratio,
        "within_tolerance": abs(ratio - 1) <= DUAL_TOLERANCE,
        "update_seconds": update_seconds(),
    }


def update_seconds(repeats: int = 1000) -> float:
    """Of one `Constraint.update`."""
    constraint = Constraint(NLL(), EPSILON, DualAscent(**MULTIPLIER))
    start = time.perf_counter()
    for _ in range(repeats):
        constraint.update(1.0, epoch=0)
    return (time.perf_counter() - start) / repeats


def dual_report(results: dict[str, Any]) -> str:
    rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in results["seconds"].items()]
    verdict = "within" if results["within_tolerance"] else "NOT within"
    return "\n".join(
        [
            table(["multiplier", "ms/step"], rows),
            f"DualAscent / FixedMultiplier: {results['ratio']:.4f}, {verdict} {DUAL_TOLERANCE:.0%}; "
            f"Constraint.update alone: {1e6 * results['update_seconds']:.1f} µs",
        ]
    )


# Command -----------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of both orders of passes (default 5)")
    parser.add_argument("--dual-rounds", type=int, default=15, help="turns with and without dual steps (default 15)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--small", action="store_true", help="toy sizes, which show that the script works and no more")
    parser.add_argument("--no-processes", action="store_true", help="leaves out data parallelism")
    parser.add_argument("--output", default="build/bench/scaling.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    gc.freeze()  # what the imports made is never garbage: collecting between turns need not look at it
    results: dict[str, Any] = {"machine": machine("cpu"), "sweeps": {}}
    plan = sweeps(options.small)
    base = plan["constraints"]["1"]
    print(machine_line(results["machine"]))
    print(
        f"base: {base.shape}, {base.rows} rows per batch, one constraint; MiB beyond parameters, gradients, optimizer"
    )
    for name, points in plan.items():
        results["sweeps"][name] = measure_sweep(points, options.rounds, options.threads)
        print(f"\n{sweep_table(name, results['sweeps'][name])}", flush=True)
    results["dual_step"] = measure_dual(base, options.dual_rounds)
    print(f"\n{dual_report(results['dual_step'])}", flush=True)
    if not options.no_processes:
        results["processes"] = measure_processes(base.shape, rows=2 * base.rows, number=8)
        print(f"\n{processes_report(results['processes'])}")
    write_json(results, options.output)
    print(f"\nwritten to {options.output}")
    return results


if __name__ == "__main__":
    main()
