"""From a name, a folder or a config to a model and a tokenizer in memory, and what is known about weight files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_unlearn.errors import MissingFileError, ModelError, reading
from lit_unlearn.utils.io import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_model_directory(name: str, use_safetensors: bool, owner: object = None, argument: str = "model") -> None:
    """Raise if a local path holds no model, so that a run fails before anything else is loaded.

    Args:
        name: Hub name or local directory; a hub name passes.
        use_safetensors: Whether other weight files do not count.
        owner: Whose argument it is, for the error.
        argument: Name of that argument.

    Raises:
        MissingFileError: If it is a path where there is nothing, or a folder without config or weights.
    """
    path = Path(name)
    if not path.exists():
        # A hub name has one slash at most.
        looks_local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
        if looks_local:
            message = f"there is no model directory '{name}': check `{argument}`, or train it first."
            raise MissingFileError(message, owner=owner, argument=argument)
        return

    patterns = ("*.safetensors",) if use_safetensors else ("*.safetensors", "*.bin")
    has_weights = any(next(path.glob(pattern), None) for pattern in patterns)
    if not has_weights or not (path / "config.json").is_file():
        content = sorted(file.name for file in path.iterdir()) if path.is_dir() else "a file"
        allow_pickle = ", or set `use_safetensors` to false" if use_safetensors else ""
        raise MissingFileError(
            f"'{name}' is no complete model directory: expected config.json and {' or '.join(patterns)}, found {content}. "
            f"Point `{argument}` at the output of `save_pretrained`{allow_pickle}.",
            owner=owner,
            argument=argument,
        )


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_tokenizer(name: str, **settings: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or a local directory.

    Args:
        name: Hub name or local directory.
        settings: For ``AutoTokenizer.from_pretrained``.

    Raises:
        MissingFileError: If there is none.
    """
    from transformers import AutoTokenizer

    with reading("the tokenizer", name, "Set `tokenizer` to a folder or a hub name that has one.", MissingFileError):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **settings)
    return tokenizer


def build_from_config(
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """Build a model with random weights, which the global seed decides.

    Args:
        fields: ``model_type`` and the fields of its config.
        tokenizer: Gives ``vocab_size`` and the special token ids where ``fields`` does not; ``None`` for the type's own.
        dtype: Of the parameters.
        attn_implementation: Passed to transformers; ``None`` for its default.

    Raises:
        ModelError: If transformers has no such type, or refuses its fields.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    if tokenizer is not None:
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))

    with reading("a model with random weights of type", fields["model_type"], "Check `config`.", ModelError):
        config = AutoConfig.for_model(**fields)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model


def load_pretrained(name: str, use_safetensors: bool, **settings: Any) -> PreTrainedModel:
    """Load a model from the hub or a directory, with all its weights or not at all.

    Args:
        name: Hub name or local directory.
        use_safetensors: Whether to insist on safetensors.
        settings: For ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MissingFileError: If there is no such model.
        ModelError: If its config or its weights cannot be read, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    kind = "safetensors" if use_safetensors else "weights"
    remedy = f"Set `model` to a local directory or to a hub name with {kind}."
    error = ModelError if Path(name).exists() else MissingFileError
    with reading("the model", name, remedy, error), hide_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            use_safetensors=use_safetensors or None,  # False would refuse safetensors
            output_loading_info=True,
            **settings,
        )
    model, info = loaded

    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the model '{name}' is incomplete: it has no {', '.join(missing[:3])} ({len(missing)} missing in all), which "
            "would start at random. Get a complete copy of it."
        )
    return model  # type: ignore[no-any-return]


def describe_weights(name: str | None, revision: str | None, use_safetensors: bool) -> dict[str, Any]:
    """Return ``commit`` and ``weights`` (sha256 by file name) of a model that was loaded; reads the files completely.

    Args:
        name: Hub name or local directory; ``None`` for a model that came from neither.
        revision: Branch, tag or commit on the hub.
        use_safetensors: Whether other weight files were not read.
    """
    from huggingface_hub import try_to_load_from_cache

    if name is None:
        return {"commit": None, "weights": {}}

    folder, commit = Path(name), None
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):  # a cache that was emptied after loading
            return {"commit": None, "weights": {}}
        folder = Path(config).parent
        commit = folder.name  # the hub's cache calls each snapshot by its commit

    # transformers reads safetensors where there are any, whatever else lies beside them.
    files = sorted(folder.glob("*.safetensors"))
    if not files and not use_safetensors:
        files = sorted(folder.glob("*.bin"))
    return {"commit": commit, "weights": {file.name: file_digest(file) for file in files}}


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars over weights, which fill log files; the hub's over downloads stay."""
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)  # transformers 5.0 does not have it yet
    if set_hook is None:
        yield
        return
    before = set_hook(lambda bar, args, settings: bar(*args, **{**settings, "disable": True}))
    try:
        yield
    finally:
        set_hook(before)


def fingerprint(model: nn.Module, trainable: bool = True) -> str:
    """Return a digest of a model's weights and, where it has one, its config.

    Args:
        model: Not sharded, on any device.
        trainable: Whether weights that are trained count.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        fields = config.to_diff_dict()
        # They say where the model lay and who wrote it, not what it computes.
        for name in ("_name_or_path", "transformers_version"):
            fields.pop(name, None)
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or (name in trained and not trainable):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # numpy has no bfloat16, so every dtype goes in as bytes.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
