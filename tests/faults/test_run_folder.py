"""One folder for every start of a run, whatever the logger is; nothing anywhere else, and nothing at all in a dry run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from command_line import quick
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_unlearn import (
    DPO,
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    LanguageModel,
    LitUnlearn,
    QABenchmark,
    cli,
    default_callbacks,
)
from lit_unlearn.training.run_folder import find_checkpoint_folder, find_run_folder


class ProjectLogger(Logger):
    """A logger as W&B's and MLflow's: many runs share its name, and each has an id."""

    def __init__(self, save_dir: str | None, version: str | int | None = "id7") -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str | int | None:
        return self._version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    def log_metrics(self, *_: Any, **settings: Any) -> None:
        """Logs nothing."""

    def log_hyperparams(self, *_: Any, **settings: Any) -> None:
        """Logs nothing."""


@pytest.mark.parametrize(
    ("make_loggers", "run", "checkpoints"),
    [
        (lambda: CSVLogger("log", "run"), "log/run/version_0", "log/run/checkpoints"),
        (lambda: TensorBoardLogger("log", "run"), "log/run/version_0", "log/run/checkpoints"),
        (lambda: ProjectLogger("."), "project/id7", "project/id7/checkpoints"),
        (lambda: ProjectLogger("log", 3), "log/project/version_3", "log/project/version_3/checkpoints"),
        (lambda: ProjectLogger(None), "root/project/id7", "root/project/id7/checkpoints"),
        (lambda: [ProjectLogger("."), CSVLogger("log", "run")], "log/run/version_0", "log/run/checkpoints"),
        (lambda: ProjectLogger(".", None), "root/runs/version_0", None),
        (lambda: ProjectLogger("s3://bucket"), "root/runs/version_0", "root/runs/checkpoints"),
        (lambda: CSVLogger(".", "", ""), "root/runs/version_0", "checkpoints"),
        (lambda: False, "root/runs/version_0", "root/runs/checkpoints"),
    ],
    ids=["csv", "tensorboard", "project", "number", "no save_dir", "two", "no id yet", "remote", "here", "none"],
)
def test_every_logger_gives_a_folder_for_the_run_and_one_for_checkpoints(
    make_loggers: Callable[[], Any], run: str, checkpoints: str | None, in_tmp: Path
) -> None:
    trainer = L.Trainer(logger=make_loggers(), accelerator="cpu", default_root_dir="root", enable_checkpointing=False)
    assert find_run_folder(trainer) == find_run_folder(trainer) == Path(run)
    assert find_checkpoint_folder(trainer) == (checkpoints and Path(checkpoints))


def test_runs_without_a_logger_have_a_folder_each(in_tmp: Path) -> None:
    trainers = [L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False) for _ in range(2)]
    assert [find_run_folder(trainer) for trainer in trainers] == [Path(f"runs/version_{n}").absolute() for n in (0, 1)]


def fit(lm: LanguageModel, trainer: L.Trainer, rows: str) -> None:
    """A run that writes everything it can: DPO needs the reference's log-probabilities, which are cached."""
    constraint = Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=3.0))
    benchmark = QABenchmark(f"{rows}/forget.jsonl", f"{rows}/retain.jsonl", max_new_tokens=2)
    module = LitUnlearn(
        lm,
        DPO(),
        {"nll": constraint},
        lambda p: torch.optim.SGD(p, lr=0.01),
        benchmark=benchmark,
        benchmark_every_n_epochs=1,
    )
    trainer.fit(module, datamodule=FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["none", "project"])
def test_the_users_own_files_in_the_working_directory_stay(
    kind: str, tiny_lm: Callable[..., LanguageModel], rows_dir: str, in_tmp: Path
) -> None:
    for name in ("config.yaml", "report.json", "qa-step=2.json"):
        Path(name).write_text("mine")
    logger = False if kind == "none" else ProjectLogger(".")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=default_callbacks(progress_bar=False))
    fit(tiny_lm(), trainer, rows_dir)
    for name in ("config.yaml", "report.json", "qa-step=2.json"):
        assert Path(name).read_text() == "mine"
    own = "runs/" if kind == "none" else "project/id7/"
    written = files(in_tmp) - {"config.yaml", "report.json", "qa-step=2.json"}
    assert all(name.startswith(own) for name in written)
    start = f"{own}version_0/" if kind == "none" else own
    assert {f"{start}{name}" for name in ("report.json", "qa-step=2.json", "model/config.json")} <= written
    assert f"{own}checkpoints/last-step=2.ckpt" in written


def test_a_dry_run_writes_nothing(
    tiny_lm: Callable[..., LanguageModel], rows_dir: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_UNLEARN_CACHE", str(in_tmp / "cache"))
    lm = tiny_lm()
    trainer = L.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=default_callbacks(progress_bar=False))
    fit(lm, trainer, rows_dir)
    assert trainer.global_step == 1
    assert list(in_tmp.rglob("*")) == []


@pytest.mark.slow
def test_from_the_command_line_too(in_tmp: Path, model_dir: str) -> None:
    Path("config.yaml").write_text("# mine\ntrainer: {max_epochs: 1}\n")
    without = ["--config=config.yaml", "--trainer.logger=false", "--export.dirpath=null"]
    cli.main(quick(model_dir, "--trainer.fast_dev_run=true", *without))
    assert files(in_tmp) == {"config.yaml"}
    cli.main(quick(model_dir, *without))
    assert Path("config.yaml").read_text() == "# mine\ntrainer: {max_epochs: 1}\n"
    assert all(name.startswith("runs/") for name in files(in_tmp) - {"config.yaml"})
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["lm"]["model"] == model_dir
    cli.main(["fit", "--config=runs/version_0/config.yaml"])  # what was saved can be given again
    assert Path("runs/version_1/report.json").is_file()
