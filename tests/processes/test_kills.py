"""`kill -9` at random points of a two-process run: started again, it ends like the uninterrupted one, bit for bit."""

from __future__ import annotations

import csv
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked import printed, run_pair, start_pair, wait
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

STEPS = 60  # 6 epochs of 10
SETTINGS = {
    "model": {
        "forget": {"class_path": "LogitMargin", "init_args": {"power": 2, "alignment": "next_token"}},
        "constraints": {
            "nll": {
                "objective": {"class_path": "NLL"},
                "epsilon": {"relative": -0.1},
                "multiplier": {"class_path": "PIMultiplier", "init_args": {"lr": 5, "kp": 2, "nu": 0.5, "init": 5}},
                "smoothing": 0.5,
                "warmup_epochs": 2,
            },
            "general": {
                "objective": {"class_path": "NLL"},
                "epsilon": 4.0,
                "multiplier": {"class_path": "DualAscent", "init_args": {"lr": 2, "init": 1}},
                "stream": "general",
                "update_every": "epoch",
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "scheduler": {"name": "linear", "warmup_epochs": 1},
        "micro_batch_size": 2,
    },
    "data": {
        "class_path": "FictionalAuthors",
        "init_args": {"num_authors": 8, "forget_authors": 4, "max_length": 200, "batch_size": 4},
    },
    "trainer": {
        "max_epochs": 6,
        "check_val_every_n_epoch": 3,
        "accelerator": "cpu",
        "strategy": "ddp",
        "devices": 2,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "ResumeCheckpoint", "init_args": {"every_n_train_steps": 2}}],
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "log", "name": "run"},
        },
    },
    "export": {"dirpath": "out"},
}


COMMAND = ["fit", "--config=run.yaml", "--ckpt_path=last"]


def newest_step(folder: Path) -> int:
    names = [path.name for path in (folder / "log" / "run" / "checkpoints").glob("last-*.ckpt")]
    return max((int(match[1]) for name in names if (match := re.search(r"step=(\d+)", name))), default=0)


def kill_after(folder: Path, step: int, delay: float) -> None:
    processes = start_pair(folder, *COMMAND)
    end = time.monotonic() + 120
    while newest_step(folder) < step:
        assert all(process.is_alive() for process in processes), printed(folder)[-3000:]
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
    assert all(process.is_alive() for process in processes)  # they did not end by themselves
    for process in processes:
        process.kill()
    assert [wait(process, timeout=10) for process in processes] == [-signal.SIGKILL] * 2


def finish(folder: Path) -> None:
    codes, text = run_pair(folder, *COMMAND)
    assert codes == [0, 0], text[-3000:]
    assert "on 2 × cpu" in text


def logged(folder: Path) -> dict[int, dict[str, str]]:
    """What every step logged, of all starts; a step that two starts took must have logged the same."""
    steps: dict[int, dict[str, str]] = {}
    for file in sorted((folder / "log" / "run").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with file.open(newline="", encoding="utf-8") as text:
            for row in csv.DictReader(text):
                values = {name: value for name, value in row.items() if value}
                for name, value in values.items():
                    assert steps.setdefault(int(row["step"]), {}).setdefault(name, value) == value
    return steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], rows_dir: str) -> Path:
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "lm": {"model": models["dropout"]}}}
    settings["data"]["init_args"]["streams"] = {"general": f"{rows_dir}/general.jsonl"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    finish(folder)
    return folder


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    kills, rng = 3, random.Random(1)
    shutil.copy(uninterrupted / "run.yaml", tmp_path)
    for number in range(kills):
        first = newest_step(tmp_path)
        last = STEPS * (number + 1) // (kills + 1)
        kill_after(tmp_path, rng.randint(min(first + 1, last), last), rng.uniform(0, 0.15))
    finish(tmp_path)
    steps, expected = logged(tmp_path), logged(uninterrupted)
    assert expected.keys() == set(range(STEPS))
    assert len(expected.keys() - steps.keys()) <= kills  # a kill between a checkpoint and the logger loses one line
    assert steps == {step: expected[step] for step in steps}
    states = [AutoModelForCausalLM.from_pretrained(folder / "out").state_dict() for folder in (uninterrupted, tmp_path)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert newest_step(tmp_path) == STEPS
    last_checkpoints = [
        torch.load(folder / f"log/run/checkpoints/last-step={STEPS}.ckpt", weights_only=True)
        for folder in (uninterrupted, tmp_path)
    ]
    for part in ("constraints", "run"):
        assert last_checkpoints[0][part] == last_checkpoints[1][part]
    for name, value in last_checkpoints[0]["state_dict"].items():
        assert torch.equal(value, last_checkpoints[1]["state_dict"][name]), name
