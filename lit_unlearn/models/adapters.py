"""Adapters in the layers of a model, through peft: put in, read, checked, and switched off for the reference model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_unlearn.errors import ModelError, reading
from lit_unlearn.models.adapter_configs import check_bias, check_kind
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.probing import probe_logits

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft import PeftModel as PeftModel  # for language_model.py too, whose own such imports jsonargparse executes
    from transformers import PreTrainedModel

# Of the copy of an adapter that goes on being trained. Unlikely to be the name of a user's.
REFERENCE = "lit_unlearn_reference"


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
    config = read_config(folder, owner)
    check_kind(config, owner, "model")
    check_bias(config, owner, "model")
    adapted = read_adapter(model, folder, owner, is_trainable=True)
    with _calling_peft(), reading_adapter(folder, owner, "Set `merge_adapter` to true."):
        adapted.load_adapter(folder, REFERENCE, torch_device=str(model.device))
    _widen(adapted, model.dtype)
    _check_base_unchanged(before, adapted)
    return adapted


def read_config(folder: str, owner: object) -> PeftConfig:
    """Return the config of a saved adapter."""
    from peft import PeftConfig

    with reading_adapter(folder, owner, "Get a complete copy of it."):
        config: PeftConfig = PeftConfig.from_pretrained(folder)
        return config


def read_adapter(model: PreTrainedModel, folder: str, owner: object, is_trainable: bool) -> PeftModel:
    """Put a saved adapter into a model's layers; missing weights are an error."""
    from peft import PeftModel

    with _calling_peft(), reading_adapter(folder, owner, "Get a complete copy of it, and of its base model."):
        # peft would leave missing weights at their random start.
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(
            model, folder, is_trainable=is_trainable, torch_device=str(model.device), autocast_adapter_dtype=True
        )


@contextmanager
def reading_adapter(folder: str, owner: object, remedy: str) -> Iterator[None]:
    """Turn errors of peft within the block into one of the adapter's folder, with a remedy."""
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
        if parameter.requires_grad or REFERENCE in name.split("."):
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
        check_kind(config)
        check_bias(config)

    if is_adapted_layer(inner.get_output_embeddings()):
        raise ModelError(
            "the losses read the head's weight directly, past an adapter on it, which would never be trained: remove the head "
            "(`lm_head`) from `target_modules`, `modules_to_save` and the like."
        )
    check_tied_embeddings(model)
    for module in inner.modules():
        if is_adapted_layer(module) and module.merged_adapters:
            raise ModelError(
                "the adapter is merged into the model and would not be trained: call `unmerge_adapter()` first."
            )


def check_tied_embeddings(
    model: PreTrainedModel | PeftModel, owner: object = None, argument: str | None = None
) -> None:
    """Raise ModelError if an adapter is on embeddings that are tied to the head."""
    inner = inner_model(model)
    tied = getattr(inner.config.get_text_config(), "tie_word_embeddings", False)
    if tied and is_adapted_layer(inner.get_input_embeddings()):
        raise ModelError(
            "the embeddings are tied to the head: an adapter would change the one and not the other, and an exported model has "
            "only one weight for both. Remove the embeddings (`embed_tokens`) from `target_modules`, `modules_to_save` and "
            "`trainable_token_indices`.",
            owner=owner,
            argument=argument,
        )


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


def is_adapted_layer(layer: nn.Module) -> bool:
    """Return whether a module is a layer with an adapter, or one that is trained as a copy."""
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
    if REFERENCE not in model.peft_config:
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
            model.set_adapter(REFERENCE)
            yield
    finally:
        model.set_adapter(trained)
        if is_switched_off:
            tuner.disable_adapter_layers()
        # peft makes an adapter trainable when it is switched on.
        for parameter, required in zip(model.parameters(), requires_grad, strict=True):
            parameter.requires_grad_(required)
