"""Checks of the settings that say where the weights of a model come from: which are needed, and which exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_unlearn.errors import ConfigError
from lit_unlearn.models.files import ModelFiles


def check_model_or_config(model: str | None, config: Mapping[str, Any] | None, owner: object) -> None:
    """Raise ConfigError unless the weights have exactly one origin."""
    if (model is None) == (config is None):
        message = (
            "give either `model` (a hub name or a local directory) or `config` (`model_type` and its fields, for random "
            f"weights); got model={model!r}, config={config!r}."
        )
        raise ConfigError(message, owner=owner, argument="model")
    if config is not None and "model_type" not in config:
        message = f"`config` needs a `model_type` such as 'llama'; got {sorted(config)}."
        raise ConfigError(message, owner=owner, argument="config")


def check_source(
    files: ModelFiles | None,
    gguf_file: str | None,
    adapter: Mapping[str, Any] | None,
    merge_adapter: bool,
    quantization: Mapping[str, Any] | None,
    owner: object,
) -> None:
    """Raise ConfigError if settings of where the weights come from exclude each other.

    Args:
        files: The files of the model; ``None`` for random weights.
        gguf_file: As for `LanguageModel`.
        adapter: As for `LanguageModel`.
        merge_adapter: As for `LanguageModel`.
        quantization: As for `LanguageModel`.
        owner: Whose arguments these are.
    """
    name = None if files is None else files.name
    is_gguf = files is not None and files.gguf_file is not None
    is_saved_adapter = files is not None and files.base is not None
    message, argument = None, "merge_adapter"
    if gguf_file is not None and files is None:
        message, argument = "`gguf_file` is the name of a file in `model`: give both, and no `config`.", "gguf_file"
    elif is_gguf and quantization is not None:
        message = (
            "`quantization` cannot round a model again that is loaded from a GGUF file: load it without, save it, and give "
            "the folder as `model`."
        )
        argument = "quantization"
    elif merge_adapter and not is_saved_adapter:
        message = f"`merge_adapter` needs the folder of a peft adapter as `model`, but '{name}' is none."
    elif merge_adapter and quantization is not None:
        message = "an adapter cannot be merged into quantised weights: leave out `merge_adapter` or `quantization`."
    elif is_saved_adapter and adapter is not None and not merge_adapter:
        message = (
            f"'{name}' is an adapter, which goes on being trained: leave out `adapter`, or set `merge_adapter` to true "
            "to merge it first and train a new one."
        )
    if message is not None:
        raise ConfigError(message, owner=owner, argument=argument)
