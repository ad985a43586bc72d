"""Small real models with their reference models, and the dense tensors that transformers itself has for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from conftest import TINY
from objectives.forms import LABELS, LAYER, B, Dense, T
from torch import Tensor, nn

from lit_unlearn import LanguageModel

VOCAB = 64
LLAMA = {**TINY, "num_hidden_layers": 3, "vocab_size": VOCAB}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": VOCAB, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"config": LLAMA},
    "tied gpt2": {"config": {**GPT2, **NO_DROPOUT}},
    "phi": {"config": {**LLAMA, "model_type": "phi"}},  # a head with bias
    "llama with adapter": {"config": LLAMA, "adapter": {"r": 4}},
    "gpt2 with adapter": {"config": {**GPT2, **NO_DROPOUT}, "adapter": {"r": 4}},
}


def shift(parameters: Iterable[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def build(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> LanguageModel:
    """A model before unlearning, no parameter of which is at a round number, with its reference model at hand."""
    torch.manual_seed(0)
    settings = MODELS[name]
    lm = LanguageModel(**{**settings, "config": {**settings["config"], **fields}})
    lm.load(dtype)
    shift((parameter for key, parameter in lm.named_parameters() if "lora_" not in key), seed=1)
    lm.keep_reference()
    # As the reference model, so that one dense form serves both.
    lm.keep_teacher(copy.deepcopy(lm.causal_lm))
    return lm


def move(lm: LanguageModel) -> LanguageModel:
    """Moves every trained parameter, far enough for the two models to differ everywhere."""
    shift((parameter for parameter in lm.parameters() if parameter.requires_grad), seed=2)
    return lm


@cache
def moved(name: str) -> LanguageModel:
    return move(build(name))


def batch() -> dict[str, Tensor]:
    """Six rows, of which the last three have the alternate answers of the first three."""
    ids = torch.randint(3, VOCAB, (2 * B, T), generator=torch.Generator().manual_seed(2))
    ids = torch.where(LABELS == -100, ids, LABELS)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": LABELS}


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the longest list of modules that there is."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """What each block of a model puts out, as a hook sees it."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _inputs, out: seen.update({layer: out[0] if isinstance(out, tuple) else out})

    hooks = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks(model))]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def dense_outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with layer_outputs(model) as seen:
        logits = model(**inputs, use_cache=False).logits
    return logits, seen[LAYER]


def dense(lm: LanguageModel) -> Dense:
    """From transformers alone: full logits, and a hook on the layer."""
    logits, states = dense_outputs(lm.causal_lm)
    with torch.no_grad():
        if lm.frozen is None:
            with lm.model.disable_adapter():
                z_ref, h_ref = dense_outputs(lm.causal_lm)
        else:
            z_ref, h_ref = dense_outputs(lm.frozen)
    return Dense(logits, z_ref, states, h_ref)
