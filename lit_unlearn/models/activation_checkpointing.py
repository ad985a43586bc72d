"""Activation checkpointing: less memory in training, for a second forward pass of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, which computes the rest again: less memory, more time.

    Args:
        model: Any whose layers support it; transformers refuses the others.
    """
    newer = hasattr(model, "activation_checkpointing_enable")
    enable: Any = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # The reentrant kind alone needs inputs that require gradients; here frozen layers would keep their activations.
    model.disable_input_require_grads()
