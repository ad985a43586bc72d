"""Measure the same global batches on one process and on two, for `scaling.py`, which starts this file under torchrun."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.random_llama import Shape, Step, build_model, make_steps
from benchmarks.step_variants import make_unlearn_module, run_trainer
from benchmarks.timing import Clock
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.training.strategies import leave_process_group
from lit_unlearn.utils.io import read_json, write_json

ROOT = Path(__file__).parents[1]
LOSS_TOLERANCE = 1e-4
# Processes, and threads of each.
LAYOUTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def measure_processes(shape: Shape, rows: int, number: int) -> dict[str, Any]:
    """Measure the seconds of a step in each of `LAYOUTS`.

    Args:
        shape: Sizes of the model.
        rows: Examples of a global batch; even.
        number: Steps to time.

    Raises:
        RuntimeError: If the layouts do not start with the same losses.
    """
    results, first_losses = {}, {}
    for name, (processes, threads) in LAYOUTS.items():
        results[name] = run_processes(shape, rows, number, processes, threads)
        first_losses[name] = results[name]["first_losses"]
    expected, *compared = first_losses.values()
    for losses in compared:
        for key, loss in expected.items():
            # Not `> LOSS_TOLERANCE`: a loss that is NaN must fail, too.
            if not abs(losses[key] / loss - 1) <= LOSS_TOLERANCE:
                raise RuntimeError(f"one and two processes take different steps: first losses {first_losses}.")
    return results


def run_processes(shape: Shape, rows: int, number: int, processes: int, threads: int) -> dict[str, Any]:
    """Run this module under torchrun and return the result of its first process."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        write_json(job, {"shape": asdict(shape), "rows": rows, "number": number, "threads": threads})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "benchmarks.data_parallel", str(job), str(result)]
        # Without this, torchrun sets one thread for each of several processes.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if not result.exists():
            raise RuntimeError(
                f"{processes} processes gave no result (exit code {done.returncode}):\n{done.stderr[-3000:]}"
            )
        return read_json(result)


def format_processes(results: dict[str, Any]) -> str:
    """Format the result of `measure_processes` as a table."""
    single = results["1 process, 1 thread"]["seconds"]
    rows = []
    for name, result in results.items():
        rows.append([name, f"{1e3 * result['seconds']:.0f}", f"{single / result['seconds']:.2f}"])
    return format_table(rows, ["the same global batch", "ms/step", "speed-up"])


def run_job(job: Path, result: Path) -> None:
    """Run one of the processes: it takes its share of every global batch."""
    settings = read_json(job)
    torch.set_num_threads(settings["threads"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shape = Shape(**settings["shape"])

    shares: list[Step] = []
    for step in make_steps(shape, settings["number"] + 1, rows=settings["rows"]):
        shares.append({stream: examples[rank::world_size] for stream, examples in step.items()})
    trainer_settings: dict[str, Any] = {}
    if world_size > 1:
        # Every process has its own examples already: a sampler would divide them once more.
        trainer_settings = {"strategy": "ddp", "devices": world_size, "use_distributed_sampler": False}
    clock = Clock()
    run_trainer(make_unlearn_module(build_model(shape)), shares, clock, **trainer_settings)

    if rank == 0:
        write_json(result, {"seconds": statistics.median(clock.step_seconds()), "first_losses": clock.losses[0]})
    # All leave together: the end of the group can abort a process that still uses it.
    if dist.is_initialized():
        dist.barrier()
    leave_process_group()


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), Path(sys.argv[2]))
