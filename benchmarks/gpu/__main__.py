"""Prove and measure the package on one GPU, in under ten minutes; stages that are done are skipped.

    make gpu                             # or python -m benchmarks.gpu, in an environment with the CUDA build of torch
    python -m benchmarks.gpu --stages step profile --again
    python -m benchmarks.gpu --smoke     # every stage on a CPU, with tiny shapes, in about a minute

Each stage runs in a process of its own, which is ended when its time is over, and its results go into one JSON file as soon as
it has finished. The same command continues with the stages that are missing or failed. It needs neither the hub nor a network.

tests        ``pytest -m gpu``: gradients in three precisions, one wait per step, LoRA, QLoRA, resuming, the scaler, answers.
step         The step beside the straightforward formulation, as `benchmarks.step` defines both, in turns within one process.
profile      The kernels of one step by time, and the time in which none runs.
variants     Packed and padded, joint and sequential, every attention that is installed, LoRA, QLoRA, compiled.
nll          The head's NLL: ours, torch's and Liger's, as `benchmarks.nll` compares them.
generation   Answers beside plain `transformers.generate`, as `benchmarks.generation` compares them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.stages import STAGES, Scale
from benchmarks.machine import describe_machine, format_machine
from benchmarks.random_llama import SHAPES
from lit_unlearn.utils.io import read_json, write_json

ROOT = Path(__file__).parents[2]
BUDGETS: dict[str, float] = {
    "tests": 2.25,
    "step": 2.0,
    "profile": 0.75,
    "variants": 3.0,
    "nll": 0.75,
    "generation": 0.75,
}
"""Minutes of each stage."""

PACKAGES = {
    "bitsandbytes": "QLoRA",
    "flash_attn": "flash attention",
    "liger_kernel": "Liger's NLL",
    "triton": "compiled kernels",
    "pytest": "the tests",
}
"""What a stage leaves out where it is missing, by the module that is imported."""


def describe_setup(scale: Scale) -> dict[str, Any]:
    """Return the card, the driver, the versions, and the packages that are missing."""
    missing = {name: use for name, use in PACKAGES.items() if importlib.util.find_spec(name) is None}
    facts = {**describe_machine(scale.device), "missing": missing, "settings": asdict(scale)}
    if scale.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "driver": _read_driver(),
            "cuda": torch.version.cuda,
            "memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
        }
    return facts


def _read_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def open_results(file: Path, setup: dict[str, Any], again: bool) -> dict[str, Any]:
    """Return the results that the file has so far, or new ones.

    Raises:
        ValueError: If they are of another card, shape or version of torch.
    """
    if again or not file.is_file():
        return {"machine": setup, "stages": {}}
    results = read_json(file)
    for key in ("device", "torch", "settings"):
        earlier, now = results["machine"][key], setup[key]
        if earlier != now:
            raise ValueError(
                f"'{file}' has figures of another {key}: {earlier}, and not {now}. Give --again to measure everything anew, or "
                "another file with --output."
            )
    return results


def run_stage(name: str, scale: Scale, minutes: float) -> dict[str, Any]:
    """Run one stage in a process of its own, and return its results, or why there are none."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--output", str(file)]
        command += ["--shape", scale.shape, *(["--smoke"] if scale.device == "cpu" else [])]
        # With a session of its own, the processes that a stage starts end with it.
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        error = None
        try:
            _, messages = process.communicate(timeout=60 * minutes)
            if process.returncode != 0:
                error = (messages.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            error = f"stopped after {minutes:g} minutes"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        # A stage that failed has left what it had measured until then.
        values = read_json(file) if file.is_file() else {}
    seconds = time.perf_counter() - started
    return {"is_done": error is None, "error": error, "seconds": seconds, **values}


def choose_shape(device: str, smoke: bool) -> str:
    """Return the shape that is measured: that of Llama-3.2-1B, or of 135M where the card has no memory for it."""
    if smoke:
        return "toy"
    # In bf16-true, both sides of the comparison take 25 GiB together, of which 17 are the straightforward form's activations.
    is_large = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 35 * 2**30
    return "1b" if is_large else "135m"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--shape", choices=SHAPES, help="default: 1b, or 135m on a card of less than 35 GiB")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--smoke", action="store_true", help="run every stage on a CPU, with tiny shapes")
    parser.add_argument("--output", type=Path, help="file of the results; default: build/bench/gpu.json")
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)  # the process of one stage
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU that CUDA knows. Give --smoke to try all stages on a CPU, with tiny shapes.")
    if options.output is None:
        options.output = ROOT / "build/bench" / ("gpu_smoke.json" if options.smoke else "gpu.json")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    device = "cpu" if options.smoke else "cuda"
    scale = Scale.choose(device, options.shape or choose_shape(device, options.smoke))
    if options.run:
        STAGES[options.run](scale, lambda values: write_json(options.output, values))
        return 0

    setup = describe_setup(scale)
    try:
        results = open_results(options.output, setup, options.again and options.stages == list(STAGES))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_machine(setup))
    for name, use in setup["missing"].items():
        print(f"not installed: {name}, so that there is no measurement of {use}")
    failed = False
    for name in options.stages:
        if not options.again and results["stages"].get(name, {}).get("is_done"):
            print(f"{name}: done before")
            continue
        # Imports alone can take half a minute on a CPU that does other work, too.
        minutes = BUDGETS[name] * (4 if options.smoke else 1)
        print(f"{name}: at most {minutes:g} minutes", flush=True)
        stage = results["stages"][name] = run_stage(name, scale, minutes)
        failed = failed or not stage["is_done"]
        print(f"{name}: {stage['error'] or 'done'}, after {stage['seconds']:.0f} s", flush=True)
        write_json(options.output, results)
    print(f"written to {options.output}; `python -m benchmarks.readme gpu` writes its tables into docs/speed.md")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
