"""A resumed run is judged by its present settings, belongs to its base model, and announces what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LogitMargin, cli
from lit_unlearn.cli import trainer as trainer_module
from lit_unlearn.errors import CheckpointError
from lit_unlearn.training import LitUnlearn


def read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
    return content


def report() -> dict[str, Any]:
    """The report of the run's last part."""
    versions = sorted(Path("log/run").glob("version_*/report.json"), key=lambda file: int(file.parent.name[8:]))
    return read(str(versions[-1]))


@pytest.fixture
def other_model_dir(tiny_lm: Callable[..., LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the same shape with other weights."""
    lm = tiny_lm(seed=7)
    lm.load(torch.float32)
    return str(lm.save(tmp_path_factory.mktemp("other") / "model"))


# Epsilon ------------------------------------------------------------------------------------------------------------------


def epsilon(number: float) -> str:
    return f"--model.constraints.nll.epsilon={number}"


@pytest.mark.slow
@pytest.mark.parametrize("lr", ["1e-9", "1e-3"], ids=["the best one stays", "a later one is better"])
def test_a_tighter_epsilon_judges_what_an_earlier_part_measured(in_tmp: Path, model_dir: str, lr: str) -> None:
    cli.main(quick(model_dir, epsilon(9.0), "--trainer.max_epochs=1"))
    value = report()["constraints"]["nll"]["value"]
    assert report()["constraints"]["nll"]["slack"] > 0
    (checkpoint,) = Path("log/run/checkpoints").glob("last-*.ckpt")
    stored = torch.load(checkpoint, weights_only=True)["run"]["best"]["values"]
    assert not any("slack" in name or "violation" in name for name in stored)

    tight = value - 1.0
    arguments = quick(model_dir, epsilon(tight), "--ckpt_path=last", f"--model.optimizer.lr={lr}")
    with pytest.raises(SystemExit, match="epsilon"):
        cli.main([*arguments, "--report.require_feasible=true"])
    for outcome in (report()["constraints"]["nll"], read("out/unlearning.json")["constraints"]["nll"]):
        assert outcome["epsilon"] == pytest.approx(tight)
        assert outcome["slack"] == pytest.approx(tight - outcome["value"])
        assert outcome["slack"] < 0
    card = Path("out/README.md").read_text("utf-8")
    assert f"> epsilon {tight:.4g}" in card.partition("## ")[0]
    assert "epsilon 9" not in card
    assert read(str(max(Path("log/run").glob("version_*/pictures.json"))))["epsilons"]["nll"] == pytest.approx(tight)


# The base model -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--model.lm.adapter={r: 4}"]], ids=["full", "lora"])
def test_another_base_of_the_same_shape_is_refused(
    extra: list[str], in_tmp: Path, model_dir: str, other_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(quick(model_dir, "--trainer.max_epochs=1", *extra))
    before = read("out/unlearning.json")
    (checkpoint,) = Path("log/run/checkpoints").glob("last-*.ckpt")
    with pytest.raises(SystemExit) as caught:
        cli.main(quick(other_model_dir, f"--ckpt_path={checkpoint}", *extra))
    assert caught.value.code == 2
    assert "base model" in str(caught.value)
    assert read("out/unlearning.json") == before
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(checkpoint), "again", "--model", other_model_dir])
    assert caught.value.code == 2
    assert not Path("again").exists()
    # A copy elsewhere is the same base.
    shutil.copytree(model_dir, "moved")
    cli.main(quick("moved", "--ckpt_path=last", *extra))
    cli.main(["export", str(next(Path("log/run/checkpoints").glob("last-*.ckpt"))), "again", "--model", "moved"])


@pytest.mark.slow
def test_no_step_is_taken_from_another_base(
    in_tmp: Path, model_dir: str, other_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.main(quick(model_dir, "--trainer.max_epochs=1"))
    steps: list[int] = []
    monkeypatch.setattr(LitUnlearn, "training_step", lambda self, batch, batch_idx: steps.append(batch_idx))
    (checkpoint,) = Path("log/run/checkpoints").glob("last-*.ckpt")
    with pytest.raises(SystemExit):
        cli.main(quick(other_model_dir, f"--ckpt_path={checkpoint}"))
    assert steps == []


def test_a_base_is_known_whatever_it_was_loaded_in(
    model_dir: str, other_model_dir: str, tmp_path: Path, tiny_lm: Callable[..., LanguageModel]
) -> None:
    def load(name: str, dtype: torch.dtype, **settings: Any) -> LanguageModel:
        lm = LanguageModel(name, **settings)
        lm.load(dtype, device="cpu")
        lm.base_checksum()
        return lm

    wide, half = load(model_dir, torch.float32), load(model_dir, torch.bfloat16)
    other = load(other_model_dir, torch.float32)
    assert wide.has_base(wide.base_checksum())
    assert wide.has_base(half.base_checksum())  # rounded as the other run had it
    assert not other.has_base(wide.base_checksum())
    assert not other.has_base(half.base_checksum())
    adapted = load(model_dir, torch.float32, adapter={"r": 4})
    again = load(model_dir, torch.float32, adapter={"r": 8})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert again.has_base(adapted.base_checksum())
    made, same, larger = tiny_lm(seed=0), tiny_lm(seed=1), tiny_lm(num_hidden_layers=1)
    for lm in (made, same, larger):
        lm.load(torch.float32)
    # All weights of a model from a config are in its checkpoint: where they began does not matter.
    assert same.has_base(made.base_checksum())
    assert not larger.has_base(made.base_checksum())


def test_a_second_fit_in_memory_does_not_take_trained_weights_for_the_base(
    in_tmp: Path, model_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    def data() -> FictionalAuthors:
        return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)

    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    module = LitUnlearn(
        LanguageModel(model_dir), LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01)
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint("mine.ckpt")
    make_trainer(max_epochs=2).fit(module, datamodule=data(), ckpt_path="mine.ckpt")
    state = torch.load("mine.ckpt", weights_only=True)
    state["run"]["base"]["weights"] = "another"
    torch.save(state, "other.ckpt")
    with pytest.raises(CheckpointError):
        make_trainer(max_epochs=2).fit(module, datamodule=data(), ckpt_path="other.ckpt")


# What is announced is there ---------------------------------------------------------------------------------------------------


@pytest.fixture
def moved_on(in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A run of which the first part stands in another working directory; gives the command of the second part."""
    Path("first").mkdir()
    Path("second").mkdir()
    monkeypatch.chdir("first")
    cli.main(quick(model_dir, "--trainer.max_epochs=1"))
    (checkpoint,) = Path("log/run/checkpoints").glob("last-*.ckpt")
    stored = torch.load(checkpoint, weights_only=True)["callbacks"]["ExportModel"]["folder"]
    assert Path(stored).is_absolute()
    assert Path(stored) == Path("out").absolute()
    found = checkpoint.absolute()
    monkeypatch.chdir("../second")

    def command(*extra: str) -> list[str]:
        return quick(model_dir, f"--ckpt_path={found}", "--model.optimizer.lr=1e-9", *extra)

    return command


@pytest.mark.slow
def test_the_best_model_moves_along_to_another_working_directory(
    moved_on: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        cli.main(moved_on("--model.constraints.nll.epsilon=9.0"))
    assert "model: out" in caplog.text
    record = read("out/unlearning.json")
    assert record["step"] == report()["kept_step"]
    assert record["after"] == report()["after"]


@pytest.mark.slow
def test_a_best_model_that_is_gone_is_not_announced(
    moved_on: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree("../first/out")
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="of step 2, is not at 'out'"):
        cli.main(moved_on())
    record = read("out/unlearning.json")
    assert record["step"] == report()["kept_step"] == 4
    assert record["after"] == report()["after"]
    assert "model: out" in caplog.text


@pytest.mark.slow
def test_an_export_of_another_run_in_its_place_is_not_announced(
    in_tmp: Path, model_dir: str, other_model_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    cli.main(quick(model_dir, "--trainer.max_epochs=1"))
    cli.main(quick(other_model_dir, "--trainer.max_epochs=1", "--logs.name=another"))  # into the same folder
    with pytest.warns(UserWarning, match="not at 'out'"):
        cli.main(quick(model_dir, "--ckpt_path=last"))
    record = read("out/unlearning.json")
    assert record["model"]["name"] == Path(model_dir).name
    assert record["after"] == report()["after"]


@pytest.mark.slow
def test_a_model_that_is_nowhere_fails_the_run(
    in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason: here somebody removes it while the run goes on."""

    class Removes(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            shutil.rmtree("out")
            # The last one must not be better, or it would be exported again.
            pl_module.best = pl_module.best._replace(values={**pl_module.best.values, "forget/loss": -1e9})

    build = trainer_module.default_callbacks
    monkeypatch.setattr(trainer_module, "default_callbacks", lambda *a, **kw: [Removes(), *build(*a, **kw)])
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as caught:
        cli.main(quick(model_dir, "--model.optimizer.lr=0.5", "--model.constraints.nll.epsilon=9.0"))
    assert caught.value.code == 1
    assert "not at 'out'" in str(caught.value)
    assert "model: out" not in caplog.text
    assert report()["kept_step"]
