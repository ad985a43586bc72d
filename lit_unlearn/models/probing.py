"""What the logits of a model are made of, found out by running it on a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lit_unlearn.models.evaluation_mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _probe_ids(model: PreTrainedModel) -> Tensor:
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    return torch.arange(1, 9, device=embeddings.device).remainder(embeddings.shape[0])[None]


def probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits of eight tokens, shape ``(1, 8, V)``."""
    with evaluation_mode(model):
        return cast(Tensor, model(input_ids=_probe_ids(model), use_cache=False).logits)


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether the logits are exactly the head applied to the trunk's last hidden state (no softcap, no scaling)."""
    head, seen = model.get_output_embeddings(), dict[str, Tensor]()
    if type(head) is not nn.Linear:  # a subclass may compute anything from its weight
        return False
    hooks = [
        model.base_model.register_forward_hook(lambda _m, _i, out: seen.update(trunk=out[0])),
        head.register_forward_hook(lambda _m, args, _out: seen.update(into=args[0])),
    ]
    try:
        logits = probe_logits(model)
        if "trunk" not in seen:  # OPT calls a part of its trunk, past the hook
            with evaluation_mode(model):
                model.base_model(input_ids=_probe_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) < 2 or not torch.equal(seen["trunk"], seen["into"]):
        return False
    return torch.equal(logits, nn.functional.linear(seen["into"], head.weight, head.bias).to(logits))
