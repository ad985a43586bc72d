"""`LitFinetune`: fine-tuning of the target model on every example, or of the retain-only model."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.suite import Suite
from lit_unlearn.models import Batch, LanguageModel
from lit_unlearn.objectives import NLL
from lit_unlearn.training.forward_plan import Term
from lit_unlearn.training.module import LitLanguageModel, Schedule


class LitFinetune(LitLanguageModel):
    """Fine-tunes a model by NLL: the target model that knows every example, or the retain-only model to compare with.

    Every stream of a batch is trained on; ``ForgetRetain`` gives the right one with ``train_on`` ``"all"`` or ``"retain"``.

    Args:
        lm: The model to fine-tune, pretrained or with random weights.
        optimizer: As for `LitUnlearn`.
        scheduler: As for `LitUnlearn`; its epochs are passes over the training examples.
        suite: As for `LitUnlearn`.
        micro_batch_size: As for `LitUnlearn`.
        gradient_clip_val: As for `LitUnlearn`.
        seed: Of dropout.
        benchmark: As for `LitUnlearn`.
        benchmark_every_n_epochs: As for `LitUnlearn`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        optimizer: OptimizerCallable,
        scheduler: Schedule | LRSchedulerCallable | None = None,
        suite: Suite | None = None,
        micro_batch_size: int | None = None,
        gradient_clip_val: float | None = None,
        seed: int = 0,
        benchmark: Benchmark | None = None,
        benchmark_every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(
            lm,
            optimizer,
            scheduler,
            suite,
            benchmark,
            benchmark_every_n_epochs,
            micro_batch_size,
            gradient_clip_val,
            seed,
        )
        self._nll = NLL()

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        """Take one optimizer step on the token mean of every stream."""
        terms = [Term(stream, stream, self._nll, 1.0) for stream in batch]
        plan = self.plan_step(batch, terms)
        sums = self.primal_step.backward(plan, terms)

        step = self.primal_step.step(sums, terms)
        for stream, loss in zip(batch, step.losses, strict=True):
            self.log_numbers({f"{stream}/nll": loss}, prog_bar=True)
