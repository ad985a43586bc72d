"""The Unlearning Depth Score of a model, and the same by the logit lens: how many layers still know what was to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch

from lit_unlearn.data.encoding import describe_first_prompt, encode_row
from lit_unlearn.data.encoding_settings import EncodingSettings, check_tokenizer
from lit_unlearn.data.example import Example
from lit_unlearn.data.formats import Document, Row, RowReader
from lit_unlearn.data.source import Rows, Source, to_source
from lit_unlearn.data.spans import find_spans
from lit_unlearn.errors import DataError, ModelError, arguments_of
from lit_unlearn.evaluation.depth_states import (
    Array,
    Drops,
    ModelTrace,
    describe_architecture,
    describe_model,
    loaded,
    measure_drops,
    trace_model,
)
from lit_unlearn.evaluation.results import Results, Values, content_digest, global_seed, package_versions
from lit_unlearn.evaluation.scoring import group_by_length
from lit_unlearn.metrics import mean_unlearning_depth, unlearning_depth
from lit_unlearn.metrics.depth import KNOWLEDGE_THRESHOLD
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.validation import check_at_least, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# By name of the score, where its drops stand among the values of an example, up to "retain_drop" and "unlearned_drop".
SCORES = {"unlearning_depth": "", "lens_depth": "lens_"}


class UnlearningDepth:
    """Measures how deep unlearning went, by putting hidden states of other models into the target model.

    The target model reads the true answer, and its score is the mean log p of the tokens in the row's spans, the facts that were
    to be forgotten. For every transformer block, its hidden states after that block, at the positions that predict these tokens,
    are replaced by those of the retain-only model. Where the score drops by more than a threshold, the layer holds the knowledge.
    If the unlearned model's states make it drop as much, the knowledge is erased there; if not, the later layers of the target
    model still read it from them, whatever the unlearned model itself answers. `metrics.unlearning_depth` sums this up.

    The logit lens asks the same without patching: the states after every block go directly through the target model's final norm
    and head. It sees only what a layer already spells out, so patching is the measure, and the lens is there to compare.

    Lee et al. 2026, "Unlearning Depth Score" (arXiv 2605.24614).

    Args:
        span_column: Column with the facts in a row's answer: a text, or a list of texts or of pairs ``[start, end]``, as
            `ForgetRetain` takes them. Of a text the first occurrence counts: from there, a model could copy the later ones.
        threshold: Drop above which a layer holds knowledge, nats per token.
        reader: The columns of the rows; ``None`` for ``RowReader(supervise="last")``.
        encoding: The prompt, which must be that of training, and the longest example; ``None`` for the defaults.
        token_budget: Largest batch, in tokens.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> depth = UnlearningDepth(span_column="spans")  # doctest: +SKIP
        >>> models = [LanguageModel(f"runs/demo/{name}") for name in ("target", "retain_only", "unlearned")]  # doctest: +SKIP
        >>> depth.run(*models, "forget.jsonl").aggregate["unlearning_depth"]  # doctest: +SKIP
        0.81
    """

    name: ClassVar[str] = "depth"

    def __init__(
        self,
        span_column: str = "entity",
        threshold: float = KNOWLEDGE_THRESHOLD,
        reader: RowReader | None = None,
        encoding: EncodingSettings | None = None,
        token_budget: int = 8192,
    ) -> None:
        check_number(self, "threshold", threshold, at_least=0)
        check_at_least(1, self, token_budget=token_budget)
        self.span_column = span_column
        self.threshold = threshold
        self.reader = reader or RowReader(supervise="last")
        self.encoding = encoding or EncodingSettings()
        self.token_budget = token_budget

    def run(
        self,
        target: LanguageModel,
        retain_only: LanguageModel,
        unlearned: LanguageModel,
        rows: Rows,
        dtype: torch.dtype | None = None,
    ) -> Results:
        """Measure the unlearned model against the other two.

        Models that are not loaded yet are loaded one after the other and released again, so that only one is in memory. Of the
        other two, the states of all tokens in spans are kept on the CPU: layers × tokens × hidden size numbers each.

        Args:
            target: The fine-tuned model before unlearning, which knows the rows. Its tokenizer encodes them.
            retain_only: The model that never saw the rows.
            unlearned: The model to measure.
            rows: The forget rows with their spans: a file, a hub name, a `Source`, a ``datasets.Dataset`` or a list of dicts.
            dtype: Of the weights that are loaded here, as for ``LanguageModel.load``.

        Returns:
            ``aggregate``: ``unlearning_depth`` and ``lens_depth``, from 0 (the target model) to 1 (the retain-only model);
            ``forget/with_knowledge``, the share of examples with a layer that holds knowledge; and each model's probability of
            the spans. ``examples``: the same for every example, and its drops by layer. No text of rows.

        Raises:
            ModelError: If the models differ in architecture, depth, width or vocabulary, or their blocks cannot be found.
            DataError: If rows or their spans cannot be used.
        """
        roles = {"target": target, "retain_only": retain_only, "unlearned": unlearned}
        self._check_vocabularies(roles)
        tokenizer = cast("PreTrainedTokenizerBase", target.tokenizer)
        rows_of_forget, source = self._read(rows)
        examples, row_numbers = self._encode(rows_of_forget, tokenizer)
        groups = list(group_by_length(examples, self.token_budget))

        traces: dict[str, ModelTrace] = {}
        for role in ("retain_only", "unlearned"):
            with loaded(roles[role], dtype):
                _check_same_architecture(role, roles[role], traces)
                traces[role] = trace_model(roles[role], examples, groups)
        with loaded(target, dtype):
            _check_same_architecture("target", target, traces)
            measured = measure_drops(target, examples, groups, traces)
            models = {"target": describe_model(target)}
        models |= {role: trace.model for role, trace in traces.items()}

        values = self._compute_values(examples, row_numbers, measured, traces)
        aggregate, missing = self._aggregate(values)
        return Results(
            benchmark=self.name,
            settings={
                "token_budget": self.token_budget,
                "threshold": self.threshold,
                "span_column": self.span_column,
                "prompt": describe_first_prompt((row for row, _ in rows_of_forget), tokenizer, self.encoding),
                "target": models["target"],
                "retain_only": models["retain_only"],
            },
            model=models["unlearned"],
            data={"forget": _describe_rows(source, rows_of_forget, examples)},
            versions=package_versions(),
            seed=global_seed(),
            aggregate=aggregate,
            missing=missing,
            examples={"forget": values},
        )

    # Rows ------------------------------------------------------------------------------------------------------------

    def _check_vocabularies(self, roles: Mapping[str, LanguageModel]) -> None:
        tokenizer = roles["target"].tokenizer
        if tokenizer is None:
            raise ModelError("`target` needs its tokenizer: give a model with one.", owner=self, argument="target")
        check_tokenizer(tokenizer)
        for role, lm in roles.items():
            # A model that is in memory may have come without a tokenizer.
            if lm.tokenizer is not None and lm.tokenizer.get_vocab() != tokenizer.get_vocab():
                message = (
                    f"`{role}` and `target` have different vocabularies, so their hidden states are of different tokens: give models "
                    "that were trained from the same base model."
                )
                raise ModelError(message, owner=self, argument=role)

    def _read(self, rows: Rows) -> tuple[list[tuple[Row, Any]], Source]:
        """Read the rows, each with its spans as they stand in the column."""
        with arguments_of(self):
            source = to_source(rows, "rows")
            table = source.load("forget", argument="rows")
            if self.span_column not in table.column_names:
                raise DataError(
                    f"the forget set has no column '{self.span_column}' with spans; its columns are {table.column_names}: set "
                    "`span_column` to that with the facts in every answer.",
                    argument="span_column",
                )
            read = self.reader.read(table, "forget", argument="rows")
        return list(zip(read, table[self.span_column], strict=True)), source

    def _encode(
        self, rows: Sequence[tuple[Row, Any]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Example], list[int]]:
        """Tokenise the rows with nothing but the spans supervised; return the examples and the number of each one's row."""
        examples: list[Example] = []
        row_numbers: list[int] = []
        with arguments_of(self):
            for number, (row, value) in enumerate(rows):
                place = f"row {number} of the forget set"
                spans = find_spans(row, _keep_first_occurrences(row, value), self.span_column, place)
                encoded = encode_row(row, tokenizer, self.encoding, place, spans)
                examples += encoded
                row_numbers += [number] * len(encoded)
        return examples, row_numbers

    # Values ----------------------------------------------------------------------------------------------------------

    def _compute_values(
        self, examples: Sequence[Example], row_numbers: Sequence[int], measured: Drops, traces: Mapping[str, ModelTrace]
    ) -> list[Values]:
        """Return the values of every example in plain types."""
        drops = {"": measured.patched, "lens_": measured.lens}
        scores = {}
        for name, prefix in SCORES.items():
            of_models = drops[prefix]
            scores[name] = unlearning_depth(of_models["retain_only"], of_models["unlearned"], self.threshold)

        values = []
        for number, row_number in enumerate(row_numbers):
            # Nothing predicts the first token, whatever its label.
            num_tokens = sum(label >= 0 for label in examples[number].labels[1:])
            of_example: Values = {"row": row_number, "tokens": num_tokens}
            for name, score in scores.items():
                of_example[name] = None if np.isnan(score[number]) else float(score[number])
            of_example["target_probability"] = float(np.exp(measured.logp[number]))
            for role, trace in traces.items():
                of_example[f"{role}_probability"] = float(np.exp(trace.logp[number]))
            for prefix, of_models in drops.items():
                of_example[f"{prefix}retain_drop"] = of_models["retain_only"][number].tolist()
                of_example[f"{prefix}unlearned_drop"] = of_models["unlearned"][number].tolist()
            values.append(of_example)
        return values

    def _aggregate(self, values: Sequence[Values]) -> tuple[dict[str, float], dict[str, str]]:
        """Return the means over all examples and, by name, why one is missing."""
        aggregate: dict[str, float] = {}
        missing: dict[str, str] = {}
        for name, prefix in SCORES.items():
            if all(of_example[name] is None for of_example in values):
                missing[name] = (
                    f"in no layer do the retain-only model's states lower the target model's score by more than {self.threshold:g}: "
                    "it knows no more about these rows, or was fine-tuned with another prompt"
                )
                continue
            retain_drop, unlearned_drop = _get_drops(values, prefix)
            aggregate[name] = mean_unlearning_depth(retain_drop, unlearned_drop, self.threshold)

        with_knowledge = [of_example["unlearning_depth"] is not None for of_example in values]
        aggregate["forget/with_knowledge"] = sum(with_knowledge) / len(values)
        for role in ("target", "retain_only", "unlearned"):
            probabilities = [of_example[f"{role}_probability"] for of_example in values]
            aggregate[f"forget/{role}_probability"] = float(np.mean(probabilities))
        return aggregate, missing


