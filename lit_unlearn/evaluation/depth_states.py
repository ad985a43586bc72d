"""Hidden states of a model at the tokens of spans, and what another model loses with them in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_unlearn.data.example import Example
from lit_unlearn.evaluation.results import Values
from lit_unlearn.evaluation.scoring import build_batch
from lit_unlearn.models import LanguageModel, TokenIndex, locate
from lit_unlearn.models.blocks import find_blocks, record_outputs, replace_output
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.loading import fingerprint

Array = NDArray[np.float64]

_LENS_WIDTH = 64
"""Tokens of a row in which states are decoded: few enough for every table of learned positions."""


class ModelTrace(NamedTuple):
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


class Drops(NamedTuple):
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
def loaded(lm: LanguageModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Load a model for the block, and release it afterwards, unless it was loaded before."""
    was_loaded = lm.is_loaded
    lm.load(dtype)
    try:
        with evaluation_mode(lm):
            yield
    finally:
        if not was_loaded:
            lm.model = None


def describe_model(lm: LanguageModel) -> Values:
    """Return a model's name and the digest of its weights, for the results."""
    return {"name": lm.name, "weights": fingerprint(cast(nn.Module, lm.model))[:16]}


def describe_architecture(lm: LanguageModel) -> str:
    """Return class, depth and width of a model, for messages and for comparison."""
    width = lm.causal_lm.config.get_text_config().hidden_size
    return f"{type(lm.causal_lm).__name__} of {lm.num_layers} blocks of width {width}"


def trace_model(lm: LanguageModel, examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> ModelTrace:
    """Run a model once over all examples, and keep its states at the positions that predict the spans."""
    blocks = find_blocks(lm.causal_lm)
    states = []
    logp = np.empty(len(examples))
    for indices in groups:
        batch, index = _build_span_batch(lm, [examples[i] for i in indices])
        with record_outputs(blocks, index.state) as outputs:
            logp[indices] = _mean_logp(lm, batch, index)
        states.append(torch.stack(outputs).cpu())
    return ModelTrace(states, logp, describe_architecture(lm), describe_model(lm))


def measure_drops(
    target: LanguageModel,
    examples: Sequence[Example],
    groups: Sequence[Sequence[int]],
    traces: Mapping[str, ModelTrace],
) -> Drops:
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
    return Drops(logp, patched, lens)


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
