"""Where the files of a model are, and whether a local model is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_unlearn.errors import MissingFileError, ModelError, reading
from lit_unlearn.models import gguf
from lit_unlearn.models.files import ADAPTER_CONFIG, ModelFiles

# What git checks out in place of a large file begins so where git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs"


def locate_model(
    name: str, revision: str | None, use_safetensors: bool, gguf_file: str | None = None, owner: object = None
) -> ModelFiles:
    """Return where a model's weights are, and raise if a local one is not complete; arguments as for `LanguageModel`.

    Raises:
        MissingFileError: If a local model, its GGUF file or the base model of an adapter is not there.
        ModelError: If a file is damaged or a git-lfs pointer, or the package that reads GGUF is not installed.
    """
    path = Path(name)
    if gguf_file is None and path.suffix == gguf.SUFFIX and path.is_file():
        # The whole path will do.
        name, gguf_file = str(path.parent), path.name
    if gguf_file is not None:
        gguf.check_package(owner)
        if is_local(name):
            check_lfs_pointers(Path(name), owner, "gguf_file")
            gguf.check_file(Path(name), gguf_file, owner)
        return ModelFiles(name, revision, use_safetensors=False, gguf_file=gguf_file)

    check_model_directory(name, use_safetensors, owner)
    base = None
    if _is_adapter(path):
        base_name, base_revision = _read_base(path, owner, "model")
        base = ModelFiles(base_name, base_revision, use_safetensors)
    return ModelFiles(name, revision, use_safetensors, base=base)


def check_model_directory(name: str, use_safetensors: bool, owner: object = None, argument: str = "model") -> None:
    """Raise if a local path holds no complete model, so that a run fails before anything else is loaded.

    Args:
        name: Hub name or local directory; a hub name passes.
        use_safetensors: Whether other weight files do not count.
        owner: The object whose argument it is, for the error.
        argument: Name of that argument.

    Raises:
        MissingFileError: If it is a path where there is nothing, or a folder without config or weights, or an adapter
            whose base model is not there.
        ModelError: If a file is only a git-lfs pointer.
    """
    path = Path(name)
    if not path.exists():
        if is_local(name):
            message = f"there is no model directory '{name}': check `{argument}`, or train it first."
            raise MissingFileError(message, owner=owner, argument=argument)
        return

    check_lfs_pointers(path, owner, argument)
    config = ADAPTER_CONFIG if _is_adapter(path) else "config.json"
    patterns = ("*.safetensors",) if use_safetensors else ("*.safetensors", "*.bin")
    has_weights = any(next(path.glob(pattern), None) for pattern in patterns)
    if not (path / config).is_file() or not has_weights:
        content = sorted(file.name for file in path.iterdir()) if path.is_dir() else "a file"
        has_pickle = use_safetensors and any(path.glob("*.bin"))
        allow_pickle = ", or set `use_safetensors` to false" if has_pickle else ""
        names = [file for file in content if file.endswith(gguf.SUFFIX)] if path.is_dir() else []
        name_file = f" For a model in GGUF, set `gguf_file`, such as '{names[0]}'." if names else ""
        message = (
            f"'{name}' is no complete model directory: expected {config} and {' or '.join(patterns)}, found {content}. "
            f"Point `{argument}` at the output of `save_pretrained`{allow_pickle}.{name_file}"
        )
        raise MissingFileError(message, owner=owner, argument=argument)

    if config == ADAPTER_CONFIG:
        base, _ = _read_base(path, owner, argument)
        if _is_adapter(Path(base)):
            message = f"the base model '{base}' of the adapter '{name}' is an adapter itself: merge the two first."
            raise ModelError(message, owner=owner, argument=argument)
        with naming_adapter(base, name, owner, argument):
            check_model_directory(base, use_safetensors, owner, argument)


def is_local(name: str) -> bool:
    """Return whether a name is a path, be there something or not; a hub name has one slash at most."""
    path = Path(name)
    return path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) > 2


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _read_base(folder: Path, owner: object, argument: str) -> tuple[str, str | None]:
    """Return name and revision of an adapter's base model."""
    file = folder / ADAPTER_CONFIG
    with reading(
        "the adapter's config", file, "Get a complete copy of it.", ModelError, owner=owner, argument=argument
    ):
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    base = config.get("base_model_name_or_path")
    if not base:
        message = f"'{file}' names no base model: write its directory or hub name there, as `base_model_name_or_path`."
        raise ModelError(message, owner=owner, argument=argument)
    # As peft does, from the working directory; or from the adapter's own folder, which may be moved together with the base.
    beside = folder / base
    is_beside = (beside / "config.json").is_file() and not (Path(base) / "config.json").is_file()
    return str(beside) if is_beside else str(base), config.get("revision")


@contextmanager
def naming_adapter(base: str, adapter: str, owner: object, argument: str) -> Iterator[None]:
    """Say whose base model is missing, if one is."""
    try:
        yield
    except MissingFileError as error:
        message = (
            f"the base model '{base}' of the adapter '{adapter}' is not there, neither as a complete local directory nor on "
            f"the hub: write where it is into {ADAPTER_CONFIG} there, as `base_model_name_or_path`."
        )
        raise MissingFileError(message, owner=owner, argument=argument) from error


def check_lfs_pointers(folder: Path, owner: object = None, argument: str | None = None) -> None:
    """Raise ModelError if a file of a folder is a git-lfs pointer."""
    # Else the reason would be "header too large" for weights, "expecting value" for a tokenizer.
    for file in sorted(folder.glob("*")):
        if not file.is_file() or file.stat().st_size > 1024:
            continue
        if file.read_bytes().startswith(LFS_POINTER):
            message = (
                f"'{file}' is a git-lfs pointer, not the file: install git-lfs and run `git lfs pull` in '{folder}'."
            )
            raise ModelError(message, owner=owner, argument=argument)
