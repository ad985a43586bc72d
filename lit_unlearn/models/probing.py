"""Probes: run a model on a few tokens to find out how its logits come about."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lit_unlearn.models.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _probe_ids(model: PreTrainedModel) -> Tensor:
    """Return eight token ids, shape ``(1, 8)``, on the model's device."""
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    return torch.arange(1, 9, device=embeddings.device).remainder(embeddings.shape[0])[None]


def probe_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of eight tokens, shape ``(1, 8, V)``."""
    with evaluation_mode(model):
        return cast(Tensor, model(input_ids=_probe_ids(model), use_cache=False).logits)


def has_linear_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are exactly the head applied to the trunk's last hidden state (no softcap, no scaling)."""
    head = model.get_output_embeddings()
    # A subclass may compute anything from its weight.
    if type(head) is not nn.Linear:
        return False

    states = dict[str, Tensor]()
    hooks = [
        model.base_model.register_forward_hook(lambda _module, _inputs, output: states.update(trunk=output[0])),
        head.register_forward_hook(lambda _module, inputs, _output: states.update(head=inputs[0])),
    ]
    try:
        logits = probe_logits(model)
        # OPT calls a part of its trunk, past the hook.
        if "trunk" not in states:
            with evaluation_mode(model):
                model.base_model(input_ids=_probe_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    # Some families scale or cap between trunk and head, others after the head.
    if len(states) < 2 or not torch.equal(states["trunk"], states["head"]):
        return False
    return torch.equal(logits, nn.functional.linear(states["head"], head.weight, head.bias).to(logits))


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return the length of the table of positions that a model has learned, as GPT-2 and OPT; ``None`` if it has none.

    Rotary positions go on beyond what a model was trained on; a table ends.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        # "wpe" in GPT-2 and those that follow it, "embed_positions" or "position_embeddings" elsewhere.
        if isinstance(module, nn.Embedding) and ("position" in kind or kind == "wpe"):
            return module.num_embeddings if limit is None else min(limit, module.num_embeddings)
    return None
