"""From the parsed options of a fit to what the formulas of its memory need to know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from lit_unlearn.errors import ConfigError
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.loading import has_tokenizer
from lit_unlearn.models.memory_plan import Setup
from lit_unlearn.models.model_sizes import ModelSizes, measure_model, read_files_dtype
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.robustness import SharpnessAware
from lit_unlearn.training.strategies import shards
from lit_unlearn.training.weights import TRUE_PRECISION

# What the Trainer takes beside the full names.
_SHORT_PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
# Elements of each side of the weight that an optimizer is tried on; its state for larger ones is proportional.
_SIDE = 64


def find_precision(precision: Any) -> str:
    """Return the full name of a Trainer's precision."""
    return _SHORT_PRECISIONS.get(str(precision), str(precision))


def find_tokenizer(settings: Mapping[str, Any]) -> str | None:
    """Return the folder of a model's tokenizer; ``None`` if it is not on this machine.

    Args:
        settings: Arguments of `LanguageModel`.
    """
    name = settings.get("tokenizer") or settings.get("model")
    return name if name is not None and has_tokenizer(Path(name)) else None


def count_devices(trainer: Namespace) -> tuple[int, int]:
    """Return the devices of a node, and of all nodes.

    Raises:
        ConfigError: If a strategy is for several devices and their number is left to the machine of the run.
    """
    devices = trainer.devices
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        if find_strategy(trainer) != "single":
            raise ConfigError(
                f"`devices={devices}` is whatever a machine has: for a plan, give the number of devices of a node, such as "
                "--trainer.devices=8.",
                argument="trainer.devices",
            )
        devices = 1
    return devices, devices * int(trainer.num_nodes or 1)


def find_strategy(trainer: Namespace) -> Any:
    """Return ``"single"``, ``"ddp"`` or ``"fsdp2"``: as the Trainer chooses, ``auto`` is DDP with several devices."""
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else strategy.class_path
    if shards(name):
        return "fsdp2"
    several = trainer.devices not in (None, "auto", 1, "1", -1) or int(trainer.num_nodes or 1) > 1
    return "ddp" if "ddp" in name.lower() or (name == "auto" and several) else "single"


def build_setup(
    config: Namespace,
    settings: Mapping[str, Any],
    model: ModelSizes,
    module: LitLanguageModel,
    devices: int,
) -> Setup:
    """Return how a model is trained.

    Args:
        config: The parsed options.
        settings: Arguments of `LanguageModel`.
        model: Its sizes.
        module: Built with another model.
        devices: On all nodes.

    Raises:
        LitUnlearnError: If a teacher is needed and missing, or the optimizer refuses its settings.
    """
    precision = find_precision(config.trainer.precision)
    dtype = TRUE_PRECISION.get(precision, torch.float32)
    optimizer_bytes, is_fused = measure_optimizer(module, model)
    strategy = find_strategy(config.trainer)
    if strategy == "fsdp2" and settings.get("quantization") is not None:
        raise ConfigError(
            "a quantised model cannot be sharded: use `ddp`, with which every device holds it, or leave out `quantization`.",
            owner=LanguageModel,
            argument="quantization",
        )
    robustness = getattr(module, "robustness", None)
    copies = 0
    if robustness is not None:
        # A copy of the gradients; sharpness-aware steps also keep the weights that they move.
        copies = 2 if isinstance(robustness, SharpnessAware) else 1
    return Setup(
        dtype=dtype,
        is_mixed="mixed" in precision,
        device="cpu" if config.trainer.accelerator == "cpu" else "cuda",
        strategy="ddp" if strategy == "single" and devices > 1 else strategy,
        devices=devices,
        optimizer_bytes=optimizer_bytes,
        optimizer_is_fused=is_fused,
        checkpointing=bool(settings.get("activation_checkpointing")),
        weight_bits=find_weight_bits(settings),
        frozen=_find_frozen(config, settings, model, module, dtype),
        gradient_copies=copies,
        rounds=_is_rounded(config, settings, model, dtype),
    )


def find_weight_bits(settings: Mapping[str, Any]) -> int:
    """Return 4 or 8 where ``quantization`` says so; 0 for floats."""
    quantization = settings.get("quantization") or {}
    if quantization.get("load_in_4bit"):
        return 4
    return 8 if quantization.get("load_in_8bit") else 0


def _find_frozen(
    config: Namespace, settings: Mapping[str, Any], model: ModelSizes, module: LitLanguageModel, dtype: torch.dtype
) -> tuple[ModelSizes, ...]:
    frozen = []
    compares = config.damage.measure == "kl" or any("reference" in term.objective.needs for term in module.terms())
    if compares and not model.has_adapter:
        frozen.append(model)
    if module.needs_teacher:
        teacher = settings.get("teacher")
        if teacher is None:
            raise ConfigError("the run needs a teacher: set `teacher`.", owner=LanguageModel, argument="teacher")
        hub_settings = {
            "revision": settings.get("teacher_revision"),
            "trust_remote_code": settings.get("trust_remote_code"),
        }
        frozen.append(measure_model({"model": teacher, **hub_settings}, dtype))
    return tuple(frozen)


def _is_rounded(config: Namespace, settings: Mapping[str, Any], model: ModelSizes, dtype: torch.dtype) -> bool:
    """Return whether validations measure weights that are rounded, as `LanguageModel.is_rounded_by` says of a loaded model."""
    # A sharded model with an adapter is exported, and so measured, in float32.
    if settings.get("quantization") is not None or (model.has_adapter and find_strategy(config.trainer) == "fsdp2"):
        return False
    name = config.export.dtype
    target = read_files_dtype(settings) if name is None else getattr(torch, name)
    if target is None:
        return False
    if model.has_adapter and target not in (torch.float32, torch.float64):
        return True
    return torch.promote_types(dtype, target) != target


def measure_optimizer(module: LitLanguageModel, model: ModelSizes) -> tuple[int, bool]:
    """Return the bytes of the optimizer's states, and whether its kernel needs no temporaries.

    It takes a step on small weights, one of each dtype: every optimizer says so itself what it keeps.
    """
    total, is_fused = 0, False
    for dtype in {parameter.dtype for parameter in model.trainable}:
        weight = nn.Parameter(torch.zeros(_SIDE, _SIDE, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        optimizer = module.build_optimizer([weight])
        optimizer.step()
        # The number of steps is one number, however large the weight is.
        states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
        per_element = sum(value.nbytes for value in states if value.numel() > 1) / weight.numel()
        elements = sum(parameter.numel() for parameter in model.trainable if parameter.dtype == dtype)
        total += round(per_element * elements)
        is_fused = bool(optimizer.defaults.get("fused"))
    return total, is_fused
