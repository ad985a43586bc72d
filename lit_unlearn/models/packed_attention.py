"""What a model is told about packed rows, so that each token sees its own sequence alone.

It depends on the implementation of attention that transformers runs (``attn_implementation``):

======================  ==============================================  ===========================
implementation          sequences in a row                              first tokens that they share
======================  ==============================================  ===========================
``sdpa``                dense mask, made by transformers of positions   dense mask
``eager``               the same, as numbers that are added             the same, as numbers
``flex_attention``      block mask, made by transformers of positions   block mask
flash attention         where they begin, and no mask                   cannot be told
======================  ==============================================  ===========================

Whether a model follows is probed when it is loaded. One that does not is padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_unlearn.errors import ConfigError
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.transfer import send

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BOUNDS = "bounds"
"""Key of a packed batch for `find_bounds` of its positions, as numbers: no value is read from the device for it."""

TAKES_MASKS = ("sdpa", "eager", "flex_attention")
"""Implementations that follow any mask."""


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Return whether the rows of a batch hold several sequences each."""
    return "position_ids" in batch and "attention_mask" not in batch


def uses_flash(config: PreTrainedConfig) -> bool:
    """Return whether attention is one of the flash attention packages, which take no mask."""
    return "flash" in (config._attn_implementation or "")


def check_attention(model: PreTrainedModel, owner: object = None) -> None:
    """Raise ConfigError if the model's attention cannot be trained where, or as, the weights are.

    Otherwise the libraries would say so at the first step.
    """
    config, dtype = model.config, cast(nn.Embedding, model.get_input_embeddings()).weight.dtype
    name = config._attn_implementation
    if name == "flex_attention" and model.device.type == "cpu":
        message = "`attn_implementation` flex_attention has no backward pass on a CPU: leave it out, or use a GPU."
        raise ConfigError(message, owner=owner, argument="attn_implementation")
    # Of a quantised model, only what is not quantised has this dtype; it computes in another one.
    is_quantized = getattr(model, "is_quantized", False)
    if uses_flash(config) and dtype == torch.float32 and not is_quantized:
        message = f"`attn_implementation` {name} computes in 16 bits, but the weights have 32: train at `bf16-true`, or leave it out."
        raise ConfigError(message, owner=owner, argument="attn_implementation")


# Arguments ------------------------------------------------------------------------------------------------------------


def find_bounds(position_ids: Tensor) -> list[int]:
    """Return where sequences begin among the tokens of packed rows, one row after the other, and where the last one ends.

    Args:
        position_ids: Shape ``(R, L)``.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return [*begins.flatten().nonzero().flatten().tolist(), position_ids.numel()]


def packed_arguments(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model needs beside ids and positions to keep the sequences of a packed batch apart.

    Args:
        model: Any causal LM.
        batch: On the model's device; see `packing.pack`.
    """
    config = model.config
    if "segments" in batch:
        segments = batch["segments"]
        if config._attn_implementation == "flex_attention":
            return {"attention_mask": _make_block_mask(segments)}
        mask = segment_mask(segments)
        if config._attn_implementation == "eager":
            # It adds what it is given to the scores.
            dtype = cast(nn.Embedding, model.get_input_embeddings()).weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return {"attention_mask": mask}
    if not uses_flash(config):
        return {}

    # Of several rows, transformers' flash attention does not look at the positions: sequences would see each other.
    positions = batch["position_ids"]
    bounds = batch[BOUNDS] if BOUNDS in batch else find_bounds(positions)
    longest = max(end - start for start, end in pairwise(bounds))
    lengths = send(torch.tensor(bounds, dtype=torch.int32), positions.device)
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


def segment_mask(segments: Tensor) -> Tensor:
    """Return which tokens of its row each token sees: those before it of its own segment, and the shared ones.

    Args:
        segments: From `packing.pack`, shape ``(R, L)``.

    Returns:
        bool, shape ``(R, 1, L, L)``, as transformers takes it.
    """
    length = segments.shape[1]
    sees = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    # No token comes after the tail, which passes for shared.
    return (sees & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()).unsqueeze(1)


def _make_block_mask(segments: Tensor) -> Any:
    """Return `segment_mask` as the block mask of flex attention."""
    # It imports torch's compiler.
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_own = segments[row, query] == segments[row, key]
        return (key <= query) & (is_own | (segments[row, key] == 0))

    rows, length = segments.shape
    # Uncompiled, it would make the dense mask first.
    is_compiled = segments.device.type == "cuda"
    return create_block_mask(sees, rows, None, length, length, device=segments.device, _compile=is_compiled)


# Probes ---------------------------------------------------------------------------------------------------------------


def separates_packed_sequences(model: PreTrainedModel) -> bool:
    """Return whether no sequence sees the one before it in its row. Where it does, losses would be silently wrong.

    transformers separates packed sequences where the model hands the positions on to the mask; not every model does.

    Args:
        model: Any causal LM; its trunk runs once on two short rows, without dropout.
    """
    if uses_flash(model.config) and not _takes_any_argument(model.base_model):
        return False
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    # The second half of both rows is the same sequence, and follows different ones.
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 1, 2, 3, 4]], device=embeddings.device)
    batch = {"input_ids": rows % embeddings.shape[0], "position_ids": torch.arange(4, device=rows.device).repeat(2, 2)}
    with evaluation_mode(model):
        output = model.base_model(**batch, **packed_arguments(model, batch), use_cache=False)[0]

    first, second = output[:, 4:].float()
    return _is_same(second, first, output.dtype)


def shares_first_tokens(model: PreTrainedModel) -> bool:
    """Return whether a model lets packed sequences share their first tokens.

    Args:
        model: Any causal LM that separates packed sequences; its trunk runs twice on short rows, without dropout.
    """
    if not takes_whole_masks(model.config):
        return False
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight
    apart = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9]], device=embeddings.device) % embeddings.shape[0]
    together = torch.cat([apart[0], apart[1, 3:]])[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]], device=apart.device)
    batch = {"segments": torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]], device=apart.device)}
    arguments = packed_arguments(model, batch)
    with evaluation_mode(model):
        expected = model.base_model(input_ids=apart, use_cache=False)[0].float()
        output = model.base_model(input_ids=together, position_ids=positions, **arguments, use_cache=False)[0]
    expected = torch.cat([expected[0], expected[1, 3:]])
    return _is_same(output[0].float(), expected, output.dtype)


def takes_whole_masks(config: PreTrainedConfig) -> bool:
    """Return whether a mask of the caller's is all that decides what a token sees, judging by the config alone."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    # A window counts the tokens of the row, in which a sequence's own tokens are apart from the shared ones.
    has_window = getattr(text, "sliding_window", None) is not None or kinds != {"full_attention"}
    return not has_window and config._attn_implementation in TAKES_MASKS


def _takes_any_argument(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _is_same(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    # Measured at random weights: exactly 0 where sequences are kept apart, 0.2 for OPT and GPT-OSS, 0.006 for BLOOM.
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    return bool((actual - expected).norm() <= tolerance * expected.norm())
