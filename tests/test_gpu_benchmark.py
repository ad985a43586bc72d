"""``python -m benchmarks.gpu``: every stage runs, at toy sizes on a CPU; what is done is not repeated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.stages import STAGES, Scale, read_report
from benchmarks.gpu.table import format_results
from benchmarks.step_profile import Interval, summarize


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    file = tmp_path_factory.mktemp("gpu") / "results.json"
    return command.main(["--smoke", "--output", str(file)]), file


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(smoke: tuple[int, Path]) -> None:
    code, file = smoke
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert code == 0, {name: stage["error"] for name, stage in results["stages"].items()}
    assert results["stages"].keys() == STAGES.keys() == command.BUDGETS.keys()
    tests, step, profile, variants = (results["stages"][name] for name in ("tests", "step", "profile", "variants"))
    assert tests["counts"]["passed"] > 5
    assert step["formulations"].keys() == {"plain", "joint"}
    assert max(step["first_loss_difference"].values()) < 1e-2
    for values in step["formulations"].values():
        assert values["floor_share"] == pytest.approx(1 / values["time_over_floor"])
        assert values["memory"]["peak_bytes"] > 0
    assert 0 < profile["busy_ms"] <= profile["span_ms"]
    wanted = variants["variants"]["joint, packed"]["first_losses"]
    measured = {name for name, values in variants["variants"].items() if "error" not in values}
    assert {"sequential, packed", "joint, padded", "LoRA", "QLoRA", "eager attention"} <= measured
    for name in measured:
        # Four bits are another model.
        tolerance = 0.02 if name == "QLoRA" else 0.005
        assert variants["variants"][name]["first_losses"] == pytest.approx(wanted, rel=tolerance), name
    assert all(name in format_results(results) for name in variants["variants"])
    nll, generation = results["stages"]["nll"], results["stages"]["generation"]
    assert {"plain", "ours", "torch"} <= nll["functions"].keys()
    assert "Liger" in nll["missing"]
    assert generation["same_texts"] == generation["prompts"]
    assert f"{generation['prompts']} answers" in format_results(results)


@pytest.mark.slow
def test_the_same_command_repeats_nothing(smoke: tuple[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, file = smoke
    before = file.read_bytes()
    assert command.main(["--smoke", "--output", str(file)]) == 0
    assert capsys.readouterr().out.count("done before") == len(STAGES)
    assert file.read_bytes() == before


def test_what_is_missing_or_failed_is_run_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, ran = tmp_path / "results.json", []

    def run_stage(name: str, scale: Scale, minutes: float) -> dict[str, Any]:
        ran.append(name)
        error = "out of memory" if ran.count(name) == 1 and name == "profile" else None
        return {"is_done": error is None, "error": error, "seconds": 1.0}

    monkeypatch.setattr(command, "run_stage", run_stage)
    options = ["--smoke", "--output", str(file)]
    assert command.main([*options, "--stages", "step", "profile"]) == 1
    assert command.main(options) == 0
    assert ran == ["step", "profile", "tests", "profile", "variants", "nll", "generation"]
    assert command.main([*options, "--shape", "32k"]) == 2  # figures of two shapes in one file would be compared
    assert "'toy'" in capsys.readouterr().err


def test_a_stage_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = command.run_stage("profile", Scale.choose("cpu", "toy"), 1 / 600)
    assert not stage["is_done"]
    assert "minutes" in stage["error"]


def test_without_a_gpu_the_command_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([])
    assert stopped.value.code == 2
    assert "--smoke" in capsys.readouterr().err


def test_overlapping_kernels_are_busy_once() -> None:
    summary = summarize([Interval("b", 50, 60), Interval("a", 0, 10), Interval("b", 2, 4), Interval("a", 8, 20)])
    assert summary["span_ms"] == pytest.approx(0.06)
    assert summary["busy_ms"] == pytest.approx(0.03)
    assert summary["largest_gap_ms"] == pytest.approx(0.03)
    assert [(row["name"], row["calls"]) for row in summary["top"]] == [("a", 2), ("b", 2)]
    with pytest.raises(ValueError, match="CUPTI"):
        summarize([])


def test_a_report_of_tests_is_counted_with_the_reasons(tmp_path: Path) -> None:
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_not_here(): pytest.skip('needs a card')\n"
    )
    report = tmp_path / "report.xml"
    pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(test), f"--junitxml={report}"]
    command.subprocess.run(
        [*pytest_command, "--rootdir", str(tmp_path)], cwd=tmp_path, capture_output=True, check=False
    )
    counts, failed, skipped = read_report(report)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert failed == ["test_bad"]
    assert skipped == {"needs a card": 1}
