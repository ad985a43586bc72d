"""Check the paper's claim of gradients that do not vanish, on losses that flatten a distribution.

    python -m benchmarks.quality.gradients

There is no model. The variable is the logits of one token that a model is certain of: 2048 entries, the largest of them 14
above the others, which are normally distributed. Two things are measured: the norm of the gradient while the logits are
scaled towards zero; and the number of steps of plain gradient descent on the logits until an entropy is reached, for each
loss with the step size that needs fewest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.quality.protocol import ROOT
from benchmarks.quality.results_files import RESULTS
from lit_unlearn.functional import kl_to_uniform, logit_margin
from lit_unlearn.utils.io import atomic_file, write_json

VOCABULARY, TOP = 2048, 14.0
# Of H / log V.
LEVELS = (0.5, 0.9, 0.99, 0.999)
RATES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
STEPS = 2000
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": logit_margin,
    "margin²": lambda z: logit_margin(z).square(),
    "KL(U‖p)": lambda z: kl_to_uniform(z, "uniform_to_model"),
    "log V − H": lambda z: kl_to_uniform(z, "model_to_uniform"),
}
STYLES = ("-", "--", "-.", ":")
COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73")


def make_certain_logits() -> Tensor:
    """Return the logits of a token that a model is sure of, shape (1, V)."""
    # float64: near uniformity the gradients differ by less than float32 resolves.
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0, 0] = logits.mean() + TOP
    return logits


def relative_entropy(logits: Tensor) -> float:
    """Return H / log V: 0 is certainty, 1 the uniform distribution."""
    return 1 - kl_to_uniform(logits, "model_to_uniform").item() / math.log(VOCABULARY)


def compute_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return the gradient of a loss in the logits."""
    variable = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable).sum(), variable)
    return gradient


def measure_norms(points: int = 60) -> dict[str, list[float]]:
    """Return the entropy and every loss's gradient norm, along the logits scaled towards zero."""
    norms: dict[str, list[float]] = {"entropy": [], **{name: [] for name in LOSSES}}
    for scale in torch.logspace(0, -3, points, dtype=torch.float64).tolist():
        logits = scale * make_certain_logits()
        norms["entropy"].append(relative_entropy(logits))
        for name, loss in LOSSES.items():
            norms[name].append(compute_gradient(loss, logits).norm().item())
    return norms


def count_steps(loss: Callable[[Tensor], Tensor], rate: float) -> list[int | None]:
    """Count the steps of gradient descent until each of `LEVELS` is reached; ``None`` where it is not."""
    logits = make_certain_logits()
    reached: dict[float, int | None] = dict.fromkeys(LEVELS, None)
    for step in range(1, STEPS + 1):
        logits = logits - rate * compute_gradient(loss, logits)
        entropy = relative_entropy(logits)
        for level in LEVELS:
            # A large step size can overshoot and come back: the first time counts.
            if reached[level] is None and entropy >= level:
                reached[level] = step
        if entropy >= LEVELS[-1]:
            break
    return list(reached.values())


def count_fewest_steps(loss: Callable[[Tensor], Tensor]) -> list[int | None]:
    """Count the steps to each of `LEVELS`, each with the best of `RATES`."""
    fewest: list[int | None] = [None] * len(LEVELS)
    for rate in RATES:
        for i, count in enumerate(count_steps(loss, rate)):
            # A large step size can reach the first level early and never the last: each level has its own best.
            if count is not None and (fewest[i] is None or count < fewest[i]):
                fewest[i] = count
    return fewest


def draw_norms(norms: dict[str, list[float]], target: Path) -> None:
    """Draw every loss's gradient norm against the distance from uniformity."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Both ends of H / log V are of interest, and only 1 − H / log V spreads the uniform one on a logarithmic axis.
    distances = [1 - entropy for entropy in norms["entropy"]]
    for name, style, colour in zip(LOSSES, STYLES, COLOURS, strict=True):
        axes.loglog(distances, norms[name], style, color=colour, label=name)
    axes.invert_xaxis()
    axes.set(
        xlabel="1 − H / log V: certain on the left, uniform on the right", ylabel="norm of the gradient in the logits"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(target) as file:
        figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the numbers, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "gradients.json", help="file for the numbers")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/pictures/gradients.png", help="file to draw")
    options = parser.parse_args(arguments)
    norms = measure_norms()
    fewest = {name: count_fewest_steps(loss) for name, loss in LOSSES.items()}
    write_json(options.output, {"norms": norms, "levels": LEVELS, "steps": fewest})
    draw_norms(norms, options.figure)


if __name__ == "__main__":
    main()
