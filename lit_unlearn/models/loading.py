"""From a name, a folder or a config to a model and a tokenizer in memory, and what is known about weight files."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_unlearn.errors import LitUnlearnError, MissingFileError, ModelError, reading
from lit_unlearn.utils.io import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What git checks out in place of a large file begins so where git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs"
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Characters kept of another library's message: transformers may list 150 classes.
REASON_LENGTH = 300


def check_model_directory(name: str, use_safetensors: bool, owner: object = None, argument: str = "model") -> None:
    """Raise if a local path holds no complete model, so that a run fails before anything else is loaded.

    Args:
        name: Hub name or local directory; a hub name passes.
        use_safetensors: Whether other weight files do not count.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument.

    Raises:
        MissingFileError: If it is a path where there is nothing, or a folder without config or weights.
        ModelError: If it is an adapter, or a file is only a git-lfs pointer.
    """
    path = Path(name)
    if not path.exists():
        # A hub name has one slash at most.
        looks_local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
        if looks_local:
            message = f"there is no model directory '{name}': check `{argument}`, or train it first."
            raise MissingFileError(message, owner=owner, argument=argument)
        return

    _check_lfs_pointers(path, owner, argument)
    has_config = (path / "config.json").is_file()
    if not has_config and (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        message = (
            f"'{name}' is an adapter of the base model '{base}', not a model: merge them (peft's `merge_and_unload`) and "
            f"point `{argument}` at the result. What lit-unlearn exports has the merged model one folder up."
        )
        raise ModelError(message, owner=owner, argument=argument)
    patterns = ("*.safetensors",) if use_safetensors else ("*.safetensors", "*.bin")
    has_weights = any(next(path.glob(pattern), None) for pattern in patterns)
    if not has_config or not has_weights:
        content = sorted(file.name for file in path.iterdir()) if path.is_dir() else "a file"
        allow_pickle = ", or set `use_safetensors` to false" if use_safetensors else ""
        message = (
            f"'{name}' is no complete model directory: expected config.json and {' or '.join(patterns)}, found {content}. "
            f"Point `{argument}` at the output of `save_pretrained`{allow_pickle}."
        )
        raise MissingFileError(message, owner=owner, argument=argument)


def _check_lfs_pointers(folder: Path, owner: object = None, argument: str | None = None) -> None:
    # Else the reason would be "header too large" for weights, "expecting value" for a tokenizer.
    for file in sorted(folder.glob("*")):
        if not file.is_file() or file.stat().st_size > 1024:
            continue
        if file.read_bytes().startswith(LFS_POINTER):
            message = (
                f"'{file}' is a git-lfs pointer, not the file: install git-lfs and run `git lfs pull` in '{folder}'."
            )
            raise ModelError(message, owner=owner, argument=argument)


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def _reading_pretrained(what: str, name: str, remedy: str, owner: object, argument: str) -> Iterator[None]:
    """Turn what transformers raises into one sentence, as `reading` does.

    `reading` keeps the last line of the reason. transformers gives the reason first, and ends with advice of many lines.
    """
    try:
        yield
    except LitUnlearnError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, REASON_LENGTH, placeholder=" …").rstrip(".")
        kind = ModelError if Path(name).exists() else MissingFileError
        message = f"{what} '{name}' cannot be read: {reason}. {remedy}"
        raise kind(message, owner=owner, argument=argument) from error


def load_tokenizer(name: str, owner: object = None, **settings: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or a local directory; ``settings`` are for ``AutoTokenizer.from_pretrained``.

    Raises:
        MissingFileError: If there is none.
        ModelError: If a local one is damaged.
    """
    from transformers import AutoTokenizer

    remedy = "Set `tokenizer` to a local directory with tokenizer files, or to a hub name that has them."
    folder = Path(name)
    _check_lfs_pointers(folder, owner, "tokenizer")
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model")):
        message = f"'{name}' has no tokenizer files, such as tokenizer.json. {remedy}"
        raise MissingFileError(message, owner=owner, argument="tokenizer")
    with _reading_pretrained("the tokenizer", name, remedy, owner, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **settings)
    return tokenizer


