"""LoRA and its relatives through peft, quantised bases, activation checkpointing."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_unlearn.errors import ConfigError, ModelError, reading
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.probing import probe_logits
from lit_unlearn.models.weights import convert

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft import PeftModel as PeftModel  # for model.py too, whose own such imports jsonargparse executes
    from transformers import PreTrainedModel

# Of the copy of an adapter that goes on being trained. Unlikely to be the name of a user's.
_REFERENCE = "lit_unlearn_reference"

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
    _check_kind(config, owner)
    _check_bias(config, owner)
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


def attach_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter into the layers of a model, in float32 or the model's wider dtype; only the adapter is left to train.

    Args:
        model: Loaded; changed in place.
        config: From `adapter_config`.

    Raises:
        ModelError: If peft finds no layers for it, or the model with the adapter switched off is not the model from before.
    """
    from peft import get_peft_model

    _keep_backward_of_4bit(model)
    before = probe_logits(model)
    with _calling_peft(), reading("the adapter config", str(config.peft_type), "Check `adapter`.", ModelError):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    _widen(adapted, model.dtype)
    _check_base_unchanged(before, adapted)
    return adapted


def load_adapter(model: PreTrainedModel, folder: str, owner: object = None) -> PeftModel:
    """Put a saved adapter into the layers of its base model, to go on training it.

    The reference model is then the base model with the adapter as it was saved, of which a copy is kept.

    Args:
        model: The base model, loaded; changed in place.
        folder: As peft wrote it.
        owner: The object whose argument ``model`` the folder is, for errors.

    Raises:
        ConfigError: If an adapter of this kind cannot be trained here.
        ModelError: If it cannot be read, does not fit the model, or changes the base model itself.
    """
    _keep_backward_of_4bit(model)
    before = probe_logits(model)
    config = _read_config(folder, owner)
    _check_kind(config, owner, "model")
    _check_bias(config, owner, "model")
    adapted = _read_adapter(model, folder, owner, is_trainable=True)
    with _calling_peft(), _reading_adapter(folder, owner, "Set `merge_adapter` to true."):
        adapted.load_adapter(folder, _REFERENCE, torch_device=str(model.device))
    _widen(adapted, model.dtype)
    _check_base_unchanged(before, adapted)
    return adapted


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
    _check_kind(_read_config(folder, owner), owner, "model")
    adapted = _read_adapter(model, folder, owner, is_trainable=False)
    _check_tied_embeddings(adapted, owner, "model")
    with _reading_adapter(folder, owner, "It cannot be merged: set `merge_adapter` to false, and go on training it."):
        state = merged_state(adapted, adapted.state_dict())
    unload: Any = adapted.unload
    base: PreTrainedModel = unload()
    base.load_state_dict(state)
    # Left behind, peft would take the model for one with an adapter.
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base.requires_grad_()


def _read_config(folder: str, owner: object) -> PeftConfig:
    from peft import PeftConfig

    with _reading_adapter(folder, owner, "Get a complete copy of it."):
        config: PeftConfig = PeftConfig.from_pretrained(folder)
        return config


def _read_adapter(model: PreTrainedModel, folder: str, owner: object, is_trainable: bool) -> PeftModel:
    from peft import PeftModel

    with _calling_peft(), _reading_adapter(folder, owner, "Get a complete copy of it, and of its base model."):
        # peft would leave missing weights at their random start.
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(
            model, folder, is_trainable=is_trainable, torch_device=str(model.device), autocast_adapter_dtype=True
        )


@contextmanager
def _reading_adapter(folder: str, owner: object, remedy: str) -> Iterator[None]:
    with reading("the adapter", folder, remedy, ModelError, owner=owner, argument="model"):
        yield


