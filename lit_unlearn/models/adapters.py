"""LoRA and its relatives through peft, quantised bases, activation checkpointing."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.probing import probe_logits

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft import PeftModel as PeftModel  # for model.py too, whose own such imports jsonargparse executes
    from transformers import PreTrainedModel

UNTRAINABLE = (
    "the weights of a quantised model are integers, which no gradient step can move: train an adapter beside them by "
    "setting `model.lm.adapter`, such as {r: 16, lora_alpha: 32}, or load the model without quantisation."
)


def adapter_config(fields: Mapping[str, Any]) -> PeftConfig:
    """The peft config of an adapter; by default LoRA on every linear layer but the head.

    Args:
        fields: ``peft_type`` and the fields of its config.

    Raises:
        ValueError: If peft has no such type or field, or the adapter could not be trained or switched off here.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    kind = str(fields.get("peft_type", "LORA")).upper()
    by_name = {peft_type.value: config for peft_type, config in CONFIGS.items()}
    _check_names("`model.lm.adapter.peft_type`", [kind], by_name)
    known = [field.name for field in dataclasses.fields(by_name[kind]) if field.init]
    _check_names(f"`model.lm.adapter` of type {kind}", fields, known)
    defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    values = {name: value for name, value in defaults.items() if name in known} | {**fields, "peft_type": kind}
    config = by_name[kind](**values)
    _check_config(config)
    return config


def quantization_config(
    fields: Mapping[str, Any], model: str | None, adapter: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How ``from_pretrained`` is told to quantise.

    Args:
        fields: ``quant_method`` and the fields of its config.
        model: Where the weights come from.
        adapter: What is to be trained.

    Raises:
        ValueError: If transformers has no such method or field, there are no weights, or nothing could be trained.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    if model is None:
        raise ValueError("`model.lm.quantization` rounds the weights of a trained model: give `model`, not `config`.")
    if adapter is None:
        raise ValueError(f"`model.lm.quantization` without `adapter`: {UNTRAINABLE}")
    config = AutoQuantizationConfig.from_dict(dict(fields))
    known = [*inspect.signature(type(config).__init__).parameters, "quant_method"]
    _check_names(f"`model.lm.quantization` ({type(config).__name__})", fields, known)  # transformers ignores the others
    return {"quantization_config": config}


def _check_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(sorted(known))}."
            raise ValueError(f"{where}: there is no '{name}'; {meant}")


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Puts an adapter into the layers of a model, in the model's own dtype; only the adapter is left to train.

    Args:
        model: Loaded; changed in place.
        config: From `adapter_config`.

    Raises:
        ValueError: If the model with the adapter switched off is not the model from before.
    """
    from peft import get_peft_model

    _keep_gradients(model)
    before = probe_logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks for it
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)  # a quantised layer gives its adapter torch's default
    with reference(adapted):
        if not torch.equal(before, probe_logits(model)):
            raise ValueError(
                "the adapter changed the base model itself, so that switching it off would not give back the model before "
                "unlearning: leave `init_lora_weights` in `model.lm.adapter` at true, and use none of PiSSA, OLoRA, CorDA, "
                "LoftQ, KaSA and layer replication."
            )
    return adapted


def check_adapter(model: PreTrainedModel | PeftModel) -> None:
    """Refuses adapters that would not be trained, could not be switched off, or could not be exported.

    Args:
        model: Any; one without adapters passes.

    Raises:
        ValueError: With the mechanism and what to do instead.
    """
    inner = inner_model(model)
    if getattr(inner, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model was loaded with an adapter by transformers itself, which would export the adapter alone, although the "
            "other weights were trained: merge the adapter first, or wrap a `peft.PeftModel`."
        )
    if not is_adapted(model):
        return
    _keep_gradients(inner)
    for config in model.peft_config.values():
        _check_config(config)
    if _is_changed(inner.get_output_embeddings()):
        raise ValueError(
            "the losses read the head's weight directly, past an adapter on it, which would never be trained: remove the head "
            "(`lm_head`) from `target_modules`, `modules_to_save` and the like."
        )
    tied = getattr(inner.config.get_text_config(), "tie_word_embeddings", False)
    if tied and _is_changed(inner.get_input_embeddings()):
        raise ValueError(
            "the embeddings are tied to the head: an adapter would change the one and not the other, and an exported model has "
            "only one weight for both. Remove the embeddings (`embed_tokens`) from `target_modules`, `modules_to_save` and "
            "`trainable_token_indices`."
        )
    if any(_is_changed(module) and module.merged_adapters for module in inner.modules()):
        raise ValueError(
            "the adapter is merged into the model and would not be trained: call `unmerge_adapter()` first."
        )


def _check_config(config: Any) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = str(getattr(config.peft_type, "value", config.peft_type))
    forward = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "forward", None)
    if forward is not BaseTuner.forward or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"adapters of this type ({kind}) are refused: a part of their work is done outside of the model's layers (virtual "
            "tokens, an extra loss, an extra pass), which the losses here never see. Use one that lives in the layers, such "
            "as `peft_type: LORA`."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"`bias: {config.bias}` trains biases of the base model, which stay when the adapter is switched off: the "
            "reference model would move. Set `bias: none` in `model.lm.adapter`."
        )


def adapter_settings(model: Any) -> dict[str, Any]:
    """Return what `adapter_config` was given, as far as it is not the default, from the adapter in use."""
    config = next(iter(model.peft_config.values()))
    place = ("base_model_name_or_path", "inference_mode", "revision", "peft_version")  # not meaningful for training
    defaults = vars(type(config)())
    changed = {key: value for key, value in vars(config).items() if key not in place and value != defaults.get(key)}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}
    return {"peft_type": config.peft_type.value, **plain}


def is_adapted(model: nn.Module | None) -> bool:
    """Whether a model is a `peft.PeftModel`, without importing peft."""
    return hasattr(model, "get_base_model")


def inner_model(model: Any) -> Any:
    """The transformers model, whose layers hold the adapters if there are any."""
    return model.get_base_model() if is_adapted(model) else model


def _keep_gradients(model: nn.Module) -> None:
    """Keeps bitsandbytes from a form of its 4-bit layers for CPUs that, after one evaluation, has no backward pass."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _is_changed(layer: nn.Module) -> bool:
    """Whether peft has put itself in the place of a layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))


@contextmanager
def reference(model: PeftModel) -> Iterator[None]:
    """Switches the adapters off within the block, which computes the base model bit for bit."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    switched_off: Any = model.disable_adapter
    try:
        with evaluation_mode(model), switched_off():
            yield
    finally:
        for parameter, requires_grad in trainable:  # peft leaves every adapter trainable, frozen ones too
            parameter.requires_grad_(requires_grad)


