"""The primal step: one optimizer step on a weighted sum of objectives, exact over passes and processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_unlearn.errors import BatchError, DivergedError
from lit_unlearn.training.forward_plan import ForwardPass, Term
from lit_unlearn.training.strategies import total_norm

if TYPE_CHECKING:
    from lit_unlearn.training.module import LitLanguageModel


class PrimalStep:
    """Accumulates the gradient of Σ weight · mean, and steps the optimizer.

    Means are over all values of the step, in all passes and on all processes, so that the division of a step into passes and
    processes changes nothing but rounding.

    Args:
        module: Has the model, the Trainer, the optimizer, ``gradient_clip_val`` and ``seed``.
    """

    def __init__(self, module: LitLanguageModel) -> None:
        self._module = module

    def backward(self, plan: Sequence[ForwardPass], terms: Sequence[Term]) -> Tensor:
        """Run the passes and accumulate their gradients.

        Args:
            plan: The passes of the step.
            terms: The parts of the sum.

        Returns:
            ``[total, count]`` of every term over all processes, float64, shape ``(len(terms), 2)``.

        Raises:
            BatchError: If a term has no value on any process.
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
                    sums = [values.sum() for values in forward_pass.run(module.lm, readers)]
                    loss = torch.zeros((), device=module.device)
                    for i, total in zip(forward_pass.terms, sums, strict=True):
                        # DDP and FSDP2 average gradients over processes, so the mean needs this factor.
                        loss = loss + total * (terms[i].weight * world_size / counts[i])
                    if is_last and skips_layers:
                        loss = loss + self._touch_all_weights()
                    module.manual_backward(loss)
                for i, total in zip(forward_pass.terms, sums, strict=True):
                    totals[i] += total.detach().double()
        return torch.stack([self._sum_over_processes(totals), totals.new_tensor(counts)], dim=1)

    def _count_values(self, plan: Sequence[ForwardPass], terms: Sequence[Term]) -> list[float]:
        """Return the number of values of every term over all passes and processes, known before any pass."""
        counts = [0.0] * len(terms)
        for forward_pass in plan:
            for i, index in zip(forward_pass.terms, forward_pass.indices, strict=True):
                counts[i] += terms[i].objective.count(index)
        if self._module.trainer.world_size > 1:
            on_device = torch.tensor(counts, dtype=torch.float64, device=self._module.device)
            counts = self._sum_over_processes(on_device).tolist()
        for term, count in zip(terms, counts, strict=True):
            if count == 0:
                raise BatchError(
                    f"no example of the '{term.stream}' batch has a supervised token that {type(term.objective).__name__} reads, "
                    "on any process: `labels` are all -100 (or only on a row's first token, which nothing predicts), or "
                    "answers are too short. Drop such rows from the data."
                )
        return counts

    def step(self) -> bool:
        """Step the optimizer with the accumulated gradient, then the schedule.

        Returns:
            Whether the step was taken: a gradient scaler skips it where half precision overflowed.
        """
        module, scaler = self._module, self._scaler
        optimizer: Any = module.optimizers()
        scale = 0.0 if scaler is None else scaler.get_scale()
        optimizer.step()
        optimizer.zero_grad()
        # A scaler lowers its scale exactly when it has skipped a step; Lightning counts that step all the same.
        if scaler is not None and scaler.get_scale() < scale:
            return False
        scheduler: Any = module.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        return True

    def clip_gradients(self) -> Tensor:
        """Clip the gradients and return their norm before; called where a gradient scaler has unscaled them.

        Raises:
            DivergedError: If the norm is not finite and no scaler will skip the step.
        """
        parameters = [parameter for parameter in self._module.lm.parameters() if parameter.grad is not None]
        norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self._scaler is None and not norm.isfinite():
            raise DivergedError(
                f"the gradient's norm is {norm.item()}; the step was not taken and the weights are still good. Lower the "
                "learning rate of the optimizer or of the multiplier, or use a wider precision."
            )
        if self._module.gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._module.gradient_clip_val, norm)
        return norm

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
        # `reduce` works in place and defaults to the mean.
        return self._module.trainer.strategy.reduce(values.clone(), reduce_op="sum")
