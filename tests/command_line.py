"""The command line, called as a user would, for several test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_unlearn import cli

ROOT = Path(__file__).parents[1]
UNLEARN = ROOT / "configs" / "demo" / "unlearn.yaml"


def end_of(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def quick(model_dir: str, *extra: str) -> list[str]:
    """A fit on the tiny model that takes a few steps."""
    return [
        "fit",
        "--config=demo/unlearn.yaml",
        f"--model.lm.model={model_dir}",
        "--data.num_authors=3",
        "--data.forget_authors=1",
        "--data.max_length=200",
        "--trainer.max_epochs=2",
        "--logs.save_dir=log",
        "--logs.name=run",
        "--trainer.enable_progress_bar=false",
        "--export.dirpath=out",
        "--report.require_feasible=false",
        "--report.require_forgotten=false",
        *extra,
    ]


def instantiate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parses and instantiates without running."""
    from lightning.pytorch.cli import LightningCLI

    made: list[Any] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: made.append(self))
    cli.main(arguments)
    return made[0]
