"""The command line answers soon; what it takes is a benchmark, of which a round runs here."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from benchmarks import startup


def cpu_seconds(*arguments: str) -> float:
    """Of the processor, which on a busy machine is less than the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lit_unlearn", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("option", "bound"), [("--version", 0.2), ("--help", 1.0)])
def test_version_and_help_answer_at_once(option: str, bound: float) -> None:
    assert min(cpu_seconds(option) for _ in range(3)) < bound


def run_script(script: str) -> None:
    """Run a script in this process, which ends as an interpreter's run does: by `SystemExit`."""
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    raise SystemExit(0)


@pytest.mark.slow
def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(command: list[str]) -> float:
        """Runs what a command of the benchmark gives to a new interpreter, whose start takes seconds."""
        _, _, script, *arguments = command
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        start = time.perf_counter()
        with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit, match=r"^(0|None|)$"):
            run_script(script)
        assert printed.getvalue()
        return time.perf_counter() - start

    assert 0 < startup.time_command(startup.list_commands()["lit-unlearn --version"]) < 60
    with pytest.raises(RuntimeError, match="failed"):
        startup.time_command([sys.executable, "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(startup, "time_command", run_here)
    startup.main(["--rounds=1", "--warm_up_rounds=0", f"--output={tmp_path}/startup.json"])
    results = json.loads((tmp_path / "startup.json").read_text(encoding="utf-8"))
    assert {len(values) for values in results["seconds"].values()} == {1}
    assert all(ratio > 0 for ratio in results["ratios"].values())
    assert "× LightningCLI's" in capsys.readouterr().out
