"""MUSE: verbatim memorisation, knowledge, and privacy leakage on news and books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.encoding import Example
from lit_unlearn.data.muse import muse_source
from lit_unlearn.data.source import Source
from lit_unlearn.evaluation.benchmark import Benchmark, BenchmarkExample, BenchmarkStream, Values
from lit_unlearn.evaluation.results import Results
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.metrics import auc, min_k, privleak, rouge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED_AUC = {"News": 0.4772, "Books": 0.5393}
"""Of Min-40 % for the retrained model, as published: the chance that a holdout text has the higher value."""

SHOTS = 10
STOP = ("\n\n", "\nQuestion", "Question:")

_SETS = {  # stream: configuration, split, and the split that the examples before each question come from
    "forget": ("verbmem", "forget", None),
    "knowledge_forget": ("knowmem", "forget_qa", "forget_qa_icl"),
    "knowledge_retain": ("knowmem", "retain_qa", "retain_qa_icl"),
    "members": ("privleak", "forget", None),
    "holdout": ("privleak", "holdout", None),
}


class MUSEBenchmark(Benchmark):
    """MUSE as its published code measures it, in per cent.

    ``verbmem_forget``: ROUGE-L F1 of 128 greedy tokens after a forget passage against what follows there. ``knowmem_forget``,
    ``knowmem_retain``: ROUGE-L F1 of 32 greedy tokens to questions, after ten examples. ``privleak``: by how much the area under
    the curve of Min-40 %, forget against holdout, differs from that of a retrained model: 0 leaks nothing, −100 means not
    forgotten, positive over-forgotten. Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", 2024
    (arXiv 2407.06460).

    Args:
        corpus: ``"News"`` or ``"Books"``.
        source: Hub name, or a local folder with ``verbmem``, ``knowmem`` and ``privleak`` and the files of their splits, where
            ``{corpus}`` stands for the corpus. What a folder lacks is left out, with the values that depend on it.
        max_rows: Only the first so many rows of every set; ``None`` for all, as published.
        max_length: Tokens of a holdout or forget text that count for ``privleak``.
        k: Fraction of the least likely tokens.
        token_budget: As for `Benchmark`.
        retain_results: Results of the retain-only model, whose area under the curve is compared with; ``None`` for the
            published one, which is that of Llama-2-7B (News) and ICLM-7B (Books).
    """

    name: ClassVar[str] = "muse"
    compared: ClassVar[tuple[str, ...]] = ("members", "holdout")
    decisive: ClassVar[tuple[str, ...]] = ("corpus", "k", "max_length")

    def __init__(
        self,
        corpus: Literal["News", "Books"] = "News",
        source: str = "muse-bench/MUSE-{corpus}",
        max_rows: int | None = None,
        max_length: int = 2048,
        k: float = 0.4,
        token_budget: int = 8192,
        retain_results: str | None = None,
    ) -> None:
        super().__init__(token_budget, retain_results)
        if corpus not in PUBLISHED_AUC:
            raise ValueError(f"MUSEBenchmark: `corpus` must be one of {', '.join(PUBLISHED_AUC)}, not {corpus!r}.")
        self.corpus, self.max_length, self.k = corpus, max_length, k
        self.sets: dict[str, tuple[Source, Source | None]] = {}
        self.absent: dict[str, str] = {}
        for stream, (config, split, shots) in _SETS.items():
            try:
                sources = [
                    muse_source(source.replace("{corpus}", corpus), part, max_rows, config)
                    for part in (split, shots)
                    if part
                ]
            except FileNotFoundError as error:
                self.absent[stream] = str(error)
                rank_zero_warn(f"{error} All values that need '{stream}' are left out.")
            else:
                self.sets[stream] = (sources[0], sources[1] if shots else None)
        if not self.sets:
            raise FileNotFoundError(f"none of MUSE's sets is in '{source}': {next(iter(self.absent.values()))}")

    def settings(self) -> Values:
        """What decides the values beside model and rows."""
        return {**super().settings(), "corpus": self.corpus, "k": self.k, "max_length": self.max_length}

    # Rows -------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Reads every set that there is."""
        streams = {}
        for name, (source, shots) in self.sets.items():
            rows = source.load(name).to_list()
            config = _SETS[name][0]
            if config == "verbmem":
                made = [_passage(tokenizer, *_texts(row, name, i, "prompt", "gt")) for i, row in enumerate(rows)]
                streams[name] = BenchmarkStream(made, source.path, max_new_tokens=128)
            elif config == "knowmem":
                examples = _pairs(shots.load(name).to_list() if shots else [], f"{name} examples")[:SHOTS]
                before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
                made = [_question(tokenizer, before, *pair) for pair in _pairs(rows, name)]
                streams[name] = BenchmarkStream(made, source.path, max_new_tokens=32, stop=STOP)
            else:
                made = [self._text(tokenizer, *_texts(row, name, i, "text")) for i, row in enumerate(rows)]
                streams[name] = BenchmarkStream(made, source.path)
        return streams

    def _text(self, tokenizer: PreTrainedTokenizerBase, text: str) -> BenchmarkExample:
        ids = list(tokenizer(text)["input_ids"])[: self.max_length]
        return BenchmarkExample({"text": text}, {"text": [Example(ids, ids)]})

    # Values -----------------------------------------------------------------------------------------------------------

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], said: str | None
    ) -> Values:
        """ROUGE of what was said, or Min-K of a text."""
        if said is not None:
            return {**example.texts, "generated": said, **rouge(said, example.texts["answer"], stemmer=False)}
        return {"min_k": min_k(scored["text"][0].logp, self.k)}

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Values:
        """The four values, in per cent."""
        named = {"verbmem_forget": "forget", "knowmem_forget": "knowledge_forget", "knowmem_retain": "knowledge_retain"}
        values: Values = {}
        for value, stream in named.items():
            if stream in examples:
                values[value] = 100 * float(np.mean([row["rougeL_f1"] for row in examples[stream]]))
            else:
                values[value] = self.absent[stream]
        values["privleak"] = self._privleak(examples, retain)
        return values

    def _privleak(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> float | str:
        for stream in ("members", "holdout"):
            if stream not in examples:
                return self.absent[stream]
        reference = PUBLISHED_AUC[self.corpus]
        if retain is not None:
            if not {"members", "holdout"} <= retain["examples"].keys():
                return f"'{self.retain_results}' has no members and holdout rows"
            reference = _holdout_is_higher(retain["examples"])
        return privleak(_holdout_is_higher(examples), reference)


def _holdout_is_higher(examples: Mapping[str, Sequence[Values]]) -> float:
    """MUSE's area under the curve: the chance that a holdout text has a higher Min-K than a forget text."""
    members, holdout = ([row["min_k"] for row in examples[stream]] for stream in ("members", "holdout"))
    return auc(holdout, members)


def _passage(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> BenchmarkExample:
    """A passage and the first 128 tokens of what follows."""
    following = tokenizer(continuation, add_special_tokens=False)["input_ids"][:128]
    answer = str(tokenizer.decode(following, skip_special_tokens=True))
    return BenchmarkExample({"prompt": prompt, "answer": answer}, {}, list(tokenizer(prompt)["input_ids"]))


def _question(tokenizer: PreTrainedTokenizerBase, before: str, question: str, answer: str) -> BenchmarkExample:
    prompt = f"{before}Question: {question}\nAnswer: "
    return BenchmarkExample({"question": question, "answer": answer}, {}, list(tokenizer(prompt)["input_ids"]))


def _pairs(rows: Sequence[Values], name: str) -> list[tuple[str, str]]:
    return [
        (texts[0], texts[1]) for i, row in enumerate(rows) for texts in [_texts(row, name, i, "question", "answer")]
    ]


def _texts(row: Values, name: str, number: int, *columns: str) -> list[str]:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"row {number} of MUSE's {name} set has no text in '{column}': got {row.get(column)!r}; its columns are "
                f"{sorted(row)}."
            )
    return [row[column] for column in columns]
