"""Suites with rows of their own: a benchmark, measured on any number of processes, row by row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from lit_unlearn.data.encoding import Example
from lit_unlearn.evaluation import results as files
from lit_unlearn.evaluation.results import Results, digest
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.evaluation.suite import AnswerSuite
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.generation import check_prompts, generate
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.distributed import gather_objects, rank_and_world_size
from lit_unlearn.utils.io import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Values = dict[str, Any]


class BenchmarkExample(NamedTuple):
    """One row of a benchmark.

    Args:
        texts: What goes into the results as it is, such as ``question`` and ``answer``.
        rows: What is scored, by kind: ``answer``, ``wrong``, …
        prompt: What is continued, token ids; ``None`` if nothing is.
    """

    texts: dict[str, str]
    rows: dict[str, list[Example]]
    prompt: list[int] | None = None


class BenchmarkStream(NamedTuple):
    """The rows of one set, and how answers to them are generated.

    Args:
        examples: At least one.
        source: Where they came from, for the results.
        max_new_tokens: Longest answer, in tokens.
        stop: An answer ends before the first of these strings.
    """

    examples: list[BenchmarkExample]
    source: str
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()


class Benchmark(AnswerSuite):
    """What `AnswerSuite` measures on the run's own streams, and a benchmark on rows that the suite brings along.

    The benchmark is run by ``lit-unlearn test``, and during a fit every ``suite_every_n_epochs``. Every row is measured by
    one process, once; what the processes found is put together by its number, so their number changes nothing.

    Args:
        token_budget: Largest batch, in tokens.
        retain_results: Results file of the retain-only model, for the scores that compare with it; ``None`` leaves
            them out.
    """

    name: ClassVar[str]
    compared: ClassVar[tuple[str, ...]] = ("forget", "holdout")  # with the retain-only model: these rows,
    decisive: ClassVar[tuple[str, ...]] = ()  # which must have been measured with the same settings

    def __init__(self, token_budget: int = 8192, retain_results: str | None = None) -> None:
        super().__init__()
        if token_budget < 1:
            raise ValueError(f"{type(self).__name__}: `token_budget` must be at least 1, not {token_budget}.")
        self.token_budget = token_budget
        self.retain_results = retain_results
        self._retain = None if retain_results is None else files.read_results(retain_results)
        self._streams: dict[str, BenchmarkStream] | None = None

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Reads and tokenises the rows, and says what is wrong with them."""

    @abstractmethod
    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], said: str | None
    ) -> Values:
        """The values of one row.

        Args:
            stream: Its set.
            example: The row.
            scored: What the model makes of ``example.rows``.
            said: The answer it generated; ``None`` if there was no prompt.
        """

    @abstractmethod
    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Values:
        """The benchmark's values.

        Args:
            examples: The values of every row, by stream.
            retain: Results of the retain-only model.

        Returns:
            Numbers by name, ``<stream>/<value>`` or ``<value>``; for a score that is missing, the reason.
        """

    def settings(self) -> Values:
        """What decides the values beside model and rows, in plain types."""
        return {"token_budget": self.token_budget}

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, BenchmarkStream]:
        """The rows, read once; what the results of the retain-only model are compared on must be the same.

        Raises:
            ValueError: If there is no tokenizer, or the retain-only results are of other rows.
        """
        if self._streams is None:
            if tokenizer is None:
                raise ValueError(f"{type(self).__name__} needs the model's tokenizer: set `model.lm.tokenizer`.")
            self._streams = self.load(tokenizer)
            if self._retain is not None:
                self._check_retain(self._streams, self._retain)
        return self._streams

    def _check_retain(self, streams: Mapping[str, BenchmarkStream], retain: Results) -> None:
        path = str(self.retain_results)
        for name in (self.compared[0], *(name for name in self.compared[1:] if name in retain["data"])):
            if name in streams:
                files.check_same_rows({"suite": self.name, "data": _describe(streams[name])}, retain, name, path)
        mine, theirs = self.settings(), retain.get("settings", {})
        if differ := [
            f"{key}: {mine[key]!r} here, {theirs.get(key)!r} there"
            for key in self.decisive
            if mine[key] != theirs.get(key)
        ]:
            raise ValueError(
                f"the results of the retain-only model in '{path}' were measured with other settings ({'; '.join(differ)}): "
                "evaluate the retain-only model with the same configuration."
            )

    def run(self, lm: LanguageModel, partial: Path | None = None) -> Results:
        """Measures a model; a collective call.

        Args:
            lm: Loaded, whole on every process.
            partial: Folder where what is done is kept until all is, so that an interrupted evaluation goes on.

        Returns:
            ``suite``, ``settings``, ``model``, ``data``, ``versions``, ``seed``, ``aggregate``, ``missing`` (reasons) and
            ``examples`` (values of every row).
        """
        streams = self.prepare(lm.tokenizer)
        weights = fingerprint(cast(nn.Module, lm.model))
        data = {name: _describe(stream) for name, stream in streams.items()}
        key = digest([self.name, self.settings(), weights, data, files.versions(), _precision(lm)])
        for stream in streams.values():  # before anything is measured
            prompts = [one.prompt for one in stream.examples if one.prompt is not None]
            check_prompts(lm, prompts, stream.max_new_tokens, stream.stop)
        examples = {}
        with tqdm(
            total=_work(streams), desc=self.name, unit="row", disable=rank_and_world_size()[0] > 0, leave=False
        ) as bar:
            for name, stream in streams.items():
                file = None if partial is None else partial / f"{name}.json"
                found = _kept(file, key)
                if found is None:
                    found = self._measure_stream(lm, name, stream, bar)
                    if file is not None and rank_and_world_size()[0] == 0:
                        write_json(file, {"key": key, "examples": found})
                examples[name] = found
        values = self.aggregate(examples, self._retain)
        return {
            "suite": self.name,
            "settings": self.settings(),
            "model": {"name": lm.name, "weights": weights[:16]},
            "data": data,
            "versions": files.versions(),
            "seed": files.seed(),
            "retain_results": self.retain_results,
            "aggregate": {name: value for name, value in values.items() if not isinstance(value, str)},
            "missing": {name: value for name, value in values.items() if isinstance(value, str)},
            "examples": examples,
        }

    def _measure_stream(self, lm: LanguageModel, name: str, stream: BenchmarkStream, bar: Any) -> list[Values]:
        rank, world_size = rank_and_world_size()
        numbers = range(rank, len(stream.examples), world_size)
        mine = [stream.examples[i] for i in numbers]
        places = [(i, kind) for i, one in enumerate(mine) for kind, rows in one.rows.items() for _ in rows]
        rows = [row for one in mine for of_kind in one.rows.values() for row in of_kind]
        scored: list[dict[str, list[Scored]]] = [{} for _ in mine]
        for (i, kind), score in zip(places, score_examples(lm, rows, self.token_budget, _counter(bar)), strict=True):
            scored[i].setdefault(kind, []).append(score)
        said = self._generate(lm, mine, stream, bar)
        found = [self.measure(name, *one) for one in zip(mine, scored, said, strict=True)]
        everywhere = dict(item for part in gather_objects(list(zip(numbers, found, strict=True))) for item in part)
        return [everywhere[i] for i in range(len(stream.examples))]

    def _generate(
        self, lm: LanguageModel, examples: Sequence[BenchmarkExample], stream: BenchmarkStream, bar: Any
    ) -> list[str | None]:
        prompts = {i: one.prompt for i, one in enumerate(examples) if one.prompt is not None}
        if not prompts:
            return [None] * len(examples)
        answers = generate(
            lm,
            list(prompts.values()),
            max_new_tokens=stream.max_new_tokens,
            stop=stream.stop,
            token_budget=self.token_budget,
        )
        _counter(bar)(len(prompts))
        said = dict(zip(prompts, answers, strict=True))
        return [said.get(i) for i in range(len(examples))]


