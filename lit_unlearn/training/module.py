"""What both LightningModules share: loading, the primal step, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.suite import AnswerSuite, Suite
from lit_unlearn.models import Batch, LanguageModel
from lit_unlearn.training.evaluator import LitMeasured
from lit_unlearn.training.forward_plan import Order, Term, plan_passes
from lit_unlearn.training.strategies import check_strategy, shard, total_norm


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule of transformers, stepped once per optimizer step, with its lengths taken from the Trainer.

    Args:
        name: As for ``transformers.get_scheduler``: ``"linear"``, ``"cosine"``, ``"constant_with_warmup"``, …
        warmup_epochs: Passes over the forget set in which the rate rises from 0; fractions are allowed.
    """

    name: str
    warmup_epochs: float = 0.0


class LitLanguageModel(LitMeasured):
    """A language model that is trained by weighted objectives on named streams.

    One ``training_step`` is one optimizer step over the whole per-device batch. Gradients are those of the means over
    all values of the step, on all processes and in all micro-batches.
    """

    def __init__(
        self,
        lm: LanguageModel,
        optimizer: OptimizerCallable,
        scheduler: Schedule | LRSchedulerCallable | None,
        suite: Suite | None,
        micro_batch_size: int | None,
        gradient_clip_val: float | None,
        seed: int,
        passes: Order,
        benchmark: Benchmark | None,
        benchmark_every_n_epochs: int | None,
    ) -> None:
        super().__init__(lm, AnswerSuite() if suite is None else suite, benchmark, benchmark_every_n_epochs)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"`model.micro_batch_size` must be at least 1, or null for one part; got {micro_batch_size}."
            )
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(
                f"`model.gradient_clip_val` must be above 0, or null for no clipping; got {gradient_clip_val}."
            )
        if passes not in ("joint", "sequential"):
            raise ValueError(f"`model.passes` must be 'joint' or 'sequential', not {passes!r}.")
        self.automatic_optimization = False
        self.passes = passes
        self.micro_batch_size = micro_batch_size
        self.gradient_clip_val = gradient_clip_val
        self.seed = seed
        self._optimizer, self._scheduler = optimizer, scheduler
        self._settings: list[dict[str, Any]] = []  # the optimizer's, as configured
        self._saved_settings: list[dict[str, Any]] = []  # the same in the checkpoint that is resumed

    # Loading ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuses strategies that would take wrong steps.

        Raises:
            ValueError: See `check_strategy`.
        """
        super().setup(stage)
        check_strategy(type(self.trainer.strategy).__name__)
        if getattr(self.trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise ValueError(
                "DDPStrategy(static_graph=True) is refused: a step has several backward passes. Leave it out."
            )

    def configure_model(self) -> None:
        """Loads the model, and shards it where that is asked for."""
        super().configure_model()
        if self.device_mesh is not None:
            shard(self.lm, self.device_mesh)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and its schedule."""
        optimizer = self._optimizer([p for p in self.lm.parameters() if p.requires_grad])
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self._scheduler is None:
            return optimizer
        if not isinstance(self._scheduler, Schedule):
            return [optimizer], [self._scheduler(optimizer)]
        from transformers import get_scheduler

        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self._scheduler.warmup_epochs * self.trainer.num_training_batches)
        return [optimizer], [get_scheduler(self._scheduler.name, optimizer, warmup, total)]

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves what decides the next step beside weights and optimizer, in plain types.

        Of an adapted model only the adapter is saved, and no copy of the reference model. Where every process saves its
        shard, all weights are: they are loaded by name, without exception.
        """
        checkpoint["run"] = {"seed": self.seed, "optimizer": self._settings}
        state = checkpoint["state_dict"]
        if not self.strict_loading and not any(isinstance(value, DTensor) for value in state.values()):
            names = self._saved_names()
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that this run can go on from a checkpoint.

        Raises:
            ValueError: If dropout was seeded otherwise.
            KeyError: If weights are missing.
        """
        if self._trainer is not None and self.trainer.state.fn == "fit":
            if checkpoint["run"]["seed"] != self.seed:
                raise ValueError(
                    f"the checkpoint cannot be resumed: `model.seed` was {checkpoint['run']['seed']}, is {self.seed}. "
                    "Restore it, or start a new run from the exported model."
                )
            self._saved_settings = checkpoint["run"]["optimizer"]
        super().on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        """Lets changed optimizer settings win over those that came with the checkpoint.

        On a single device the losses may add to the head's gradient directly, which saves a buffer of its size.
        """
        self.lm.accumulate_head = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.processed == epochs.started:
            loop.reset_restart_stage()  # Lightning forgets to count the epoch that begins after one's last step
        optimizers, schedulers = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        for i, (new, old) in enumerate(zip(self._settings, self._saved_settings, strict=False)):
            group = optimizers[0].param_groups[i]
            changed = {key: value for key, value in new.items() if value != old.get(key)}
            if "lr" in changed and old["lr"] > 0:
                changed |= {"lr": group["lr"] * new["lr"] / old["lr"], "initial_lr": new["lr"]}  # keeps the schedule
                for config in schedulers:
                    if hasattr(config.scheduler, "base_lrs"):
                        config.scheduler.base_lrs[i] = new["lr"]
            group.update(changed)
        self._saved_settings = []

    def on_train_end(self) -> None:
        """Leaves the gradients to autograd again."""
        self.lm.accumulate_head = False

    # The primal step -------------------------------------------------------------------------------------------------

    def _backward(self, batch: Mapping[str, Batch], terms: list[Term]) -> Tensor:
        """Accumulates the gradient of Σ weight · mean over everything this step sees on all processes.

        Args:
            batch: One batch per stream.
            terms: The parts of the sum.

        Returns:
            ``[total, count]`` of every term over all processes, float64, shape ``(len(terms), 2)``.
        """
        torch.manual_seed(hash((self.seed, self.global_step, self.global_rank)) % 2**63)  # resumes dropout exactly
        passes = plan_passes(batch, terms, self.lm, self.micro_batch_size, self.passes)
        counts = [0] * len(terms)
        for one in passes:
            for i, tokens in zip(one.terms, one.tokens, strict=True):
                counts[i] += terms[i].objective.count(tokens)
        sums = torch.zeros(len(terms), 2, dtype=torch.float64, device=self.device)
        sums[:, 1] = torch.tensor(counts)
        all_counts = self._add_over_processes(sums)[:, 1].tolist() if self.trainer.world_size > 1 else counts
        for term, count in zip(terms, all_counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"no row of the '{term.stream}' batch has a supervised token that {type(term.objective).__name__} reads, on any "
                    "process: `labels` are all -100 (or only on a row's first token, which nothing predicts), or answers are "
                    "too short. Drop such rows from the data."
                )
        for number, one in enumerate(passes):
            scales = [terms[i].weight * self.trainer.world_size / all_counts[i] for i in one.terms]
            last = number + 1 == len(passes)
            with nullcontext() if last else self._no_gradient_sync():
                averages = self._pass(one, [term.objective for term in terms])
                weighted = [average.total * scale for average, scale in zip(averages, scales, strict=True)]
                loss = torch.stack(weighted).sum()
                if last and any(one.layers for one in passes):
                    loss = loss + self._touch_all()
                self.manual_backward(loss)
            for i, average in zip(one.terms, averages, strict=True):
                sums[i, 0] += average.total.detach().double()
        return self._add_over_processes(sums)

    def _touch_all(self) -> Tensor | float:
        """Zero, with a gradient of zero for every weight where DDP waits for all: layers may be left out of a loss."""
        if not isinstance(self.trainer.strategy, DDPStrategy):
            return 0.0
        return 0.0 * torch.stack([p.sum() for p in self.lm.parameters() if p.requires_grad]).sum()

    def _step(self) -> bool:
        """Steps the optimizer with the accumulated gradient, then the schedule.

        Returns:
            Whether the step was taken: a gradient scaler leaves it out where half precision overflowed.
        """
        optimizer, scaler = self.optimizers(), self._scaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        if scaler is not None and scaler.get_scale() < scale:
            return False
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        return True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measures and clips here, where a gradient scaler has unscaled the gradients.

        Raises:
            ValueError: If the gradient is not finite and no scaler will leave the step out.
        """
        parameters = [p for p in self.lm.parameters() if p.grad is not None]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        self.log("grad_norm", norm)
        if self._scaler is None and not norm.isfinite():
            raise ValueError(
                f"the gradient's norm is {norm.item()}; the step was not taken and the weights are still good. Lower "
                "`model.optimizer.init_args.lr` or the multiplier's, or use a wider `trainer.precision`."
            )
        if self.gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _no_gradient_sync(self) -> AbstractContextManager[Any]:
        """Saves DDP an all-reduce; FSDP2 scatters every time, lest each process hold the gradient of the whole model."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _add_over_processes(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")  # works in place
