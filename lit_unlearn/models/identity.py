"""What a model is known by: checksums of its weights, of its base model, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_unlearn.models import adapter_configs
from lit_unlearn.models.weights import checksum

if TYPE_CHECKING:
    from lit_unlearn.models.language_model import LanguageModel


def checksum_weights(lm: LanguageModel) -> str:
    """Return a checksum of the weights as they are now, with an adapter of those that are trained.

    A collective call if the model is sharded.
    """
    model = cast(nn.Module, lm.model)
    if not lm.has_adapter:
        return checksum(lm.causal_lm.state_dict().items())
    # The base does not change; and an export may load it in another dtype.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return checksum((name, tensor) for name, tensor in model.state_dict().items() if name in trained)


def describe_base(lm: LanguageModel) -> dict[str, str]:
    """Return what the base model is known by in checkpoints: a checksum, and the dtype that it was loaded in.

    Of a model made from a config it is a digest of the config: the checkpoint has all of its weights, and where they began
    does not matter.
    """
    if lm.has_random_weights and not lm.has_adapter:
        fields = json.dumps(lm.config, sort_keys=True, default=str)
        return {"config": hashlib.sha256(fields.encode()).hexdigest()[:16]}
    # Of most numbers: a quantised model has a few dtypes, and a saved adapter is wider than its base model.
    dtypes: Counter[torch.dtype] = Counter()
    for _, tensor in _base_weights(lm):
        dtypes[tensor.dtype] += tensor.numel()
    dtype = dtypes.most_common(1)[0][0]
    return {"dtype": str(dtype).removeprefix("torch."), "weights": checksum(_base_weights(lm), dtype)}


def has_base(lm: LanguageModel, base: Mapping[str, str]) -> bool:
    """Return whether the base model is the one that `describe_base` returned in another run.

    The dtypes may differ: the values are compared in the one that the other run had loaded.
    """
    known = lm.base_checksum()
    if "config" in base or "config" in known or known["dtype"] == base["dtype"]:
        return known == base
    return checksum(_base_weights(lm), getattr(torch, base["dtype"])) == base["weights"]


def _base_weights(lm: LanguageModel) -> list[tuple[str, Tensor]]:
    """Return the floating-point parameters that are not trained; quantised integers depend on the device."""
    weights = []
    for name, parameter in cast(nn.Module, lm.model).named_parameters():
        is_trained = lm.has_adapter and parameter.requires_grad
        if parameter.is_floating_point() and not is_trained:
            weights.append((name, parameter.detach()))
    return weights


def describe_origin(lm: LanguageModel) -> dict[str, Any]:
    """Return where the loaded weights came from, and which adapter was put on them, in plain types.

    Weights are known by the sha256 of their files, which anybody can check without this package and whatever the dtype,
    unlike `fingerprint`; those of a hub name by their commit as well. Reads the files completely.

    Returns:
        ``name``, ``architecture``, ``revision`` as asked for, ``commit``, ``weights`` (sha256 by file), ``adapter``
        (``peft_type`` and the fields that are not its defaults) and, if the weights are an adapter's, ``base`` (``name``,
        ``revision``, ``commit`` and ``weights`` of its base model, and whether it was ``merged``), and ``teacher``, all of
        this for the teacher if it is loaded; ``None`` or empty where there is none.
    """
    files, teacher = lm.files, lm.teacher
    base: dict[str, Any] | None = None
    if files is not None and files.base is not None:
        base = {"name": files.base.name, "revision": files.base.revision, **files.base.describe()}
        base["merged"] = lm.merges_adapter
    return {
        "name": lm.name or lm.causal_lm.config.name_or_path or None,
        "architecture": type(lm.causal_lm).__name__,
        "revision": lm.hub_settings["revision"],
        **({"commit": None, "weights": {}} if files is None else files.describe()),
        "adapter": adapter_configs.adapter_settings(lm.model) if lm.has_adapter else None,
        "base": base,
        "teacher": None if teacher is None or not teacher.is_loaded else describe_origin(teacher),
    }
