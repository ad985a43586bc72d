"""Signals: SIGTERM and SIGUSR1 end a run as Ctrl-C does, on any number of processes, and nothing of SLURM's takes part."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import printed, run_command, start_command, wait
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin, cli
from lit_unlearn.callbacks import AtomicCheckpointIO, ResumeCheckpoint
from lit_unlearn.callbacks.signals import SignalWatch
from lit_unlearn.errors import StoppedBySignal

TWO = ["--config=hardware/ddp.yaml", "--trainer.devices=2"]
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "unlearn",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "localhost",
}


def arguments(model: str, out: str, epochs: int = 12) -> list[str]:
    settings = [
        "--data.num_authors=4",
        "--data.max_length=200",
        f"--trainer.max_epochs={epochs}",
        "--report.require_forgotten=false",
    ]
    paths = [f"--model.lm.model={model}", f"--logs.save_dir={out}", f"--export.dirpath={out}/model"]
    return ["fit", "--config=demo/unlearn.yaml", *settings, *paths, "--trainer.accelerator=cpu", "--picture.answers=0"]


def wait_for(pattern: str, process: BaseProcess, folder: Path) -> None:
    end = time.monotonic() + 240
    while not re.search(pattern, printed(folder)):
        assert process.is_alive(), printed(folder)[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "target", "devices"),
    [
        (signal.SIGTERM, 143, "first process", []),
        (signal.SIGTERM, 143, "group", TWO),
        (signal.SIGUSR1, 138, "group", []),
        (signal.SIGUSR1, 138, "first process", TWO),
    ],
    ids=["SIGTERM", "SIGTERM to the group of two", "SIGUSR1 to the group", "SIGUSR1 to the first of two"],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_command_to_go_on(
    number: signal.Signals, code: int, target: str, devices: list[str], model_dir: str, tmp_path: Path
) -> None:
    process = start_command(tmp_path, *arguments(model_dir, "stopped"), *devices)
    wait_for(r"step [2-9] of", process, tmp_path)
    assert process.pid is not None
    (os.killpg if target == "group" else os.kill)(process.pid, number)
    assert wait(process, timeout=120) == code, printed(tmp_path)[-3000:]
    assert "Traceback" not in printed(tmp_path)
    stopped = re.search(r"after step (\d+): (\S+last-step=\1\.ckpt); resume with `lit-unlearn (.*)`", printed(tmp_path))
    assert stopped, printed(tmp_path)[-3000:]
    assert int(stopped[1]) < 48
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    if number == signal.SIGUSR1 or devices:
        return
    # That it then ends like the uninterrupted run, also on two devices, is shown for Ctrl-C in processes/test_interrupt.py.
    code_of_rest, text = run_command(tmp_path, *shlex.split(stopped[3]))
    assert code_of_rest == 0, text[-3000:]
    assert (tmp_path / "stopped" / "model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [[], TWO], ids=["one process", "two"])
def test_a_second_signal_ends_at_once(devices: list[str], model_dir: str, tmp_path: Path) -> None:
    # Every step takes seconds, so that the second signal comes within one.
    (tmp_path / "slow_steps.py").write_text(
        "import time\nfrom lightning.pytorch.callbacks import Callback\n\n\nclass SlowSteps(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        print('in step', trainer.global_step, flush=True)\n"
        "        for _ in range(600):\n            time.sleep(0.1)\n",
        encoding="utf-8",
    )
    extra = ["--trainer.callbacks=slow_steps.SlowSteps", *devices]
    process = start_command(tmp_path, *arguments(model_dir, "out"), *extra)
    assert process.pid is not None
    wait_for("in step", process, tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    wait_for("SIGTERM: the run stops after this step", process, tmp_path)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert wait(process, timeout=10) == 143, printed(tmp_path)[-3000:]
    assert "lit-unlearn: stopped by SIGTERM" in printed(tmp_path)
    assert "Traceback" not in printed(tmp_path)
    assert not list(tmp_path.rglob("last-*.ckpt"))


@pytest.mark.slow
def test_slurms_requeue_takes_no_part(model_dir: str, tmp_path: Path) -> None:
    # Another run left this in the working directory, whatever it is.
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    process = start_command(tmp_path, *arguments(model_dir, "out"), **SLURM)
    assert process.pid is not None
    wait_for(r"step [2-9] of", process, tmp_path)
    os.kill(process.pid, signal.SIGUSR1)
    assert wait(process, timeout=120) == 138, printed(tmp_path)[-3000:]
    assert [path.name for path in tmp_path.rglob("*.ckpt")].count("hpc_ckpt_1.ckpt") == 1
    assert len(list(tmp_path.rglob("last-*.ckpt"))) == 1
    assert "scontrol" not in printed(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_before_the_run_ends_plainly(
    number: signal.Signals, code: int, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("slow_to_import.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n", encoding="utf-8")
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--trainer.callbacks=slow_to_import.Callback"])
    assert end.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert signal.getsignal(number) is before
    sys.modules.pop("slow_to_import", None)


def test_a_signal_while_the_model_is_loaded(in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    ctrl_c = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        cli.main(quick(model_dir))
    assert end.value.code == 143
    assert not list(in_tmp.rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) is ctrl_c  # which Lightning ignores from then on


class Signal(L.Callback):
    """Signals the process within a step."""

    def __init__(self, *numbers: int, step: int = 1) -> None:
        self._numbers, self._step = numbers, step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            for number in self._numbers:
                os.kill(os.getpid(), number)


def make(lm: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01))


def rows() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


def fit_with(callback: L.Callback, tiny_lm: Any, make_trainer: Any, tmp_path: Path, **settings: Any) -> Any:
    saver = ResumeCheckpoint(dirpath=str(tmp_path / "checkpoints"))
    trainer = make_trainer(max_epochs=2, callbacks=[callback, saver], enable_checkpointing=True, **settings)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    try:
        trainer.fit(make(tiny_lm()), datamodule=rows())
    finally:
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        assert before == after
    return trainer


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_one_request_in_two_signals_is_one(
    number: signal.Signals, code: int, tiny_lm: Any, make_trainer: Any, tmp_path: Path
) -> None:
    # As `timeout` sends them: to the process, and to its group.
    with pytest.raises(SystemExit) as end:
        fit_with(Signal(number, number), tiny_lm, make_trainer, tmp_path)
    assert end.value.code == code
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last-step=2.ckpt"]


def test_a_signal_in_the_last_step_leaves_a_finished_run(tiny_lm: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = fit_with(Signal(signal.SIGTERM, step=3), tiny_lm, make_trainer, tmp_path)
    assert trainer.global_step == 4


def test_a_later_signal_raises_and_restores_the_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    before = signal.getsignal(signal.SIGTERM)
    watch = SignalWatch()
    watch.start()
    signal.raise_signal(signal.SIGTERM)
    assert watch.first == signal.SIGTERM
    clock[0] += 5
    with pytest.raises(StoppedBySignal) as stop:
        signal.raise_signal(signal.SIGUSR1)
    assert stop.value.exit_code == 138
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_requeue_file_of_another_run_is_neither_written_nor_read(
    in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    AtomicCheckpointIO().save_checkpoint({"loops": "of another run"}, in_tmp / "hpc_ckpt_3.ckpt")
    Path("signal_once.py").write_text(
        "import os, signal\nfrom lightning.pytorch.callbacks import Callback\n\n\nclass SignalOnce(Callback):\n"
        "    def on_train_batch_start(self, *_):\n        os.kill(os.getpid(), signal.SIGUSR1)\n",
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as end:
        cli.main(quick(model_dir, "--trainer.callbacks=signal_once.SignalOnce"))
    assert end.value.code == 138
    assert [path.name for path in in_tmp.glob("hpc_ckpt*")] == ["hpc_ckpt_3.ckpt"]
    sys.modules.pop("signal_once", None)
