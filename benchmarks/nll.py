"""Measure the head's NLL: ours, torch's `linear_cross_entropy` and Liger's kernel beside a matrix product and `cross_entropy`.

    python -m benchmarks.nll                              # SmolLM2-135M's head, 200 and 800 tokens, float32 and bfloat16
    python -m benchmarks.nll --shapes 1b --tokens 2000 --dtypes bfloat16

One turn is the mean NLL of the tokens, and the gradients of the hidden states and of the head's weight, which is added to one that is
there: a tied head, and any head of a second pass, has one.

plain                 `F.linear` and `F.cross_entropy`, in float32 from the logits on.
ours                  `linear_token_logp`.
ours, in place        The same, with the weight's gradient added to ``weight.grad`` directly, as on a single device.
torch                 `F.linear_cross_entropy` in chunks, with its own choice of them; without them it is `plain`.
torch, unreduced      The same with ``reduction="none"``: objectives that weigh tokens need every token's value.
Liger                 `LigerFusedLinearCrossEntropyFunction`, if it is installed, on a GPU.

Loss and gradients are compared with those of `plain`, and a difference above the tolerance is an error. All take turns in one process;
shown are the median time and the median of the ratio within a round. Memory is the peak beyond what is there before, in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import describe_machine, format_machine
from benchmarks.memory import PeakMemory, format_mib, return_freed_blocks_at_once, run_in_fresh_process
from benchmarks.random_llama import SHAPES
from benchmarks.timing import median_ratio, synchronize, take_turns
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.functional import linear_token_logp
from lit_unlearn.utils.io import write_json

NLLFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADERS = ["", "ms", "range", "time ratio", "extra MiB"]
# Of the gradients, relative to their norm. bfloat16 has 8 bits, and forms round at different places.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Head:
    """What is measured: a head, and the number of supervised tokens."""

    shape: str
    tokens: int
    dtype: torch.dtype
    device: str
    threads: int

    def make_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, the weight with a gradient, and labels, the same at every call."""
        shape = SHAPES[self.shape]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.tokens, shape.hidden, generator=generator)
        # The spread of a model's initial weights.
        weight = torch.randn(shape.vocabulary, shape.hidden, generator=generator) * 0.02
        labels = torch.randint(shape.vocabulary, (self.tokens,), generator=generator).to(self.device)
        hidden, weight = (values.to(self.device, self.dtype).requires_grad_() for values in (hidden, weight))
        weight.grad = torch.zeros_like(weight)
        return hidden, weight, labels


def compute_plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the mean NLL from all logits."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def compute_ours(hidden: Tensor, weight: Tensor, labels: Tensor, *, accumulate: bool) -> Tensor:
    """Return the mean NLL as `lit_unlearn.NLL` computes it."""
    return -linear_token_logp(hidden, weight, labels, accumulate=accumulate).mean()


