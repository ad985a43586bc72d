"""Run ``lit-unlearn methods``: list the forgetting methods that have a configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lit_unlearn import objectives
from lit_unlearn.cli.main import CONFIGS
from lit_unlearn.cli.parser import CommandParser


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(prog="lit-unlearn methods", description="Lists the forgetting methods.")
    parser.add_argument("--json", action="store_true", help="As JSON, for programs.")
    return parser


def run(arguments: list[str]) -> None:
    """List the methods, as text or as JSON."""
    options = build_parser().parse_args(arguments)
    folder = next(filter(Path.is_dir, CONFIGS))
    methods = list(map(describe_method, sorted((folder / "method").glob("*.yaml"))))
    if options.json:
        print(json.dumps(methods, indent=2, ensure_ascii=False))
        return
    print("\n\n".join(map(_format_method, methods)))
    print("\nlit-unlearn fit --config configs/tofu.yaml --config method/<name>.yaml")


def describe_method(file: Path) -> dict[str, Any]:
    """Return what a method's file sets, and what its objectives declare.

    Args:
        file: A configuration of ``model.forget`` and ``model.constraints``.

    Returns:
        ``name``, ``objective``, ``formula``, ``needs``, ``paper``, ``retention`` (a line per constraint) and ``config``.
    """
    model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
    forget = _build_objective(model["forget"])
    needs = set(forget.requirements)
    retention = []
    for constraint in model["constraints"].values():
        objective = _build_objective(constraint["objective"])
        needs |= set(objective.requirements)
        retention.append(f"{type(objective).__name__} {_describe_multiplier(constraint['multiplier'])}")
    return {
        "name": file.stem,
        "objective": type(forget).__name__,
        "formula": forget.formula,
        "needs": sorted(needs),
        "paper": forget.paper,
        "retention": retention,
        "config": f"method/{file.name}",
    }


def _build_objective(settings: dict[str, Any]) -> objectives.Objective:
    objective: objectives.Objective = getattr(objectives, settings["class_path"])(**settings.get("init_args", {}))
    return objective


def _describe_multiplier(multiplier: dict[str, Any]) -> str:
    if multiplier["class_path"] != "FixedMultiplier":
        return f"≤ epsilon ({multiplier['class_path']})"
    weight = multiplier["init_args"]["weight"]
    return f"with fixed weight {weight}" if weight else "only reported"


def _format_method(method: dict[str, Any]) -> str:
    lines = [
        f"{method['name']}: {method['objective']}, {method['formula']}",
        f"needs {', '.join(method['needs']) or 'nothing'}; {'; '.join(method['retention'])}",
        f"{method['paper']}; --config {method['config']}",
    ]
    return "\n    ".join(lines)
