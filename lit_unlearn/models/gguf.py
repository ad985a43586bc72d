"""Models in GGUF, the format of llama.cpp: what a file holds, and an ordinary model of what transformers makes of it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_unlearn.errors import MissingFileError, ModelError, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
# Every other type has blocks of integers with a scale.
_FLOATS = ("F64", "F32", "F16", "BF16")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


class Header(NamedTuple):
    """What a GGUF file says of its tensors."""

    parameters: int  # numbers in all tensors
    quantized: tuple[str, ...]  # the types that are no floats, the most frequent one first


def check_file(folder: Path, name: str, owner: object = None) -> None:
    """Raise if a GGUF file cannot be loaded, before anything is.

    Args:
        folder: Local.
        name: Of the file in it.
        owner: The object whose argument ``gguf_file`` it is, for the error.

    Raises:
        MissingFileError: If there is no such file.
        ModelError: If it is damaged, or one part of several.
    """
    file = folder / name
    if not file.is_file():
        names = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
        message = (
            f"'{folder}' has no file '{name}': expected the name of a GGUF file there, which has {names or 'none'}."
        )
        raise MissingFileError(message, owner=owner, argument="gguf_file")
    if part := _PART.search(name):
        message = (
            f"'{name}' is one of {int(part[1])} parts, and transformers reads one file: join them (`llama-gguf-split --merge`) "
            "and give the result."
        )
        raise ModelError(message, owner=owner, argument="gguf_file")
    remedy = "Get a complete copy of it."
    with reading("the GGUF file", file, remedy, ModelError, owner=owner, argument="gguf_file"):
        read_header(file)


def check_package(owner: object = None) -> None:
    """Raise if the package that reads the format is not installed.

    Raises:
        ModelError: With the command that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        message = "reading a GGUF file needs the package `gguf`, which is not installed: `pip install gguf`."
        raise ModelError(message, owner=owner, argument="gguf_file")


def read_header(file: Path) -> Header:
    """Return what a file says of its tensors; they are not read."""
    # Its list of tokens takes seconds to go through.
    return _read_header(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_header(file: Path, _modified: int) -> Header:
    from gguf import GGUFReader

    parameters = 0
    types: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        size = int(tensor.n_elements)
        parameters += size
        types[tensor.tensor_type.name] += size
    quantized = tuple(name for name, _ in types.most_common() if name not in _FLOATS)
    return Header(parameters, quantized)


def loading_settings(gguf_file: str) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that load a file with all its weights as floats."""
    import transformers

    settings: dict[str, Any] = {"gguf_file": gguf_file}
    # Newer versions leave the integers as they are where there is a kernel for them.
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return settings


def as_ordinary_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights that does not know that they came from a GGUF file.

    transformers takes a model that it loaded from one for a quantised model, and refuses to save it.

    Args:
        model: Loaded with `loading_settings`, so that all its weights are floats.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = getattr(config, "_attn_implementation", None)
    ordinary: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=attention
    )
    # Assigned, not copied, so that the random weights make room.
    ordinary.load_state_dict(model.state_dict(), assign=True)
    ordinary.tie_weights()
    ordinary.generation_config = model.generation_config
    ordinary.eval()
    return ordinary


def describe_loss(file: Path, dtype: Any) -> str | None:
    """Return one sentence on what a model that was loaded from a file lacks; ``None`` if nothing is lost."""
    header = read_header(file)
    if not header.quantized:
        return None
    return (
        f"the weights in '{file.name}' were rounded to {' and '.join(header.quantized)}, and loading them as "
        f"{str(dtype).removeprefix('torch.')} does not undo that; exports are safetensors, not GGUF."
    )
