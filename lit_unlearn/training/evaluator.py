"""Measuring a module's model on whole streams: in Lightning's validation and test, and at any other time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.errors import BatchError, ConfigError
from lit_unlearn.metrics import ConstraintSlack
from lit_unlearn.models import Batch, LanguageModel, SupervisedTokens
from lit_unlearn.objectives import NLL, Objective
from lit_unlearn.training.evaluate import prepare_benchmark, run_benchmark
from lit_unlearn.training.forward_plan import Term, build_forward_plan
from lit_unlearn.training.pace import Pace

if TYPE_CHECKING:
    from lit_unlearn.training.module import LitLanguageModel

Reader = Callable[[LanguageModel, SupervisedTokens], None]


class Measurement(NamedTuple):
    """Values that were measured on whole streams, and the weights that they were measured on.

    The step alone does not say which weights these were: Lightning's ``WeightAveraging`` has others in place during validation
    than between two steps.

    Args:
        step: Optimizer steps taken before.
        values: As `Evaluator.measure` gives them. Nothing in them depends on a setting that a resumed run may change.
        weights: `LanguageModel.checksum` of the weights; empty if these were not the same from the first batch to the last.
    """

    step: int
    values: dict[str, float]
    weights: str = ""


class Evaluator:
    """Measures a module's suite and objectives on whole streams, on any number of processes, and runs its benchmark.

    What is measured is what an export has: weights that it will round are rounded from the first batch of a measurement to its
    last, see `LanguageModel.as_exported`.

    Args:
        module: Has the model, the suite, the benchmark (or ``None``) and the terms.
        benchmark_every_n_epochs: Epochs between two runs of the benchmark in a fit; ``None`` for none.

    Raises:
        ConfigError: If there is a number of epochs below 1, or one without a benchmark.
    """

    def __init__(self, module: LitLanguageModel, benchmark_every_n_epochs: int | None) -> None:
        every = benchmark_every_n_epochs
        if every is not None and (every < 1 or module.benchmark is None):
            raise ConfigError(
                f"`benchmark_every_n_epochs` ({every}) must be at least 1 and needs a `benchmark`, such as TOFUBenchmark; None "
                "for no benchmark during the fit.",
                owner=module,
                argument="benchmark_every_n_epochs",
            )
        self.benchmark_every_n_epochs = every
        self.last: Measurement | None = None  # of whole streams
        self.export_dtype: torch.dtype | None = None  # of exports; None for that of the base model's files
        # Whether a measurement has ended, and no other one has begun since.
        self.has_finished = False
        self._weights: str | None = None  # of the measurement that is going on
        self._exit_stack: ExitStack | None = None
        self._module = module
        self._answers = NLL()  # reads what suites read
        self._means: dict[str, ConstraintSlack] = {}  # of the module's objectives, by name of the term

    def setup(self, stage: str) -> None:
        """Forget an earlier run's measurements; read the benchmark's examples where it will be run."""
        self.last = None
        self.abort()
        runs = stage == "test" or (stage == "fit" and self.benchmark_every_n_epochs is not None)
        if self._module.benchmark is not None and runs:
            prepare_benchmark(self._module, self._module.benchmark, self._module.lm)

    # Whole streams ------------------------------------------------------------------------------------------------

    def update(self, stream: str, batch: Batch) -> None:
        """Add one batch of one stream to everything that is measured on it, in as few passes as that takes.

        The first batch begins a measurement, which `finish` ends.
        """
        if self._weights is None:
            self._weights = self._module.lm.checksum()
            self.has_finished = False
            self._exit_stack = ExitStack()
            self._exit_stack.enter_context(self.exported_weights())
        terms = [Term("suite", stream, self._answers, 0.0)]
        readers: list[Reader] = [partial(self._module.suite.update, stream)]
        for term in self._module.terms():
            if term.stream == stream:
                terms.append(term)
                readers.append(partial(self._add_to_mean, term.name, term.objective))

        lm = self._module.lm
        logp = self._module.reference_cache.logp
        for forward_pass in build_forward_plan({stream: batch}, terms, lm.packs, None, "joint", logp):
            forward_pass.run(lm, readers)

    def _add_to_mean(self, name: str, objective: Objective, lm: LanguageModel, tokens: SupervisedTokens) -> None:
        values = objective(lm, tokens)
        if name not in self._means:
            self._means[name] = ConstraintSlack(None).to(values.device)
        self._means[name].update(values.sum(), values.numel())

    def exported_weights(self) -> AbstractContextManager[None]:
        """Give the model within the block the weights that its export has."""
        return self._module.lm.as_exported(self.export_dtype)

    def finish(self) -> Measurement:
        """Return the values over everything added on all processes, and start anew with the weights as they were."""
        suite = self._module.suite
        values = suite.compute()
        means = {name: mean.compute()["value"].item() for name, mean in self._means.items()}
        weights = self._weights or ""
        self.abort()
        if weights and weights != self._module.lm.checksum():
            rank_zero_warn(
                "the weights were changed between two batches of a validation, so that its values are of no single model: they "
                "are logged, and neither reported nor exported. Look for a callback that changes weights at the end of a batch."
            )
            weights = ""
        self.has_finished = True
        return Measurement(self._module.global_step, values | self._module.name_means(means), weights)

    def abort(self) -> None:
        """Forget what was added, and restore the weights."""
        if self._exit_stack is not None:
            self._exit_stack.close()
        self._exit_stack, self._weights, self._means = None, None, {}
        self._module.suite.reset()

    def is_last_batch(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Return whether a batch is the last one of Lightning's validation or test, as far as that is known before it ends."""
        trainer = self._module.trainer
        if trainer.testing:
            counts = trainer.num_test_batches
        else:
            counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        last_loader = max((i for i, count in enumerate(counts) if count > 0), default=0)
        return dataloader_idx == last_loader and batch_idx + 1 == counts[last_loader]

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Evaluate the current weights on every validation example, outside of Lightning's own validation.

        Returns:
            Values of suite and objectives by name, over all processes. Those of a validation are used again if it was made with
            the very same weights, after the same step.
        """
        last = self.last
        if last is not None and (last.step, last.weights) == (self._module.global_step, self._module.lm.checksum()):
            return last
        try:
            for stream, batch in self.batches():
                self.update(stream, batch)
            measurement = self.finish()
        except BaseException:
            self.abort()
            raise
        self._module.remember(measurement)
        return measurement

    @torch.no_grad()
    def measure_objective(self, objective: Objective, stream: str) -> list[float] | None:
        """Return the means of an objective over a whole validation stream, one for each column of its values.

        ``None`` if there is no such stream.
        """
        means: list[ConstraintSlack] = []
        lm = self._module.lm
        for name, batch in self.batches():
            if name != stream:
                continue
            terms = [Term(stream, stream, objective, 0.0)]
            for forward_pass in build_forward_plan({stream: batch}, terms, lm.packs, None, "joint"):
                (values,) = forward_pass.run(lm, [objective])
                # A pass may have no value at all.
                columns = [values] if values.ndim == 1 else values.unbind(dim=1)
                means = means or [ConstraintSlack(None).to(values.device) for _ in columns]
                for mean, column in zip(means, columns, strict=True):
                    mean.update(column.sum(), column.numel())
        return [mean.compute()["value"].item() for mean in means] or None

    @torch.no_grad()
    def measure_batches(self, objective: Objective, stream: str, batches: Iterable[Batch]) -> float:
        """Return the mean of an objective over batches of all processes, with the weights as an export has them."""
        lm = self._module.lm
        mean = ConstraintSlack(None).to(self._module.device)
        terms = [Term(stream, stream, objective, 0.0)]
        with self._evaluation(), self.exported_weights():
            for batch in batches:
                for forward_pass in build_forward_plan({stream: batch}, terms, lm.packs, None, "joint"):
                    (values,) = forward_pass.run(lm, [objective])
                    mean.update(values.sum(), values.numel())
        return mean.compute()["value"].item()

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """Yield every batch of every validation stream; in between, the model is in evaluation mode."""
        with self._evaluation():
            streams = self._streams()
            pace = Pace("measuring", _count_batches(streams.values()))
            for stream, batches in streams.items():
                for batch in batches:
                    yield stream, batch
                    pace.count_batch()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Put the model in evaluation mode, and validation's precision, within the block."""
        lm = self._module.lm
        training = lm.training
        lm.eval()
        try:
            with self._module.trainer.precision_plugin.val_step_context():
                yield
        finally:
            lm.train(training)

    def _streams(self) -> dict[str, Iterable[Batch]]:
        """Return the validation loaders, or else the training loaders that come to an end."""
        trainer = self._module.trainer
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            return dict(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        loaders = (trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders) or trainer.train_dataloader
        if isinstance(loaders, Mapping):
            return dict(loaders)
        raise BatchError(
            "the reference model is measured on the validation loaders: pass `val_dataloaders={'forget': …, 'retain': …}` "
            f"(or a dict of finite training loaders), not {type(loaders).__name__}; or set an absolute epsilon."
        )

    def stream_name(self, dataloader_idx: int) -> str:
        """Return the stream of a validation or test loader.

        Raises:
            BatchError: If the loaders have no names.
        """
        trainer = self._module.trainer
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        if not isinstance(loaders, Mapping):
            raise BatchError(
                "validation and test loaders must be a dict from stream name to loader, such as {'forget': …, "
                f"'retain': …}}, so that results can be named; got {type(loaders).__name__}."
            )
        return str(list(loaders)[dataloader_idx])

    # Benchmark ----------------------------------------------------------------------------------------------------

    def is_benchmark_due(self) -> bool:
        """Return whether the benchmark is run with the validation at the end of this epoch of a fit."""
        module, every = self._module, self.benchmark_every_n_epochs
        return module.trainer.state.fn == "fit" and every is not None and (module.current_epoch + 1) % every == 0

    def run_benchmark(self, stage: str) -> dict[str, float]:
        """Run the benchmark, if there is one: a JSON file and, in a test, a table; and return the values to log."""
        if self._module.benchmark is None:
            return {}
        with self.exported_weights():
            return run_benchmark(self._module, self._module.benchmark, self._module.lm, stage)


def _count_batches(loaders: Iterable[Any]) -> int | None:
    """Return the number of all batches; ``None`` if a loader does not say."""
    total = 0
    for loader in loaders:
        if not hasattr(loader, "__len__"):
            return None
        total += len(loader)
    return total
