"""Measuring a model on whole streams: Lightning's validation and test, and the same at any other time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch

from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.suite import Suite
from lit_unlearn.models import Batch, LanguageModel, SupervisedTokens
from lit_unlearn.objectives import NLL, Objective
from lit_unlearn.training.evaluate import prepare_benchmark, run_benchmark
from lit_unlearn.training.forward_plan import Pass, Term, plan_passes
from lit_unlearn.training.weights import check_tensors, load_for_trainer, saved_tensor_names

Value = TypeVar("Value")
Consumer = Callable[[LanguageModel, SupervisedTokens], Value]


class Measurement(NamedTuple):
    """What the model measured on whole streams after one step.

    Args:
        step: Optimizer steps taken before.
        values: As `LitMeasured.measure` gives them.
    """

    step: int
    values: dict[str, float]


class LitMeasured(L.LightningModule):
    """A language model that a suite measures, on any number of processes.

    Args:
        lm: The model.
        suite: What is measured on which stream.
        benchmark: Run at a test, and during a fit; ``None`` for none.
        benchmark_every_n_epochs: Epochs between two runs of the benchmark in a fit; ``None`` for none.

    Raises:
        ConfigError: If there is a number of epochs below 1, or one without a benchmark.
    """

    def __init__(
        self,
        lm: LanguageModel,
        suite: Suite,
        benchmark: Benchmark | None = None,
        benchmark_every_n_epochs: int | None = None,
    ) -> None:
        super().__init__()
        if benchmark_every_n_epochs is not None and (benchmark_every_n_epochs < 1 or benchmark is None):
            raise ConfigError(
                f"`benchmark_every_n_epochs` ({benchmark_every_n_epochs}) must be at least 1 and goes with a `benchmark`; null "
                "for none during the fit.",
                owner=self,
                argument="benchmark_every_n_epochs",
            )
        self.lm = lm
        self.suite = suite
        self.benchmark = benchmark
        self.benchmark_every_n_epochs = benchmark_every_n_epochs
        self._answers = NLL()  # reads what suites read
        self._measured: Measurement | None = None

    # Loading ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Forgets what an earlier run measured; reads the benchmark's rows, where it will be run.

        Raises:
            ValueError: If the model will be sharded, with which no answers can be generated.
        """
        self._measured = None
        is_run = stage == "test" or (stage == "fit" and self.benchmark_every_n_epochs is not None)
        if self.benchmark is not None and is_run:
            prepare_benchmark(self, self.benchmark, self.lm)

    def configure_model(self) -> None:
        """Loads the model in the dtype that the Trainer's precision calls for."""
        load_for_trainer(self.lm, self._trainer)
        self._prepare_reference()
        self.strict_loading = not self.lm.has_adapter and self.lm.frozen is None

    def _prepare_reference(self) -> None:
        """Does what must be done with the model as it was loaded, before a checkpoint or a step changes it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint has all weights that it must have.

        Raises:
            CheckpointError: If some are missing.
        """
        check_tensors(checkpoint, self, self.lm)

    def _saved_names(self) -> set[str]:
        return saved_tensor_names(self, self.lm)

    # Measuring -------------------------------------------------------------------------------------------------------

    def _evaluate(self, stream: str, batch: Batch) -> None:
        """Adds one batch of one stream to everything that is measured on it, in as few passes as that takes."""
        self._consume(stream, batch, self._consumers(stream))

    def _consumers(self, stream: str) -> list[tuple[Objective, Consumer[Any]]]:
        """What is measured on a stream: an objective that says what it reads, and what is done with it."""
        return [(self._answers, partial(self.suite.update, stream))]

    def _consume(self, stream: str, batch: Batch, consumers: Sequence[tuple[Objective, Consumer[Any]]]) -> None:
        terms = [Term(stream, stream, objective, 0.0) for objective, _ in consumers]
        for one in plan_passes({stream: batch}, terms, self.lm, None, "joint"):
            self._pass(one, [consume for _, consume in consumers])

    def _pass(self, one: Pass, consumers: Sequence[Consumer[Value]]) -> list[Value]:
        """Runs the model and hands each term's tokens to its consumer."""
        compute = partial(_apply, self.lm, [consumers[i] for i in one.terms])
        return self.lm(one.batch, compute, index=one.tokens, reference=one.reference, layers=one.layers)  # type: ignore[no-any-return]

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
            if self.trainer.limit_val_batches == 1.0:  # else it is a part that was measured
                self._keep(values)
            self._log_results("val", values)
            every = self.benchmark_every_n_epochs
            is_due = self.trainer.state.fn == "fit" and every is not None and (self.current_epoch + 1) % every == 0
            if self.benchmark is not None and is_due:
                run_benchmark(self, self.benchmark, self.lm, "val")

    def on_test_epoch_end(self) -> None:
        """Logs the values over the whole test set, and runs the benchmark, if there is one."""
        values = self._results()
        if values:
            self._log_results("test", values)
        if self.benchmark is not None:
            run_benchmark(self, self.benchmark, self.lm, "test")

    def _log_results(self, stage: str, values: dict[str, float]) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Evaluates the current weights on every validation row, outside of Lightning's own validation.

        Returns:
            The suite's and the constraints' values by name, over all processes; those of a validation that was just
            made with the same weights are used again.
        """
        if self._measured is not None and self._measured.step == self.global_step:
            return self._measured.values
        for stream, batch in self._evaluation_batches():
            self._evaluate(stream, batch)
        values = self._results()
        self._keep(values)
        return values

    def _evaluation_batches(self) -> Iterator[tuple[str, Batch]]:
        """Every batch of every validation stream, on the device; in between, the model is in evaluation mode."""
        training = self.lm.training
        self.lm.eval()
        try:
            with self.trainer.precision_plugin.val_step_context():
                for stream, batches in self._evaluation_streams().items():
                    for batch in batches:
                        yield stream, self.trainer.strategy.batch_to_device(batch)
        finally:
            self.lm.train(training)

    @property
    def kept_step(self) -> int:
        """Optimizer steps that the model had taken which the run keeps so far: here the last one."""
        return self.global_step

    def _keep(self, values: dict[str, float]) -> None:
        self._measured = Measurement(self.global_step, values)

    def _evaluation_streams(self) -> dict[str, Iterable[Batch]]:
        """The validation loaders, or else the training loaders that come to an end."""
        if self.trainer.datamodule is not None:  # type: ignore[attr-defined]
            return dict(self.trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        own = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        loaders = own or self.trainer.train_dataloader
        if isinstance(loaders, Mapping):
            return dict(loaders)
        raise ValueError(
            "the model before unlearning is measured on the validation loaders: pass `val_dataloaders={'forget': …, 'retain': …}` "
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


def _apply(lm: LanguageModel, consumers: Sequence[Consumer[Value]], *tokens: SupervisedTokens) -> list[Value]:
    return [consume(lm, own) for consume, own in zip(consumers, tokens, strict=True)]