@contextmanager
def _calling_peft() -> Iterator[None]:
    """Let peft create adapters in float32, and without warnings about what it reads itself."""
    # In 16 bits most steps of a usual learning rate are smaller than the spacing of the numbers: on a tiny model, 120 steps
    # raised the forget NLL to 0.72 instead of 3.23. peft computes with such an adapter in float32.
    with warnings.catch_warnings(), _default_dtype(torch.float32):
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _widen(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Give the weights of adapters the dtype of the base model where that is wider."""
    for parameter in _adapter_parameters(adapted):
        if parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def _adapter_parameters(adapted: PeftModel) -> list[nn.Parameter]:
    parameters = []
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or _REFERENCE in name.split("."):
            parameters.append(parameter)
    return parameters


def _check_base_unchanged(before: Tensor, adapted: PeftModel) -> None:
    with adapter_switched_off(adapted):
        unchanged = torch.equal(before, probe_logits(inner_model(adapted)))
    if not unchanged:
        raise ModelError(
            "the adapter changed the base model itself, so that switching it off would not give back the model before "
            "unlearning: leave `init_lora_weights` in `adapter` at true, and use none of PiSSA, OLoRA, CorDA, LoftQ, KaSA "
            "and layer replication."
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors in a dtype within the block; Lightning's 16-bit precisions create them in 16 bits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def keep_wide(model: nn.Module | None, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion of a model's tensors that leaves float32 weights of its adapter as wide as they are.

    Args:
        model: Any; without an adapter, the conversion is returned as it is.
        convert: As `nn.Module.to` hands it to every tensor.
    """
    if not is_adapted(model):
        return convert
    wide = set[int]()
    for name, parameter in cast(nn.Module, model).named_parameters():
        # Copies of whole layers compute in the model's dtype, without peft's conversion of inputs.
        is_copy = "modules_to_save" in name
        if parameter.requires_grad and parameter.dtype == torch.float32 and not is_copy:
            wide |= {id(parameter), id(parameter.grad)}

    def convert_narrow(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        is_narrowed = converted.is_floating_point() and converted.dtype.itemsize < tensor.dtype.itemsize
        return tensor.to(converted.device) if is_narrowed and id(tensor) in wide else converted

    return convert_narrow


def check_adapter(model: PreTrainedModel | PeftModel) -> None:
    """Raise if an adapter would not be trained, could not be switched off, or could not be exported.

    Args:
        model: Any; one without adapters passes.

    Raises:
        ModelError: With the mechanism and what to do instead.
    """
    inner = inner_model(model)
    if getattr(inner, "_hf_peft_config_loaded", False):
        raise ModelError(
            "the model was loaded with an adapter by transformers itself, which would export the adapter alone, although the "
            "other weights were trained: merge the adapter first, or wrap a `peft.PeftModel`."
        )
    if not is_adapted(model):
        return
    _keep_backward_of_4bit(inner)
    for config in model.peft_config.values():
        _check_kind(config)
        _check_bias(config)

    if _is_adapted_layer(inner.get_output_embeddings()):
        raise ModelError(
            "the losses read the head's weight directly, past an adapter on it, which would never be trained: remove the head "
            "(`lm_head`) from `target_modules`, `modules_to_save` and the like."
        )
    _check_tied_embeddings(model)
    for module in inner.modules():
        if _is_adapted_layer(module) and module.merged_adapters:
            raise ModelError(
                "the adapter is merged into the model and would not be trained: call `unmerge_adapter()` first."
            )


def _check_tied_embeddings(
    model: PreTrainedModel | PeftModel, owner: object = None, argument: str | None = None
) -> None:
    inner = inner_model(model)
    tied = getattr(inner.config.get_text_config(), "tie_word_embeddings", False)
    if tied and _is_adapted_layer(inner.get_input_embeddings()):
        raise ModelError(
            "the embeddings are tied to the head: an adapter would change the one and not the other, and an exported model has "
            "only one weight for both. Remove the embeddings (`embed_tokens`) from `target_modules`, `modules_to_save` and "
            "`trainable_token_indices`.",
            owner=owner,
            argument=argument,
        )


def _check_kind(config: Any, owner: object = None, argument: str = "adapter") -> None:
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


def _check_bias(config: Any, owner: object = None, argument: str = "adapter") -> None:
    if getattr(config, "bias", "none") != "none":
        message = (
            f"`bias: {config.bias}` trains biases of the base model, which stay when the adapter is switched off: the "
            "reference model would move. Set `bias: none` in `adapter`."
        )
        raise ConfigError(message, owner=owner, argument=argument)


def is_adapted(model: nn.Module | None) -> bool:
    """Return whether a model is a `peft.PeftModel`, without importing peft."""
    return hasattr(model, "get_base_model")


def inner_model(model: Any) -> Any:
    """Return the transformers model, whose layers hold the adapters if there are any."""
    return model.get_base_model() if is_adapted(model) else model


def _keep_backward_of_4bit(model: nn.Module) -> None:
    # On some CPUs, bitsandbytes brings its 4-bit layers at the first evaluation into a form without a backward pass.
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _is_adapted_layer(layer: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))


@contextmanager
def adapter_switched_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapters off within the block, which computes the base model bit for bit."""
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    switch_off: Any = model.disable_adapter
    try:
        with evaluation_mode(model), switch_off():
            yield
    finally:
        # peft makes every adapter trainable when it is switched on again, frozen ones too.
        for parameter, required in zip(model.parameters(), requires_grad, strict=True):
            parameter.requires_grad_(required)


@contextmanager
def adapter_as_before(model: PeftModel, is_switched_off: bool = False) -> Iterator[None]:
    """Compute the reference model within the block: without the adapter or, if it goes on being trained, with the saved one.

    Args:
        model: Adapted.
        is_switched_off: Whether its adapters are switched off already.
    """
    if _REFERENCE not in model.peft_config:
        if is_switched_off:
            yield
            return
        with adapter_switched_off(model):
            yield
        return

    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    trained = model.active_adapter
    tuner: Any = model.base_model
    try:
        with evaluation_mode(model):
            if is_switched_off:
                tuner.enable_adapter_layers()
            model.set_adapter(_REFERENCE)
            yield
    finally:
        model.set_adapter(trained)
        if is_switched_off:
            tuner.disable_adapter_layers()
        # peft makes an adapter trainable when it is switched on.
        for parameter, required in zip(model.parameters(), requires_grad, strict=True):
            parameter.requires_grad_(required)


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
    names = [name for name in model.peft_config if name != _REFERENCE]
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
        if not _is_adapted_layer(layer) or name.startswith(merged_layers):
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
        if not _is_adapted_layer(layer) or name.startswith(adapted_layers):
            continue
        adapted_layers += (f"{name}.",)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
        for key, tensor in base.state_dict().items():
            tensors[f"{name}.{key}"] = tensor
    for name, tensor in inner.state_dict().items():
        if not name.startswith(adapted_layers):
            tensors[name] = tensor
    return tensors


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, which computes the rest again: less memory, more time.

    Args:
        model: Any whose layers support it; transformers refuses the others.
    """
    newer = hasattr(model, "activation_checkpointing_enable")
    enable: Any = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # The reentrant kind alone needs inputs that require gradients; here frozen layers would keep their activations.
    model.disable_input_require_grads()
