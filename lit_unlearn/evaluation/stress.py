"""A benchmark under stress: what an unlearned model gives away once it is fine-tuned, rounded, or asked in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from lit_unlearn.data.example import Example
from lit_unlearn.errors import ConfigError, ModelError, arguments_of
from lit_unlearn.evaluation.attacks.copies import check_changeable
from lit_unlearn.evaluation.attacks.other_questions import OtherQuestions
from lit_unlearn.evaluation.attacks.relearning import Relearn
from lit_unlearn.evaluation.attacks.rounding import Backend, Rounding, check_package, check_widths
from lit_unlearn.evaluation.benchmark import Aggregate, Benchmark
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.results import Results, Values
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.models import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Value = TypeVar("Value")


class StressBenchmark(Benchmark):
    """A benchmark, run on the model as it is and again under each stress, whose name comes before those of the values.

    ``relearn/…``: after fine-tuning on some forget rows; then also ``relearn/forget_relearned/…`` and
    ``relearn/forget_others/…``, of the rows it was fine-tuned on and of the other forget rows. ``8bit/…``, ``4bit/…``: with
    rounded weights. ``paraphrased/…``: with the questions in ``paraphrased_question``, on the sets that have them.

    The model itself is never touched: a stress works on a copy, into which an adapter is merged as by an export. The device
    must hold both; relearning takes up to 16 bytes per weight.

    Scores that compare with the retain-only model need its results under the same stress, because relearning would move that
    model, too: give ``benchmark`` the ``retain_results`` of a `StressBenchmark` with equal settings.

    Args:
        benchmark: Runs on the model, and under every stress.
        relearn: The attack by fine-tuning, measured after its last step; ``None`` for none.
        bits: Widths to which the weights of every linear layer but the head are rounded, one stress each.
        paraphrased: Whether to ask in other words.
        backend: As for `Rounding`.

    Raises:
        ConfigError: If ``bits`` or ``backend`` are unknown, or the backend's package is not installed.
    """

    name: ClassVar[str] = "stress"

    def __init__(
        self,
        benchmark: Benchmark,
        relearn: Relearn | None = None,
        bits: Sequence[int] = (),
        paraphrased: bool = False,
        backend: Backend = "round",
    ) -> None:
        # Without retain-only results of its own: those of `benchmark` are split by stress in `load`.
        super().__init__(benchmark.token_budget)
        with arguments_of(self):
            check_widths(backend, bits)
            if bits:
                check_package(backend)

        self.benchmark = benchmark
        self.relearn = relearn
        self._changes: dict[str, Relearn | Rounding] = {}
        self._paraphrase = OtherQuestions() if paraphrased else None
        self.stresses: dict[str, Values] = {}
        if relearn is not None:
            self._changes["relearn"] = relearn
            self.stresses["relearn"] = _describe_relearn(relearn)
        for width in bits:
            self._changes[f"{width}bit"] = Rounding(width, backend)
            self.stresses[f"{width}bit"] = {"bits": width, "backend": backend}
        if self._paraphrase is not None:
            self.stresses["paraphrased"] = {"question_column": self._paraphrase.question_column}
        self._stressed: dict[str, Benchmark] = {}
        self._relearned: tuple[list[Example], list[int]] = ([], [])

    def settings(self) -> Values:
        """Return the settings of the benchmark and, under ``stress``, those of every stress."""
        return {**self.benchmark.settings(), "stress": self.stresses}

    # Rows ------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read the benchmark's rows, and those with paraphrased questions.

        Raises:
            ConfigError: If there are fewer forget rows than are to be relearned, or none that are paraphrased.
        """
        streams = dict(self.benchmark.prepare(tokenizer))
        if self.relearn is not None:
            self._relearned = self.relearn.find_examples(self.benchmark, tokenizer)

        # Every stress has a benchmark of its own, with the part of the retain-only results that was under the same stress.
        retain = self.benchmark.retain_results
        self._stressed = {}
        for stress, settings in self.stresses.items():
            stressed = self.benchmark
            if stress == "paraphrased" and self._paraphrase is not None:
                try:
                    stressed = self._paraphrase.change_benchmark(stressed)
                except ConfigError as error:
                    message = f"{error} Set `paraphrased` to false."
                    raise ConfigError(message, owner=self, argument="paraphrased") from error
            self._stressed[stress] = stressed.with_retain_results(_results_under(stress, settings, retain))

        if "paraphrased" in self._stressed:
            for name, stream in self._stressed["paraphrased"].prepare(tokenizer).items():
                streams[f"paraphrased/{name}"] = stream
        return streams

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute the values of one example as the benchmark does."""
        return self.benchmark.measure(stream, example, scored, generated)

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the values as the benchmark does."""
        return self.benchmark.aggregate(examples, retain)

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self, lm: LanguageModel, partial_dir: Path | None = None) -> Results:
        """Measure a model as it is and under every stress, as `Benchmark` does, with a folder for each stress.

        Returns:
            The benchmark's own results, with those under the stresses added to ``aggregate``, ``missing``, ``data`` and
            ``examples``, whose relearned rows are marked.

        Raises:
            ModelError: If the weights of a quantised model were to be changed.
            DivergedError: If relearning diverged.
        """
        self._prepare_for(lm)
        # The benchmark's own name stays in the results, so that plain results can be compared with these.
        results = self.benchmark.run(lm, partial_dir and partial_dir / "plain")
        results.settings = self.settings()
        for stress in self.stresses:
            stressed = self._run_prepared(stress, lm, partial_dir and partial_dir / stress)
            results.aggregate |= _add_prefix(stress, stressed.aggregate)
            results.missing |= _add_prefix(stress, stressed.missing)
            results.data |= _add_prefix(stress, stressed.data)
            results.examples |= _add_prefix(stress, stressed.examples)
        return results

    def run_under(self, stress: str, lm: LanguageModel, partial_dir: Path | None = None) -> Results:
        """Measure a model under one stress alone.

        Args:
            stress: Of `stresses`.
            lm: As for `run`.
            partial_dir: Folder for what is measured under it.

        Returns:
            Results of the benchmark under that stress, with the names that they have without it.

        Raises:
            ModelError: As `run`, as does DivergedError.
        """
        self._prepare_for(lm)
        return self._run_prepared(stress, lm, partial_dir)

    def _prepare_for(self, lm: LanguageModel) -> None:
        self.prepare(lm.tokenizer)
        if self._changes:
            try:
                check_changeable(lm)
            except ModelError as error:
                raise ModelError(f"{error} Or set `relearn` to null and `bits` to [].", owner=self) from error

    def _run_prepared(self, stress: str, lm: LanguageModel, partial_dir: Path | None) -> Results:
        benchmark = self._stressed[stress]
        if stress == "paraphrased":
            return benchmark.run(lm, partial_dir)

        examples, relearned = self._relearned
        *_, (_, changed) = self._changes[stress].change_model(lm, examples, self.token_budget)
        results = benchmark.run(changed, partial_dir)
        # The cache of autocast would keep the copy's weights alive, as casts.
        torch.clear_autocast_cache()
        if stress == "relearn":
            results.aggregate |= _split_forget(benchmark, results.examples["forget"], relearned)
        return results


