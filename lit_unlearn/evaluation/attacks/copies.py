"""Copies of a model whose weights an attack changes: the model itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lit_unlearn.errors import ModelError
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.adapters import inner_model


def check_changeable(lm: LanguageModel) -> None:
    """Raise if a model's weights cannot be changed.

    Raises:
        ModelError: If it is quantised.
    """
    if getattr(inner_model(lm.model), "is_quantized", False):
        raise ModelError(
            "the model is quantised, and its integers can be neither trained nor rounded: load it without quantisation."
        )


def copy_model(lm: LanguageModel) -> LanguageModel:
    """Return the same model in memory of its own; an adapter is merged into it, as by an export.

    A collective call if the model is sharded; every process then has a copy of the whole model.

    Raises:
        ModelError: If it is quantised, or has an adapter that cannot be merged.
    """
    check_changeable(lm)
    if lm.is_sharded:
        return LanguageModel.wrap(_gather_model(lm), lm.tokenizer, lm.chunk_size)
    model: Any = copy.deepcopy(lm.model)
    if lm.has_adapter:
        try:
            model = model.merge_and_unload()
        except (RuntimeError, ValueError) as reason:  # what peft raises for kinds and biases that have no merged form
            raise ModelError(
                f"attacks change the weights of the exported model, into which this adapter cannot be merged ({reason}): leave out "
                "relearning and rounding, or train another kind of adapter."
            ) from reason
    return LanguageModel.wrap(model, lm.tokenizer, lm.chunk_size)


@torch.no_grad()
def _gather_model(lm: LanguageModel) -> Any:
    if lm.has_adapter:
        raise ModelError(
            "an attack changes a copy of the weights, and a sharded model's adapter cannot be merged into one: run the attack on the "
            "exported model."
        )
    # Before a model is built: FSDP2 may hold whole weights, which it lets go of when it is asked for the state.
    state = lm.causal_lm.state_dict()
    with torch.inference_mode(False):
        model: Any = type(lm.causal_lm)(lm.causal_lm.config)
        model.to(lm.causal_lm.dtype)
        for name, value in model.state_dict().items():
            sharded = state[name]
            # One tensor after the other, so that only one copy of the model is made.
            value.copy_(sharded.full_tensor() if isinstance(sharded, DTensor) else sharded)
    return model.to(lm.input_device)


@contextmanager
def changing_weights(lm: LanguageModel) -> Iterator[None]:
    """Allow weights to be changed within the block, whatever arithmetic the evaluation around it uses.

    A generator must not yield within it: the caller would go on with these settings.

    Args:
        lm: On the device that is used.
    """
    device = next(lm.parameters()).device.type
    # Tensors of inference mode cannot be trained; autocast keeps casts of weights, and would not see these change.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        yield
    torch.clear_autocast_cache()
