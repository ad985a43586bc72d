"""What both LightningModules share: loading, the primal step, evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_unlearn.evaluation import AnswerSuite, Suite
from lit_unlearn.lm import LanguageModel, locate
from lit_unlearn.objectives import Objective

Batch = Mapping[str, Tensor]

_TRUE_PRECISION = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule of transformers, stepped once per optimizer step, with its lengths taken from the Trainer.

    Args:
        name: As for ``transformers.get_scheduler``: ``"linear"``, ``"cosine"``, ``"constant_with_warmup"``, …
        warmup_epochs: Passes over the forget set in which the rate rises from 0; fractions are allowed.
    """

    name: str
    warmup_epochs: float = 0.0


class Term(NamedTuple):
    """One weighted objective on one stream: a part of the Lagrangian.

    Args:
        name: For logs and messages.
        stream: Key of its batch.
        objective: What is averaged over the stream's rows.
        weight: Its factor in the sum that the primal step descends.
    """

    name: str
    stream: str
    objective: Objective
    weight: float


class LitLanguageModel(L.LightningModule):
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
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"`model.micro_batch_size` must be at least 1, or null for one part; got {micro_batch_size}."
            )
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(
                f"`model.gradient_clip_val` must be above 0, or null for no clipping; got {gradient_clip_val}."
            )
        self.automatic_optimization = False
        self.lm = lm
        self.suite = AnswerSuite() if suite is None else suite
        self.micro_batch_size = micro_batch_size
        self.gradient_clip_val = gradient_clip_val
        self.seed = seed
        self._optimizer, self._scheduler = optimizer, scheduler
        self._measured: tuple[int, dict[str, float]] | None = None

    # Loading ---------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the model in the dtype that the Trainer's precision calls for."""
        if self.lm.is_loaded:
            return
        precision = "32-true" if self._trainer is None else self.trainer.precision
        dtype = _TRUE_PRECISION.get(str(precision), torch.float32)  # mixed precision keeps float32 weights
        self.lm.load(dtype)
        trainable = sum(p.numel() for p in self.lm.parameters() if p.requires_grad)
        kind = type(self.lm.model).__name__
        head = "linear head" if self.lm.linear_head else "full logits, because its head is not a plain linear layer"
        rank_zero_info(f"model: {kind}, {trainable:,} trainable parameters, {str(dtype)[6:]}, {head}")

    def on_fit_start(self) -> None:
        """Forgets what an earlier run measured."""
        self._measured = None

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and its schedule."""
        optimizer = self._optimizer([p for p in self.lm.parameters() if p.requires_grad])
        if self._scheduler is None:
            return optimizer
        if not isinstance(self._scheduler, Schedule):
            return [optimizer], [self._scheduler(optimizer)]
        from transformers import get_scheduler

        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self._scheduler.warmup_epochs * self.trainer.num_training_batches)
        return [optimizer], [get_scheduler(self._scheduler.name, optimizer, warmup, total)]

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
        parts = {stream: self._split(_stream(batch, stream)) for stream in dict.fromkeys(term.stream for term in terms)}
        passes = [(i, part) for i, term in enumerate(terms) for part in parts[term.stream]]
        sums = torch.zeros(len(terms), 2, dtype=torch.float64, device=self.device)
        for i, part in passes:
            sums[i, 1] += terms[i].objective.count(locate(part, terms[i].objective.alignment))
        counts = self._add_over_processes(sums)[:, 1].tolist()
        for term, count in zip(terms, counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"no row of the '{term.stream}' batch has a supervised token on any process: `labels` are all -100 (or "
                    "only on a row's first token, which nothing predicts). Drop such rows from the data."
                )
        for number, (i, part) in enumerate(passes):
            term = terms[i]
            with self._no_gradient_sync() if number + 1 < len(passes) else nullcontext():
                average = self.lm(part, partial(term.objective, self.lm), term.objective.alignment)
                self.manual_backward(average.total * (term.weight * self.trainer.world_size / counts[i]))
            sums[i, 0] += average.total.detach().double()
        return self._add_over_processes(sums)

    def _step(self) -> None:
        """Steps the optimizer with the accumulated gradient, then the schedule."""
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips here, where a gradient scaler has unscaled the gradients."""
        limit = math.inf if self.gradient_clip_val is None else self.gradient_clip_val
        self.log("grad_norm", nn.utils.clip_grad_norm_(self.lm.parameters(), limit))

    def _split(self, batch: Batch) -> list[Batch]:
        if self.micro_batch_size is None:
            return [batch]
        split = {key: value.split(self.micro_batch_size) for key, value in batch.items() if isinstance(value, Tensor)}
        return [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]

    def _no_gradient_sync(self) -> AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _add_over_processes(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")  # works in place

    # Evaluation ------------------------------------------------------------------------------------------------------

    def _evaluate(self, stream: str, batch: Batch) -> None:
        self.lm(batch, partial(self.suite.update, stream, self.lm))

    def _results(self) -> dict[str, float]:
        """Values over everything evaluated on all processes; starts afresh afterwards."""
        values = self.suite.compute()
        self.suite.reset()
        return values

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch of one stream; the loaders are a dict from stream name to loader."""
        self._evaluate(self._stream_name(dataloader_idx), batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the values over the whole validation set."""
        values = self._results()
        if not self.trainer.sanity_checking:
            self._measured = (self.global_step, values)
            self._log_results("val", values)

    def on_test_epoch_end(self) -> None:
        """Logs the values over the whole test set."""
        self._log_results("test", self._results())

    def _log_results(self, stage: str, values: dict[str, float]) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Evaluates the current weights on every validation row, outside of Lightning's own validation.

        Returns:
            The suite's and the constraints' values by name, over all processes; those of a validation that was just
            made with the same weights are used again.
        """
        if self._measured is not None and self._measured[0] == self.global_step:
            return self._measured[1]
        training = self.lm.training
        self.lm.eval()
        with self.trainer.precision_plugin.val_step_context():
            for stream, batches in self._evaluation_streams().items():
                for batch in batches:
                    self._evaluate(stream, self.trainer.strategy.batch_to_device(batch))
        self.lm.train(training)
        values = self._results()
        self._measured = (self.global_step, values)
        return values

    def _evaluation_streams(self) -> dict[str, Iterable[Batch]]:
        """The validation loaders, or else the training loaders that come to an end."""
        if self.trainer.datamodule is not None:  # type: ignore[attr-defined]
            return dict(self.trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        loaders = self.trainer.val_dataloaders or self.trainer.train_dataloader
        if isinstance(loaders, Mapping):
            return dict(loaders)
        raise ValueError(
            "a relative epsilon is measured on the validation loaders: pass `val_dataloaders={'forget': …, 'retain': …}` "
            f"(or a dict of finite training loaders), not {type(loaders).__name__}; or set an absolute epsilon."
        )

    def _stream_name(self, index: int) -> str:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        if not isinstance(loaders, Mapping):
            raise ValueError(
                "validation and test loaders must be a dict from stream name to loader, such as {'forget': …, "
                f"'retain': …}}, so that results can be named; got {type(loaders).__name__}."
            )
        return str(list(loaders)[index])


def _stream(batch: Mapping[str, Batch], stream: str) -> Batch:
    if isinstance(batch, Mapping) and isinstance(batch.get(stream), Mapping):
        return batch[stream]
    got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise KeyError(
        f"a training batch must be a dict with '{stream}' among its keys, whose value is a batch with `input_ids`, "
        f"`attention_mask` and `labels`; got {got}."
    )