def compute_torch(hidden: Tensor, weight: Tensor, labels: Tensor, *, reduction: str) -> Tensor:
    """Return the mean NLL by torch's chunked function."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options).mean()


def compute_liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the mean NLL by Liger's Triton kernel."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Any = liger_fused_linear_cross_entropy(hidden, weight, labels)
    # Some versions return further values beside it.
    return loss[0] if isinstance(loss, tuple) else loss


FUNCTIONS: dict[str, NLLFunction] = {
    "plain": compute_plain,
    "ours": partial(compute_ours, accumulate=False),
    "ours, in place": partial(compute_ours, accumulate=True),
    "torch": partial(compute_torch, reduction="mean"),
    "torch, unreduced": partial(compute_torch, reduction="none"),
    "Liger": compute_liger,
}


def compute(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run one function forward and backward, and return the loss."""
    loss = FUNCTIONS[name](*inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def find_missing(head: Head) -> dict[str, str]:
    """Return why a function cannot run here, by name; those that are not in it give the loss and the gradients of `plain`.

    Raises:
        RuntimeError: If one gives something else.
    """
    wanted, missing = _compute_results("plain", head), {}
    for name in FUNCTIONS:
        if name == "Liger" and head.device == "cpu":
            missing[name] = "its kernel needs a GPU"
            continue
        try:
            results = _compute_results(name, head)
        # The package, or the function in this version of torch.
        except (ImportError, AttributeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        for what, actual, expected in zip(("loss", "hidden", "weight"), results, wanted, strict=True):
            difference = float((actual - expected).norm() / expected.norm())
            # Not `difference > …`: nan must fail, too.
            if not difference <= TOLERANCE[head.dtype]:
                raise RuntimeError(
                    f"'{name}' gives another {what} than 'plain': the relative difference is {difference:.2g}"
                )
    return missing


def _compute_results(name: str, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    inputs = head.make_inputs()
    loss = compute(name, inputs)
    hidden_gradient, weight_gradient = inputs[0].grad, inputs[1].grad
    assert hidden_gradient is not None
    assert weight_gradient is not None
    return loss.float(), hidden_gradient.float(), weight_gradient.float()


def measure_memory(name: str, head: Head) -> int | None:
    """Measure the bytes that one turn needs beyond hidden states, weight and its gradient; on a CPU, in a fresh process."""
    torch.set_num_threads(head.threads)
    if head.device == "cpu":
        return_freed_blocks_at_once()
    inputs = head.make_inputs()
    # Libraries take memory at their first call.
    compute(name, inputs)
    inputs[0].grad = None
    memory = PeakMemory(0, 0, head.device)
    memory.on_step_start(0)
    compute(name, inputs)
    memory.on_step_end(0, {})
    return memory.extra_bytes(0)


def measure_turn(name: str, inputs: tuple[Tensor, Tensor, Tensor], device: str) -> float:
    """Return the seconds of one turn."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    compute(name, inputs)
    synchronize(device)
    return time.perf_counter() - start


def compare_functions(head: Head, rounds: int, with_memory: bool = True) -> dict[str, Any]:
    """Measure time and memory of every function that can run here.

    Args:
        head: What is measured.
        rounds: Turns of every function.
        with_memory: Whether memory is measured, too.

    Raises:
        RuntimeError: If a function gives another loss or gradient than `plain`.
    """
    missing = find_missing(head)
    names = [name for name in FUNCTIONS if name not in missing]
    inputs = head.make_inputs()
    turns = {name: partial(measure_turn, name, inputs, head.device) for name in names}
    for turn in turns.values():
        turn()
    seconds = take_turns(rounds, turns)
    functions = {}
    for name in names:
        extra = None
        if with_memory:
            is_cpu = head.device == "cpu"
            extra = run_in_fresh_process(measure_memory, name, head) if is_cpu else measure_memory(name, head)
        functions[name] = {
            "seconds": statistics.median(seconds[name]),
            "seconds_of_rounds": seconds[name],
            "time_ratio": median_ratio(seconds[name], seconds["plain"]),
            "extra_bytes": extra,
        }
    shape = SHAPES[head.shape]
    return {
        "tokens": head.tokens,
        "hidden": shape.hidden,
        "vocabulary": shape.vocabulary,
        "dtype": str(head.dtype).removeprefix("torch."),
        "functions": functions,
        "missing": missing,
    }


def list_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of one head, under `HEADERS`."""
    rows = []
    for name, values in results["functions"].items():
        of_rounds = [1e3 * value for value in values["seconds_of_rounds"]]
        milliseconds, spread = f"{1e3 * values['seconds']:.3g}", f"{min(of_rounds):.3g}–{max(of_rounds):.3g}"
        rows.append([name, milliseconds, spread, f"{values['time_ratio']:.2f}", format_mib(values["extra_bytes"])])
    return rows


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m"], help="default: 135m")
    parser.add_argument("--tokens", nargs="+", type=int, default=[200, 800], help="default: 200 800")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7, help="turns of every function (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory, which takes a process each")
    parser.add_argument("--output", type=Path, default="build/bench/nll.json", help="file for the results")
    options = parser.parse_args(arguments)
    for value in (options.rounds, options.threads, *options.tokens):
        if value < 1:
            parser.error(f"--rounds, --threads and --tokens must be at least 1, not {value}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": describe_machine(options.device), "heads": []}
    print(format_machine(results["machine"]))
    for shape in options.shapes:
        for tokens in options.tokens:
            for dtype in options.dtypes:
                head = Head(shape, tokens, getattr(torch, dtype), options.device, options.threads)
                compared = compare_functions(head, options.rounds, not options.no_memory)
                results["heads"].append(compared)
                print(f"\n{shape}: {tokens} × {compared['hidden']}, V = {compared['vocabulary']:,}, {dtype}")
                print(format_table(list_rows(compared), HEADERS))
                for name, reason in compared["missing"].items():
                    print(f"not measured: {name}: {reason}")
                write_json(options.output, results)
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
