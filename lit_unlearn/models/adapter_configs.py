"""Settings of adapters and of quantised bases: their fields become configs of peft and transformers, or an error says why not."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lit_unlearn.errors import ConfigError, reading

if TYPE_CHECKING:
    from peft import PeftConfig


UNTRAINABLE = (
    "the weights of a quantised model are integers, which no gradient step can move: train an adapter beside them by "
    "setting `adapter`, such as {r: 16, lora_alpha: 32}, or load the model without quantisation."
)


def adapter_config(fields: Mapping[str, Any], owner: object = None) -> PeftConfig:
    """Return the peft config of an adapter; by default LoRA on every linear layer but the head.

    Args:
        fields: ``peft_type`` and the fields of its config.
        owner: Whose argument ``adapter`` this is, for errors.

    Raises:
        ConfigError: If peft has no such type or field, or the adapter could not be trained or switched off here.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    kind = str(fields.get("peft_type", "LORA")).upper()
    config_classes = {peft_type.value: config_class for peft_type, config_class in CONFIGS.items()}
    _check_names("`adapter`, `peft_type`", [kind], config_classes, owner, "adapter")
    config_class = config_classes[kind]
    field_names = [field.name for field in dataclasses.fields(config_class) if field.init]
    _check_names(f"`adapter` of type {kind}", fields, field_names, owner, "adapter")

    values = {**fields, "peft_type": kind}
    for name, default in {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}.items():
        if name in field_names:
            values.setdefault(name, default)
    with reading("the adapter config", dict(fields), "Check `adapter`.", owner=owner, argument="adapter"):
        config: PeftConfig = config_class(**values)
    check_kind(config, owner)
    check_bias(config, owner)
    return config


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return what `adapter_config` was given, as far as it is not the default, from the adapter in use."""
    config = next(iter(model.peft_config.values()))
    defaults = vars(type(config)())
    # They say where the adapter came from, not what is trained.
    ignored = {"base_model_name_or_path", "inference_mode", "revision", "peft_version"}
    settings = {"peft_type": config.peft_type.value}
    for name, value in vars(config).items():
        if name not in ignored and value != defaults.get(name):
            settings[name] = sorted(value) if isinstance(value, set) else value
    return settings


def quantization_config(
    fields: Mapping[str, Any], model: str | None, trains_adapter: bool, owner: object = None
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantise a model.

    Args:
        fields: ``quant_method`` and the fields of its config.
        model: Where the weights come from.
        trains_adapter: Whether an adapter is trained beside the weights.
        owner: Whose argument ``quantization`` this is, for errors.

    Raises:
        ConfigError: If transformers has no such method or field, there are no weights, or nothing could be trained.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    if model is None:
        message = "`quantization` rounds the weights of a trained model: give `model`, not `config`."
        raise ConfigError(message, owner=owner, argument="quantization")
    if not trains_adapter:
        message = f"`quantization` without `adapter`: {UNTRAINABLE}"
        raise ConfigError(message, owner=owner, argument="adapter")
    remedy = "Check `quantization`."
    with reading("the quantisation config", dict(fields), remedy, owner=owner, argument="quantization"):
        config = AutoQuantizationConfig.from_dict(dict(fields))
    # transformers ignores unknown fields.
    field_names = [*inspect.signature(type(config).__init__).parameters, "quant_method"]
    _check_names(f"`quantization` ({type(config).__name__})", fields, field_names, owner, "quantization")
    return {"quantization_config": config}


def _check_names(where: str, given: Iterable[str], known: Iterable[str], owner: object, argument: str) -> None:
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(sorted(known))}."
        raise ConfigError(f"{where}: there is no '{name}'; {advice}", owner=owner, argument=argument)


def check_kind(config: Any, owner: object = None, argument: str = "adapter") -> None:
    """Raise ConfigError if adapters of a config's kind work outside of the model's layers, past the losses."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = str(getattr(config.peft_type, "value", config.peft_type))
    # Tuners that work outside of the layers have a forward pass of their own, and aLoRA changes its inputs.
    forward = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "forward", None)
    if forward is not BaseTuner.forward or getattr(config, "alora_invocation_tokens", None):
        message = (
            f"adapters of this type ({kind}) are refused: a part of their work is done outside of the model's layers (virtual "
            "tokens, an extra loss, an extra pass), which the losses here never see. Use one that lives in the layers, such "
            "as `peft_type: LORA`."
        )
        raise ConfigError(message, owner=owner, argument=argument)


def check_bias(config: Any, owner: object = None, argument: str = "adapter") -> None:
    """Raise ConfigError if an adapter would train biases of the base model, which stay when it is switched off."""
    if getattr(config, "bias", "none") != "none":
        message = (
            f"`bias: {config.bias}` trains biases of the base model, which stay when the adapter is switched off: the "
            "reference model would move. Set `bias: none` in `adapter`."
        )
        raise ConfigError(message, owner=owner, argument=argument)
