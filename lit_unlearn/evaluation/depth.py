"""The Unlearning Depth Score of a model, and the same by the logit lens: how many layers still know what was to be forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_unlearn.data.encoding import describe_first_prompt, encode_row
from lit_unlearn.data.encoding_settings import EncodingSettings, check_tokenizer
from lit_unlearn.data.example import Example
from lit_unlearn.data.formats import Document, Row, RowReader
from lit_unlearn.data.source import Rows, Source, to_source
from lit_unlearn.data.spans import find_spans
from lit_unlearn.errors import DataError, ModelError, arguments_of
from lit_unlearn.evaluation.results import Results, Values, content_digest, global_seed, package_versions
from lit_unlearn.evaluation.scoring import build_batch, group_by_length
from lit_unlearn.metrics import mean_unlearning_depth, unlearning_depth
from lit_unlearn.metrics.depth import KNOWLEDGE_THRESHOLD
from lit_unlearn.models import LanguageModel, TokenIndex, locate
from lit_unlearn.models.blocks import find_blocks, record_outputs, replace_output
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.validation import check_at_least, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = NDArray[np.float64]

# By name of the score, where its drops stand among the values of an example, up to "retain_drop" and "unlearned_drop".
SCORES = {"unlearning_depth": "", "lens_depth": "lens_"}

_LENS_WIDTH = 64
"""Tokens of a row in which states are decoded: few enough for every table of learned positions."""


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

        traces: dict[str, _Trace] = {}
        for role in ("retain_only", "unlearned"):
            with _loaded(roles[role], dtype):
                _check_same_architecture(role, roles[role], traces)
                traces[role] = _trace_model(roles[role], examples, groups)
        with _loaded(target, dtype):
            _check_same_architecture("target", target, traces)
            measured = _measure_drops(target, examples, groups, traces)
            models = {"target": _describe_model(target)}
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
        self, examples: Sequence[Example], row_numbers: Sequence[int], measured: _Drops, traces: Mapping[str, _Trace]
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


# Models ---------------------------------------------------------------------------------------------------------------


class _Trace(NamedTuple):
    """What a model computes at the tokens of the spans.

    Args:
        states: For each batch, the states after every block, shape ``(layers, N, D)``, on the CPU.
        logp: Mean log-probability of each example's tokens, shape ``(examples,)``, nats.
        architecture: Class, depth and width, as a message names them.
        model: Name and digest of the weights, for the results.
    """

    states: list[Tensor]
    logp: Array
    architecture: str
    model: Values


class _Drops(NamedTuple):
    """What the target model loses, by the model whose states are taken.

    Args:
        logp: The target model's own scores, shape ``(examples,)``, nats.
        patched: Drops with the states of another model, shape ``(examples, layers)``, nats.
        lens: Drops where these states are decoded at once, of the same shape.
    """

    logp: Array
    patched: dict[str, Array]
    lens: dict[str, Array]


@contextmanager
def _loaded(lm: LanguageModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Load a model for the block, and release it afterwards, unless it was loaded before."""
    was_loaded = lm.is_loaded
    lm.load(dtype)
    try:
        with evaluation_mode(lm):
            yield
    finally:
        if not was_loaded:
            lm.model = None


def _describe_model(lm: LanguageModel) -> Values:
    return {"name": lm.name, "weights": fingerprint(cast(nn.Module, lm.model))[:16]}


def _describe_architecture(lm: LanguageModel) -> str:
    width = lm.causal_lm.config.get_text_config().hidden_size
    return f"{type(lm.causal_lm).__name__} of {lm.num_layers} blocks of width {width}"


def _check_same_architecture(role: str, lm: LanguageModel, traces: Mapping[str, _Trace]) -> None:
    """Raise ModelError unless a model's states fit into those that were traced before."""
    architecture = _describe_architecture(lm)
    for traced_role, trace in traces.items():
        if trace.architecture != architecture:
            message = (
                f"`{role}` is a {architecture}, but `{traced_role}` is a {trace.architecture}, and hidden states can be exchanged only "
                "between models of one architecture: give models that were trained from the same base model."
            )
            raise ModelError(message, owner=UnlearningDepth, argument=role)


