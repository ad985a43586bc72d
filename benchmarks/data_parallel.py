"""The same global batches on one process and on two, for `scaling.py`, which starts this file under torchrun."""

from __future__ import annotations

import json
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

from benchmarks.random_llama import Shape, build_model, make_steps
from benchmarks.step_variants import fit, unlearn_module
from benchmarks.timing import Clock, table
from lit_unlearn.training.strategies import leave_process_group

ROOT = Path(__file__).parents[1]
LOSS_TOLERANCE = 1e-4
PLACES = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def measure_processes(shape: Shape, rows: int, number: int) -> dict[str, Any]:
    """Seconds of a step in each of the places.

    Args:
        shape: Of the model.
        rows: Of a global batch; even.
        number: Steps that are timed.

    Raises:
        RuntimeError: If the places do not start with the same losses.
    """
    results = {name: run_processes(shape, rows, number, *place) for name, place in PLACES.items()}
    first = {name: result["first_losses"] for name, result in results.items()}
    one, *others = first.values()
    if not all(abs(other[key] / one[key] - 1) <= LOSS_TOLERANCE for other in others for key in one):
        raise RuntimeError(f"one and two processes take different steps: first losses {first}.")
    return results


def run_processes(shape: Shape, rows: int, number: int, processes: int, threads: int) -> dict[str, Any]:
    """Runs this module under torchrun and reads what it found."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.json")
        settings = {"shape": asdict(shape), "rows": rows, "number": number, "threads": threads}
        job.write_text(json.dumps(settings), encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launch, "-m", "benchmarks.data_parallel", str(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        result = job.with_name("result.json")
        if not result.exists():
            raise RuntimeError(
                f"{processes} processes gave no result (exit code {done.returncode}):\n{done.stderr[-3000:]}"
            )
        return json.loads(result.read_text(encoding="utf-8"))


def processes_report(results: dict[str, Any]) -> str:
    alone = next(iter(results.values()))["seconds"]
    rows = [[name, f"{1e3 * r['seconds']:.0f}", f"{alone / r['seconds']:.2f}"] for name, r in results.items()]
    return table(["the same global batch", "ms/step", "speed-up"], rows)


def main(job: Path) -> None:
    """One of the processes: its part of every global batch."""
    settings = json.loads(job.read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shape = Shape(**settings["shape"])
    mine = [
        {stream: {key: value[rank::world] for key, value in batch.items()} for stream, batch in step.items()}
        for step in make_steps(shape, settings["number"] + 1, rows=settings["rows"])
    ]
    clock = Clock()
    place = {"strategy": "ddp", "devices": world, "use_distributed_sampler": False}  # the rows are dealt out already
    fit(unlearn_module(build_model(shape)), mine, clock, **(place if world > 1 else {}))
    if rank == 0:
        found = {"seconds": statistics.median(clock.seconds), "first_losses": clock.losses[0]}
        job.with_name("result.json").write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
