"""Count the 16-bit weights that an optimizer step moves, and those that it leaves where they are, by rounding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_unlearn.models.weights import local_part
from lit_unlearn.training.float32_weights import Float32Weights

_SAMPLE_SIZE = 4096  # weights per tensor: a copy of all would take as much memory as the model
_ENOUGH = 0.5  # of the weights; below it, most of what a gradient says is lost


class _Sample(NamedTuple):
    """Some weights of one tensor before a step; those without a gradient would not move in any precision."""

    parameter: nn.Parameter
    stride: int
    values: Tensor
    has_gradient: Tensor


class WeightMovement:
    """Measures, once, the share of 16-bit weights that a step at the full learning rate moves.

    bfloat16 has 8 bits for a number's digits: a step smaller than 2⁻⁹ to 2⁻⁸ of a weight is rounded away, every time anew. At
    the learning rates of full fine-tuning that is nearly all of them.
    """

    def __init__(self) -> None:
        self.share: float | None = None
        self._samples: list[_Sample] = []
        self._lr = 0.0

    @property
    def is_small(self) -> bool:
        """True if most weights with a gradient did not move."""
        return self.share is not None and self.share < _ENOUGH

    def note_weights(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Remember a sample of the weights right before a step, while their gradients are there."""
        self._samples = []
        # Beside float32 copies, a weight that stays where it is has not lost its step.
        if self.share is not None or isinstance(optimizer, Float32Weights):
            return
        groups = optimizer.param_groups
        # During a warm-up steps are smaller than they are meant to be.
        if any(group["lr"] <= 0 or group["lr"] < 0.5 * group.get("initial_lr", 0) for group in groups):
            return
        self._lr = max(group["lr"] for group in groups)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None and parameter.dtype.itemsize == 2:
                values, gradient = _flatten(parameter), _flatten(parameter.grad)
                stride = max(1, values.numel() // _SAMPLE_SIZE)
                sampled = values[::stride].clone()
                self._samples.append(_Sample(parameter, stride, sampled, gradient[::stride] != 0))

    def compare_weights(self, step: int) -> str | None:
        """Compare with the sample after the step; return what to tell the user, or ``None`` if nothing was measured.

        Args:
            step: Number of the step.
        """
        moved = total = 0.0
        for parameter, stride, before, has_gradient in self._samples:
            after = _flatten(parameter)[::stride]
            moved += stride * float((after[has_gradient] != before[has_gradient]).sum())
            total += stride * float(has_gradient.sum())
        if not total:
            self._samples = []
            return None
        self.share = moved / total
        dtype = self._samples[0].values.dtype
        text = (
            f"the weights are {str(dtype).removeprefix('torch.')}: step {step} moved {100 * self.share:.3g} % of them"
        )
        if self.is_small:
            needed = _median_size(self._samples) * torch.finfo(dtype).eps / 2
            text += (
                f", and rounded the others back to where they were, because `lr` ({self._lr:.3g}) is smaller than the spacing of such "
                "numbers. Set the Trainer's `precision` to '32-true' or 'bf16-mixed', whose weights have 32 bits, let the optimizer "
                f"Float32Weights keep 32 bits beside them, train an `adapter`, or raise `lr` above {needed:.1g}"
            )
        self._samples = []
        return f"{text}."


def _flatten(tensor: Tensor) -> Tensor:
    return local_part(tensor).detach().flatten()


def _median_size(samples: list[_Sample]) -> float:
    sizes = torch.cat([sample.values.abs().float().cpu() for sample in samples])
    return float(sizes[sizes > 0].median()) if bool((sizes > 0).any()) else 0.0
