from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.callbacks import AtomicCheckpointIO, ExportModel, ResumeCheckpoint, RunPicture
from lit_unlearn.errors import CheckpointError
from lit_unlearn.training import FSDP2Strategy


def save_on_and_on(path: Path) -> None:
    for number in range(10_000):
        AtomicCheckpointIO().save_checkpoint({"number": number, "tensor": torch.full((500_000,), number)}, path)


@pytest.mark.parametrize("delay", [0.05, 0.12, 0.19, 0.26])
def test_a_kill_while_writing_leaves_the_checkpoint_before(delay: float, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    process = multiprocessing.get_context("fork").Process(target=save_on_and_on, args=(path,))
    process.start()
    while not path.exists():
        time.sleep(0.001)
    first = path.stat().st_ino
    while path.stat().st_ino == first:  # a busy machine may take longer than the delay for the second one
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    saved = torch.load(path, weights_only=True)
    assert saved["number"] > 0
    assert torch.equal(saved["tensor"], torch.full((500_000,), saved["number"]))


def test_the_newest_whole_checkpoint_is_the_last(make_trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    saver = ResumeCheckpoint(dirpath=str(tmp_path))
    find = saver._find_last_checkpoints
    trainer = make_trainer()
    assert find(trainer) == set()

    def touch(name: str, age: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (1_000_000 - age, 1_000_000 - age))

    touch("last-step=90.ckpt", 5)
    touch("last-step=20.ckpt", 4)
    touch(".last-step=30.ckpt.unfinished", 0)
    touch("best-step=40.ckpt", 0)
    assert find(trainer) == {str(tmp_path / "last-step=20.ckpt")}
    touch("last-step=40.ckpt/.metadata", 1)  # a sharded one whose last file is not there
    assert find(trainer) == {str(tmp_path / "last-step=20.ckpt")}
    touch("last-step=40.ckpt/meta.pt", 1)
    assert find(make_trainer(strategy=FSDP2Strategy())) == {str(tmp_path / "last-step=40.ckpt")}
    with pytest.raises(CheckpointError, match="sharded"):
        find(trainer)


def make(lm: LanguageModel) -> LitUnlearn:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01))


def data() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


def fit(lm: LanguageModel, make_trainer: Callable[..., L.Trainer], root: Path, epochs: int, **settings: Any) -> Any:
    callbacks = [RunPicture(), ExportModel(settings.pop("export", None)), ResumeCheckpoint(), *settings.pop("more", [])]
    trainer = make_trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=CSVLogger(root, "run"),
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    trainer.fit(make(lm), datamodule=data(), **settings)
    return callbacks


@pytest.mark.usefixtures("draws_pictures")
@pytest.mark.slow
def test_a_run_in_two_parts_has_one_picture_one_export_and_one_checkpoint(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit(tiny_lm(), make_trainer, tmp_path, 2)
    picture, export, *_ = fit(tiny_lm(), make_trainer, tmp_path, 4, ckpt_path="last")
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last-step=8.ckpt"]
    files = [str(run / f"version_{n}" / "metrics.csv") for n in (0, 1)]
    assert picture.state_dict()["files"] == files
    assert (run / "version_1" / "dual.png").is_file()
    assert export.state_dict()["folder"] == str(run / "version_0" / "model")  # where the first part exported to
    assert not (run / "version_1" / "model").exists()


@pytest.mark.slow
def test_an_export_moves_along_with_its_folder(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Ruin(L.Callback):
        """Makes what the second part trains worse than what the first exported."""

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.data.mul_(20)

    first, second = tmp_path / "first", tmp_path / "second"
    fit(tiny_lm(), make_trainer, tmp_path, 1, export=str(first))
    fit(tiny_lm(), make_trainer, tmp_path, 2, export=str(second), ckpt_path="last", more=[Ruin()])
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_folder_that_is_no_model_is_refused_before_training(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        fit(tiny_lm(), make_trainer, tmp_path, 1, export=str(tmp_path / "notes"))
    assert not list(tmp_path.glob("run/checkpoints/*"))
