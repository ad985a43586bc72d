"""The files that a model comes from: which they are, what they are known by, how large they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lit_unlearn.models import gguf
from lit_unlearn.utils.io import file_digest, read_json

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder one of peft's adapters."""

RECORD_FILE = "unlearning.json"
"""The record of an export of this package, beside its weights."""

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes that are read at each of 256 places of a file to tell models apart.
_SAMPLE = 16 * 1024


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where the weights of a model are: a folder or a hub name, a GGUF file in it, or an adapter and its base model.

    Args:
        name: Hub name or local directory.
        revision: Branch, tag or commit on the hub.
        use_safetensors: Whether other weight files do not count.
        gguf_file: Name of the GGUF file there that has the weights, if one has.
        base: The base model, if the folder is an adapter.
    """

    name: str
    revision: str | None = None
    use_safetensors: bool = True
    gguf_file: str | None = None
    base: ModelFiles | None = None

    @property
    def model(self) -> ModelFiles:
        """The files that are a whole model: of an adapter, those of its base model."""
        return self if self.base is None else self.base

    def folder(self) -> Path | None:
        """Return the folder; of a model from the hub the one in its cache, ``None`` if that has it no more."""
        from huggingface_hub import try_to_load_from_cache

        folder = Path(self.name)
        if folder.is_dir():
            return folder
        file = try_to_load_from_cache(self.name, self.gguf_file or "config.json", revision=self.revision)
        return Path(file).parent if isinstance(file, str) else None

    def weight_files(self) -> list[Path]:
        """Return the files with weights, all shards of them; none if the folder is not there."""
        folder = self.folder()
        if folder is None:
            return []
        if self.gguf_file is not None:
            return [folder / self.gguf_file]
        # transformers reads safetensors where there are any, whatever else lies beside them.
        files = sorted(folder.glob("*.safetensors"))
        if not files and not self.use_safetensors:
            files = sorted(folder.glob("*.bin"))
        return files

    def dtype(self) -> torch.dtype | None:
        """Return the dtype that most numbers of the model have in safetensors; ``None`` if it has no such files."""
        from safetensors import safe_open

        counts: Counter[torch.dtype] = Counter()
        for file in self.model.weight_files():
            if file.suffix != ".safetensors":
                continue
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (it cannot be iterated over)
                    # Only the header is read.
                    tensor = tensors.get_slice(key)
                    dtype = _SAFETENSORS_DTYPES.get(tensor.get_dtype())
                    if dtype is not None:
                        counts[dtype] += math.prod(tensor.get_shape())
        return counts.most_common(1)[0][0] if counts else None

    def describe(self) -> dict[str, Any]:
        """Return ``commit`` and ``weights`` (sha256 by file name) of a model that was loaded; reads the files completely.

        Both are empty after the hub's cache was emptied.
        """
        # The hub's cache names the folder of each snapshot by its commit.
        folder = None if Path(self.name).is_dir() else self.folder()
        weights = {file.name: file_digest(file) for file in self.weight_files()}
        return {"commit": None if folder is None else folder.name, "weights": weights}

    def read_record(self) -> dict[str, Any] | None:
        """Return the record of the export that these files are; ``None`` if they are none, or have changed since.

        Reads the files completely.
        """
        folder = self.folder()
        if folder is None or not (folder / RECORD_FILE).is_file():
            return None
        # A damaged record says nothing.
        with suppress(ValueError):
            record: dict[str, Any] = read_json(folder / RECORD_FILE)
            if self.describe()["weights"].items() <= record["files"].items():
                return record
        return None

    def describe_export(self) -> dict[str, Any]:
        """Return what results of these files say of them: nothing, unless they are an export that has not changed since.

        Reads the files completely.

        Returns:
            ``files``, the sha256 of the weights by file name, by which a record takes no results of another model; and ``damage``, for
            ``lit-unlearn compare --matched``, if its run measured it.
        """
        record = self.read_record()
        if record is None:
            return {}
        description = {"files": self.describe()["weights"]}
        return description if record.get("damage") is None else {**description, "damage": record["damage"]}

    def sample(self) -> str:
        """Return a digest that tells models apart without reading them completely, the same wherever a model lies.

        Training changes weights all over a model, so a part of every 256th of a file shows it. Of a hub name, the name and
        the revision are digested.
        """
        digest = hashlib.sha256()
        if not Path(self.name).is_dir():
            digest.update(f"{self.name} {self.revision} {self.gguf_file or ''}".rstrip().encode())
            return digest.hexdigest()[:16]

        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(_SAMPLE, size // 256)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
        if self.base is not None:
            digest.update(self.base.sample().encode())
        return digest.hexdigest()[:16]

    def export_size(self) -> int:
        """Return about how many bytes an export of a local model takes; 0 for any other model."""
        model = self.model
        if not Path(model.name).is_dir():
            return 0
        if model.gguf_file is not None:
            # What is exported are numbers of 4 bytes each.
            return sum(4 * count_parameters(file) for file in model.weight_files())
        return sum(file.stat().st_size for file in model.weight_files())


def count_parameters(file: Path) -> int:
    """Return how many numbers a file in safetensors or GGUF has, from its header alone."""
    if file.suffix == ".gguf":
        return gguf.read_header(file).parameters
    # A safetensors file begins with the length of a JSON object, which has the shape of every tensor.
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
