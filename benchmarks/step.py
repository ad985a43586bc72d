"""Measure time and memory of one optimizer step, beside the straightforward formulation.

    python -m benchmarks.step                           # 4 layers × 512 with V = 32 000 and 128 256, and SmolLM2-135M's shape
    python -m benchmarks.step --shapes 1b               # Llama-3.2-1B's: about 25 GB on a CPU; on a GPU it is among the defaults
    python -m benchmarks.step --shapes 32k --lora --compile --activation-checkpointing

Models have random weights. A step has as many forget as retain examples, of lengths like TOFU's (`random_llama.make_steps`). With
the shapes of real models there are 4 of each, which begin with the same 24 tokens, as in SmolLM2's chat template: its system message
stands before every question. With the other shapes there are 8 of each, which have nothing in common.
Variants:

plain       The computation of the method's public trainer, reimplemented in `step_variants.py`: padded batches, logits of
            every position of both sets, margin² + λ · NLL, one backward pass, clipping, AdamW. Unlike there, logits are
            compared with the labels they predict (shifted by one), so that all variants minimise the same function. The
            first step's losses are compared; a relative difference above 1e-4 (1e-2 with bfloat16) is an error.
sequential  `LitUnlearn(passes="sequential")` in a Lightning Trainer.
joint       `LitUnlearn(passes="joint")`.

Options add variants with LoRA (frozen head; compared with a plain variant with LoRA), with ``torch.compile`` of the trunk,
and with activation checkpointing. ``--profile`` shows which operators take the time of a joint step.

Time. All variants take turns in one process. A turn is a new optimizer, a step on two tokens that is not timed, and
``--steps`` steps on the same examples for every variant, each timed from ``on_train_batch_start`` to ``on_train_batch_end``
(the time between steps is printed below the table). A turn's value is its mean step. The table shows the median over
``--rounds`` turns, their range, and the median of the ratio within a round.

Memory. Each variant runs in a fresh process::

    extra = peak over the steps − resident memory before the first of them − bytes of the gradients

Before the first step the memory holds parameters, optimizer state (created by a step on two tokens), batches and libraries,
but no gradients, which are freed between steps. So extra is the memory beyond parameters, gradients and optimizer state:
activations, logits and temporaries, including those of clipping and AdamW; the share of these two alone is printed below
the table. On a CPU the peak is the kernel's high-water mark of the resident set, reset before the first step, with a malloc
that keeps no large freed blocks. On a GPU it comes from PyTorch's allocator.

All gradients are subtracted, although they never coexist with all activations. Activations that are freed before the
gradients exist are therefore hidden, up to the size of the gradients. A small extra says that the step needs hardly more
memory than any step does, and the ratio of two extras can be far from the ratio of the peaks, which are in the table too.
A peak is that of the whole process (on a GPU, of the allocator), with parameters, optimizer state and libraries: it is what decides
whether a run fits, and what the ratio is of.

Floor. The arithmetic that cannot be avoided while every example is computed for itself: 6 × trunk parameters × tokens without padding, and per answer token 2 · D · V
for the margin's one head product, three times that for the NLL's; divided by the FLOP/s of matrix products of these sizes,
measured in the same rounds. Attention's own products are left out. Tokens that examples share count for each of them. With LoRA, frozen weights need no gradient: 4 instead
of 6, and two head products instead of three for the NLL.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, format_machine
from benchmarks.memory import PeakMemory, format_mib, return_freed_blocks_at_once, run_in_fresh_process
from benchmarks.random_llama import (
    SHAPES,
    Shape,
    Step,
    build_model,
    compute_floor_flops,
    count_answer_tokens,
    count_parameters,
    count_tokens,
    make_steps,
    make_tiny_step,
)
from benchmarks.step_profile import ProfiledStep
from benchmarks.step_variants import (
    Formulation,
    Precision,
    Variant,
    check_agreement,
    count_gradient_bytes,
    first_loss_difference,
    make_adamw,
    select_trainable,
    step_optimizer,
)
from benchmarks.timing import Clock, measure_matmul_rate, median_ratio, take_turns
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.utils.io import write_json

PLAIN, SEQUENTIAL, JOINT = Variant("plain", "plain"), Variant("sequential", "sequential"), Variant("joint", "joint")
# Relative, of the first losses. bfloat16 has 8 bits, and the variants sum in different orders.
TOLERANCE = {"32-true": 1e-4, "bf16-true": 1e-2, "bf16-mixed": 1e-2}
HEADERS = ["", "s/step", "range", "tokens/s", "time ratio", "× floor", "peak MiB", "peak ratio", "extra MiB"]
# Examples of each stream, and tokens that all of them begin with.
WORKLOADS = {"135m": {"rows": 4, "prefix": 24}, "1b": {"rows": 4, "prefix": 24}}


@dataclass(frozen=True)
class Job:
    """One shape, and the conditions under which it is measured."""

    name: str
    device: str
    precision: Precision
    rounds: int
    steps: int
    threads: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    def make_steps(self) -> list[Step]:
        return make_steps(self.shape, self.steps, **WORKLOADS.get(self.name, {}))

    def build(self, variant: Variant) -> Formulation:
        return Formulation(variant, self.shape, self.device, self.precision)


# Measurements ------------------------------------------------------------------------------------------------------------


def measure_memory(job: Job, variant: Variant) -> dict[str, Any]:
    """Measure the peak memory of one variant; call this in a fresh process."""
    torch.set_num_threads(job.threads)
    return_freed_blocks_at_once()
    formulation, steps = job.build(variant), job.make_steps()
    warmup = [make_tiny_step()]
    if variant.compiled:
        # The compiler's own memory is not what is measured: it has seen these lengths before the first counted step.
        warmup += steps
    memory = PeakMemory(len(warmup), len(warmup) + len(steps) - 1, job.device)
    formulation.run([*warmup, *steps], memory)
    gradient_bytes = count_gradient_bytes(formulation.model)
    return {
        "extra_bytes": memory.extra_bytes(gradient_bytes),
        "peak_bytes": memory.peak,
        "baseline_bytes": memory.baseline,
        "gradient_bytes": gradient_bytes,
        "method": memory.method,
    }


def measure_optimizer_memory(job: Job) -> int | None:
    """Measure the extra bytes of clipping and AdamW alone, on given gradients; call this in a fresh process."""
    torch.set_num_threads(job.threads)
    return_freed_blocks_at_once()
    model = job.build(PLAIN).model
    parameters = select_trainable(model)
    optimizer, memory = make_adamw(parameters), PeakMemory(1, 1, job.device)
    # AdamW creates its state in step 0, so that step 1 is the one that counts.
    for number in range(2):
        memory.on_step_start(number)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step_optimizer(optimizer, parameters)
        memory.on_step_end(number, {})
    return memory.extra_bytes(count_gradient_bytes(model))


def measure_time(job: Job, variants: list[Variant]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Measure the step seconds of all variants.

    Returns:
        For every variant ``seconds`` and ``pauses`` of its turns and ``first_losses``; and the rates of matrix products
        measured between the turns.

    Raises:
        RuntimeError: If the variants do not start with the same losses.
    """
    formulations = {variant.name: job.build(variant) for variant in variants}
    steps = job.make_steps()
    pauses: dict[str, list[float]] = defaultdict(list)

    def measure_turn(name: str) -> float:
        # Garbage of another variant's turn must not be collected at the expense of this one.
        gc.collect()
        clock = Clock(job.device)
        formulations[name].run([make_tiny_step(), *steps], clock)
        pauses[name] += clock.pause_seconds()
        return statistics.fmean(clock.step_seconds())

    # The first run also compiles and fills caches.
    first_losses = {}
    for name, formulation in formulations.items():
        clock = Clock(job.device)
        formulation.run(steps, clock)
        first_losses[name] = clock.losses[0]
    check_agreement(first_losses, TOLERANCE[job.precision])

    turns = {name: partial(measure_turn, name) for name in formulations}
    rates = take_turns(job.rounds, {**turns, **make_rate_turns(job)})
    measured = {}
    for name in formulations:
        measured[name] = {"seconds": rates.pop(name), "pauses": pauses[name], "first_losses": first_losses[name]}
    return measured, rates