def summarize_layers(results: Results) -> list[Values]:
    """Return the means of every layer over all examples, the first layer first.

    Args:
        results: From `UnlearningDepth.run`.

    Returns:
        For each layer, and with ``lens_`` before the names for the logit lens: the mean ``retain_drop`` and ``unlearned_drop``,
        nats per token; ``with_knowledge``, the share of examples whose knowledge it holds; and ``erased``, the share of that
        knowledge that is erased, ``None`` where it holds none.
    """
    threshold = results.settings["threshold"]
    values = results.examples["forget"]
    layers: list[Values] = []
    for prefix in SCORES.values():
        retain_drop, unlearned_drop = _get_drops(values, prefix)
        # Transposed, the sums run over the examples of each layer.
        erased = unlearning_depth(retain_drop.T, unlearned_drop.T, threshold)
        layers = layers or [{} for _ in erased]
        for number, of_layer in enumerate(layers):
            of_layer[f"{prefix}retain_drop"] = float(retain_drop[:, number].mean())
            of_layer[f"{prefix}unlearned_drop"] = float(unlearned_drop[:, number].mean())
            of_layer[f"{prefix}with_knowledge"] = float((retain_drop[:, number] > threshold).mean())
            of_layer[f"{prefix}erased"] = None if np.isnan(erased[number]) else float(erased[number])
    return layers