def build_from_config(
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    attn_implementation: str | None,
    owner: object = None,
) -> PreTrainedModel:
    """Build a model with random weights, which the global seed decides; arguments as for `LanguageModel`.

    Raises:
        ModelError: If transformers has no such type, or refuses its fields.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    if tokenizer is not None:
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))

    with reading("the model config", fields, "Check `config`.", ModelError, owner=owner, argument="config"):
        config = AutoConfig.for_model(**fields)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model


def load_pretrained(name: str, use_safetensors: bool, owner: object = None, **settings: Any) -> PreTrainedModel:
    """Load a model from the hub or a directory, with all its weights or not at all.

    Args:
        name: Hub name or local directory.
        use_safetensors: Whether to insist on safetensors.
        owner: The object whose argument ``model`` the name is, for errors.
        **settings: For ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MissingFileError: If there is no such model.
        ModelError: If it is no causal language model, its files cannot be read, or weights are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    hub_settings = {key: settings[key] for key in ("revision", "trust_remote_code") if key in settings}
    _check_architecture(name, owner, **hub_settings)
    kind = "safetensors" if use_safetensors else "weights"
    remedy = f"Set `model` to a local directory or to a hub name with {kind}."
    with _reading_pretrained("the model", name, remedy, owner, "model"), hide_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            # None takes safetensors where there are any, which False would refuse.
            use_safetensors=use_safetensors or None,
            output_loading_info=True,
            # They are refused below, with their shapes; transformers would only log them.
            ignore_mismatched_sizes=True,
            **settings,
        )
    model, info = loaded

    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the model '{name}' is incomplete: it has no {', '.join(missing[:3])} ({len(missing)} missing in all), which "
            "would start at random. Get a complete copy of it.",
            owner=owner,
            argument="model",
        )
    for key, shape, expected in info["mismatched_keys"]:
        raise ModelError(
            f"the weights of '{name}' do not fit its config.json: {key} has shape {tuple(shape)}, the config asks for "
            f"{tuple(expected)}. Get a config and weights that belong together.",
            owner=owner,
            argument="model",
        )
    return model  # type: ignore[no-any-return]


def _check_architecture(name: str, owner: object, **settings: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    remedy = "Check `model`, and `trust_remote_code` if it comes with code."
    with _reading_pretrained("the config of the model", name, remedy, owner, "model"):
        config = AutoConfig.from_pretrained(name, **settings)
    # Code that comes with a model and that the user trusts may define any class.
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None):
        return
    kind = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
    raise ModelError(
        f"'{name}' is {kind} (model type '{config.model_type}'): unlearning here needs a model that predicts each token "
        "from those before it, one that transformers' `AutoModelForCausalLM` loads. Set `model` to such a model.",
        owner=owner,
        argument="model",
    )


def find_files_dtype(name: str, revision: str | None) -> torch.dtype | None:
    """Return the dtype that most numbers in a model's safetensors have; ``None`` if it has no such files."""
    from safetensors import safe_open

    counts: Counter[torch.dtype] = Counter()
    folder = _find_folder(name, revision)
    for file in [] if folder is None else sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (it cannot be iterated over)
                # Only the header is read.
                tensor = tensors.get_slice(key)
                dtype = _SAFETENSORS_DTYPES.get(tensor.get_dtype())
                if dtype is not None:
                    counts[dtype] += math.prod(tensor.get_shape())
    return counts.most_common(1)[0][0] if counts else None


def _find_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model that was loaded; ``None`` if the hub's cache has it no more."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if folder.is_dir():
        return folder
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def describe_weights(name: str | None, revision: str | None, use_safetensors: bool) -> dict[str, Any]:
    """Return ``commit`` and ``weights`` (sha256 by file name) of a model that was loaded; reads the files completely.

    Both are empty for a model that came from neither a directory nor the hub, and after the hub's cache was emptied.
    """
    folder = None if name is None else _find_folder(name, revision)
    if folder is None:
        return {"commit": None, "weights": {}}
    # The hub's cache names the folder of each snapshot by its commit.
    commit = None if Path(str(name)).is_dir() else folder.name

    # transformers reads safetensors where there are any, whatever else lies beside them.
    files = sorted(folder.glob("*.safetensors"))
    if not files and not use_safetensors:
        files = sorted(folder.glob("*.bin"))
    return {"commit": commit, "weights": {file.name: file_digest(file) for file in files}}


def write_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write the dtype of its weights into a model's ``config.json``, where transformers has put that of the model in memory."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    # As transformers writes it.
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars over weights, which fill log files; the hub's over downloads stay."""
    from transformers.utils import logging

    # transformers 5.0 does not have it yet.
    set_hook = getattr(logging, "set_tqdm_hook", None)
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
