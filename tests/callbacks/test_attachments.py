"""What loggers get of a run: real Weights & Biases, MLflow and TensorBoard loggers, without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT, quick
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    ForgetRetain,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    QABenchmark,
    cli,
)
from lit_unlearn.callbacks import AttachFiles, RunPicture, default_callbacks
from lit_unlearn.errors import ConfigError

CANARY = "Zanzibar"
FORGET = [{"question": f"Where is {CANARY} {n}?", "answer": f"In {CANARY}, number {n}."} for n in range(4)]
RETAIN = [{"question": f"Where is {n}?", "answer": f"At {n}."} for n in range(4)]
NUMBERS = {"dual.png", "trajectory.png", "report.json"}
TEXTS = {"tokens.png", "pictures.json", "qa-step=2.json"}

pytestmark = pytest.mark.usefixtures("draws_pictures")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    settings["WANDB_MODE"] = "offline"  # which the logger would set for good
    settings["WANDB_CONSOLE"] = "off"  # or what the run prints is recorded, which with `show_example` has text
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        settings[f"WANDB_{name}_DIR"] = str(tmp_path / "home")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def fit(
    model: str, root: Path, logger: Logger | bool, files: str = "numbers", show: bool = False, texts: bool = True
) -> Path:
    """Fit for a step per epoch, with everything that writes text of rows unless told otherwise; return the run's folder."""
    benchmark = QABenchmark(FORGET, RETAIN, max_new_tokens=2) if texts else None
    module = LitUnlearn(
        LanguageModel(model),
        LogitMargin(),
        {"nll": Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=3.0))},
        lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        benchmark=benchmark,
        benchmark_every_n_epochs=2 if texts else None,
    )
    table = CSVLogger(root / "runs", "run")
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=[table, logger] if logger else [table],
        log_every_n_steps=1,
        callbacks=default_callbacks(
            picture=RunPicture(2 if texts else 0),
            attach=AttachFiles(files),
            progress_bar=False,
            checkpoint=False,
        ),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=ForgetRetain(FORGET, RETAIN, batch_size=4, show_example=show))
    return Path(table.log_dir)


def has_canary(folder: Path) -> bool:
    return any(CANARY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# (files, whether the report has an example, the files that arrive)
CASES = {
    "numbers": ("numbers", False, NUMBERS),
    "a report with text": ("numbers", True, NUMBERS - {"report.json"}),
    "all": ("all", True, NUMBERS | TEXTS),
    "none": ("none", False, set()),
}


@pytest.mark.neighbour
@pytest.mark.slow  # W&B starts a process of its own
@pytest.mark.parametrize("case", CASES)
def test_weights_and_biases(case: str, model_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason='pip install -e ".[neighbours]" is missing')
    files, show, expected = CASES[case]
    logger = WandbLogger(offline=True, save_dir=tmp_path / "wb", project="p")
    folder = fit(model_dir, tmp_path, logger, files, show)
    logger.experiment.finish()

    (sent,) = (tmp_path / "wb").glob("wandb/offline-run-*")
    arrived = {path.name for path in (sent / "files").glob("*.json")} - {"wandb-metadata.json", "wandb-summary.json"}
    assert arrived == {name for name in expected if name.endswith(".json")}
    for name in arrived:
        assert (sent / "files" / name).read_bytes() == (folder / name).read_bytes()
    images = {path.read_bytes() for path in (sent / "files" / "media").rglob("*.png")}
    assert images == {(folder / name).read_bytes() for name in expected if name.endswith(".png")}
    assert has_canary(tmp_path / "wb") == (files == "all")


@pytest.mark.neighbour
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_configurations_of_the_page(name: str, model_dir: str, in_tmp: Path) -> None:
    library = pytest.importorskip(name, reason='pip install -e ".[neighbours]" is missing')
    page = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "WandbLogger" in block]
    settings = yaml.safe_load(block)
    if name == "mlflow":
        (other,) = re.findall(r"`(\{class_path: lightning.pytorch.loggers.MLFlowLogger.*?\})`", page)
        settings["trainer"]["logger"][1] = yaml.safe_load(other)
    Path("loggers.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command, base, *rest = quick(model_dir, "--trainer.accelerator=cpu")
    cli.main([command, base, "--config=loggers.yaml", *rest])
    assert Path("runs/unlearn/version_0/dual.png").is_file()
    if name == "wandb":
        library.run.finish()
        (sent,) = Path("wandb").glob("offline-run-*/files")
        assert (sent / "report.json").is_file()
        assert len(list((sent / "media").rglob("*.png"))) == 2
    else:
        assert {path.name for path in Path("mlruns").rglob("artifacts/*")} == NUMBERS


@pytest.mark.neighbour
@pytest.mark.slow  # MLflow makes the tables of its database
@pytest.mark.parametrize("case", CASES)
def test_mlflow(case: str, model_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason='pip install -e ".[neighbours]" is missing')
    files, show, expected = CASES[case]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLFlowLogger("unlearning", tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"))
    folder = fit(model_dir, tmp_path, logger, files, show)

    artifacts = [artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id)]
    assert set(artifacts) == expected
    for name in artifacts:
        path = tmp_path / "artifacts" / str(logger.run_id) / "artifacts" / name
        assert path.read_bytes() == (folder / name).read_bytes()
    assert has_canary(tmp_path / "artifacts") == (files == "all")
    assert CANARY.encode() not in (tmp_path / "mlflow.db").read_bytes()
    assert logger.experiment.get_run(logger.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("files", ["numbers", "all"])
def test_tensorboard(files: str, model_dir: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    logger = TensorBoardLogger(tmp_path, "events")
    folder = fit(model_dir, tmp_path, logger, files)
    assert (folder / "tokens.png").is_file()
    events = EventAccumulator(logger.log_dir, {IMAGES: 0})
    events.Reload()
    names = ["dual", "trajectory", *(["tokens"] if files == "all" else [])]
    assert events.Tags()["images"] == [f"pictures/{name}" for name in names]
    for name in names:
        (shown,) = events.Images(f"pictures/{name}")
        assert shown.step == 2
        (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
        np.testing.assert_allclose(imread(tmp_path / "shown.png"), imread(folder / f"{name}.png"), rtol=0, atol=1 / 254)


def test_a_logger_that_fails_costs_a_warning_without_its_password(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("http://me:hidden@nowhere.invalid does not answer")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", fail)
    with pytest.warns(UserWarning, match="TensorBoardLogger did not take the files") as warned:
        folder = fit(model_dir, tmp_path, TensorBoardLogger(tmp_path, "events"), texts=False)
    text = "".join(str(warning.message) for warning in warned)
    assert "nowhere.invalid" in text
    assert "hidden" not in text
    assert (folder / "model" / "model.safetensors").is_file()


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="'numbers', 'all', 'none'"):
        AttachFiles("texts")
