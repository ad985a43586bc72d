"""Sizes of a model that decide its memory, read from its config alone: it is built on the meta device, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lit_unlearn.errors import ConfigError, MissingFileError, ModelError, reading
from lit_unlearn.models import adapter_configs, adapters, hub, loading, locating
from lit_unlearn.models.blocks import find_blocks
from lit_unlearn.models.files import ADAPTER_CONFIG, ModelFiles
from lit_unlearn.models.language_model import LanguageModel
from lit_unlearn.models.packed_attention import takes_whole_masks

# Settings of a head that is not plain linear: the losses then read the logits of every token, see `has_linear_head`.
_CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
# What families call the layer that ends the attention.
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "wo")


@dataclass(frozen=True)
class LinearSizes:
    """A linear layer of a block.

    Args:
        inputs: Elements of its input, per token.
        fed_by: What its input is: ``"norm"``, the output of the ``"attention"``, or the ``"mlp"``'s intermediate product.
        rank: Of the adapter on it; 0 without one.
    """

    inputs: int
    fed_by: str
    rank: int


@dataclass(frozen=True)
class BlockSizes:
    """A transformer block; sizes in elements, per token where they are activations.

    Args:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        is_gated: Whether the MLP multiplies two projections, as in Llama.
        linears: Its linear layers.
        parameters: All of its parameters, adapters included.
        linear_parameters: Those of its linear layers, without adapters.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    is_gated: bool
    linears: tuple[LinearSizes, ...]
    parameters: int
    linear_parameters: int


