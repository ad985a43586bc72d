"""Ctrl-C: the run stops with a checkpoint and says how to go on; then it ends like the uninterrupted one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "lit_unlearn"]
TWO = ["--config=hardware/ddp.yaml", "--trainer.devices=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(model: str, out: str) -> list[str]:
    settings = [f"--model.lm.model={model}", "--data.num_authors=4", "--data.max_length=200", "--trainer.max_epochs=12"]
    return [
        "fit",
        "--config=demo/unlearn.yaml",
        *settings,
        f"--logs.save_dir={out}",
        f"--export.dirpath={out}/model",
        "--report.require_forgotten=false",
    ]


def interrupt(folder: Path, *extra: str) -> tuple[int, str]:
    """Starts a fit, presses Ctrl-C once it takes steps, and returns the exit code and what was printed."""
    log = folder / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, *extra], cwd=folder, stdout=file, stderr=file, env=ENVIRONMENT, start_new_session=True
        )
    end = time.monotonic() + 120
    while not re.search(r"step [2-9] of", log.read_text("utf-8")):
        assert process.poll() is None, log.read_text("utf-8")[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it, to every process of the run
    return process.wait(timeout=120), log.read_text("utf-8")


@pytest.mark.parametrize("devices", [[], TWO], ids=["one process", "two"])
def test_an_interrupted_run_goes_on_as_it_says(devices: list[str], model_dir: str, tmp_path: Path) -> None:
    code, printed = interrupt(tmp_path, *arguments(model_dir, "stopped"), "--trainer.accelerator=cpu", *devices)
    assert code == 130, printed[-3000:]
    assert "Traceback" not in printed
    stopped = re.search(r"stopped after step (\d+): (\S+last-step=\1\.ckpt); resume with `lit-unlearn (.*)`", printed)
    assert stopped, printed[-3000:]
    assert int(stopped[1]) < 48
    for command in (shlex.split(stopped[3]), [*arguments(model_dir, "whole"), "--trainer.accelerator=cpu", *devices]):
        done = subprocess.run(
            [*COMMAND, *command], cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / out / "model").state_dict() for out in ("stopped", "whole")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
