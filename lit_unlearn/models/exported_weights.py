"""The weights that an export of a model has, rounded and merged: put in place for a measurement, and written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lit_unlearn.models import adapters, loading, merging
from lit_unlearn.models.weights import TemporaryValues, changes_values, convert

if TYPE_CHECKING:
    from lit_unlearn.models.language_model import LanguageModel


def is_rounded(lm: LanguageModel, dtype: torch.dtype | None = None) -> bool:
    """Return whether an export in ``dtype`` computes something else than the model in memory.

    Args:
        lm: The model.
        dtype: ``None`` for that of the base model's files.
    """
    dtype = dtype or lm.files_dtype
    if dtype is None or getattr(lm.causal_lm, "is_quantized", False):
        return False
    if lm.has_adapter and dtype not in (torch.float32, torch.float64):
        # Small changes are lost where they are added to large weights.
        return True
    return changes_values(lm.causal_lm.state_dict().values(), dtype)


@contextmanager
def put_in_place(lm: LanguageModel, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Give the model within the block the weights that an export in ``dtype`` has: rounded and, with an adapter, merged.

    Takes memory for a copy of the weights, and nothing where the export has the very weights of the model.

    Args:
        lm: The model.
        dtype: ``None`` for that of the base model's files.

    Raises:
        RuntimeError: If the model is sharded and has an adapter.
    """
    dtype = dtype or lm.files_dtype
    if dtype is None or lm.temporary_values is not None or not is_rounded(lm, dtype):
        yield
        return
    with ExitStack() as stack:
        if lm.has_adapter:
            model = cast("adapters.PeftModel", lm.model)
            merged = merging.merged_state(model, model.state_dict(), dtype)
            tensors = merging.base_tensors(model)
            values = TemporaryValues(list(tensors.values()), [merged[name] for name in tensors], dtype)
            stack.enter_context(adapters.adapter_switched_off(model))
        else:
            floats = [tensor for tensor in lm.causal_lm.state_dict().values() if tensor.is_floating_point()]
            values = TemporaryValues(floats, None, dtype)
        values.put_in()
        lm.temporary_values = values
        try:
            yield
        finally:
            lm.temporary_values = None
            # FSDP2 may hold whole weights that it has gathered; asking for the state makes it let go of them.
            cast(nn.Module, lm.model).state_dict()
            values.take_out()


def save_weights(lm: LanguageModel, folder: Path, state: dict[str, Tensor] | None, dtype: torch.dtype | None) -> None:
    """Write the weights into a folder that exists, with an adapter both merged and alone.

    Args:
        lm: The model.
        folder: Where to.
        state: The gathered state of ``lm.model``; ``None`` to read the model.
        dtype: Of the weights; ``None`` for that of the weights in memory.
    """
    if lm.has_adapter:
        merging.save_adapted(cast("adapters.PeftModel", lm.model), folder, state, dtype)
    else:
        if dtype is not None:
            state = convert(lm.causal_lm.state_dict() if state is None else state, dtype)
        lm.causal_lm.save_pretrained(folder, state_dict=state)
    # Where only the adapter could be saved, there is no config of a model.
    if dtype is not None and (folder / "config.json").is_file():
        loading.write_dtype(folder, dtype)
