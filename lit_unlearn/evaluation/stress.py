"""Stress tests: what an unlearned model gives away once it is trained a little, rounded, or asked in other words."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lit_unlearn.evaluation.attacks.relearning import Relearn, copy_of, relearn
from lit_unlearn.evaluation.attacks.rounding import quantized_by_bitsandbytes, round_weights
from lit_unlearn.evaluation.benchmark import Benchmark, BenchmarkExample, BenchmarkStream, Values
from lit_unlearn.evaluation.qa import QuestionBenchmark
from lit_unlearn.evaluation.results import Results
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.adapters import inner_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAPHRASED = "paraphrased_question"
WIDTHS = {"round": range(2, 9), "bitsandbytes": (4, 8)}


class StressBenchmark(Benchmark):
    """A suite of questions, run on the model as it is and again under each stress, whose name comes before the values'.

    ``relearn/…``: after fine-tuning on some forget rows; then also ``relearn/forget_relearned/…`` and
    ``relearn/forget_others/…``, of the rows it saw and of those it did not. ``8bit/…``, ``4bit/…``: with rounded weights.
    ``paraphrased/…``: with the questions in ``paraphrased_question``, on the sets that have them.

    The model itself is never touched: a stress works on a copy, into which an adapter is merged as by an export. The device
    must hold both; relearning takes up to 16 bytes per weight.

    What compares with the retain-only model compares with it under the same stress, where ``suite.retain_results`` are those
    of a `StressBenchmark` with the same settings, and is missing elsewhere: relearning would move that model, too.

    Args:
        suite: What is measured.
        relearn: The attack by fine-tuning; ``None`` for none.
        bits: Widths to which the weights of every linear layer but the head are rounded, one stress each.
        paraphrased: Whether to ask in other words.
        backend: Who rounds. ``"round"``: to the nearest value, symmetric, with a scale for each output row, 2 to 8 bits.
            ``"bitsandbytes"``: as models are deployed, 8 bits (LLM.int8) or 4 (NF4), by way of a temporary copy on disk.

    Raises:
        ValueError: If ``bits`` or ``backend`` are none of these.
    """

    name: ClassVar[str] = "stress"

    def __init__(
        self,
        suite: QuestionBenchmark,
        relearn: Relearn | None = None,
        bits: Sequence[int] = (),
        paraphrased: bool = False,
        backend: Literal["round", "bitsandbytes"] = "round",
    ) -> None:
        super().__init__(suite.token_budget)
        if backend not in WIDTHS or not set(bits) <= set(WIDTHS[backend]):
            raise ValueError(
                f"StressBenchmark: `backend` 'round' rounds to `bits` from 2 to 8, and 'bitsandbytes' to 4 or 8; got "
                f"{backend!r} and {list(bits)}."
            )
        if bits and backend == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("StressBenchmark: `backend` needs `pip install bitsandbytes`, or must be 'round'.")
        self.suite, self.relearn, self.backend = suite, relearn, backend
        self.stresses: dict[str, Values] = {} if relearn is None else {"relearn": asdict(relearn)}
        self.stresses |= {f"{width}bit": {"bits": width, "backend": backend} for width in bits}
        self.stresses |= {"paraphrased": {"question_column": PARAPHRASED}} if paraphrased else {}
        self._suites: dict[str, QuestionBenchmark] = {}

    def settings(self) -> Values:
        """Those of the suite, and under ``stress`` those of every stress."""
        return {**self.suite.settings(), "stress": self.stresses}

    # Rows -------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """The suite's rows, and the paraphrased ones.

        Raises:
            ValueError: If there are fewer forget rows than are to be relearned, or none that are paraphrased.
        """
        streams = {**self.suite.prepare(tokenizer)}
        rows = len(streams["forget"].examples)
        if self.relearn is not None and self.relearn.rows > rows:
            raise ValueError(
                f"StressBenchmark: `relearn.rows` is {self.relearn.rows}, but there are {rows} forget rows."
            )
        self._suites = {stress: self._suite_under(stress) for stress in self.stresses}
        asked = self._suites["paraphrased"].prepare(tokenizer) if "paraphrased" in self._suites else {}
        return streams | {f"paraphrased/{name}": stream for name, stream in asked.items()}

    def _suite_under(self, stress: str) -> QuestionBenchmark:
        """The suite with its rows, and with what the retain-only model makes of them under the same stress."""
        suite = copy.copy(self.suite)
        suite._retain = _part(suite._retain, stress, self.stresses[stress])
        if stress == "paraphrased":
            suite.question_column, suite._streams = PARAPHRASED, None
            sets = suite.sets.items()
            suite.sets = {name: one for name, one in sets if PARAPHRASED in one.source.load(name).column_names}
            if "forget" not in suite.sets:
                raise ValueError(
                    f"StressBenchmark: the forget set has no column '{PARAPHRASED}': set `paraphrased` to false."
                )
        return suite

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], said: str | None
    ) -> Values:
        """As the suite does."""
        return self.suite.measure(stream, example, scored, said)

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Values:
        """As the suite does."""
        return self.suite.aggregate(examples, retain)

    # Running ----------------------------------------------------------------------------------------------------------

    def run(self, lm: LanguageModel, partial: Path | None = None) -> Results:
        """Measures a model plainly and under every stress; a collective call.

        Args:
            lm: Loaded, whole on every process; it is left as it was.
            partial: As for `Benchmark`, with a folder for each stress.

        Returns:
            The suite's own results, with those under the stresses added to ``aggregate``, ``missing``, ``data`` and
            ``examples``, whose relearned rows are marked.

        Raises:
            ValueError: If the weights of a quantised model were to be changed, or if relearning diverged.
        """
        self.prepare(lm.tokenizer)
        if getattr(inner_model(lm.model), "is_quantized", False) and self.stresses.keys() - {"paraphrased"}:
            raise ValueError(
                "StressBenchmark: the model is quantised, and its integers can be neither trained nor rounded: load it without "
                "quantisation, or set `relearn` to null and `bits` to []."
            )
        folders = {stress: None if partial is None else partial / stress for stress in ("plain", *self.stresses)}
        results = self.suite.run(lm, folders["plain"])
        for stress in self.stresses:
            found = self._run_under(stress, lm, folders[stress])
            for part in ("aggregate", "missing", "data", "examples"):
                results[part] |= {f"{stress}/{name}": value for name, value in found[part].items()}
        return {**results, "settings": self.settings()}

    def _run_under(self, stress: str, lm: LanguageModel, partial: Path | None) -> Results:
        suite, attack = self._suites[stress], self.relearn
        chosen = [] if attack is None else attack.choose(len(self.prepare(lm.tokenizer)["forget"].examples))
        found = suite.run(lm if stress == "paraphrased" else self._model_under(stress, lm, chosen), partial)
        torch.clear_autocast_cache()  # it holds on to casts of the copy's weights
        for name, reason in found["missing"].items():
            if "`retain_results`" in reason:
                found["missing"][name] = f"{reason} under the same stress"
        if stress == "relearn":
            found["aggregate"] |= _split_forget(suite, found["examples"]["forget"], chosen)
        return found

    def _model_under(self, stress: str, lm: LanguageModel, chosen: Sequence[int]) -> LanguageModel:
        """A changed copy of the model, made in plain arithmetic whatever the evaluation is made in."""
        device = next(lm.parameters()).device.type
        # Tensors of inference mode cannot be trained; autocast keeps casts of weights, and would not see these change.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            if stress != "relearn" and self.backend == "bitsandbytes":
                return quantized_by_bitsandbytes(lm, self.stresses[stress]["bits"])
            stressed = copy_of(lm)
            if stress == "relearn" and self.relearn is not None:
                examples = self.prepare(lm.tokenizer)["forget"].examples
                rows = [row for i in chosen for row in examples[i].rows["answer"]]
                relearn(stressed, rows, self.relearn, self.token_budget)
            else:
                round_weights(stressed.model, self.stresses[stress]["bits"])
            return stressed


def _part(results: Results | None, stress: str, settings: Values) -> Results | None:
    """What of results was measured under a stress, as if there were nothing else; ``None`` without the same stress."""
    if results is None or results.get("settings", {}).get("stress", {}).get(stress) != settings:
        return None
    start = f"{stress}/"
    own = {
        part: {name.removeprefix(start): value for name, value in results[part].items() if name.startswith(start)}
        for part in ("aggregate", "data", "examples")
    }
    return {**results, **own}


def _split_forget(suite: QuestionBenchmark, rows: Sequence[Values], chosen: Sequence[int]) -> Values:
    """Marks the relearned ones of the forget rows; returns the values of these and of the others."""
    values: Values = {}
    for i, row in enumerate(rows):
        row["relearned"] = i in chosen
    for name, relearned in {"forget_relearned": True, "forget_others": False}.items():
        part = [row for row in rows if row["relearned"] == relearned]
        found = suite.aggregate({"forget": part}, None) if part else {}
        values |= {key.replace("forget", name, 1): found[key] for key in found if key.startswith("forget/")}
    return values
