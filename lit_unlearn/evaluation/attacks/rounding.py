"""Weights rounded to few bits, as models are deployed."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_unlearn.errors import ModelError
from lit_unlearn.functional import upcast
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.adapters import inner_model
from lit_unlearn.models.loading import load_pretrained


@torch.no_grad()
def round_weights(model: Any, bits: int) -> None:
    """Round the weights of every linear layer but the head, in place, by `round_to_nearest`.

    Args:
        model: A causal LM of transformers. Weights outside of ``nn.Linear``, such as experts that share one tensor, stay.
        bits: As for `round_to_nearest`.

    Raises:
        ModelError: If there is no such layer.
    """
    # The head stays, as transformers leaves it with bitsandbytes.
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no nn.Linear but the head, so that nothing would be rounded: set `bits` to []."
        )
    for layer in layers:
        layer.weight.copy_(round_to_nearest(layer.weight, bits))


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Round each row to the nearest of 2 ** bits − 1 values, evenly spaced between ± its largest magnitude.

    Args:
        weight: Shape ``(rows, columns)``.
        bits: Width of the integers that could be stored instead, at least 2.

    Returns:
        Shape ``(rows, columns)``, float32 or wider; nowhere further from ``weight`` than half a step.

    Example:
        >>> round_to_nearest(torch.tensor([[3.0, 1.4, -0.6], [0.0, 0.0, 0.0]]), bits=3)
        tensor([[ 3.,  1., -1.],
                [ 0.,  0.,  0.]])
    """
    wide = upcast(weight)
    step = wide.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    # A row of zeros has no magnitude to divide by, and stays zero with any step.
    step = step.where(step > 0, 1.0)
    return torch.round(wide / step).mul(step)


def load_quantized(lm: LanguageModel, bits: int) -> LanguageModel:
    """Return a copy of a model as it would be deployed: LLM.int8 or NF4, loaded by transformers from an export in between.

    The export has the weights in memory, which after training or ``--ckpt_path`` are not those of ``lm.name``.

    Args:
        lm: Loaded, not quantised.
        bits: 8 or 4.
    """
    from transformers import BitsAndBytesConfig

    # LLM.int8 computes in float16, and warns of it in every layer of every pass.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    model = inner_model(lm.model)
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype)
    settings = {
        "dtype": model.dtype,
        "device_map": {"": model.device},
        "quantization_config": config,
        **lm.hub_settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_pretrained(str(lm.save(Path(folder) / "model")), use_safetensors=True, **settings)
    return LanguageModel.wrap(loaded, lm.tokenizer, lm.chunk_size)
