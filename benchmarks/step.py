"""Time and memory of one optimizer step, against the straightforward formulation.

    python -m benchmarks.step                           # 4 layers × 512 with V = 32 000 and 128 256; on a GPU also the 1B shape
    python -m benchmarks.step --shapes 32k --lora --compile --activation-checkpointing

Models have random weights, batches 8 forget and 8 retain rows with lengths like TOFU's (`random_llama.make_steps`). Variants:

plain       What the method's public trainer does, written anew in `step_variants.py`: padded batches, logits of every
            position of both sets, margin² + λ · NLL, one backward pass, clipping, AdamW. Its losses are taken at the right,
            shifted positions, so that it minimises what ours does; the first step's losses are compared, and a relative
            difference above 1e-4 (1e-2 with bfloat16) is an error.
sequential  `LitUnlearn(passes="sequential")` in a Lightning Trainer.
joint       `LitUnlearn(passes="joint")`.

Options add variants with LoRA (frozen head; compared with a plain one with LoRA), ``torch.compile`` of the trunk, and
activation checkpointing.

Time. All variants take turns in one process. A turn is a new optimizer, a step on two tokens that does not count, and
``--steps`` steps on the same batches for everybody, each timed from ``on_train_batch_start`` to ``on_train_batch_end``
(what the loop does between steps is printed below the table). A turn's value is its mean step; the table shows the
median over ``--rounds`` turns, their range, and the median of the ratio within a round.

Memory. Each variant runs in a fresh process::

    extra = peak over the steps − what was resident before the first of them − bytes of the gradients

Before the first of them there are parameters, optimizer state (made by a step on two tokens), batches and libraries, but
no gradients, which are freed between steps. So extra is what a variant needs beyond parameters, gradients and optimizer
state: activations, logits, temporaries, also those of clipping and AdamW; how much these two need by themselves is printed
below the table. On a CPU the peak is the kernel's high-water mark of the resident set, reset before the first step, with a
malloc that keeps no large freed blocks; on a GPU PyTorch's allocator keeps it.

All gradients count, although they never coexist with all activations: what a variant holds before the gradients are there
is masked up to their size. A small extra therefore says that the step needs hardly more than any step needs, and the ratio
of two extras can be far from the ratio of the peaks, which the table has too: of the whole process (on a GPU, of the
allocator), parameters, optimizer state and libraries included.

Floor. Work that cannot be avoided: 6 × trunk parameters × real tokens, and per answer token 2 · D · V for the margin's one
head product, three times that for the NLL's; divided by the FLOP/s of matrix products of these sizes, measured in the same
rounds. Attention's own products are left out. With LoRA, the weights that are frozen need no gradient: 4 instead of 6, and
two head products instead of three for the NLL.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.random_llama import (
    SHAPES,
    Shape,
    answer_tokens,
    build_model,
    floor_flops,
    make_steps,
    real_tokens,
    tiny_step,
)
from benchmarks.step_variants import (
    Formulation,
    Precision,
    Variant,
    adamw,
    check_agreement,
    first_loss_difference,
    step_optimizer,
    trainable,
)
from benchmarks.timing import (
    Clock,
    PeakMemory,
    alternate,
    apart,
    in_mib,
    machine,
    machine_line,
    matmul_rate,
    measure_what_is_used,
    median_ratio,
    table,
    write_json,
)

PLAIN, *OURS = Variant("plain", "plain"), Variant("sequential", "sequential"), Variant("joint", "joint")
TOLERANCE = {"32-true": 1e-4, "bf16-true": 1e-2, "bf16-mixed": 1e-2}


@dataclass(frozen=True)
class Job:
    """One shape, and how it is run."""

    shape: Shape
    device: str
    precision: Precision
    rounds: int
    steps: int
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16

    def batches(self) -> list[Any]:
        return make_steps(self.shape, self.steps, device=self.device)

    def formulation(self, variant: Variant) -> Formulation:
        return Formulation(variant, self.shape, self.device, self.precision)


def measure_memory(job: Job, variant: Variant) -> dict[str, Any]:
    """Peak memory of one variant; call it in a fresh process."""
    torch.set_num_threads(job.threads)
    measure_what_is_used()
    formulation, steps = job.formulation(variant), job.batches()
    before = [tiny_step(device=job.device), *(steps if variant.compiled else [])]  # compiling is not what is measured
    memory = PeakMemory(len(before), len(before) + len(steps) - 1, job.device)
    formulation.run([*before, *steps], memory)
    return {
        "extra_bytes": memory.extra(formulation.gradient_bytes),
        "peak_bytes": memory.peak,
        "baseline_bytes": memory.baseline,
        "gradient_bytes": formulation.gradient_bytes,
        "method": memory.method,
    }


def measure_optimizer_memory(job: Job) -> int | None:
    """Extra bytes of clipping and AdamW alone, on gradients that are there; call it in a fresh process."""
    torch.set_num_threads(job.threads)
    measure_what_is_used()
    parameters = trainable(job.formulation(PLAIN).model)
    optimizer, memory = adamw(parameters), PeakMemory(1, 1, job.device)
    for number in range(2):
        memory.step_starts(number)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step_optimizer(optimizer, parameters)
        memory.step_ends(number, {})
    return memory.extra(sum(p.numel() * p.element_size() for p in parameters))


def measure_time(job: Job, variants: list[Variant]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Step seconds of all variants, the losses of their first steps, and the rates of matrix products in between."""
    formulations = {variant.name: job.formulation(variant) for variant in variants}
    steps, tiny = job.batches(), tiny_step(device=job.device)
    measured: dict[str, Any] = {name: {"pauses": []} for name in formulations}

    def first_losses(name: str) -> dict[str, float]:
        clock = Clock(job.device)
        formulations[name].run(steps, clock)
        return clock.losses[0]

    def turn(name: str) -> float:
        gc.collect()
        clock = Clock(job.device)
        formulations[name].run([tiny, *steps], clock)
        measured[name]["pauses"] += clock.pauses
        return statistics.fmean(clock.seconds)

    for name in formulations:  # also compiles, and fills caches
        measured[name]["first_losses"] = first_losses(name)
    check_agreement({name: values["first_losses"] for name, values in measured.items()}, TOLERANCE[job.precision])
    turns = {name: partial(turn, name) for name in formulations}
    seconds = alternate(job.rounds, {**turns, **rate_turns(job)})
    for name, values in measured.items():
        values["seconds"] = seconds.pop(name)
    return measured, seconds