def _work(streams: Mapping[str, BenchmarkStream]) -> int:
    examples = [example for stream in streams.values() for example in stream.examples]
    return sum(sum(map(len, one.rows.values())) + (one.prompt is not None) for one in examples)


def _counter(bar: Any) -> Any:
    return lambda done: bar.update(done * rank_and_world_size()[1])


def _kept(file: Path | None, key: str) -> list[Values] | None:
    """What an interrupted evaluation of the same model on the same rows left; the first process decides for all."""
    kept: Any = None
    if file is not None and file.is_file():
        with suppress(ValueError):
            kept = read_json(file)
    same = isinstance(kept, dict) and kept.get("key") == key
    return gather_objects(kept["examples"] if same else None)[0]


def _precision(lm: LanguageModel) -> list[str]:
    """What the model computes in."""
    first = next(lm.parameters())
    autocast = torch.is_autocast_enabled(first.device.type)
    return [str(first.dtype), str(torch.get_autocast_dtype(first.device.type)) if autocast else "no autocast"]


def _describe(stream: BenchmarkStream) -> Values:
    tokens = [[row.input_ids for rows in one.rows.values() for row in rows] for one in stream.examples]
    texts = [{**one.texts} for one in stream.examples]
    return {
        "source": stream.source,
        "rows": len(stream.examples),
        "texts": digest(texts),
        "tokens": digest([tokens, [one.prompt for one in stream.examples]]),
    }
