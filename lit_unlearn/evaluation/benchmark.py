"""Benchmarks: examples of their own, measured one by one on any number of processes, and values over all of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from torch import nn
from tqdm.auto import tqdm

from lit_unlearn.data.example import Example
from lit_unlearn.errors import ConfigError, DataError, LitUnlearnError, ModelError
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream, count_work, describe_stream
from lit_unlearn.evaluation.partial_files import cut_into_parts, describe_precision, read_partial, write_partial
from lit_unlearn.evaluation.results import (
    Results,
    Values,
    check_same_rows,
    content_digest,
    global_seed,
    package_versions,
)
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.generation import check_prompts, generate
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.distributed import measure_shares, rank_and_world_size
from lit_unlearn.utils.validation import check_at_least, list_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Aggregate(NamedTuple):
    """The values of a benchmark.

    Args:
        values: Numbers by name, ``<stream>/<value>`` or ``<value>``.
        missing: By name, the reason why a value could not be computed.
    """

    values: dict[str, float]
    missing: dict[str, str]


class Benchmark(ABC):
    """Measures a model on examples that the benchmark brings along, unlike a `Suite`, which reads the run's own streams.

    ``lit-unlearn test`` runs it, and `LitUnlearn` does every ``benchmark_every_n_epochs``. Every example is measured once, by
    one process, and its values are put in order by its number: the number of processes changes nothing but rounding.

    Args:
        token_budget: Largest batch, in tokens.
        retain_results: Results of the retain-only model, for the scores that compare with it: a results file, what `run`
            returned, or the content of a file. ``None`` leaves these scores out.

    Raises:
        ConfigError: If ``token_budget`` is below 1.
        MissingFileError: If there is no such results file.
        DataError: If it is not one.
    """

    name: ClassVar[str]

    compared_streams: ClassVar[tuple[str, ...]] = ("forget", "holdout")
    """Streams whose rows the retain-only results must share, the first one in any case."""

    compared_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that the retain-only results must have been measured with."""

    rows_per_part: ClassVar[int | None] = None
    """Number of rows that an interrupted evaluation keeps together; ``None`` for all rows of a stream."""

    def __init__(
        self, token_budget: int = 8192, retain_results: str | Path | Results | dict[str, Any] | None = None
    ) -> None:
        check_at_least(1, self, token_budget=token_budget)
        self.token_budget = token_budget
        self.retain_results: Results | None = None
        self._retain_source: str | None = None
        self._streams: dict[str, BenchmarkStream] | None = None
        if retain_results is not None:
            self._read_retain_results(retain_results)

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read and tokenise the rows of every stream, and raise an error for rows that cannot be used."""

    @abstractmethod
    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute the values of one example.

        Args:
            stream: The stream of the example.
            example: The example.
            scored: Scores of ``example.sequences``, by kind.
            generated: The answer that the model generated; ``None`` if there was no prompt.
        """

    @abstractmethod
    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the benchmark's values.

        Args:
            examples: The values of every example, by stream.
            retain: Results of the retain-only model.
        """

    def add_values(self, examples: Mapping[str, list[Values]], lm: LanguageModel) -> None:  # noqa: B027
        """Add values that need another model, to examples that are all measured; nothing by default."""

    def settings(self) -> Values:
        """Return the settings that decide values, beside model and rows, in plain types."""
        return {"token_budget": self.token_budget}

    def with_retain_results(self, results: Results | None) -> Benchmark:
        """Return this benchmark, with its examples as they are read, compared with other retain-only results."""
        # A shallow copy: the rows stay tokenised, and are shared.
        changed = copy.copy(self)
        changed.retain_results = results
        return changed

    def with_questions(self, column: str, answer_column: str | None = None) -> Benchmark:
        """Return this benchmark with questions from another column, on the sets that have it.

        Args:
            column: Column with the questions.
            answer_column: Column with the answers to them; ``None`` for the answers as they are.

        Raises:
            ConfigError: If the benchmark has no questions.
            DataError: If the forget set has no such column.
        """
        raise ConfigError(f"{type(self).__name__} has no questions that could be taken from the column '{column}'.")

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, BenchmarkStream]:
        """Read the rows, once, and check that the retain-only results are of the same rows.

        Raises:
            ModelError: If there is no tokenizer.
            DataError: If rows cannot be used, or retain-only results are of other rows or settings.
        """
        if self._streams is None:
            if tokenizer is None:
                raise ModelError(f"{type(self).__name__} needs the model's tokenizer: give the model's `tokenizer`.")
            streams = self.load(tokenizer)
            if self.retain_results is not None:
                self._check_retain_results(streams, self.retain_results)
            self._streams = streams
        return self._streams

    def read_sequences(self, source: str, tokenizer: PreTrainedTokenizerBase | None) -> list[list[Example]]:
        """Return what a model can be fine-tuned on: for each row of a set, its answer after its prompt, or the chunks of its text.

        Args:
            source: Name of a set.
            tokenizer: The model's.

        Raises:
            ConfigError: If there is no such set, or it has nothing to be learned.
        """
        streams = self.prepare(tokenizer)
        if source not in streams:
            message = f"{type(self).__name__} has no set '{source}': {list_names(source, streams)}."
            raise ConfigError(message, argument="source")
        rows = []
        for example in streams[source].examples:
            sequences = example.sequences.get("answer", example.sequences.get("text"))
            if sequences is None:
                message = f"{type(self).__name__} has no answers to relearn in its {source} set."
                raise ConfigError(message, argument="source")
            rows.append(sequences)
        return rows

    def describe_data(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Values]:
        """Return source, number of rows and digests of texts and tokens of every stream, as results have them."""
        return {name: describe_stream(stream) for name, stream in self.prepare(tokenizer).items()}

    def run(self, lm: LanguageModel, partial_dir: Path | None = None) -> Results:
        """Measure a model; a collective call.

        Args:
            lm: Loaded, whole or sharded; it is left as it was. Processes divide the examples; those of a sharded model
                measure all of them together.
            partial_dir: Folder for the streams that are measured, until all are, so that an interrupted evaluation
                resumes there.
        """
        streams = self.prepare(lm.tokenizer)
        # The weights, not the name: they may have been trained, or loaded from a checkpoint, since.
        weights = fingerprint(cast(nn.Module, lm.model))
        data = self.describe_data(lm.tokenizer)
        # Partial files count only where everything that decides their values is the same.
        key = content_digest([self.name, self.settings(), weights, data, package_versions(), describe_precision(lm)])

        # A prompt that is too long is reported now, not after minutes of scoring.
        for stream in streams.values():
            prompts = [example.prompt for example in stream.examples if example.prompt is not None]
            check_prompts(lm, prompts, stream.max_new_tokens, stream.stop)

        is_first = rank_and_world_size()[0] == 0
        examples: dict[str, list[Values]] = {}
        with tqdm(total=count_work(streams), desc=self.name, unit="row", disable=not is_first, leave=False) as bar:
            for name, stream in streams.items():
                examples[name] = []
                for part, rows in cut_into_parts(name, len(stream.examples), self.rows_per_part):
                    file = None if partial_dir is None else partial_dir / f"{part}.json"
                    values = read_partial(file, key)
                    if values is None:
                        values = self._measure_rows(lm, name, stream, rows, bar)
                        write_partial(file, key, values)
                    examples[name] += values

        self.add_values(examples, lm)
        aggregate = self.aggregate(examples, self.retain_results)
        return Results(
            benchmark=self.name,
            settings=self.settings(),
            model={"name": lm.name, "weights": weights[:16]},
            data=data,
            versions=package_versions(),
            seed=global_seed(),
            retain_results=self._retain_source,
            aggregate=aggregate.values,
            missing=aggregate.missing,
            examples=examples,
        )

    # Measuring -------------------------------------------------------------------------------------------------------

    def _measure_rows(
        self, lm: LanguageModel, name: str, stream: BenchmarkStream, rows: range, bar: Any
    ) -> list[Values]:
        """Return the values of some rows of a stream, in order; each process measures its share of them."""
        world_size = rank_and_world_size()[1]

        def advance_bar(count: int) -> None:
            # The bar is that of the first process, and its share stands for those of all.
            bar.update(count if lm.is_sharded else count * world_size)

        def measure_share(share: Sequence[int]) -> list[Values]:
            return self._measure_share(lm, name, stream, share, advance_bar)

        return measure_shares(rows, measure_share, lm.is_sharded)

    def _measure_share(
        self, lm: LanguageModel, name: str, stream: BenchmarkStream, rows: Sequence[int], advance: Callable[[int], None]
    ) -> list[Values]:
        """Return the values of the rows that this process measures."""
        examples = [stream.examples[row] for row in rows]
        scored = self._score_sequences(lm, examples, advance)
        generated = self._generate_answers(lm, examples, stream, advance)
        values = []
        for example, scores, text in zip(examples, scored, generated, strict=True):
            values.append(self.measure(name, example, scores, text))
        return values

    def _score_sequences(
        self, lm: LanguageModel, examples: Sequence[BenchmarkExample], advance: Callable[[int], None]
    ) -> list[dict[str, list[Scored]]]:
        """Return the scores of each example's sequences, by kind."""
        # All sequences go into common batches, and back to where they came from.
        sequences: list[Example] = []
        origins: list[tuple[int, str]] = []
        for index, example in enumerate(examples):
            for kind, of_kind in example.sequences.items():
                sequences += of_kind
                origins += [(index, kind)] * len(of_kind)

        scored: list[dict[str, list[Scored]]] = [{} for _ in examples]
        scores = score_examples(lm, sequences, self.token_budget, advance)
        for (index, kind), score in zip(origins, scores, strict=True):
            scored[index].setdefault(kind, []).append(score)
        return scored

    def _generate_answers(
        self,
        lm: LanguageModel,
        examples: Sequence[BenchmarkExample],
        stream: BenchmarkStream,
        advance: Callable[[int], None],
    ) -> list[str | None]:
        """Return the generated answer to each example's prompt; ``None`` where there is no prompt."""
        answers: list[str | None] = [None] * len(examples)
        prompts = {index: example.prompt for index, example in enumerate(examples) if example.prompt is not None}
        if prompts:
            texts = generate(
                lm,
                list(prompts.values()),
                max_new_tokens=stream.max_new_tokens,
                stop=stream.stop,
                hidden_id=stream.hidden_id,
                token_budget=self.token_budget,
            )
            advance(len(prompts))
            for index, text in zip(prompts, texts, strict=True):
                answers[index] = text
        return answers

    # Retain-only results ---------------------------------------------------------------------------------------------

    def _read_retain_results(self, source: str | Path | Results | Mapping[str, Any]) -> None:
        try:
            if isinstance(source, str | Path):
                self.retain_results = Results.read(source)
                self._retain_source = str(source)
            else:
                results = source if isinstance(source, Results) else Results.from_dict(source, "`retain_results`")
                self.retain_results = results
                self._retain_source = f"results of {results.model.get('name')}"
        except LitUnlearnError as error:
            # Results do not know which argument they were given as.
            error.owner, error.argument = self, "retain_results"
            raise

    def _check_retain_results(self, streams: Mapping[str, BenchmarkStream], retain: Results) -> None:
        """Raise an error unless the retain-only model was measured on the same rows, with the same settings."""
        source = str(self._retain_source)
        for name in self.compared_streams:
            # Older results may lack a holdout set, which only takes PrivLeak; without the first stream nothing compares.
            is_required = name == self.compared_streams[0] or name in retain.data
            if name in streams and is_required:
                check_same_rows(self.name, describe_stream(streams[name]), retain, name, source)

        settings = self.settings()
        differences = []
        for key in self.compared_settings:
            if settings[key] != retain.settings.get(key):
                differences.append(f"{key}: {settings[key]!r} here, {retain.settings.get(key)!r} there")
        if differences:
            raise DataError(
                f"the results of the retain-only model in '{source}' were measured with other settings "
                f"({'; '.join(differences)}): evaluate the retain-only model with the same configuration.",
                owner=self,
                argument="retain_results",
            )
