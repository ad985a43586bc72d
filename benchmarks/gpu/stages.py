"""The stages: each measures one thing, and hands over what it has so far as a dict for JSON."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.generation import compare_generation, make_random_model, make_random_prompts
from benchmarks.gpu.variants import VARIANTS, measure_variant
from benchmarks.nll import Head, compare_functions
from benchmarks.random_llama import SHAPES, Step, count_answer_tokens, make_steps, make_tiny_step
from benchmarks.step import JOINT, PLAIN, Job, compare_variant, describe_workload, measure_memory, measure_time
from benchmarks.step_profile import ProfiledStep
from benchmarks.step_variants import Precision, first_loss_difference

ROOT = Path(__file__).parents[2]
Save = Callable[[dict[str, Any]], None]
DEVICE_TESTS = ["tests/training/test_devices.py", "tests/training/test_read_backs.py"]


@dataclass(frozen=True)
class LargeJob(Job):
    """A job whose steps have another number of examples than 8 of each stream."""

    rows: int = 32

    def make_steps(self) -> list[Step]:
        return make_steps(self.shape, self.steps, rows=self.rows)


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a trial of all stages.
        shape: Key of `SHAPES`.
        precision: As for the Trainer.
        rows: Examples of each stream in a step.
        rounds: Turns of both sides.
        steps: Timed steps of a turn.
    """

    device: str
    shape: str
    precision: Precision
    rows: int
    rounds: int
    steps: int

    @classmethod
    def choose(cls, device: str, shape: str) -> Scale:
        """Return the scale for a device."""
        if device == "cpu":
            return cls(device, shape, "bf16-mixed", rows=3, rounds=1, steps=1)
        return cls(device, shape, _choose_precision(), rows=32, rounds=4, steps=3)

    @property
    def dtype(self) -> torch.dtype:
        """Of what has no mixed precision: 16 bits on a GPU that computes with them."""
        return torch.float32 if self.device == "cpu" or self.precision == "32-true" else torch.bfloat16

    def job(self) -> LargeJob:
        """Return the job of `benchmarks.step`."""
        threads = torch.get_num_threads()
        return LargeJob(self.shape, self.device, self.precision, self.rounds, self.steps, threads, self.rows)


def _choose_precision() -> Precision:
    # Older cards emulate bfloat16, slowly.
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "32-true"
    # Of the 1B shape, mixed precision takes 32-bit weights, gradients and optimizer state beside both sides' activations.
    return "bf16-mixed" if torch.cuda.get_device_properties(0).total_memory > 70 * 2**30 else "bf16-true"


def release_memory() -> None:
    """Free what the models of an earlier measurement held."""
    gc.collect()
    torch.cuda.empty_cache()


def run_tests(scale: Scale, save: Save) -> None:
    """Run the tests that need a GPU; on a CPU, some of the same tests there.

    Raises:
        RuntimeError: If one fails, or none ran.
    """
    selection = ["-m", "gpu"]
    if scale.device == "cpu":
        # All tests of the CPU would take more than this trial's minute.
        selection = ["-m", "not gpu and not slow", "-k", "NLL-torch or resumed_run or scaler or waits_once"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *DEVICE_TESTS, *selection, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if not report.is_file():
            raise RuntimeError(
                "pytest did not run: install the package's test dependencies with `pip install -e .[test]`"
            )
        counts, failed, skipped = read_report(report)
    save({"counts": counts, "failed": failed, "skipped": skipped})
    if failed or not counts["passed"]:
        raise RuntimeError(f"{counts['passed']} tests passed, {len(failed)} failed: {', '.join(failed)}")


def read_report(report: Path) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Return the numbers of tests by outcome, the names of those that failed, and how often each reason skipped one."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed, reasons = [], Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None:
            counts["skipped"] += 1
            reasons[skip.get("message", "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(str(case.get("name")))
        else:
            counts["passed"] += 1
    return counts, failed, dict(reasons)


def compare_step(scale: Scale, save: Save) -> None:
    """Measure time and memory of the step beside the straightforward formulation."""
    job, variants = scale.job(), [PLAIN, JOINT]
    memory = {}
    for variant in variants:
        # In this process: the figures are those of the GPU's allocator, which a process before this one cannot change.
        memory[variant.name] = measure_memory(job, variant)
        release_memory()
    measured, rates = measure_time(job, variants)
    median_rates = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    compared = {}
    for variant in variants:
        values = compare_variant(variant, measured, memory, job, median_rates)
        compared[variant.name] = {**values, "floor_share": 1 / values["time_over_floor"]}
    losses = {name: values["first_losses"] for name, values in measured.items()}
    save(
        {
            **describe_workload(job),
            "rows": scale.rows,
            "matmul_flops_per_second": median_rates,
            "first_loss_difference": first_loss_difference(losses),
            "formulations": compared,
        }
    )


def profile_step(scale: Scale, save: Save) -> None:
    """Profile one step after others of the same lengths."""
    job = scale.job()
    steps = job.make_steps()
    # Twice: kernels are chosen and memory is reserved at the first time.
    warmup = [make_tiny_step(), *steps]
    profiled = ProfiledStep(len(warmup), scale.device)
    job.build(JOINT).run([*warmup, steps[0]], profiled)
    save(profiled.summarize())


def compare_variants(scale: Scale, save: Save) -> None:
    """Measure every variant, one model at a time; what cannot run says why."""
    job = scale.job()
    results: dict[str, Any] = {}
    # The first one again at the end: their difference is what the card's clock and heat do.
    for name, variant in [*VARIANTS.items(), ("joint, packed, again", next(iter(VARIANTS.values())))]:
        try:
            results[name] = measure_variant(variant, job)
        # Whatever a library raises for a card, a shape or a package that it does not have.
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        release_memory()
        save({"variants": results})


def compare_nll(scale: Scale, save: Save) -> None:
    """Measure the head's NLL, ours and others', on as many tokens as a stream's answers have in a step.

    Memory only on a GPU: on a CPU, each function would take a process of its own.
    """
    steps = scale.job().make_steps()
    tokens = count_answer_tokens(steps, "retain") // len(steps)
    head = Head(scale.shape, tokens, scale.dtype, scale.device, torch.get_num_threads())
    save(compare_functions(head, 5 * scale.rounds, with_memory=scale.device == "cuda"))


def compare_answers(scale: Scale, save: Save) -> None:
    """Measure generation beside plain `transformers.generate`."""
    shape = SHAPES[scale.shape]
    lm = make_random_model(shape, scale.device, scale.dtype)
    prompts = make_random_prompts(shape, scale.rows)
    longest = 8 if scale.device == "cpu" else 64
    save(compare_generation(lm, prompts, longest, batch_size=max(1, scale.rows // 2), rounds=min(3, scale.rounds)))


STAGES: dict[str, Callable[[Scale, Save], None]] = {
    "tests": run_tests,
    "step": compare_step,
    "profile": profile_step,
    "variants": compare_variants,
    "nll": compare_nll,
    "generation": compare_answers,
}
