"""From a name, a folder or a config to a model and a tokenizer in memory."""

from __future__ import annotations

import hashlib
import json
import resource
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lit_unlearn.errors import LitUnlearnError, MissingFileError, ModelError, OutputError, reading
from lit_unlearn.models import gguf
from lit_unlearn.models.files import ModelFiles, count_parameters
from lit_unlearn.models.hub import check_hub
from lit_unlearn.models.locating import check_lfs_pointers, naming_adapter
from lit_unlearn.utils.distributed import rank_and_world_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Characters kept of another library's message: transformers may list 150 classes.
REASON_LENGTH = 300
# Whose weights are packed integers: transformers needs a package for each, and no gradient reaches them. The name for people.
_PACKED = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "aqlm": "AQLM", "spqr": "SpQR", "vptq": "VPTQ"}


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


def load_tokenizer(
    name: str, owner: object = None, argument: str = "tokenizer", **settings: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or a local directory.

    Args:
        name: Hub name or local directory.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument: ``"model"`` if the tokenizer is to be the model's own.
        **settings: For ``AutoTokenizer.from_pretrained``.

    Raises:
        MissingFileError: If there is none.
        ModelError: If a local one is damaged.
    """
    from transformers import AutoTokenizer

    remedy = "Set `tokenizer` to a local directory with tokenizer files, or to a hub name that has them."
    folder = Path(name)
    if folder.exists():
        # The model is there; another tokenizer can be given beside it.
        remedy = f"Get a complete copy of it. {remedy}" if argument == "model" else remedy
        argument = "tokenizer"
    elif argument == "model":
        remedy = "Check `model`: expected is a local directory, or a name on the hub."
    check_hub(name, owner, argument, settings.get("gguf_file", "tokenizer_config.json"))
    check_lfs_pointers(folder, owner, "tokenizer")
    if folder.is_dir() and "gguf_file" not in settings and not has_tokenizer(folder):
        message = f"'{name}' has no tokenizer files, such as tokenizer.json. {remedy}"
        raise MissingFileError(message, owner=owner, argument="tokenizer")
    with _reading_pretrained("the tokenizer", name, remedy, owner, argument):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **settings)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has files of a tokenizer."""
    return any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model"))


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


def load_model(files: ModelFiles, owner: object = None, **settings: Any) -> PreTrainedModel:
    """Load a model from its files; of an adapter, its base model. Arguments and errors are those of `load_pretrained`."""
    if files.base is not None:
        with naming_adapter(files.base.name, files.name, owner, "model"):
            return load_model(files.base, owner, **settings)
    settings["revision"] = files.revision
    if files.gguf_file is None:
        return load_pretrained(files.name, files.use_safetensors, owner, **settings)

    settings |= gguf.loading_settings(files.gguf_file)
    model = gguf.as_ordinary_model(load_pretrained(files.name, use_safetensors=False, owner=owner, **settings))
    loss = gguf.describe_loss(files.weight_files()[0], model.dtype)
    if loss is not None and rank_and_world_size()[0] == 0:
        warnings.warn(loss, stacklevel=2)
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

    gguf_file = settings.get("gguf_file")
    check_hub(name, owner, "model", gguf_file or "config.json")
    config_settings = {key: settings[key] for key in ("revision", "trust_remote_code", "gguf_file") if key in settings}
    read_config(name, owner, **config_settings)
    kind = "safetensors" if use_safetensors else "weights"
    remedy = f"Set `model` to a local directory or to a hub name with {kind}."
    with (
        _reading_pretrained("the model", name, remedy, owner, "model"),
        _explaining_shortage(
            ModelFiles(name, settings.get("revision"), False, gguf_file), settings.get("dtype"), owner
        ),
        hide_progress_bars(),
    ):
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


@contextmanager
def _explaining_shortage(model: ModelFiles, dtype: Any, owner: object) -> Iterator[None]:
    """Say how much memory a model needs where loading it fails for want of memory.

    Raises:
        ModelError: With the need and with what was left.
    """
    free = _free_memory()
    try:
        yield
    except Exception as error:
        # Every library has its own exception for it, and torch the same for whatever goes wrong: the numbers decide.
        need, files = _weigh(model.weight_files(), dtype)
        if not isinstance(error, MemoryError) and need < free:
            raise
        raise ModelError(
            f"there is not enough memory for the model '{model.name}': its weights ({', '.join(files)}) take {need / 2**20:,.0f} MiB "
            f"in {str(dtype).removeprefix('torch.')}, and {free / 2**20:,.0f} MiB were left. Free some, raise the limit (`ulimit "
            "-v`), or load it in 16 bits (the Trainer's `precision`).",
            owner=owner,
            argument="model",
        ) from error


def _free_memory() -> float:
    """Return the bytes that this process may still take; infinite where the system does not say."""
    free = float("inf")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = float(available.split()[1]) * 1024
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            free = min(free, limit - used)
    return free


def _weigh(files: list[Path], dtype: Any) -> tuple[int, list[str]]:
    """Return the bytes that reading weights takes, mapped files included, and the files' names."""
    size = sum(file.stat().st_size for file in files)
    parameters = 0
    for file in files:
        with suppress(OSError, ValueError, AttributeError):
            parameters += count_parameters(file)
    item_size = dtype.itemsize if isinstance(dtype, torch.dtype) else 0
    return size + parameters * item_size, [file.name for file in files]


def read_config(name: str, owner: object, **settings: Any) -> PretrainedConfig:
    """Return the config of a causal language model whose weights can be trained.

    Args:
        name: Hub name or local directory.
        owner: The object whose argument ``model`` the name is, for errors.
        **settings: For ``AutoConfig.from_pretrained``.

    Raises:
        MissingFileError: If there is none.
        ModelError: If it is of another kind of model, or of one with packed integers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    remedy = "Check `model`, and `trust_remote_code` if it comes with code."
    with _reading_pretrained("the config of the model", name, remedy, owner, "model"):
        config = AutoConfig.from_pretrained(name, **settings)
    _check_packing(name, config, owner)
    # Code that comes with a model and that the user trusts may define any class.
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None):
        return cast("PretrainedConfig", config)
    kind = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
    raise ModelError(
        f"'{name}' is {kind} (model type '{config.model_type}'): unlearning here needs a model that predicts each token "
        "from those before it, one that transformers' `AutoModelForCausalLM` loads. Set `model` to such a model.",
        owner=owner,
        argument="model",
    )


def _check_packing(name: str, config: Any, owner: object) -> None:
    fields = getattr(config, "quantization_config", None) or {}
    method = fields.get("quant_method") if isinstance(fields, Mapping) else getattr(fields, "quant_method", None)
    packing = _PACKED.get(str(getattr(method, "value", method)).lower())
    if packing is not None:
        raise ModelError(
            f"'{name}' is quantised with {packing}: its weights are packed integers, which no gradient step can move, and that "
            "nothing can be merged into. Set `model` to the model that it was made from; to save memory, load that one with "
            "`quantization` (bitsandbytes) and train an `adapter`.",
            owner=owner,
            argument="model",
        )


@contextmanager
def writing_weights(target: Path) -> Iterator[None]:
    """Turn what safetensors raises while it writes into an `OutputError` that names the target."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # It is no OSError, though its text is one: "Error while serializing: I/O error: No space left on device".
        reason = str(error).rpartition("I/O error: ")[2]
        raise OutputError(f"'{target}' cannot be written: {reason}.") from error


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
        model: On any device; a collective call if it is sharded.
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
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        # numpy has no bfloat16, so every dtype goes in as bytes.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