def save_adapted(model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Writes the merged model into a folder and the adapter into its ``adapter``; the model itself is not touched.

    Where the adapter cannot be merged, only the adapter is written, with a warning that says why.

    Args:
        model: Adapted.
        folder: Exists.
        state: The model's whole state by its own names; ``None`` to read the model.
    """
    inner = inner_model(model)
    state = model.state_dict() if state is None else state
    # "auto" would ask the hub whether the vocabulary has grown
    model.save_pretrained(str(folder / "adapter"), state_dict=state, save_embedding_layers=False)
    try:
        if getattr(inner, "is_quantized", False):
            raise ValueError("the base model is quantised, and its integers have no room for the adapter.")
        merged = _merged_state(model, state)
    except (RuntimeError, ValueError) as reason:  # what peft raises for kinds and biases that have no merged form
        warnings.warn(
            f"only the adapter is exported, to be put on the base model by `peft.PeftModel.from_pretrained`: {reason}",
            stacklevel=3,
        )
    else:
        inner.save_pretrained(folder, state_dict=merged)


def _merged_state(model: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an ordinary model that computes what the adapted one does.

    Layers are copied and merged one at a time, on the CPU, with the weights that the state has for them; so it is all
    the same whether the live ones are sharded.
    """
    merged, done = dict[str, Tensor](), tuple[str, ...]()
    for name, layer in model.named_modules():
        if not _is_changed(layer) or name.startswith(done):
            continue
        done += (f"{name}.",)
        weights = {id(p): state[f"{name}.{key}"].detach().to("cpu", copy=True) for key, p in layer.named_parameters()}
        memo = {key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()}
        whole: Any = copy.deepcopy(layer, memo).cpu()  # the memo stands in for the live weights
        if hasattr(whole, "unload_and_optionally_merge_module"):
            base = whole.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            whole.merge()
            base = whole.get_base_layer()
        merged |= {f"{name}.{key}": weight for key, weight in base.state_dict().items()}
    merged |= {name: weight for name, weight in state.items() if not name.startswith(done)}
    prefix = "base_model.model."  # peft's; what lies elsewhere is not the model's
    return {name.removeprefix(prefix): weight for name, weight in merged.items() if name.startswith(prefix)}


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps only each layer's input for the backward pass, which computes the rest again: less memory, more time.

    Args:
        model: Any whose layers support it; transformers refuses the others.
    """
    newer = hasattr(model, "activation_checkpointing_enable")
    enable: Any = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # for the reentrant kind alone; frozen layers would keep activations
