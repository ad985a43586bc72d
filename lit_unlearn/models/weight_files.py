"""Model directories and weight files: what is in them, where they are, and loading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model_directory(name: str, use_safetensors: bool) -> None:
    """Refuses a local path that holds no model, before anything else is loaded."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2  # a hub name has at most one slash
    if not path.exists():
        if looks_local:
            raise FileNotFoundError(f"there is no model directory '{name}': check `model.lm.model`, or train it first.")
        return
    patterns = ("*.safetensors",) if use_safetensors else ("*.safetensors", "*.bin")
    if not (path / "config.json").is_file() or not any(next(path.glob(pattern), None) for pattern in patterns):
        raise FileNotFoundError(
            f"'{name}' is no complete model directory: expected config.json and {' or '.join(patterns)}, found "
            f"{sorted(p.name for p in path.iterdir()) if path.is_dir() else 'a file'}. Point `model.lm.model` at the "
            "output of `save_pretrained`" + (", or set `use_safetensors: false`." if use_safetensors else ".")
        )


def weight_folder(name: str, revision: str | None) -> tuple[Path | None, str | None]:
    """Where the weights of a model that was loaded lie on this machine, and their commit if they came from the hub."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name), None
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None, None
    snapshot = Path(config).parent
    return snapshot, snapshot.name  # which is the commit


def weight_files(folder: Path, use_safetensors: bool) -> list[Path]:
    """The files in a folder that weights are read from."""
    return sorted(folder.glob("*.safetensors")) or ([] if use_safetensors else sorted(folder.glob("*.bin")))


def load_pretrained(name: str, use_safetensors: bool, **settings: Any) -> PreTrainedModel:
    """A model from the hub or a directory, with all its weights or not at all.

    Args:
        name: Hub name or local directory.
        use_safetensors: Whether to insist on safetensors.
        settings: For ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If weights are missing.
    """
    from transformers import AutoModelForCausalLM

    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                use_safetensors=use_safetensors or None,  # False would refuse safetensors
                output_loading_info=True,
                **settings,
            )
    except OSError as error:
        raise FileNotFoundError(
            f"no model at '{name}': neither a local directory nor a name that the hub answers to with "
            f"{'safetensors' if use_safetensors else 'weights'}. The reason given: {error}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"the model '{name}' is incomplete: it has no {', '.join(sorted(info['missing_keys'])[:3])} (of "
            f"{len(info['missing_keys'])} missing), which would start at random. Get a whole copy of it."
        )
    return model  # type: ignore[no-any-return]


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars over weights, which fill log files; the hub's over downloads stay."""
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)  # which transformers 5.0 has not yet
    if set_hook is None:
        yield
        return
    before = set_hook(lambda bar, args, settings: bar(*args, **{**settings, "disable": True}))
    try:
        yield
    finally:
        set_hook(before)


def fingerprint(model: nn.Module, trainable: bool = True) -> str:
    """A digest of a model's weights and, where it has one, its config.

    Args:
        model: Whole, on any device.
        trainable: Whether weights that are trained count.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        fields = {k: v for k, v in config.to_diff_dict().items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    skipped = set() if trainable else {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if name not in skipped and isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
