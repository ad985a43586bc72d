"""The benchmarks run, at toy sizes, and compare formulations that do the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_command

from benchmarks import generation, methods, nll

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys
from benchmarks import scaling, step
folder = sys.argv[1]
# A process for each measurement would take long.
step.run_in_fresh_process = scaling.run_in_fresh_process = lambda function, *arguments: function(*arguments)
step.main(["--shapes", "toy", "--rounds", "1", "--steps", "1", "--threads", "1", "--lora", "--profile", "--output", f"{folder}/step.json"])
scaling.main(["--small", "--rounds", "1", "--dual-rounds", "1", "--threads", "1", "--no-processes", "--output", f"{folder}/scaling.json"])
try:
    step.check_agreement({"plain": {"nll": 1.0}, "joint": {"nll": 1.001}}, 1e-4)
except RuntimeError as error:
    print(error, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("bench")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_formulations_start_alike_and_are_measured(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = ran
    results: dict[str, Any] = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    toy = results["shapes"]["toy, 32-true"]
    assert {"cpu", "threads", "torch"} <= results["machine"].keys()
    assert toy["variants"].keys() == {"plain", "sequential", "joint", "plain, lora", "sequential, lora"}
    plain = toy["variants"]["plain"]
    for name, values in toy["variants"].items():
        assert values["first_losses"] == pytest.approx(plain["first_losses"], rel=1e-4), name
        assert min(values[key] for key in ("seconds", "tokens_per_second", "time_over_floor", "time_ratio")) > 0
        assert values["memory"]["extra_bytes"] > 0
    assert plain["time_ratio"] == plain["memory_ratio"] == plain["peak_ratio"] == 1
    assert toy["variants"]["sequential, lora"]["floor_flops"]["head"] < plain["floor_flops"]["head"]
    assert all(name in done.stdout for name in toy["variants"])


def test_a_disagreement_is_an_error(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert "disagree" in ran[1].stderr


def test_scaling_has_every_sweep(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    results = json.loads((ran[0] / "scaling.json").read_text(encoding="utf-8"))
    assert results["sweeps"].keys() == {"rows per batch", "length of rows", "vocabulary", "constraints"}
    points = [point for sweep in results["sweeps"].values() for point in sweep.values()]
    assert all(order["seconds"] > 0 for point in points for order in point["orders"].values())
    assert results["dual_step"]["seconds"].keys() == {"DualAscent", "FixedMultiplier"}


def test_every_nll_that_runs_here_gives_the_same_and_is_measured(tmp_path: Path) -> None:
    options = ["--shapes", "toy", "--tokens", "40", "--rounds", "1", "--threads", "1", "--no-memory"]
    nll.main([*options, "--output", f"{tmp_path}/nll.json"])
    heads = json.loads((tmp_path / "nll.json").read_text(encoding="utf-8"))["heads"]
    assert [head["dtype"] for head in heads] == ["float32", "bfloat16"]
    for head in heads:
        assert {"plain", "ours", "ours, in place"} <= head["functions"].keys()
        assert head["functions"].keys() | head["missing"].keys() == nll.FUNCTIONS.keys()
        assert head["functions"]["plain"]["time_ratio"] == 1


def test_an_nll_that_gives_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nll.FUNCTIONS, "ours", lambda *inputs: 1.01 * nll.compute_plain(*inputs))
    with pytest.raises(RuntimeError, match="'ours'"):
        nll.find_missing(nll.Head("toy", 40, torch.float32, "cpu", 1))


def test_answers_are_those_of_plain_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--shape", "toy", "--prompts", "6", "--max-new-tokens", "8", "--batch-size", "4", "--rounds", "1"]
    options += ["--threads", "1", "--output", f"{tmp_path}/generation.json"]
    assert generation.main(options) == 0
    results = json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))
    assert results["same_texts"] == results["prompts"] == 6
    assert 6 <= results["answer_tokens"] <= 6 * 8
    assert min(results["tokens_per_second"].values()) > 0

    monkeypatch.setattr(generation, "generate", lambda _lm, prompts, **_: ["another"] * len(prompts))
    assert generation.main(options) == 1


def test_methods_are_compared_and_a_failure_is_a_row(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_forked(arguments: list[str], work: Path) -> subprocess.CompletedProcess[str]:
        code, text = run_command(work, *arguments)
        return subprocess.CompletedProcess(arguments, code or 0, "", text)

    monkeypatch.setattr(methods, "run_command", run_forked)
    target = tmp_path / "work/runs/demo/target"
    target.parent.mkdir(parents=True)
    target.symlink_to(model_dir)  # has two layers, so that RMU's layer 1 is one too many
    paths = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "methods.json")]
    short = ["--extra=--trainer.max_steps=2", "--extra=--data.max_length=200"]
    methods.main(["--methods", "npo", "rmu", *paths, *short])
    results = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))["methods"]
    assert 0 < results["npo"]["forget_probability"] < 1
    assert results["npo"]["seconds"] > 0 < results["npo"]["peak_mib"]
    assert "error" in results["rmu"]
    assert "failed: " in capsys.readouterr().out
