"""``lit-unlearn methods``: the forgetting methods that have a configuration file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_unlearn import objectives
from lit_unlearn.cli import CONFIGS


def run(arguments: list[str]) -> None:
    """Lists the methods, as text or as JSON."""
    parser = argparse.ArgumentParser(prog="lit-unlearn methods", description="Lists the forgetting methods.")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    folder = next(folder for folder in CONFIGS if folder.is_dir())
    found = [describe(file) for file in sorted((folder / "method").glob("*.yaml"))]
    if parser.parse_args(arguments).json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_text(method) for method in found))
        print("\nlit-unlearn fit --config configs/tofu.yaml --config method/<name>.yaml")


def describe(file: Path) -> dict[str, Any]:
    """What a method's file says, and what its objectives say of themselves.

    Args:
        file: A configuration of ``model.forget`` and ``model.constraints``.

    Returns:
        ``name``, ``objective``, ``formula``, ``needs``, ``paper``, ``retention`` (a line per constraint) and ``config``.
    """
    model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
    forget = _objective(model["forget"])
    bounded = {name: _objective(constraint["objective"]) for name, constraint in model["constraints"].items()}
    needs = set(forget.needs).union(*(objective.needs for objective in bounded.values()))
    return {
        "name": file.stem,
        "objective": forget.__name__,
        "formula": forget.formula,
        "needs": sorted(needs),
        "paper": forget.paper,
        "retention": [
            f"{objective.__name__} {_policy(model['constraints'][name])}" for name, objective in bounded.items()
        ],
        "config": f"method/{file.name}",
    }


def _objective(settings: dict[str, Any]) -> type[objectives.Objective]:
    kind: type[objectives.Objective] = getattr(objectives, settings["class_path"])
    return kind


def _policy(constraint: dict[str, Any]) -> str:
    multiplier = constraint["multiplier"]
    if multiplier["class_path"] != "FixedMultiplier":
        return f"≤ epsilon ({multiplier['class_path']})"
    weight = multiplier["init_args"]["weight"]
    return f"with fixed weight {weight}" if weight else "only reported"


def _text(method: dict[str, Any]) -> str:
    lines: Sequence[str] = [
        f"{method['name']}: {method['objective']}, {method['formula']}",
        f"needs {', '.join(method['needs']) or 'nothing'}; {'; '.join(method['retention'])}",
        f"{method['paper']}; --config {method['config']}",
    ]
    return "\n    ".join(lines)
