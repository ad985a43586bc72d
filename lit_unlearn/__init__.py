"""Constrained unlearning for language models on PyTorch Lightning.

The public names are those of ``__init__.pyi``. They are imported on first use, so that ``import lit_unlearn`` and
``lit-unlearn --version`` stay quick: torch, lightning and transformers take seconds to import.
"""

from __future__ import annotations

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """Return the module of every public name, as the type stub beside this file has it."""
    import ast
    from pathlib import Path

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {}
    for statement in stub.body:
        if isinstance(statement, ast.ImportFrom):
            homes |= {alias.name: str(statement.module) for alias in statement.names}
    return homes


def __getattr__(name: str) -> object:
    import importlib

    homes = _public_names()
    if name == "__all__":
        return [*homes, "__version__"]
    if name not in homes:
        raise AttributeError(f"module 'lit_unlearn' has no attribute '{name}'")
    value = getattr(importlib.import_module(homes[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted([*_public_names(), "__version__"])
