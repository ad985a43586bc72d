"""The hardware overlays, as a user types them: what one process, DDP and FSDP2 print is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

OVERLAYS = {"ddp": ["ddp.yaml"], "ddp_spawn": ["ddp.yaml", "--trainer.strategy=ddp_spawn"], "fsdp2": ["fsdp2.yaml"]}


def fit(folder: Path, model: str, *extra: str) -> str:
    arguments = [
        "--config=configs/demo/unlearn.yaml",
        *extra,
        f"--model.lm.model={model}",
        "--data.num_authors=4",
        "--data.max_length=200",
        "--model.constraints.nll.warmup_epochs=1",
        "--trainer.max_epochs=3",
        "--trainer.accelerator=cpu",
        "--report.require_forgotten=false",
    ]
    command = [sys.executable, "-m", "lit_unlearn", "fit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def results(folder: Path) -> tuple[dict[str, Any], str, dict[str, torch.Tensor]]:
    report = folder / "runs/demo/unlearn/version_0/report.json"
    weights = AutoModelForCausalLM.from_pretrained(folder / "runs/demo/unlearned").state_dict()
    return json.loads(report.read_text(encoding="utf-8")), report.read_text(encoding="utf-8"), weights


@pytest.fixture(scope="module")
def alone(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    return fit(folder, model_dir), *results(folder)


@pytest.mark.parametrize("name", OVERLAYS)
def test_two_devices_give_what_one_gives(name: str, alone: Any, model_dir: str, tmp_path: Path) -> None:
    overlay, *extra = OVERLAYS[name]
    printed = fit(tmp_path, model_dir, f"--config=configs/hardware/{overlay}", "--trainer.devices=2", *extra)
    assert "on 2 × cpu" in printed
    expected_print, expected, _, expected_weights = alone
    report, _, weights = results(tmp_path)
    for key in ("before", "after"):
        assert report[key] == pytest.approx(expected[key], rel=1e-5)
    bound, expected_bound = report["constraints"]["nll"], expected["constraints"]["nll"]
    assert bound.pop("stream") == expected_bound["stream"]
    assert bound == pytest.approx({name: expected_bound[name] for name in bound}, rel=1e-5)
    assert bound["multiplier_after"] != 100.0
    assert max((weights[name] - value).abs().max().item() for name, value in expected_weights.items()) < 2e-6
    verdict = [line for line in printed.splitlines() if line.startswith("constraint nll")]
    assert verdict == [line for line in expected_print.splitlines() if line.startswith("constraint nll")]
