"""MUSE: verbatim memorisation, knowledge, and privacy leakage on news and books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.example import Example
from lit_unlearn.data.muse import muse_source
from lit_unlearn.data.source import Source, read_columns
from lit_unlearn.data.special_tokens import encode_text
from lit_unlearn.errors import MissingFileError, arguments_of
from lit_unlearn.evaluation.benchmark import Aggregate, Benchmark
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.results import Results, Values, get_column
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.metrics import auc, min_k, privleak, rouge
from lit_unlearn.utils.validation import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED_AUC = {"News": 0.4772, "Books": 0.5393}
"""Area under the curve of Min-40 % for the retrained model: the chance that a holdout text has the higher value."""

# As in the published code: ten examples before a question, and answers that end where the next question would begin.
SHOTS = 10
STOP = ("\n\n", "\nQuestion", "Question:")

PASSAGE_TOKENS = 128
ANSWER_TOKENS = 32


class MUSESet(NamedTuple):
    """A stream's place in MUSE's files: configuration, split, and the split with the examples before each question."""

    config: Literal["verbmem", "knowmem", "privleak"]
    split: str
    shots_split: str | None = None


SETS = {
    "forget": MUSESet("verbmem", "forget"),
    "knowledge_forget": MUSESet("knowmem", "forget_qa", "forget_qa_icl"),
    "knowledge_retain": MUSESet("knowmem", "retain_qa", "retain_qa_icl"),
    "members": MUSESet("privleak", "forget"),
    "holdout": MUSESet("privleak", "holdout"),
}

ROUGE_STREAMS = {
    "verbmem_forget": "forget",
    "knowmem_forget": "knowledge_forget",
    "knowmem_retain": "knowledge_retain",
}
"""Values that are a mean ROUGE-L F1, and their streams."""


class MUSEBenchmark(Benchmark):
    """MUSE as its published code measures it, in per cent.

    ``verbmem_forget``: ROUGE-L F1 of 128 greedy tokens after a forget passage against the text that follows there.
    ``knowmem_forget``, ``knowmem_retain``: ROUGE-L F1 of 32 greedy tokens to questions, after ten examples. ``privleak``:
    relative difference of the area under the curve of Min-40 %, forget against holdout, from that of a retrained model: 0
    leaks nothing, −100 means not forgotten, positive over-forgotten. Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation
    for Language Models", 2024 (arXiv 2407.06460).

    Args:
        corpus: ``"News"`` or ``"Books"``.
        source: Hub name, or a local folder with ``verbmem``, ``knowmem`` and ``privleak`` and the files of their splits, where
            ``{corpus}`` stands for the corpus. A set that a folder lacks is left out, with the values that depend on it.
        max_rows: Number of rows read of every set; ``None`` for all, as published.
        max_length: Tokens of a holdout or forget text that count for ``privleak``.
        k: Fraction of the least likely tokens.
        token_budget: As for `Benchmark`.
        retain_results: Results of the retain-only model, whose area under the curve is compared with; ``None`` for the
            published one, which is that of Llama-2-7B (News) and ICLM-7B (Books).

    Raises:
        ConfigError: If ``corpus`` is unknown.
        MissingFileError: If a local folder has none of the sets.
    """

    name: ClassVar[str] = "muse"
    compared_streams: ClassVar[tuple[str, ...]] = ("members", "holdout")
    compared_settings: ClassVar[tuple[str, ...]] = ("corpus", "k", "max_length")

    def __init__(
        self,
        corpus: Literal["News", "Books"] = "News",
        source: str = "muse-bench/MUSE-{corpus}",
        max_rows: int | None = None,
        max_length: int = 2048,
        k: float = 0.4,
        token_budget: int = 8192,
        retain_results: str | Path | Results | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(token_budget, retain_results)
        check_choice(tuple(PUBLISHED_AUC), self, corpus=corpus)
        self.corpus = corpus
        self.max_length = max_length
        self.k = k
        self.sources: dict[str, Source] = {}
        self.shot_sources: dict[str, Source] = {}
        self.absent: dict[str, str] = {}

        folder = source.replace("{corpus}", corpus)
        for stream, (config, split, shots_split) in SETS.items():
            try:
                if shots_split is not None:
                    self.shot_sources[stream] = muse_source(folder, shots_split, max_rows, config)
                self.sources[stream] = muse_source(folder, split, max_rows, config)
            except FileNotFoundError as error:
                self.absent[stream] = str(error)
                rank_zero_warn(f"{error} All values that need '{stream}' are left out.")
        if not self.sources:
            reason = next(iter(self.absent.values()))
            raise MissingFileError(f"none of MUSE's sets is in '{source}': {reason}", owner=self, argument="source")

    def settings(self) -> Values:
        """Return the settings that decide values, beside model and rows."""
        return {**super().settings(), "corpus": self.corpus, "k": self.k, "max_length": self.max_length}

    # Rows ------------------------------------------------------------------------------------------------------------

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read and tokenise every set that is there."""
        # By configuration: both knowledge sets are read alike, and so are members and holdout.
        loaders = {"verbmem": self._load_passages, "knowmem": self._load_questions, "privleak": self._load_texts}
        with arguments_of(self):
            return {name: loaders[SETS[name].config](name, tokenizer) for name in self.sources}

    def _load_passages(self, name: str, tokenizer: PreTrainedTokenizerBase) -> BenchmarkStream:
        """Read passages and the first tokens of the text that follows each."""
        examples = []
        for prompt, continuation in read_columns(self.sources[name], "MUSE", name, "prompt", "gt"):
            following = encode_text(continuation, tokenizer, add_special_tokens=False)[:PASSAGE_TOKENS]
            answer = str(tokenizer.decode(following, skip_special_tokens=True))
            texts = {"prompt": prompt, "answer": answer}
            examples.append(BenchmarkExample(texts, {}, encode_text(prompt, tokenizer)))
        return BenchmarkStream(examples, self.sources[name].path, max_new_tokens=PASSAGE_TOKENS)

    def _load_questions(self, name: str, tokenizer: PreTrainedTokenizerBase) -> BenchmarkStream:
        """Read questions, each after the same examples of questions with answers."""
        # The prompts are the published ones to the character: another space would change what models answer.
        before = ""
        shots = read_columns(self.shot_sources[name], "MUSE", f"{name} examples", "question", "answer")
        for question, answer in shots[:SHOTS]:
            before += f"Question: {question}\nAnswer: {answer}\n\n"

        examples = []
        for question, answer in read_columns(self.sources[name], "MUSE", name, "question", "answer"):
            prompt = encode_text(f"{before}Question: {question}\nAnswer: ", tokenizer)
            examples.append(BenchmarkExample({"question": question, "answer": answer}, {}, prompt))
        return BenchmarkStream(examples, self.sources[name].path, max_new_tokens=ANSWER_TOKENS, stop=STOP)

    def _load_texts(self, name: str, tokenizer: PreTrainedTokenizerBase) -> BenchmarkStream:
        """Read texts of which every token is scored."""
        examples = []
        for (text,) in read_columns(self.sources[name], "MUSE", name, "text"):
            # Every token is supervised, as in the published code, which takes Min-K over the whole text.
            ids = encode_text(text, tokenizer)[: self.max_length]
            examples.append(BenchmarkExample({"text": text}, {"text": [Example(ids, ids)]}))
        return BenchmarkStream(examples, self.sources[name].path)

    # Values ----------------------------------------------------------------------------------------------------------

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Compute ROUGE of a generated answer, or Min-K of a text."""
        if generated is None:
            return {"min_k": min_k(scored["text"][0].logp, self.k)}
        # MUSE's code does not stem words, unlike TOFU's.
        scores = rouge(generated, example.texts["answer"], stemmer=False)
        return {**example.texts, "generated": generated, **scores}

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Compute the four values, in per cent."""
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        for name, stream in ROUGE_STREAMS.items():
            if stream in examples:
                values[name] = 100 * float(np.mean(get_column(examples[stream], "rougeL_f1")))
            else:
                missing[name] = self.absent[stream]

        absent = [stream for stream in ("members", "holdout") if stream not in examples]
        if absent:
            missing["privleak"] = self.absent[absent[0]]
        elif retain is not None and not {"members", "holdout"} <= retain.examples.keys():
            missing["privleak"] = "`retain_results` have no members and holdout rows"
        else:
            reference = PUBLISHED_AUC[self.corpus] if retain is None else _holdout_auc(retain.examples)
            values["privleak"] = privleak(_holdout_auc(examples), reference)
        return Aggregate(values, missing)


def _holdout_auc(examples: Mapping[str, Sequence[Values]]) -> float:
    """Compute MUSE's area under the curve: the chance that a holdout text has a higher Min-K than a forget text."""
    return auc(get_column(examples["holdout"], "min_k"), get_column(examples["members"], "min_k"))
