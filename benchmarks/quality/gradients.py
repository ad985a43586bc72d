"""The paper's claim of gradients that do not vanish: losses that flatten a distribution, from certainty to uniformity.

    python benchmarks/quality/gradients.py

No model: the logits themselves are the variable, of one token that a model is sure of (2048 entries, the largest logit 14 above
normally distributed others). Shown are the norm of the gradient where the logits are scaled towards zero, and how many steps of plain gradient
descent on the logits each loss needs to an entropy, each with the step size that needs fewest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_unlearn.functional import kl_to_uniform, logit_margin
from lit_unlearn.utils.io import atomic_file, write_json

VOCABULARY, TOP = 2048, 14.0
LEVELS = (0.5, 0.9, 0.99, 0.999)  # of H / log V
RATES = tuple(10.0**exponent for exponent in range(-3, 4))
STEPS = 2000
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": logit_margin,
    "margin²": lambda z: logit_margin(z).square(),
    "KL(U‖p)": lambda z: kl_to_uniform(z, "uniform_to_model"),
    "log V − H": lambda z: kl_to_uniform(z, "model_to_uniform"),
}
STYLES = ("-", "--", "-.", ":")
COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73")


def certain() -> Tensor:
    """Logits of a token that a model is sure of, shape (1, V)."""
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0, 0] = logits.mean() + TOP
    return logits


def entropy(logits: Tensor) -> float:
    """H / log V."""
    return 1 - kl_to_uniform(logits, "model_to_uniform").item() / math.log(VOCABULARY)


def norm(loss: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    variable = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable).sum(), variable)
    return gradient.norm().item()


def norms(points: int = 60) -> dict[str, list[float]]:
    """Along the logits scaled towards zero: entropy, and every loss's gradient norm."""
    scales = torch.logspace(0, -3, points, dtype=torch.float64).tolist()
    found: dict[str, list[float]] = {"entropy": [entropy(scale * certain()) for scale in scales]}
    for name, loss in LOSSES.items():
        found[name] = [norm(loss, scale * certain()) for scale in scales]
    return found


def steps(loss: Callable[[Tensor], Tensor], rate: float) -> list[int | None]:
    """Steps of gradient descent until each of the levels is reached; ``None`` where it is not."""
    logits, reached = certain(), dict.fromkeys(LEVELS, None)
    for step in range(1, STEPS + 1):
        variable = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(variable).sum(), variable)
        logits = variable.detach() - rate * gradient
        now = entropy(logits)
        for level in LEVELS:
            if reached[level] is None and now >= level:
                reached[level] = step
        if now >= LEVELS[-1]:
            break
    return list(reached.values())


def fewest(loss: Callable[[Tensor], Tensor]) -> list[int | None]:
    """For each level, with the best of the step sizes."""
    runs = [steps(loss, rate) for rate in RATES]
    return [min((run[i] for run in runs if run[i] is not None), default=None) for i in range(len(LEVELS))]


def draw(found: dict[str, list[float]], target: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    flatness = [1 - value for value in found["entropy"]]
    for (name, style), colour in zip(zip(LOSSES, STYLES, strict=True), COLOURS, strict=True):
        axes.loglog(flatness, found[name], style, color=colour, label=name)
    axes.invert_xaxis()
    axes.set(
        xlabel="1 − H / log V: certain on the left, uniform on the right", ylabel="norm of the gradient in the logits"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(target) as file:
        figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/gradients.json")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[2] / "docs/pictures/gradients.png")
    options = parser.parse_args(arguments)
    found = norms()
    write_json(
        options.output, {"norms": found, "levels": LEVELS, "steps": {n: fewest(loss) for n, loss in LOSSES.items()}}
    )
    draw(found, options.figure)


if __name__ == "__main__":
    main()