def rate_turns(job: Job) -> dict[str, Any]:
    """Measures the speed of products as large as the head's and as the trunk's."""
    shape, steps = job.shape, job.batches()
    answers = answer_tokens(steps, "retain") // len(steps)
    tokens = real_tokens(steps) // (2 * len(steps))
    return {
        "head": lambda: matmul_rate(answers, shape.hidden, shape.vocabulary, job.device, job.dtype),
        "trunk": lambda: matmul_rate(tokens, shape.hidden, shape.intermediate, job.device, job.dtype),
    }


def adapter_parameters(shape: Shape) -> int:
    adapted = Formulation(Variant("lora", "plain", lora=True), shape, "meta", "32-true").model
    return sum(p.numel() for p in trainable(adapted))


def make_variants(options: argparse.Namespace) -> list[Variant]:
    """The three, and those that options ask for."""
    variants = [PLAIN, *OURS]
    if options.lora:
        variants += [Variant("plain, lora", "plain", lora=True), Variant("sequential, lora", "sequential", lora=True)]
    if options.compile:
        variants.append(Variant("sequential, compiled", "sequential", compiled=True))
    if options.activation_checkpointing:
        variants.append(Variant("sequential, checkpointed", "sequential", checkpointed=True))
    return variants


def benchmark(job: Job, variants: list[Variant], with_memory: bool) -> dict[str, Any]:
    """Everything about one shape."""
    memory = {v.name: apart(measure_memory, job, v) if with_memory else {} for v in variants}
    measured, rates = measure_time(job, variants)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **workload(job),
        "optimizer_extra_bytes": apart(measure_optimizer_memory, job) if with_memory else None,
        "matmul_flops_per_second": rate,
        "first_loss_difference": first_loss_difference({n: v["first_losses"] for n, v in measured.items()}),
        "variants": {v.name: {**asdict(v), **against(v, measured, memory, job, rate)} for v in variants},
    }


def workload(job: Job) -> dict[str, Any]:
    """What a step of this shape has to do."""
    steps = job.batches()
    return {
        "shape": asdict(job.shape),
        "parameters": sum(p.numel() for p in build_model(job.shape, "meta").parameters()),
        "precision": job.precision,
        "rounds": job.rounds,
        "steps": job.steps,
        "tokens_per_step": real_tokens(steps) / len(steps),
        "padded_tokens_per_step": sum(b["input_ids"].numel() for s in steps for b in s.values()) / len(steps),
        "answer_tokens_per_step": {s: answer_tokens(steps, s) / len(steps) for s in ("forget", "retain")},
    }


