"""The comparison on TOFU: its selection rule, its tables, and that every page's blocks are there to be filled."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT

FOLDER = ROOT / "benchmarks" / "quality"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts' modules, by name."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(ROOT / "benchmarks"), *sys.path])
    import choose
    import protocol
    import sweep
    import tables

    return {"choose": choose, "protocol": protocol, "sweep": sweep, "tables": tables}


def result(
    quality: Any, stage: str, label: str, size: int | None, facts: dict[str, Any] | None, **values: Any
) -> dict[str, Any]:
    nll = values.pop("nll", 0.1)
    aggregate = {f"retain/{key}": 0.5 for key in ("probability", "rougeL_recall", "truth_ratio")}
    aggregate |= {"forget/nll": 5.0, "forget/entropy": 2.0, "forget/truth_ratio": 0.7, "forget/probability": 0.1}
    aggregate |= {key.replace("__", "/"): value for key, value in values.items()}
    measured = {str(size or 4): {"aggregate": aggregate, "forget_truth_ratios": [0.5, 0.7]}}
    constraints = {"nll": {"value": nll, "epsilon": 0.15, "slack": 0.15 - nll}}
    unit = {"stage": stage, "label": label, "size": size, "seed": 0, "settings": ["--x=1"], "facts": facts}
    report = {"constraints": constraints}
    return {
        "unit": unit, "protocol": quality["protocol"].digest(), "measured": measured, "report": report, "seconds": 1.0, "peak_mib": 1.0
    }  # fmt: skip


def write(folder: Path, content: dict[str, Any]) -> None:
    unit = content["unit"]
    file = folder / unit["stage"] / f"{unit['label']}-{unit['size'] or 'all'}-{unit['seed']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def results(quality: Any, tmp_path: Path) -> Path:
    """One method's four tuning runs: the most forgetful breaks the bound, and two of the others tie."""
    write(tmp_path, result(quality, "models", "retain_only", 4, None))
    write(tmp_path, result(quality, "models", "target", None, None, forget_quality=1e-9))
    runs = [
        {"forget_quality": 0.9, "nll": 0.2},
        {"forget_quality": 0.50, "forget__truth_ratio": 0.9},
        {"forget_quality": 0.48, "forget__truth_ratio": 0.71},
        {"forget_quality": 0.10},
    ]
    for number, values in enumerate(runs):
        facts = {"method": "pdu", "lr": 1e-3, "main": {"a.lr": number}}
        write(tmp_path, result(quality, "tuning", f"pdu-{number:02b}", 4, facts, **values))
    shutil.copy(FOLDER / "results" / "gradients.json", tmp_path)
    return tmp_path


def test_the_rule(quality: Any, results: Path) -> None:
    picked = quality["choose"].chosen("pdu", results)
    assert picked["feasible"]
    assert picked["rule"]["unit"]["facts"]["main"] == {"a.lr": 2}  # tied with 1, and nearer to the retain-only model
    assert picked["harmonic"]["unit"]["facts"]["main"] == {"a.lr": 0}  # which does not ask for the bound
    with pytest.raises(ValueError, match="'npo' has 0 of 4 tuning runs"):
        quality["choose"].chosen("npo", results)


def test_results_of_another_protocol_are_refused(quality: Any, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality["protocol"], "EPSILON", 0.3)
    with pytest.raises(ValueError, match="has results of another protocol"):
        quality["choose"].read(results, "tuning")


def test_tables_keep_failures_and_what_was_not_run(quality: Any, results: Path, tmp_path: Path) -> None:
    facts = {"method": "pdu"}
    write(results, result(quality, "final", "pdu", 4, facts, forget_quality=0.25, forget__truth_ratio=0.75, nll=0.3))
    write(results, {**result(quality, "final", "npo", 4, facts), "error": "it diverged"})
    page = tmp_path / "results.md"
    shutil.copy(ROOT / "docs" / "results.md", page)
    quality["tables"].main(["--results", str(results), "--page", str(page)])
    lines = page.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith("| pdu | 0 of 1 | 0.25 | 0.25 | 0.75 | 0.05 |")]
    assert "| 2 | 0.5 |" in row  # retain NLL / ε, and the retain utility
    assert any(line.startswith("| npo | 0 of 0 | failed: it diverged |") for line in lines)
    assert "| pdu | yes | lr 0.001, lr 2 | 0.48 | 0.710 | 0.500 | lr 0.001, lr 0: 0.9 |" in lines
    assert any("final 2 of 162" in line for line in lines)


def test_the_sweep_plans_every_method(quality: Any, results: Path) -> None:
    sweep, protocol = quality["sweep"], quality["protocol"]
    assert {path.stem for path in (ROOT / "configs/method").glob("*.yaml")} == protocol.MAIN.keys() | {"match_unseen"}
    units = sweep.tuning(list(protocol.MAIN))
    assert len({unit.file for unit in units}) == 4 * len(protocol.MAIN)
    finals = sweep.final(["pdu"], (0, 1), results)
    assert [unit.size for unit in finals] == [4, 2, 8, 4, 2, 8]
    assert all(unit.settings == ("--x=1",) for unit in finals)


def test_kept_results_are_those_of_this_protocol(quality: Any) -> None:
    for stage in ("models", "tuning", "final", "calibrated"):
        for one in quality["choose"].read(FOLDER / "results", stage):
            assert one["commit"] != "unknown"