def _get_drops(values: Sequence[Values], prefix: str) -> tuple[Array, Array]:
    """Return the drops by both models, shape ``(examples, layers)`` each."""
    retain_drop = np.array([of_example[f"{prefix}retain_drop"] for of_example in values])
    unlearned_drop = np.array([of_example[f"{prefix}unlearned_drop"] for of_example in values])
    return retain_drop, unlearned_drop


def _keep_first_occurrences(row: Row, value: Any) -> Any:
    """Replace every text among a row's spans by the place where it occurs first; leave the rest for `find_spans` to judge."""
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, Sequence):
        return value
    # As `find_spans` counts offsets over several turns.
    turns = [row.text] if isinstance(row, Document) else [row.messages[turn].content for turn in row.supervised]
    text = "\n".join(turns)
    places: list[Any] = []
    for span in named:
        start = text.find(span) if isinstance(span, str) and span.strip() else -1
        places.append(span if start < 0 else [start, start + len(span)])
    return places


def _describe_rows(source: Source, rows: Sequence[tuple[Row, Any]], examples: Sequence[Example]) -> Values:
    """Return the source, the number of rows, and digests of texts and tokens, as benchmarks have them."""
    texts = [[*row.texts, value] for row, value in rows]
    tokens = [[example.input_ids, example.labels, example.attention_mask] for example in examples]
    return {
        "source": source.path,
        "rows": len(rows),
        "texts": content_digest(texts),
        "tokens": content_digest(tokens),
    }


def _check_same_architecture(role: str, lm: LanguageModel, traces: Mapping[str, ModelTrace]) -> None:
    """Raise ModelError unless a model's states fit into those that were traced before."""
    architecture = describe_architecture(lm)
    for traced_role, trace in traces.items():
        if trace.architecture != architecture:
            message = (
                f"`{role}` is a {architecture}, but `{traced_role}` is a {trace.architecture}, and hidden states can be exchanged only "
                "between models of one architecture: give models that were trained from the same base model."
            )
            raise ModelError(message, owner=UnlearningDepth, argument=role)
