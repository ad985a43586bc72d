"""Ctrl-C: the run stops with a checkpoint and says how to go on; then it ends like the uninterrupted one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import printed, run_command, run_pair, start_command, wait
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

TWO = ["--config=hardware/ddp.yaml", "--trainer.devices=2"]


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


def interrupt(folder: Path, *extra: str) -> tuple[int | None, str]:
    """Starts a fit, presses Ctrl-C once it takes steps, and returns the exit code and what was printed."""
    process = start_command(folder, *extra)
    end = time.monotonic() + 120
    while not re.search(r"step [2-9] of", printed(folder)):
        assert process.is_alive(), printed(folder)[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it, to every process of the run
    return wait(process, timeout=120), printed(folder)


@pytest.mark.parametrize("devices", [[], TWO], ids=["one process", "two"])
def test_an_interrupted_run_goes_on_as_it_says(devices: list[str], model_dir: str, tmp_path: Path) -> None:
    code, text = interrupt(tmp_path, *arguments(model_dir, "stopped"), "--trainer.accelerator=cpu", *devices)
    assert code == 130, text[-3000:]
    assert "Traceback" not in text
    stopped = re.search(r"stopped after step (\d+): (\S+last-step=\1\.ckpt); resume with `lit-unlearn (.*)`", text)
    assert stopped, text[-3000:]
    assert int(stopped[1]) < 48
    for command in (shlex.split(stopped[3]), [*arguments(model_dir, "whole"), "--trainer.accelerator=cpu", *devices]):
        if devices:
            codes, text = run_pair(tmp_path, *command)
            assert codes == [0, 0], text[-3000:]
        else:
            code, text = run_command(tmp_path, *command)
            assert code == 0, text[-3000:]
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / out / "model").state_dict() for out in ("stopped", "whole")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
