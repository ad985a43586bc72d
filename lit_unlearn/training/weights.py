"""Weights of a LightningModule's model: loading them for a Trainer, and checking those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.errors import CheckpointError
from lit_unlearn.models import LanguageModel

# Mixed precision keeps float32 weights.
TRUE_PRECISION = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Dtypes of the weights by the Trainer's precision; float32 with any other one."""


def load_for_trainer(lm: LanguageModel, trainer: L.Trainer | None) -> None:
    """Load a model in the dtype that the Trainer's precision calls for, and log what it is."""
    if not lm.is_loaded:
        precision = "32-true" if trainer is None else str(trainer.precision)
        # It may take minutes, and the hub's own bar is there only while files are fetched.
        rank_zero_info(f"loading the model {lm.name or 'from its config, with random weights'}")
        # The strategy moves the weights to its device.
        lm.load(TRUE_PRECISION.get(precision, torch.float32), device="cpu")
        rank_zero_info(f"model: {describe_model(lm)}")


def saved_tensor_names(module: L.LightningModule, lm: LanguageModel) -> set[str]:
    """Return the names of the tensors in the module's checkpoints: of an adapted model, only those of the adapter."""
    if lm.has_adapter:
        return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name for name in module.state_dict() if not name.startswith(("lm.frozen.", "lm.teacher."))}


def check_tensors(checkpoint: dict[str, Any], module: L.LightningModule, lm: LanguageModel) -> None:
    """Raise an error unless a checkpoint has all tensors that the module saves, in the same shapes, and no others.

    Raises:
        CheckpointError: If some are missing, unknown or of another shape.
    """
    # Sharding strategies load tensors by themselves, and leave no state in the checkpoint.
    if "state_dict" not in checkpoint:
        return
    saved, names = checkpoint["state_dict"], saved_tensor_names(module, lm)
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    misfits = names - saved.keys()
    for name, value in saved.items():
        # Of an adapted model, a checkpoint may have the base as well: where it was sharded.
        is_unknown = name not in shapes and module.strict_loading
        if is_unknown or (name in names and value.shape != shapes[name]):
            misfits.add(name)
    if misfits:
        raise CheckpointError(
            f"the checkpoint does not fit the {'adapter' if lm.has_adapter else 'model'}: {len(misfits)} tensors, such as "
            f"'{min(misfits)}', are missing in one of the two or of another shape. It was made with another `lm`: give the "
            "same, or start a new run.",
            owner=module,
            argument="lm",
        )


def check_base(run: Mapping[str, Any], owner: object, lm: LanguageModel) -> None:
    """Raise an error if a checkpoint was trained from another base model.

    Its tensors may fit all the same. But the record would then name a model that the weights do not come from, and what is
    relative to the model before unlearning would be relative to another one.

    Args:
        run: The checkpoint's ``run``; one of an earlier version does not know its base.
        owner: Whose argument ``lm`` is.
        lm: Loaded, and neither trained nor sharded when its `base_checksum` was first asked for.

    Raises:
        CheckpointError: If it is another one.
    """
    base = run.get("base")
    if base is None or lm.has_base(base):
        return
    name = f"'{lm.name}'" if lm.name else "the model"
    raise CheckpointError(
        f"the checkpoint was not trained from this base model: {name} has other weights (checksum "
        f"{lm.base_checksum()}, in the checkpoint {base}). Give the `model` that the run was started with and, if its files "
        "have more digits than the run used, the same precision; or start a new run.",
        owner=owner,
        argument="lm",
    )


def describe_model(lm: LanguageModel) -> str:
    """Return one line on architecture, size, dtype and the paths that the model takes."""
    model: Any = lm.model
    trainable = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    total = sum(parameter.numel() for parameter in model.parameters())
    kind = f"{type(model.get_base_model()).__name__} with an adapter" if lm.has_adapter else type(model).__name__
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trainable}))
    head = "linear head" if lm.linear_head else "full logits, because its head is not a plain linear layer"
    padding = "" if lm.packs else ", padded batches, because it lets packed sequences see each other"
    return f"{kind}, {count:,} trainable parameters of {total:,}, {dtypes}, {head}{padding}"
