"""The command line answers soon; what it takes is a benchmark, of which a round runs here."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cpu_seconds(*arguments: str) -> float:
    """Of the processor, which on a busy machine is less than the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lit_unlearn", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("option", "bound"), [("--version", 0.2), ("--help", 1.0)])
def test_version_and_help_answer_at_once(option: str, bound: float) -> None:
    assert min(cpu_seconds(option) for _ in range(3)) < bound


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    rounds = ["--rounds=1", "--warm_up_rounds=0"]
    command = [sys.executable, "-m", "benchmarks.startup", *rounds, f"--output={tmp_path}/startup.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "startup.json").read_text(encoding="utf-8"))
    assert {len(values) for values in results["seconds"].values()} == {1}
    assert all(ratio > 0 for ratio in results["ratios"].values())
    assert "× LightningCLI's" in done.stdout