def make_rate_turns(job: Job) -> dict[str, Callable[[], float]]:
    """Return functions that measure the rate of products as large as the head's and the trunk's."""
    shape, steps = job.shape, job.make_steps()
    # Rows of one stream's product: the straightforward formulation has one pass per stream.
    answer_tokens = count_answer_tokens(steps, "retain") // len(steps)
    stream_tokens = count_tokens(steps) // (2 * len(steps))
    dtype = torch.float32 if job.precision == "32-true" else torch.bfloat16
    rate = partial(measure_matmul_rate, device=job.device, dtype=dtype)
    return {
        "head": partial(rate, answer_tokens, shape.hidden, shape.vocabulary),
        "trunk": partial(rate, stream_tokens, shape.hidden, shape.intermediate),
    }


def count_adapter_parameters(shape: Shape) -> int:
    """Return the number of parameters that LoRA trains."""
    adapted = Formulation(Variant("lora", "plain", lora=True), shape, "meta", "32-true").model
    return sum(parameter.numel() for parameter in select_trainable(adapted))


# Results -----------------------------------------------------------------------------------------------------------------


def benchmark_shape(job: Job, variants: list[Variant], with_memory: bool) -> dict[str, Any]:
    """Measure all variants of one shape and return everything that is stored about it."""
    memory: dict[str, dict[str, Any]] = {}
    for variant in variants:
        memory[variant.name] = run_in_fresh_process(measure_memory, job, variant) if with_memory else {}
    measured, rates = measure_time(job, variants)
    median_rates = {name: statistics.median(values) for name, values in rates.items()}

    compared = {}
    for variant in variants:
        values = compare_variant(variant, measured, memory, job, median_rates)
        compared[variant.name] = {**asdict(variant), **values}
    first_losses = {name: values["first_losses"] for name, values in measured.items()}
    return {
        **describe_workload(job),
        "optimizer_extra_bytes": run_in_fresh_process(measure_optimizer_memory, job) if with_memory else None,
        "matmul_flops_per_second": median_rates,
        "first_loss_difference": first_loss_difference(first_losses),
        "variants": compared,
    }


