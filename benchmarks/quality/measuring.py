"""The commands that measure a model of a sweep, as lines of its ``after``: the same for every tier."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Sweep = dict[str, Any]
"""The content of a sweep's file."""

CELL = "{cell}"
ATTACKS_FILE = "attacks.yaml"
"""Settings of the attacks, in the folder of a tier."""

TOFU_FILE, ATTACK_FOLDER, DEPTH_FILE = "tofu.json", "attack", "depth.json"
"""What the commands leave in a cell."""

RELEARNING = ("relearned", "relearned with LoRA")
"""Labels of the attacks that relearn, in the lists of every tier."""


def measure(output: str, axes: Mapping[str, Sequence[int]], commands: Sequence[str]) -> Sweep:
    """Return a sweep that fits nothing: it runs commands for every combination of labels.

    Args:
        output: Its folder.
        axes: Labels by axis.
        commands: Arguments of ``lit-unlearn``.
    """
    grid = {name: list(labels) for name, labels in axes.items()}
    return {"output": output, "fit": False, "grid": grid, "after": list(commands)}


def evaluate(model: str, /, **settings: Any) -> str:
    """Return the command of TOFU's benchmark.

    Args:
        model: Folder or hub name; names of axes in braces stand for the cell's labels, here and below.
        **settings: Of the benchmark, such as ``source``.
    """
    return _join("evaluate", model, suite="tofu", output=f"{CELL}/{TOFU_FILE}", **{"logs.save_dir": CELL}, **settings)


def attack(model: str, config: str, /, **settings: Any) -> str:
    """Return the command of a list of attacks.

    The retain-only model is not attacked beside each model, which would take as long again: it has a cell of its own.

    Args:
        model: Folder or hub name.
        config: File with the attacks.
        **settings: Sets of rows, prompt and lengths.
    """
    return _join("attack", model, config=config, output=f"{CELL}/{ATTACK_FOLDER}", **settings)


def depth(model: str, /, **settings: Any) -> str:
    """Return the command of the Unlearning Depth Score.

    Args:
        model: Folder or hub name.
        **settings: ``target``, ``retain_only`` and ``rows``, and the prompt.
    """
    return _join("depth", model, output=f"{CELL}/{DEPTH_FILE}", **settings)


def prepare(kind: str, /, **settings: Any) -> str:
    """Return the command that makes rows of a kind, which are then ``<kind>.jsonl`` in the cell."""
    return _join("prepare", kind, output=f"{CELL}/{kind}.jsonl", **settings)


def _join(command: str, subject: str, /, **options: Any) -> str:
    words = [command, subject]
    for name, value in options.items():
        words.append(f"--{name}={value}")
    return shlex.join(words)
