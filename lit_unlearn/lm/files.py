"""Model directories on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """A new folder that becomes ``target`` when the block ends well; a half-written one never replaces a whole one.

    Args:
        target: Final place; what is there before stays until the new folder is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        fresh, old = Path(work) / "new", Path(work) / "old"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