def describe_workload(job: Job) -> dict[str, Any]:
    """Return the sizes of the model and of a step."""
    steps = job.make_steps()
    return {
        "shape": asdict(job.shape),
        "parameters": count_parameters(build_model(job.shape, "meta")),
        "precision": job.precision,
        "rounds": job.rounds,
        "steps": job.steps,
        "tokens_per_step": count_tokens(steps) / len(steps),
        "padded_tokens_per_step": count_tokens(steps, padded=True) / len(steps),
        "answer_tokens_per_step": {
            stream: count_answer_tokens(steps, stream) / len(steps) for stream in ("forget", "retain")
        },
    }


def compare_variant(
    variant: Variant, measured: dict[str, Any], memory: dict[str, Any], job: Job, rates: dict[str, float]
) -> dict[str, Any]:
    """Return the numbers of one variant, with those relative to the plain variant and to the floor."""
    values = measured[variant.name]
    # Training an adapter is different work, so that it has a plain variant of its own.
    plain = "plain, lora" if variant.lora else "plain"
    steps, seconds = job.make_steps(), statistics.median(values["seconds"])
    flops = compute_floor_flops(job.shape, steps, count_adapter_parameters(job.shape) if variant.lora else None)
    floor_seconds = flops["trunk"] / rates["trunk"] + flops["head"] / rates["head"]
    return {
        "compared_with": plain,
        "seconds": seconds,
        "seconds_of_rounds": values["seconds"],
        "time_ratio": median_ratio(values["seconds"], measured[plain]["seconds"]),
        "tokens_per_second": count_tokens(steps) / len(steps) / seconds,
        "floor_flops": flops,
        "floor_seconds": floor_seconds,
        "time_over_floor": seconds / floor_seconds,
        # With a single timed step there is no pause.
        "seconds_between_steps": statistics.median(values["pauses"]) if values["pauses"] else None,
        "first_losses": values["first_losses"],
        "memory": memory[variant.name],
        "peak_ratio": _ratio("peak_bytes", memory[variant.name], memory[plain]),
        "memory_ratio": _ratio("extra_bytes", memory[variant.name], memory[plain]),
    }


def _ratio(key: str, memory: dict[str, Any], plain_memory: dict[str, Any]) -> float | None:
    size, plain_size = memory.get(key), plain_memory.get(key)
    return None if size is None or not plain_size else size / plain_size