@dataclass(frozen=True)
class ModelSizes:
    """A model as the formulas of `memory_plan` need it.

    Args:
        name: Of its class.
        block: One of its blocks.
        layers: Number of blocks.
        vocabulary: Rows of the head.
        parameters: All parameters of the model without adapters; a tied head counts once.
        tied: Whether the head is the embedding.
        linear_head: Whether losses read states, and not logits; guessed from the config.
        trainable: The parameters that are trained, on the meta device.
        attention: Implementation of the attention.
        dropout: Of the adapter's inputs.
        shares_prefix: Whether packed examples share their first tokens; guessed from the config.
    """

    name: str
    block: BlockSizes
    layers: int
    vocabulary: int
    parameters: int
    tied: bool
    linear_head: bool
    trainable: tuple[nn.Parameter, ...]
    attention: str
    dropout: float
    shares_prefix: bool

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained in place of the model."""
        return any(linear.rank for linear in self.block.linears)

    @property
    def root_parameters(self) -> int:
        """Parameters outside of the blocks: embedding, head, norm."""
        return max(0, self.parameters - self.layers * self.block.parameters)


def read_model_config(settings: Mapping[str, Any]) -> Any:
    """Return the transformers config of a model that need not be complete: a folder with ``config.json`` will do.

    Args:
        settings: Arguments of `LanguageModel`.

    Raises:
        ConfigError: If not exactly one of ``model`` and ``config`` is given.
        MissingFileError: If there is no such config, or the hub does not answer.
        ModelError: If it is no config of a causal language model.
    """
    from transformers import AutoConfig

    name: str | None = settings.get("model")
    fields = settings.get("config")
    if (name is None) == (fields is None):
        raise ConfigError("give exactly one of `model` and `config`.", owner=LanguageModel, argument="model")
    if name is None:
        with reading("the model config", fields, "Check `config`.", ModelError, owner=LanguageModel, argument="config"):
            return AutoConfig.for_model(**cast("dict[str, Any]", fields))
    folder = Path(name)
    if locating.is_local(name) and not folder.exists():
        message = f"there is no folder '{name}': a plan reads its config.json alone, without weights. Check `model`."
        raise MissingFileError(message, owner=LanguageModel, argument="model")
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        name = str(adapters.read_config(str(folder), LanguageModel).base_model_name_or_path)
    hub.check_hub(name, LanguageModel, "model", settings.get("gguf_file") or "config.json")
    keys = ("revision", "trust_remote_code", "gguf_file")
    return loading.read_config(name, LanguageModel, **{key: settings[key] for key in keys if settings.get(key)})


def read_files_dtype(settings: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of a model's files: of its weights or, where they are not there, as its config says.

    Args:
        settings: Arguments of `LanguageModel`. A model with random weights has no files.
    """
    name = settings.get("model")
    if name is None:
        return None
    dtype = ModelFiles(name, settings.get("revision")).dtype() or getattr(read_model_config(settings), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def measure_model(settings: Mapping[str, Any], dtype: torch.dtype) -> ModelSizes:
    """Build a model on the meta device, with its adapter, and return its sizes.

    Args:
        settings: Arguments of `LanguageModel`.
        dtype: Of the weights.

    Raises:
        LitUnlearnError: As `read_model_config`, or if the adapter does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    config = read_model_config(settings)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=settings.get("attn_implementation")
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dropout = 0.0
    adapted = model
    adapter = _adapter_config(settings)
    if adapter is not None:
        adapted, dropout = _attach(model, adapter), float(getattr(adapter, "lora_dropout", 0.0))
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    head = model.get_output_embeddings()
    return ModelSizes(
        name=type(model).__name__,
        block=_measure_block(find_blocks(model)[0], text, heads),
        layers=int(text.num_hidden_layers),
        vocabulary=int(head.weight.shape[0]),
        parameters=parameters,
        tied=head.weight is model.get_input_embeddings().weight,
        linear_head=all(getattr(text, name, None) in (None, 1.0) for name in _CHANGED_LOGITS),
        trainable=tuple(parameter for parameter in adapted.parameters() if parameter.requires_grad),
        attention=str(getattr(model.config, "_attn_implementation", "sdpa")),
        dropout=dropout,
        shares_prefix=takes_whole_masks(model.config),
    )


def _adapter_config(settings: Mapping[str, Any]) -> Any:
    fields, name = settings.get("adapter"), settings.get("model")
    if fields is not None:
        return adapter_configs.adapter_config(fields, owner=LanguageModel)
    if name is None or settings.get("merge_adapter"):
        return None
    folder = Path(name)
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    return adapters.read_config(name, LanguageModel) if is_adapter else None


def _attach(model: nn.Module, adapter: Any) -> Any:
    from peft import get_peft_model

    with reading("the adapter config", str(adapter.peft_type), "Check `adapter`.", ModelError):
        adapter.inference_mode = False
        adapted: Any = get_peft_model(model, adapter)
    for parameter in adapted.parameters():
        # Adapters are trained in float32 or wider, see `attach_adapter`.
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
    return adapted


def _measure_block(block: nn.Module, config: Any, heads: int) -> BlockSizes:
    hidden = int(config.hidden_size)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    linears, parameters, projections = [], 0, 0
    for name, module in block.named_modules():
        # An adapted layer has its own linear layers, for the base weight and for both factors.
        if "lora_" in name or name.endswith("base_layer") or not _is_linear(module):
            continue
        weight: Any = module.weight
        sizes = [size for size in weight.shape if size > 0]
        parameters += weight.numel()
        # GPT-2's layers keep their weight transposed, which changes nothing for the square ones.
        inputs = int(getattr(module, "in_features", sizes[0]))
        outputs = weight.numel() // max(1, inputs)
        projections += outputs == intermediate and inputs != intermediate
        ranks: Any = getattr(module, "r", {})
        rank = max(ranks.values(), default=0) if isinstance(ranks, Mapping) else 0
        linears.append(LinearSizes(inputs, _fed_by(name, inputs, intermediate), rank))
    return BlockSizes(
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        is_gated=projections > 1,
        linears=tuple(linears),
        parameters=sum(parameter.numel() for name, parameter in block.named_parameters() if "lora_" not in name),
        linear_parameters=parameters,
    )


def _is_linear(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _fed_by(name: str, inputs: int, intermediate: int) -> str:
    if inputs == intermediate:
        return "mlp"
    return "attention" if name.rpartition(".")[2] in _ATTENTION_OUTPUTS else "norm"
