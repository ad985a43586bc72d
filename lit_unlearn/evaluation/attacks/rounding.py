"""An attack that rounds the weights to few bits, as models are deployed."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_unlearn.data.example import Example
from lit_unlearn.errors import ConfigError, ModelError, arguments_of
from lit_unlearn.evaluation.attacks.copies import changing_weights, copy_model
from lit_unlearn.functional import upcast
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.adapters import inner_model
from lit_unlearn.models.loading import load_pretrained

Backend = Literal["round", "bitsandbytes", "gguf"]

WIDTHS: Mapping[str, Collection[int]] = {"round": range(2, 9), "bitsandbytes": (4, 8), "gguf": (4, 8)}
"""The widths in bits that each backend rounds to."""

_GGUF_TYPES = {8: "Q8_0", 4: "Q4_0"}
_GGUF_BLOCK = 32  # weights of a row that share a scale


@dataclass(frozen=True)
class Rounding:
    """An attack that rounds the weights of every linear layer but the head. Small changes of the weights can be lost in it.

    Args:
        bits: Width of the rounded weights.
        backend: The rounding. ``"round"``: to the nearest value, symmetric, with a scale for each output row, 2 to 8 bits.
            ``"bitsandbytes"``: LLM.int8 or NF4, through a temporary copy on disk. ``"gguf"``: to the values that a GGUF file of
            type Q8_0 or Q4_0 holds, which the package gguf computes; such a file also rounds the embeddings, and llama.cpp's
            finer 4-bit types are not in that package.

    Raises:
        ConfigError: If ``backend`` is unknown, or does not round to ``bits``.
    """

    bits: int
    backend: Backend = "round"

    name: ClassVar[str] = "rounding"
    unit: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        with arguments_of(self):
            check_widths(self.backend, [self.bits])

    @property
    def effort(self) -> int:
        """Number of bits."""
        return self.bits

    def change_model(
        self, lm: LanguageModel, examples: Sequence[Example] = (), token_budget: int = 0
    ) -> Iterator[tuple[int, LanguageModel]]:
        """Yield the number of bits and a rounded copy.

        Args:
            lm: Loaded; it is left as it was.
            examples: Not used.
            token_budget: Not used.

        Raises:
            ConfigError: If the backend's package is not installed.
            ModelError: If the model cannot be rounded.
        """
        with arguments_of(self):
            check_package(self.backend)
        with changing_weights(lm):
            if self.backend == "bitsandbytes":
                changed = load_quantized(lm, self.bits)
            else:
                changed = copy_model(lm)
                round_weights(changed.model, self.bits, round_as_gguf if self.backend == "gguf" else round_to_nearest)
        yield self.bits, changed


def check_widths(backend: str, bits: Sequence[int]) -> None:
    """Raise ConfigError unless a backend is known and rounds to all these widths."""
    if backend not in WIDTHS or not set(bits) <= set(WIDTHS[backend]):
        raise ConfigError(
            "`backend` 'round' rounds to `bits` from 2 to 8, and 'bitsandbytes' and 'gguf' to 4 or 8; got "
            f"{backend!r} and {list(bits)}.",
            argument="bits",
        )


def check_package(backend: str) -> None:
    """Raise ConfigError unless the package of a backend is installed."""
    if backend != "round" and importlib.util.find_spec(backend) is None:
        message = f"`backend` '{backend}' needs `pip install {backend}`; or choose 'round'."
        raise ConfigError(message, argument="backend")


@torch.no_grad()
def round_weights(model: Any, bits: int, round_weight: Callable[[Tensor, int], Tensor] | None = None) -> None:
    """Round the weights of every linear layer but the head, in place.

    Args:
        model: A causal LM of transformers. Weights outside of ``nn.Linear``, such as experts that share one tensor, stay.
        bits: As for `round_to_nearest`.
        round_weight: ``None`` for `round_to_nearest`. It returns the weight itself to leave it as it is.

    Raises:
        ModelError: If nothing was rounded: there is no such layer, or all of them were left as they are.
    """
    # The head stays, as transformers leaves it with bitsandbytes.
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    is_rounded = False
    for layer in layers:
        rounded = (round_weight or round_to_nearest)(layer.weight, bits)
        if rounded is not layer.weight:
            layer.weight.copy_(rounded)
            is_rounded = True
    if not is_rounded:
        raise ModelError(
            f"{type(model).__name__} has no nn.Linear but the head that this backend rounds, so that nothing would be rounded: set "
            "`bits` to []."
        )


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


def round_as_gguf(weight: Tensor, bits: int) -> Tensor:
    """Round a weight to what is read back from a GGUF file, through the integers that the file holds.

    Args:
        weight: Shape ``(rows, columns)``. With columns that are no multiple of 32 it is left as it is: a file has floats then.
        bits: 8 for Q8_0, 4 for Q4_0.

    Returns:
        Shape ``(rows, columns)``, float32.
    """
    from gguf import GGMLQuantizationType, quants

    if weight.shape[1] % _GGUF_BLOCK:
        return weight
    kind = GGMLQuantizationType[_GGUF_TYPES[bits]]
    values = quants.quantize(weight.float().cpu().numpy(), kind)
    return torch.from_numpy(quants.dequantize(values, kind)).to(weight.device)


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