def _trace_model(lm: LanguageModel, examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> _Trace:
    """Run a model once over all examples, and keep its states at the positions that predict the spans."""
    blocks = find_blocks(lm.causal_lm)
    states = []
    logp = np.empty(len(examples))
    for indices in groups:
        batch, index = _build_span_batch(lm, [examples[i] for i in indices])
        with record_outputs(blocks, index.state) as outputs:
            logp[indices] = _mean_logp(lm, batch, index)
        states.append(torch.stack(outputs).cpu())
    return _Trace(states, logp, _describe_architecture(lm), _describe_model(lm))


def _measure_drops(
    target: LanguageModel,
    examples: Sequence[Example],
    groups: Sequence[Sequence[int]],
    traces: Mapping[str, _Trace],
) -> _Drops:
    """Put the states of the other models into the target model, one layer at a time."""
    blocks = find_blocks(target.causal_lm)
    shape = (len(examples), len(blocks))
    patched = {role: np.empty(shape) for role in traces}
    lens = {role: np.empty(shape) for role in traces}
    logp = np.empty(len(examples))

    # Standard error alone, and only on a terminal.
    with tqdm(total=len(groups) * len(blocks), desc="depth", unit="pass", disable=None, leave=False) as bar:
        for group, indices in enumerate(groups):
            batch, index = _build_span_batch(target, [examples[i] for i in indices])
            with record_outputs(blocks, index.state) as outputs:
                score = _mean_logp(target, batch, index)
            logp[indices] = score
            for layer, block in enumerate(blocks):
                lens_score = _decode_states(target, blocks[-1], outputs[layer], index)
                for role, trace in traces.items():
                    states = trace.states[group][layer]
                    with replace_output(block, index.state, states):
                        patched_score = _mean_logp(target, batch, index)
                    patched[role][indices, layer] = score - patched_score
                    decoded_score = _decode_states(target, blocks[-1], states, index)
                    lens[role][indices, layer] = lens_score - decoded_score
                bar.update(1)
    return _Drops(logp, patched, lens)


def _build_span_batch(lm: LanguageModel, examples: Sequence[Example]) -> tuple[dict[str, Tensor], TokenIndex]:
    """Return a batch, and the index of its tokens in the order of the examples."""
    batch = build_batch(lm, examples)
    index = locate(batch)
    # Packing changes the order of the examples. States of several models belong to the same tokens only in an order of their own.
    order = index.sequence.argsort(stable=True)
    index = index._replace(state=index.state[order], labels=index.labels[order], sequence=index.sequence[order])
    return batch, index


def _mean_logp(lm: LanguageModel, batch: Mapping[str, Tensor], index: TokenIndex) -> Array:
    """Compute the mean log-probability of each example's tokens, shape ``(S,)``, nats."""
    logp = lm(batch, lm.token_logp, index=[index]).double()
    counts = index.by_sequence(torch.ones_like(logp))
    mean: Array = (index.by_sequence(logp) / counts).cpu().numpy()
    return mean


def _decode_states(lm: LanguageModel, last_block: nn.Module, states: Tensor, index: TokenIndex) -> Array:
    """Compute the mean log-probability of each example's tokens from states that go through the final norm and head alone.

    What follows the last block works on every position by itself. So states may stand in for the last block's output in any batch,
    here one of as many arbitrary tokens: neither norm nor head has to be known by name, nor what a family does between them.

    Args:
        lm: The model whose norm and head decode.
        last_block: Its last block.
        states: After any block, shape ``(N, D)``.
        index: The tokens that the states predict.
    """
    device = index.labels.device
    count = len(states)
    width = min(count, _LENS_WIDTH)
    ids = torch.zeros(-(-count // width), width, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    decoded = index._replace(state=torch.arange(count, device=device))
    with replace_output(last_block, decoded.state, states):
        return _mean_logp(lm, batch, decoded)