def format_report(name: str, results: dict[str, Any]) -> str:
    """Format the results of one shape as a table with lines of text around it."""
    rows = []
    for variant, values in results["variants"].items():
        of_rounds, memory, peak_ratio = values["seconds_of_rounds"], values["memory"], values["peak_ratio"]
        rows.append(
            [
                variant,
                f"{values['seconds']:.3g}",
                f"{min(of_rounds):.3g}–{max(of_rounds):.3g}",
                f"{values['tokens_per_second']:,.0f}",
                f"{values['time_ratio']:.2f}",
                f"{values['time_over_floor']:.2f}",
                format_mib(memory.get("peak_bytes")),
                None if peak_ratio is None else f"{peak_ratio:.2f}",
                format_mib(memory.get("extra_bytes")),
            ]
        )

    answers, rates = results["answer_tokens_per_step"], results["matmul_flops_per_second"]
    difference = ", ".join(f"{key} {value:.1e}" for key, value in results["first_loss_difference"].items())
    pauses, methods = [], set()
    for values in results["variants"].values():
        pauses.append(values["seconds_between_steps"] or 0.0)
        methods.add(values["memory"].get("method", "not measured"))
    lines = [
        f"{name}: {Shape(**results['shape'])}, {results['parameters'] / 1e6:.0f} M parameters, {results['precision']}; a step: "
        f"{results['tokens_per_step']:.0f} tokens ({results['padded_tokens_per_step']:.0f} with padding), answers "
        f"{answers['forget']:.0f} + {answers['retain']:.0f}",
        format_table(rows, HEADERS),
        f"median of {results['rounds']} rounds of {results['steps']} steps; products: head {rates['head'] / 1e9:,.0f}, "
        f"trunk {rates['trunk'] / 1e9:,.0f} GFLOP/s; between steps at most {1e3 * max(pauses):.1f} ms",
        f"ratios are to plain ('lora' to 'plain, lora'); first losses agree to {difference} (relative)",
        f"memory: {'; '.join(sorted(methods))}; clipping and AdamW alone "
        f"{format_mib(results['optimizer_extra_bytes'])} MiB",
    ]
    return "\n".join(lines)


def profile_step(job: Job) -> str:
    """Return the operators that take the most time in a step of the joint variant, as a table."""
    steps = job.make_steps()
    # Twice: memory is reserved at the first time.
    profiled = ProfiledStep(2, job.device)
    job.build(JOINT).run([steps[0], steps[0], steps[0]], profiled)
    rows = []
    for operator in profiled.summarize()["top"]:
        rows.append([operator["name"], operator["calls"], f"{operator['ms']:.0f}", f"{100 * operator['share']:.0f} %"])
    return format_table(rows, ["joint", "calls", "ms", "share"])


# Command -----------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 32k 128k 135m, and 1b on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn (default 2)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=TOLERANCE,
        help="as for the Trainer (default: 32-true; of 135m and 1b bf16-mixed, too)",
    )
    parser.add_argument("--lora", action="store_true", help="add variants that train an adapter")
    parser.add_argument("--compile", action="store_true", help="add a variant with a compiled trunk")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="add a variant that recomputes activations"
    )
    parser.add_argument("--profile", action="store_true", help="show the operators of a joint step by time, too")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory, which takes a process each")
    parser.add_argument("--output", type=Path, default="build/bench/step.json", help="file for the results")
    options = parser.parse_args(arguments)
    for name in ("rounds", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options


def make_variants(options: argparse.Namespace) -> list[Variant]:
    """Return the three variants, and those that options ask for."""
    variants = [PLAIN, SEQUENTIAL, JOINT]
    if options.lora:
        variants += [Variant("plain, lora", "plain", lora=True), Variant("sequential, lora", "sequential", lora=True)]
    if options.compile:
        variants.append(Variant("sequential, compiled", "sequential", compiled=True))
    if options.activation_checkpointing:
        variants.append(Variant("sequential, checkpointed", "sequential", checkpointed=True))
    return variants


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    # The imports' objects are never garbage, and there are enough of them to make the collections between turns slow.
    gc.freeze()
    names = options.shapes or ["32k", "128k", "135m"]
    if options.shapes is None and options.device == "cuda":
        names.append("1b")
    results: dict[str, Any] = {"machine": describe_machine(options.device), "shapes": {}}
    print(format_machine(results["machine"]))
    for name in names:
        for precision in options.precisions or (["32-true", "bf16-mixed"] if name in WORKLOADS else ["32-true"]):
            job = Job(name, options.device, precision, options.rounds, options.steps, options.threads)
            key = f"{name}, {precision}"
            results["shapes"][key] = benchmark_shape(job, make_variants(options), not options.no_memory)
            print(f"\n{format_report(name, results['shapes'][key])}", flush=True)
            if options.profile:
                print(profile_step(job), flush=True)
            # After every one, because the large ones take long and can run out of memory.
            write_json(options.output, results)
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
