"""Robustness options of the primal step: other gradients, after which what was forgotten is harder to bring back.

Each runs the passes of the step itself, through `PrimalStep.backward`, so that micro-batches, packing, processes and precisions
need nothing of their own here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_unlearn.errors import ConfigError
from lit_unlearn.functional import upcast
from lit_unlearn.models import Batch
from lit_unlearn.models.weights import local_part, shifted
from lit_unlearn.training.forward_plan import Term
from lit_unlearn.training.strategies import total_norm
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.validation import check_number

if TYPE_CHECKING:
    from lit_unlearn.training.module import LitLanguageModel


class Robustness(ABC):
    """A way to compute the gradient of a primal step.

    Attributes:
        changes_weights: Whether it evaluates gradients at slightly other weights, which 16 bits cannot hold.
    """

    changes_weights: ClassVar[bool] = False

    @abstractmethod
    def backward(self, module: LitLanguageModel, batch: Mapping[str, Batch], terms: Sequence[Term]) -> Tensor:
        """Accumulate the gradient of a step on the trained parameters, the same on every process.

        Args:
            module: Has the model and the primal step.
            batch: The batch of the step on this process.
            terms: The forget term, then those of the constraints.

        Returns:
            As `PrimalStep.backward`, measured at the present weights.
        """

    def check(self, lm: nn.Module) -> None:
        """Raise if it would have no effect on a model; called before the first step.

        Raises:
            ConfigError: If it changes weights, and trained ones have 16 bits.
        """
        trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
        if self.changes_weights and any(parameter.dtype.itemsize < 4 for parameter in trained):
            raise ConfigError(
                f"{type(self).__name__} takes gradients at slightly other weights, but these have 16 bits, which round the "
                "difference away: set the Trainer's `precision` to 'bf16-mixed' or '32-true', or leave out `robustness`."
            )


class SharpnessAware(Robustness):
    """Forget gradient at the worst weights near by, as in sharpness-aware minimisation.

    The forget term's gradient is taken at θ + ρ g/‖g‖, with g its gradient at θ; the constraints' are taken at θ. The step then
    lowers the largest forget loss within a distance of ρ, max over ‖δ‖ ≤ ρ of the loss at θ + δ, of which ρ g/‖g‖ is the
    first-order solution. It takes a second gradient of the forget examples, separate passes for the constraints, and memory for a
    copy of the trained weights. Foret et al., ICLR 2021 (arXiv 2010.01412); Fan et al., ICML 2025 (arXiv 2502.05374), with
    ρ = 0.01, report that relearning then brings less back, which has not been measured here.

    Args:
        rho: Length ρ > 0 of the change, in the norm of all trained weights together.

    Raises:
        ConfigError: If ``rho`` is not above 0 or not finite.
    """

    changes_weights = True

    def __init__(self, rho: float = 0.01) -> None:
        self.rho = check_number(self, "rho", rho, above=0)

    def backward(self, module: LitLanguageModel, batch: Mapping[str, Batch], terms: Sequence[Term]) -> Tensor:
        """Accumulate the forget gradient at the changed weights, then the constraints' at the present ones."""
        forget, constraints = list(terms[:1]), list(terms[1:])
        step, forget_plan = module.primal_step, module.plan_step(batch, forget)
        forget_sums = step.backward(forget_plan, forget)

        parameters = _parameters_with_gradient(module.lm)
        gradients = _take_gradients(parameters)
        norm = float(total_norm(gradients))
        # Zero has no direction. What is not finite is found again below, and refused or skipped when the step is taken.
        factor = self.rho / norm if math.isfinite(norm) and norm > 0 else 0.0
        with shifted(parameters, gradients, factor):
            del gradients
            # Dropout is that of the first gradient: both are seeded by the step.
            step.backward(forget_plan, forget)
        constraint_sums = step.backward(module.plan_step(batch, constraints), constraints)
        return torch.cat([forget_sums, constraint_sums])


class GradientProjection(Robustness):
    """Forget gradient without the part that raises the constraints' values.

    g_f ← g_f − min(0, g_f · g_c)/‖g_c‖² · g_c, where g_f is the forget term's gradient and g_c that of Σ λ · constraint; then both
    are added. While λ is zero there is nothing to project on. It takes separate passes for the constraints, and memory for a
    second gradient. Yu et al., NeurIPS 2020 (arXiv 2001.06782), project conflicting gradients of tasks; here the forget gradient
    alone is projected.
    """

    def backward(self, module: LitLanguageModel, batch: Mapping[str, Batch], terms: Sequence[Term]) -> Tensor:
        """Accumulate the constraints' gradient and the projected forget gradient."""
        forget, constraints = list(terms[:1]), list(terms[1:])
        step = module.primal_step
        constraint_sums = step.backward(module.plan_step(batch, constraints), constraints)
        parameters = _parameters_with_gradient(module.lm)
        constraint_gradients = _take_gradients(parameters)
        forget_sums = step.backward(module.plan_step(batch, forget), forget)

        forget_gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            forget_gradients.append(parameter.grad)
        product = _inner_product(forget_gradients, constraint_gradients)
        square = _inner_product(constraint_gradients, constraint_gradients)
        # What is not finite is left to the step, which refuses or skips it.
        conflicts = math.isfinite(product) and math.isfinite(square) and product < 0 < square
        factor = 1 - product / square if conflicts else 1.0
        for forget_gradient, constraint_gradient in zip(forget_gradients, constraint_gradients, strict=True):
            forget_gradient.add_(constraint_gradient, alpha=factor)
        return torch.cat([forget_sums, constraint_sums])


def _parameters_with_gradient(lm: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in lm.parameters() if parameter.grad is not None]


def _take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients, and leave the parameters without."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            # A copy, because DDP may keep gradients in buckets that the next backward pass writes to.
            gradients.append(parameter.grad.clone())
        parameter.grad = None
    return gradients


def _inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the sum of products over all parameters, and over all processes where these are sharded."""
    products = []
    for a, b in zip(left, right, strict=True):
        products.append((upcast(local_part(a)) * upcast(local_part(b))).sum())
    total = float(torch.stack(products).sum())
    is_sharded = any(isinstance(tensor, DTensor) for tensor in left)
    return sum(gather_objects(total)) if is_sharded else total
