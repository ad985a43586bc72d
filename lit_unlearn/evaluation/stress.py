"""A benchmark under stress: what an unlearned model gives away once it is fine-tuned, rounded, or asked in other words."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch

from lit_unlearn.data.encoding import Example
from lit_unlearn.errors import ConfigError, ModelError
from lit_unlearn.evaluation.attacks.relearning import Relearn, copy_model, relearn
from lit_unlearn.evaluation.attacks.rounding import load_quantized, round_weights
from lit_unlearn.evaluation.benchmark import Aggregate, Benchmark, BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.results import Results, Values
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.adapters import inner_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Value = TypeVar("Value")

PARAPHRASED_COLUMN = "paraphrased_question"
WIDTHS = {"round": range(2, 9), "bitsandbytes": (4, 8)}


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
        relearn: The attack by fine-tuning; ``None`` for none. The forget examples need an ``answer`` to be fine-tuned on.
        bits: Widths to which the weights of every linear layer but the head are rounded, one stress each.
        paraphrased: Whether to ask in other words.
        backend: The rounding. ``"round"``: to the nearest value, symmetric, with a scale for each output row, 2 to 8 bits.
            ``"bitsandbytes"``: as models are deployed, 8 bits (LLM.int8) or 4 (NF4), through a temporary copy on disk.

    Raises:
        ConfigError: If ``bits`` or ``backend`` are unknown, or bitsandbytes is not installed.
    """

    name: ClassVar[str] = "stress"

    def __init__(
        self,
        benchmark: Benchmark,
        relearn: Relearn | None = None,
        bits: Sequence[int] = (),
        paraphrased: bool = False,
        backend: Literal["round", "bitsandbytes"] = "round",
    ) -> None:
        # Without retain-only results of its own: those of `benchmark` are split by stress in `load`.
        super().__init__(benchmark.token_budget)
        if backend not in WIDTHS or not set(bits) <= set(WIDTHS[backend]):
            raise ConfigError(
                f"`backend` 'round' rounds to `bits` from 2 to 8, and 'bitsandbytes' to 4 or 8; got {backend!r} and "
                f"{list(bits)}.",
                owner=self,
                argument="bits",
            )
        if bits and backend == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
            message = "`backend` 'bitsandbytes' needs `pip install bitsandbytes`; or choose 'round'."
            raise ConfigError(message, owner=self, argument="backend")

        self.benchmark = benchmark
        self.relearn = relearn
        self.backend = backend
        self.stresses: dict[str, Values] = {}
        if relearn is not None:
            self.stresses["relearn"] = asdict(relearn)
        for width in bits:
            self.stresses[f"{width}bit"] = {"bits": width, "backend": backend}
        if paraphrased:
            self.stresses["paraphrased"] = {"question_column": PARAPHRASED_COLUMN}
        self._stressed: dict[str, Benchmark] = {}

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
            forget = streams["forget"].examples
            if not all("answer" in example.sequences for example in forget):
                message = f"{type(self.benchmark).__name__} has no answers to relearn."
                raise ConfigError(message, owner=self, argument="relearn")
            if self.relearn.rows > len(forget):
                message = f"`relearn.rows` is {self.relearn.rows}, but there are {len(forget)} forget rows."
                raise ConfigError(message, owner=self, argument="relearn")

        # Every stress has a benchmark of its own, with the part of the retain-only results that was under the same stress.
        retain = self.benchmark.retain_results
        self._stressed = {}
        for stress, settings in self.stresses.items():
            stressed = self.benchmark
            if stress == "paraphrased":
                try:
                    stressed = stressed.with_questions(PARAPHRASED_COLUMN)
                except ValueError as error:
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
        self.prepare(lm.tokenizer)
        if getattr(inner_model(lm.model), "is_quantized", False) and self.stresses.keys() - {"paraphrased"}:
            raise ModelError(
                "the model is quantised, and its integers can be neither trained nor rounded: load it without "
                "quantisation, or set `relearn` to null and `bits` to [].",
                owner=self,
            )
        # The benchmark's own name stays in the results, so that plain results can be compared with these.
        results = self.benchmark.run(lm, partial_dir and partial_dir / "plain")
        results.settings = self.settings()
        for stress in self.stresses:
            stressed = self._run_under(stress, lm, partial_dir and partial_dir / stress)
            results.aggregate |= _add_prefix(stress, stressed.aggregate)
            results.missing |= _add_prefix(stress, stressed.missing)
            results.data |= _add_prefix(stress, stressed.data)
            results.examples |= _add_prefix(stress, stressed.examples)
        return results

    def _run_under(self, stress: str, lm: LanguageModel, partial_dir: Path | None) -> Results:
        """Run the benchmark under one stress."""
        benchmark = self._stressed[stress]
        if stress == "paraphrased":
            return benchmark.run(lm, partial_dir)

        forget = self.prepare(lm.tokenizer)["forget"].examples
        chosen = [] if self.relearn is None else self.relearn.choose(len(forget))
        sequences = []
        for number in chosen:
            sequences += forget[number].sequences["answer"]
        results = benchmark.run(self._change_model(stress, lm, sequences), partial_dir)
        # The cache of autocast would keep the copy's weights alive, as casts.
        torch.clear_autocast_cache()
        if stress == "relearn":
            results.aggregate |= _split_forget(benchmark, results.examples["forget"], chosen)
        return results

    def _change_model(self, stress: str, lm: LanguageModel, sequences: Sequence[Example]) -> LanguageModel:
        """Return a changed copy of the model, computed without autocast even if the evaluation uses it."""
        device = next(lm.parameters()).device.type
        # Tensors of inference mode cannot be trained; autocast keeps casts of weights, and would not see these change.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            if stress != "relearn" and self.backend == "bitsandbytes":
                return load_quantized(lm, self.stresses[stress]["bits"])
            changed = copy_model(lm)
            if stress == "relearn" and self.relearn is not None:
                relearn(changed, sequences, self.relearn, self.token_budget)
            else:
                round_weights(changed.model, self.stresses[stress]["bits"])
            return changed


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
