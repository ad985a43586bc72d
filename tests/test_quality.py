"""The comparison on TOFU: its selection rule, its tables, its results files, and that an interrupted unit is no result."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT

from benchmarks.quality import protocol, results_files, run_unit, selection_rule, sweep, tables


def make_result(stage: str, label: str, size: int | None, facts: dict[str, Any] | None, **values: Any) -> Any:
    nll = values.pop("nll", 0.1)
    aggregate = {f"retain/{key}": 0.5 for key in ("probability", "rougeL_recall", "truth_ratio")}
    aggregate |= {"forget/nll": 5.0, "forget/entropy": 2.0, "forget/truth_ratio": 0.7, "forget/probability": 0.1}
    aggregate |= {key.replace("__", "/"): value for key, value in values.items()}
    constraints = {"nll": {"value": nll, "epsilon": 0.15, "slack": 0.15 - nll}}
    return {
        "unit": {"stage": stage, "label": label, "size": size, "seed": 0, "settings": ["--x=1"], "facts": facts},
        "protocol": protocol.digest(),
        "measured": {str(size or 4): {"aggregate": aggregate, "forget_truth_ratios": [0.5, 0.7]}},
        "report": {"constraints": constraints},
        "seconds": 1.0,
        "peak_mib": 1.0,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One method's four tuning runs: the one that forgets most is infeasible, and two of the others tie."""
    folder = tmp_path / "results"
    runs = [
        {"forget_quality": 0.9, "nll": 0.2},
        {"forget_quality": 0.50, "forget__truth_ratio": 0.9},
        {"forget_quality": 0.48, "forget__truth_ratio": 0.71},
        {"forget_quality": 0.10},
    ]
    results_files.write_result(folder, make_result("models", "retain_only", 4, None))
    results_files.write_result(folder, make_result("models", "target", None, None, forget_quality=1e-9))
    for number, values in enumerate(runs):
        facts = {"method": "pdu", "lr": 1e-3, "main": {"a.lr": number}}
        results_files.write_result(folder, make_result("tuning", f"pdu-{number:02b}", 4, facts, **values))
    shutil.copy(results_files.RESULTS / "gradients.json", folder)
    return folder


def test_the_rule_breaks_ties_by_truth_ratio(results: Path) -> None:
    choice = selection_rule.choose_settings("pdu", results)
    assert choice.feasible
    assert choice.by_rule["unit"]["facts"]["main"] == {"a.lr": 2}  # tied with 1, and nearer to the retain-only model
    assert choice.by_harmonic_mean["unit"]["facts"]["main"] == {"a.lr": 0}  # which ignores the constraint
    with pytest.raises(ValueError, match=r"npo.* 0 of 4"):
        selection_rule.choose_settings("npo", results)


def test_results_of_another_protocol_are_refused(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "EPSILON", 0.3)
    with pytest.raises(ValueError, match="another protocol"):
        results_files.read_results(results, "tuning")


def test_a_unit_has_one_line_and_lines_are_sorted(results: Path) -> None:
    results_files.write_result(results, make_result("tuning", "ceu-00", 4, {"method": "ceu"}, forget_quality=0.123456))
    results_files.write_result(results, make_result("tuning", "pdu-00", 4, {"method": "pdu"}, forget_quality=0.2))
    stored = results_files.read_results(results, "tuning")
    assert [row["unit"]["label"] for row in stored] == ["ceu-00", "pdu-00", "pdu-01", "pdu-10", "pdu-11"]
    assert [selection_rule.get_values(row)["forget_quality"] for row in stored[:2]] == [0.1235, 0.2]


def test_tables_keep_failures_and_what_was_not_run(results: Path, tmp_path: Path) -> None:
    facts = {"method": "pdu"}
    runs = [make_result("final", "pdu", 4, facts, forget_quality=0.25, forget__truth_ratio=0.75, nll=0.3)]
    runs.append({**make_result("final", "npo", 4, facts), "error": "it diverged"})
    for run in runs:
        results_files.write_result(results, run)
    page = tmp_path / "results.md"
    shutil.copy(ROOT / "docs" / "results.md", page)
    tables.main(["--results", str(results), "--page", str(page)])
    lines = page.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith("| pdu | 0 of 1 | 0.25 | 0.25 | 0.75 | 0.05 |")]
    assert "| 2 | 0.5 |" in row  # retain NLL / ε, and the retain utility
    assert any(line.startswith("| npo | 0 of 0 | failed: it diverged |") for line in lines)
    assert "| pdu | yes | lr 0.001, lr 2 | 0.48 | 0.710 | 0.500 | lr 0.001, lr 0: 0.9 |" in lines
    assert any("final 2 of" in line for line in lines)


def test_the_sweep_plans_every_method(results: Path) -> None:
    methods = {path.stem for path in (ROOT / "configs/method").glob("*.yaml")}
    candidates = {
        "match_unseen",
        "match_calibrated",
        "kl_to_teacher",
        "teacher_answers",
        "altpo_constrained",
        "nll_floor",
    }  # not in the protocol of this sweep
    assert methods == protocol.MAIN.keys() | candidates
    units = sweep.plan_tuning(list(protocol.MAIN))
    assert len({unit.name for unit in units}) == 4 * len(protocol.MAIN)
    finals = sweep.plan_final(["pdu"], (0, 1), results)
    assert [unit.size for unit in finals] == [4, 2, 8, 4, 2, 8]
    assert all(unit.settings == ("--x=1",) for unit in finals)


def test_a_sweep_resumes_and_an_interrupted_unit_is_no_result(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [run_unit.Unit("tuning", f"pdu-{n:02b}", 4, 0) for n in range(2)]
    units += [run_unit.Unit("final", "pdu", 4, 0), run_unit.Unit("final", "npo", 4, 0)]
    options = argparse.Namespace(results=results, work=tmp_path, again=False, only=None, jobs=1)
    outcomes = {"pdu": {**make_result("final", "pdu", 4, {}), "total_seconds": 1.0}, "npo": None}
    monkeypatch.setattr(sweep, "run_in_process", lambda unit, work: outcomes[unit.label])
    sweep.run_pending(units, options)  # would fail with a KeyError on a unit that has a result
    assert [row["unit"]["label"] for row in results_files.read_results(results, "final")] == ["pdu"]
    assert [unit.name for unit in sweep.select_pending(units, options)] == ["final/npo-4-0"]


def test_a_failure_is_a_result_and_an_interruption_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = run_unit.Unit("models", "target", None, 0)
    ends: list[BaseException] = [ValueError(f"no model in {tmp_path}"), SystemExit(130)]

    def end(*_: Any) -> None:
        raise ends.pop(0)

    monkeypatch.setattr(run_unit, "measure_finetuned", end)
    command = ["--unit", json.dumps(unit.__dict__), "--work", str(tmp_path), "--output", str(tmp_path / "a.json")]
    run_unit.main(command)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["error"] == "no model in {work}"
    (tmp_path / "a.json").unlink()
    with pytest.raises(SystemExit):
        run_unit.main(command)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("stage", sweep.STAGES)
def test_kept_results_are_those_of_this_protocol(stage: str) -> None:
    for result in results_files.read_results(results_files.RESULTS, stage):
        assert result["commit"] != "unknown"