def against(
    variant: Variant, measured: dict[str, Any], memory: dict[str, Any], job: Job, rate: dict[str, float]
) -> dict[str, Any]:
    """One variant's numbers, beside those of the plain one and the floor."""
    values, other = measured[variant.name], "plain, lora" if variant.lora else "plain"
    steps, seconds = job.batches(), statistics.median(values["seconds"])
    flops = floor_flops(job.shape, steps, adapter_parameters(job.shape) if variant.lora else None)
    floor = sum(flops[part] / rate[part] for part in flops)
    return {
        "compared_with": other,
        "seconds": seconds,
        "seconds_of_rounds": values["seconds"],
        "time_ratio": median_ratio(values["seconds"], measured[other]["seconds"]),
        "tokens_per_second": real_tokens(steps) / len(steps) / seconds,
        "floor_flops": flops,
        "floor_seconds": floor,
        "time_over_floor": seconds / floor,
        "seconds_between_steps": statistics.median(values["pauses"]) if values["pauses"] else None,
        "first_losses": values["first_losses"],
        "memory": memory[variant.name],
        "memory_ratio": _quotient(memory[variant.name], memory[other]),
    }


def _quotient(memory: dict[str, Any], other: dict[str, Any]) -> float | None:
    mine, theirs = memory.get("extra_bytes"), other.get("extra_bytes")
    return None if mine is None or not theirs else mine / theirs


def report(name: str, results: dict[str, Any]) -> str:
    """The table of one shape."""
    header = ["", "s/step", "range", "tokens/s", "time ratio", "× floor", "peak MiB", "extra MiB", "extra ratio"]
    rows = []
    for variant, values in results["variants"].items():
        of_rounds, extra = values["seconds_of_rounds"], values["memory"].get("extra_bytes")
        rows.append(
            [
                variant,
                f"{values['seconds']:.3g}",
                f"{min(of_rounds):.3g}–{max(of_rounds):.3g}",
                f"{values['tokens_per_second']:,.0f}",
                f"{values['time_ratio']:.2f}",
                f"{values['time_over_floor']:.2f}",
                in_mib(values["memory"].get("peak_bytes")),
                in_mib(extra),
                "–" if values["memory_ratio"] is None else f"{values['memory_ratio']:.2f}",
            ]
        )
    shape, answers, rate = (
        Shape(**results["shape"]),
        results["answer_tokens_per_step"],
        results["matmul_flops_per_second"],
    )
    difference = ", ".join(f"{key} {value:.1e}" for key, value in results["first_loss_difference"].items())
    pauses = max(values["seconds_between_steps"] or 0.0 for values in results["variants"].values())
    methods = {values["memory"].get("method", "not measured") for values in results["variants"].values()}
    return "\n".join(
        [
            f"{name}: {shape}, {results['parameters'] / 1e6:.0f} M parameters, {results['precision']}; a step: "
            f"{results['tokens_per_step']:.0f} tokens ({results['padded_tokens_per_step']:.0f} with padding), answers "
            f"{answers['forget']:.0f} + {answers['retain']:.0f}",
            table(header, rows),
            f"median of {results['rounds']} rounds of {results['steps']} steps; products: head {rate['head'] / 1e9:,.0f}, "
            f"trunk {rate['trunk'] / 1e9:,.0f} GFLOP/s; between steps at most {1e3 * pauses:.1f} ms",
            f"ratios are to plain ('lora' to 'plain, lora'); first losses agree to {difference} (relative)",
            f"memory: {'; '.join(sorted(methods))}; clipping and AdamW alone {in_mib(results['optimizer_extra_bytes'])} MiB",
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 32k 128k, and 1b on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn (default 2)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=TOLERANCE, default="32-true", help="as for the Trainer (default 32-true)"
    )
    parser.add_argument("--lora", action="store_true", help="adds variants that train an adapter")
    parser.add_argument("--compile", action="store_true", help="adds a variant with a compiled trunk")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="adds a variant that recomputes activations"
    )
    parser.add_argument("--no-memory", action="store_true", help="leaves out the memory, and its processes")
    parser.add_argument("--output", default="build/bench/step.json")
    options = parser.parse_args(arguments)
    for name in ("rounds", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    gc.freeze()  # what the imports made is never garbage: collecting between turns need not look at it
    names = options.shapes or ["32k", "128k", *(["1b"] if options.device == "cuda" else [])]
    results: dict[str, Any] = {"machine": machine(options.device), "shapes": {}}
    print(machine_line(results["machine"]))
    for name in names:
        job = Job(SHAPES[name], options.device, options.precision, options.rounds, options.steps, options.threads)
        results["shapes"][name] = benchmark(job, make_variants(options), not options.no_memory)
        print(f"\n{report(name, results['shapes'][name])}", flush=True)
        write_json(results, options.output)
    print(f"\nwritten to {options.output}")
    return results


if __name__ == "__main__":
    main()
