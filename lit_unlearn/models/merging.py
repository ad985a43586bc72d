"""Adapters merged into their base model: the state of an ordinary model that computes the same, and what is written of both."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_unlearn.models.adapter_configs import check_kind
from lit_unlearn.models.adapters import (
    REFERENCE,
    check_tied_embeddings,
    inner_model,
    is_adapted_layer,
    read_adapter,
    read_config,
    reading_adapter,
)
from lit_unlearn.models.weights import convert

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PreTrainedModel, folder: str, owner: object = None) -> PreTrainedModel:
    """Add a saved adapter to the weights of its base model, in float32 and rounded once.

    Args:
        model: The base model, loaded and not quantised; changed in place.
        folder: As peft wrote it.
        owner: The object whose argument ``model`` the folder is, for errors.

    Returns:
        The model, an ordinary one.

    Raises:
        ModelError: If the adapter cannot be read, does not fit the model, or cannot be merged.
    """
    check_kind(read_config(folder, owner), owner, "model")
    adapted = read_adapter(model, folder, owner, is_trainable=False)
    check_tied_embeddings(adapted, owner, "model")
    with reading_adapter(folder, owner, "It cannot be merged: set `merge_adapter` to false, and go on training it."):
        state = merged_state(adapted, adapted.state_dict())
    unload: Any = adapted.unload
    base: PreTrainedModel = unload()
    base.load_state_dict(state)
    # Left behind, peft would take the model for one with an adapter.
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base.requires_grad_()


def save_adapted(model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None, dtype: torch.dtype | None) -> None:
    """Write the merged model into a folder and the adapter into its ``adapter``; the model itself is not touched.

    Where the adapter cannot be merged, only the adapter is written, with a warning that says why.

    Args:
        model: Adapted.
        folder: Exists.
        state: The model's gathered state by its own names; ``None`` to read the model.
        dtype: Of the merged model; ``None`` for that of the weights in memory.
    """
    inner = inner_model(model)
    state = model.state_dict() if state is None else state
    # The default, "auto", would ask the hub whether the vocabulary has grown.
    names = [name for name in model.peft_config if name != REFERENCE]
    model.save_pretrained(
        str(folder / "adapter"), selected_adapters=names, state_dict=state, save_embedding_layers=False
    )
    _forget_base_folder(folder / "adapter", str(getattr(inner.config, "name_or_path", "")))
    try:
        if getattr(inner, "is_quantized", False):
            raise ValueError("the base model is quantised, and an adapter cannot be added to its integers.")
        merged = merged_state(model, state, dtype)
    except (RuntimeError, ValueError) as reason:  # peft's, for kinds and biases that have no merged form
        warnings.warn(
            f"only the adapter is exported, to be put on the base model by `peft.PeftModel.from_pretrained`: {reason}",
            stacklevel=3,
        )
    else:
        inner.save_pretrained(folder, state_dict=merged)


def _forget_base_folder(folder: Path, base: str) -> None:
    """Leave only the last part of the base model's absolute path in what peft has written: exports are published."""
    if not Path(base).is_absolute():
        return
    for file in (folder / "adapter_config.json", folder / "README.md"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(base, Path(base).name), encoding="utf-8")


def merged_state(model: PeftModel, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the state of an ordinary model that computes what the adapted one does.

    Args:
        model: Adapted.
        state: Its state, whole.
        dtype: Of the result. Layers are merged in float32 and rounded once; ``None`` for that of the base model's weights.
    """
    # Layers are copied and merged one at a time, on the CPU, with the weights that the state has for them: the live ones
    # may be sharded, and a second model may not fit.
    merged = dict[str, Tensor]()
    merged_layers = tuple[str, ...]()
    for name, layer in model.named_modules():
        if not is_adapted_layer(layer) or name.startswith(merged_layers):
            continue
        merged_layers += (f"{name}.",)

        # deepcopy takes the weights from its memo in place of the live ones.
        memo = dict[int, nn.Parameter]()
        for key, parameter in layer.named_parameters():
            weight = state[f"{name}.{key}"].detach().to("cpu", copy=True)
            memo[id(parameter)] = nn.Parameter(weight, requires_grad=False)
        layer_copy: Any = copy.deepcopy(layer, memo).cpu()
        if dtype is not None:
            layer_copy = layer_copy.to(torch.promote_types(dtype, torch.float32))
        else:
            widths = [parameter.dtype for parameter in layer_copy.parameters() if parameter.is_floating_point()]
            layer_copy = layer_copy.to(functools.reduce(torch.promote_types, widths))
        # A validation may run under autocast, which would round the product of the adapter's matrices.
        with torch.autocast("cpu", enabled=False):
            if hasattr(layer_copy, "unload_and_optionally_merge_module"):
                base = layer_copy.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer_copy.merge()
                base = layer_copy.get_base_layer()
        for key, weight in base.state_dict().items():
            original = state.get(f"{name}.base_layer.{key}", state.get(f"{name}.original_module.{key}", weight))
            merged[f"{name}.{key}"] = weight.to(dtype or original.dtype)

    for name, weight in state.items():
        if not name.startswith(merged_layers):
            merged[name] = weight
    prefix = "base_model.model."  # peft's; whatever lies elsewhere is not the model's
    inner = {name.removeprefix(prefix): weight for name, weight in merged.items() if name.startswith(prefix)}
    return inner if dtype is None else convert(inner, dtype)


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors that an adapted model computes with while its adapter is off, by the names of `merged_state`."""
    tensors = dict[str, Tensor]()
    adapted_layers = tuple[str, ...]()
    inner = inner_model(model)
    for name, layer in inner.named_modules():
        if not is_adapted_layer(layer) or name.startswith(adapted_layers):
            continue
        adapted_layers += (f"{name}.",)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
        for key, tensor in base.state_dict().items():
            tensors[f"{name}.{key}"] = tensor
    for name, tensor in inner.state_dict().items():
        if not name.startswith(adapted_layers):
            tensors[name] = tensor
    return tensors