def _describe_relearn(attack: Relearn) -> Values:
    """Return the settings that decide the values after the last step, the later ones only where they are not the default."""
    values = asdict(attack)
    # In the way, they would make results of earlier versions those of another attack.
    later = {"source": Relearn.source, "lora_rank": Relearn.lora_rank}
    return {name: value for name, value in values.items() if name != "curve" and value != later.get(name, ...)}


def _add_prefix(stress: str, values: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{stress}/{name}": value for name, value in values.items()}


def _select_prefix(stress: str, values: Mapping[str, Value]) -> dict[str, Value]:
    start = f"{stress}/"
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _results_under(stress: str, settings: Values, results: Results | None) -> Results | None:
    """Return the part of results that was measured under a stress, by plain names; ``None`` without the same stress."""
    if results is None or results.settings.get("stress", {}).get(stress) != settings:
        return None
    data = _select_prefix(stress, results.data)
    return replace(results, data=data, examples=_select_prefix(stress, results.examples), aggregate={})


def _split_forget(benchmark: Benchmark, rows: Sequence[Values], chosen: Sequence[int]) -> dict[str, float]:
    """Mark the relearned forget rows, and compute the values of these and of the other ones."""
    # The other rows show whether relearning some brings back the rest, which the attacker has not seen.
    groups: dict[str, list[Values]] = {"forget_relearned": [], "forget_others": []}
    for number, row in enumerate(rows):
        row["relearned"] = number in chosen
        groups["forget_relearned" if row["relearned"] else "forget_others"].append(row)

    values: dict[str, float] = {}
    for group, members in groups.items():
        if members:
            of_group = benchmark.aggregate({"forget": members}, None).values
            values |= _add_prefix(group, _select_prefix("forget", of_group))
    return values
