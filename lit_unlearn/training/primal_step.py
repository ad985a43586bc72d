"""The primal step: one optimizer step on a weighted sum of objectives, exact over passes and processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_unlearn.errors import BatchError, DivergedError
from lit_unlearn.functional import upcast
from lit_unlearn.models.transfer import send
from lit_unlearn.training.forward_plan import ForwardPass, Term
from lit_unlearn.training.strategies import total_norm

if TYPE_CHECKING:
    from lit_unlearn.training.module import LitLanguageModel


class StepResult(NamedTuple):
    """What an optimizer step measured and did.

    Args:
        losses: The mean of every term over all processes, at the weights before the step.
        is_taken: Whether weights moved: a gradient scaler skips the step where half precision overflowed.
    """

    losses: list[float]
    is_taken: bool


class PrimalStep:
    """Accumulates the gradient of Σ weight · mean, and steps the optimizer.

    Means are over all values of the step, in all passes and on all processes, so that the division of a step into passes and
    processes changes nothing but rounding.

    Values are read back from the device once per step, right before the weights change: the processor runs ahead of a GPU
    until then, and every other look at a value would stall it.

    Args:
        module: Has the model, the Trainer, the optimizer, ``gradient_clip_val`` and ``seed``.
    """

    def __init__(self, module: LitLanguageModel) -> None:
        self._module = module
        self._sums, self._terms = torch.empty(0, 2), list[Term]()  # of the step that is being taken
        self._losses: list[float] = []

    def backward(self, plan: Sequence[ForwardPass], terms: Sequence[Term]) -> Tensor:
        """Run the passes and accumulate their gradients.

        Args:
            plan: The passes of the step.
            terms: The parts of the sum.

        Returns:
            ``[total, count]`` of every term over all processes, float64, shape ``(len(terms), 2)``, on the device.
        """
        module = self._module
        world_size = module.trainer.world_size
        counts = self._count_values(plan, terms)
        totals = torch.zeros(len(terms), dtype=torch.float64, device=module.device)
        readers = [term.objective for term in terms]
        skips_layers = any(forward_pass.layers for forward_pass in plan)

        with self._seed_dropout():
            for number, forward_pass in enumerate(plan):
                is_last = number + 1 == len(plan)
                # Only the last backward pass needs to exchange gradients.
                with nullcontext() if is_last else self._postpone_gradient_sync():
                    sums = [upcast(values.sum()) for values in forward_pass.run(module.lm, readers)]
                    loss = torch.zeros((), device=module.device)
                    for i, total in zip(forward_pass.terms, sums, strict=True):
                        # DDP and FSDP2 average gradients over processes, so the mean needs this factor.
                        weight = torch.full_like(counts[i], terms[i].weight * world_size)
                        # Not a number divided by a tensor, which torch rounds twice.
                        factor = weight / counts[i]
                        loss = loss + total * factor.to(total.dtype)
                    if is_last and skips_layers:
                        loss = loss + self._touch_all_weights()
                    module.manual_backward(loss)
                for i, total in zip(forward_pass.terms, sums, strict=True):
                    totals[i] += total.detach().double()
        return torch.stack([self._sum_over_processes(totals), counts], dim=1)

    def _count_values(self, plan: Sequence[ForwardPass], terms: Sequence[Term]) -> Tensor:
        """Return the number of values of every term over all passes and processes, on the device."""
        counts = torch.zeros(len(terms), dtype=torch.float64)
        for forward_pass in plan:
            for i, index in zip(forward_pass.terms, forward_pass.indices, strict=True):
                counts[i] += terms[i].objective.count(index)
        return self._sum_over_processes(send(counts, self._module.device))

    def step(self, sums: Tensor, terms: Sequence[Term]) -> StepResult:
        """Step the optimizer with the accumulated gradient, then the schedule.

        Args:
            sums: What `backward` returned.
            terms: The terms that they are of.

        Raises:
            BatchError: If a term has no value on any process.
            DivergedError: If a loss or the gradient's norm is not finite. The weights are as they were.
        """
        module, scaler = self._module, self._scaler
        self._sums, self._terms, self._losses = sums, list(terms), []
        optimizer: Any = module.optimizers()
        scale = 0.0 if scaler is None else scaler.get_scale()
        optimizer.step()
        optimizer.zero_grad()
        # A scaler lowers its scale exactly when it has skipped a step; Lightning counts that step all the same.
        if scaler is not None and scaler.get_scale() < scale:
            return StepResult(self._losses, is_taken=False)
        scheduler: Any = module.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        return StepResult(self._losses, is_taken=True)

    def clip_gradients(self) -> float:
        """Check the losses of the step, clip the gradients and return their norm before.

        It is called within `step`, where a gradient scaler has unscaled the gradients and callbacks have changed them.

        Raises:
            BatchError: See `step`.
            DivergedError: If a loss is not finite, or the norm is not and no scaler will skip the step.
        """
        parameters = [parameter for parameter in self._module.lm.parameters() if parameter.grad is not None]
        norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        # Everything that the processor must know of a step, at once.
        *sums, norm_value = read_back(torch.cat([self._sums.flatten(), norm.to(self._sums).reshape(1)]))
        self._losses = _compute_means(sums, self._terms)
        self._module.check_losses(self._losses)
        if self._scaler is None and not math.isfinite(norm_value):
            raise DivergedError(
                f"the gradient's norm is {norm_value}; the step was not taken and the weights are still good. Lower the "
                "learning rate of the optimizer or of the multiplier, or use a wider precision."
            )
        if self._module.gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._module.gradient_clip_val, norm)
        return norm_value

    @contextmanager
    def _seed_dropout(self) -> Iterator[None]:
        """Seed the step's random numbers, and give the process its own back afterwards.

        Lightning saves no random state: seeded by step, dropout is the same after a resume, and differs between processes.
        """
        module = self._module
        key = f"{module.seed}/{module.global_step}/{module.global_rank}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield

    def _touch_all_weights(self) -> Tensor | float:
        """Return zero, with a gradient of zero for every weight: layers may not be part of a loss, and DDP waits for all."""
        if not isinstance(self._module.trainer.strategy, DDPStrategy):
            return 0.0
        sums = [parameter.sum() for parameter in self._module.lm.parameters() if parameter.requires_grad]
        return 0.0 * torch.stack(sums).sum()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self._module.trainer.precision_plugin, "scaler", None)

    def _postpone_gradient_sync(self) -> AbstractContextManager[Any]:
        """Spare DDP an all-reduce. FSDP2 scatters every time, or each process would hold the whole model's gradient."""
        block = getattr(self._module.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self._module.trainer.world_size == 1:
            return values
        summed = values.clone()
        # Not the strategy's `reduce`, which waits for all processes and their devices before.
        dist.all_reduce(summed)
        return summed


def read_back(values: Tensor) -> list[float]:
    """Return values that are on the device; called once per step, because it waits for all work that they depend on."""
    return values.tolist()


def _compute_means(sums: Sequence[float], terms: Sequence[Term]) -> list[float]:
    """Return the mean of every term.

    Args:
        sums: Total and count of each term in turn.
        terms: As many.

    Raises:
        BatchError: If a term has no value.
    """
    means = []
    for term, total, count in zip(terms, sums[::2], sums[1::2], strict=True):
        if count == 0:
            raise BatchError(
                f"no example of the '{term.stream}' batch has a supervised token that {type(term.objective).__name__} reads, "
                "on any process: `labels` are all -100 (or only on a row's first token, which nothing predicts), or "
                "answers are too short. Drop such rows from the data."
            )
        means.append(total / count)
    return means
