"""What a fit leaves to draw from, and that leaving it changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    LanguageModel,
    LitFinetune,
    LitUnlearn,
    LogitMargin,
)
from lit_unlearn.callbacks import ExportModel, ResumeCheckpoint, RunPicture
from lit_unlearn.cli import main
from lit_unlearn.plotting import RecordedAnswer, read_run

PICTURES = {f"{name}.{suffix}" for name in ("dual", "trajectory", "tokens") for suffix in ("png", "svg")}


class Stopped(Exception):
    """Like a kill."""


class Stop(L.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            raise Stopped


class Ruin(L.Callback):
    """Spoils the model in the last epoch, so that an earlier one is kept."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1:
            for parameter in pl_module.parameters():
                parameter.data.mul_(20)


def unlearn(lm: LanguageModel, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), 7.0, DualAscent(lr=5.0, init=1.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.05), **settings)


def fit(
    module: L.LightningModule,
    make_trainer: Callable[..., L.Trainer],
    root: Path,
    *more: L.Callback,
    picture: RunPicture | None = None,
    epochs: int = 2,
    data: L.LightningDataModule | None = None,
    **settings: Any,
) -> Path:
    """Runs a fit; returns the folder of its metrics."""
    logger = CSVLogger(root, "run")
    callbacks = [*([] if picture is None else [picture]), *more]
    saves = any(isinstance(callback, ResumeCheckpoint) for callback in more)
    trainer = make_trainer(
        max_epochs=epochs, callbacks=callbacks, logger=logger, log_every_n_steps=1, enable_checkpointing=saves
    )
    if "train_dataloaders" not in settings:
        settings["datamodule"] = data or FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)
    trainer.fit(module, **settings)
    return Path(logger.log_dir)


def probabilities(model: Any, ids: list[int], labels: list[int]) -> list[float]:
    """Of the supervised tokens, from the whole row's logits."""
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0].softmax(-1)
    return [p[i - 1, label].item() for i, label in enumerate(labels) if i and label != -100]


@pytest.mark.usefixtures("draws_pictures")
@pytest.mark.slow
def test_a_fit_records_answers_of_the_first_and_of_the_kept_model(
    model_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    data = FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)
    export = ExportModel(str(tmp_path / "kept"))
    folder = fit(
        unlearn(LanguageModel(model_dir)),
        make_trainer,
        tmp_path,
        export,
        Ruin(),
        picture=RunPicture(2),
        epochs=3,
        data=data,
    )
    assert PICTURES | {"metrics.csv", "pictures.json"} <= {path.name for path in folder.iterdir()}
    run, steps = read_run(folder), len(data.examples["forget"]) // 5
    assert run.kept_step is not None
    assert run.kept_step < 3 * steps
    assert run.before["constraint/nll/value"] > 0
    assert [(answer.stream, answer.row) for answer in run.answers] == [
        (s, i) for s in ("forget", "retain") for i in (0, 1)
    ]
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model_dir, tmp_path / "kept"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for answer in run.answers:
        row = data.examples[answer.stream][answer.row]
        count = len(answer.tokens)
        assert answer.before == pytest.approx(probabilities(before, row.input_ids, row.labels)[:count], abs=2e-6)
        assert answer.after == pytest.approx(probabilities(after, row.input_ids, row.labels)[:count], abs=2e-6)
        assert answer.after != answer.before
        said = [label for label in row.labels if label != -100]
        assert answer.cut == (len(said) > 64)
        text = "".join(answer.tokens)
        assert text.removesuffix("∎") == tokenizer.decode(said[:count], skip_special_tokens=True)
        assert text.endswith("∎") != answer.cut
        assert answer.prompt.startswith("Question: ")


@pytest.mark.usefixtures("draws_pictures")
@pytest.mark.parametrize("kind", ["unlearn", "finetune"])
def test_training_does_not_notice(
    kind: str, models: dict[str, str], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    weights = []
    for picture in (None, RunPicture(3)):
        lm = LanguageModel(models["dropout"])
        module = unlearn(lm) if kind == "unlearn" else LitFinetune(lm, lambda p: torch.optim.SGD(p, lr=0.05))
        L.seed_everything(1, verbose=False)
        folder = fit(module, make_trainer, tmp_path, picture=picture)
        weights.append([*lm.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    names = {path.name for path in folder.iterdir()}
    assert {"tokens.png", "dual.png" if kind == "unlearn" else "finetuning.png"} <= names
    assert ("trajectory.svg" in names) == (kind == "unlearn")


@pytest.mark.slow
def test_a_run_that_was_killed_can_be_drawn_and_goes_on(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path, capsys: Any
) -> None:
    def saver() -> ResumeCheckpoint:
        return ResumeCheckpoint(every_n_train_steps=1, dirpath=str(tmp_path / "checkpoints"))

    with pytest.raises(Stopped):
        fit(unlearn(tiny_lm()), make_trainer, tmp_path, saver(), Stop(3), picture=RunPicture(3), epochs=4)
    killed = tmp_path / "run" / "version_0"
    assert not PICTURES & {path.name for path in killed.iterdir()}
    main(["plot", str(killed)])
    assert {path.name for path in killed.iterdir()} >= PICTURES
    first = read_run(killed)
    assert first.kept_step == 2
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    folder = fit(
        unlearn(tiny_lm()), make_trainer, tmp_path, saver(), picture=RunPicture(3), epochs=4, ckpt_path=str(checkpoint)
    )
    assert json.loads((folder / "pictures.json").read_text())["metrics"] == ["../version_0/metrics.csv", "metrics.csv"]
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run = read_run(tmp_path / "moved" / folder.name)
    assert run.missing == []
    assert run.metrics["forget/loss"][0] == list(range(8))
    assert run.metrics["forget/loss"][1][:3] == first.metrics["forget/loss"][1][:3]
    assert run.before == first.before
    assert [answer.before for answer in run.answers] == [answer.before for answer in first.answers]
    assert run.kept_step == 8
    whole = read_run(fit(unlearn(tiny_lm()), make_trainer, tmp_path, picture=RunPicture(3), epochs=4))
    assert whole.answers == run.answers


def test_an_older_checkpoint_and_other_settings_do_no_harm() -> None:
    picture = RunPicture()
    picture.load_state_dict({"files": ["old/metrics.csv"]})
    nothing = {"before": {}, "answers": [], "kept_step": None, "weights": None}
    assert picture.state_dict() == {"files": ["old/metrics.csv"], **nothing}
    with pytest.raises(ValueError, match=r"`answers` .* at least 0, not -1"):
        RunPicture(-1)


@pytest.mark.usefixtures("draws_pictures")
def test_loaders_of_ones_own_have_no_tokens(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: Any
) -> None:
    data = FictionalAuthors(4, 1, tokenizer=tiny_lm().tokenizer_name, batch_size=5, retain_batch_size=4, max_length=200)
    data.setup("fit")
    loaders = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
    with caplog.at_level("INFO"):
        folder = fit(unlearn(tiny_lm()), make_trainer, tmp_path, picture=RunPicture(3), **loaders)
    assert PICTURES - {path.name for path in folder.iterdir()} == {"tokens.png", "tokens.svg"}
    assert "no picture 'tokens': no answers were recorded" in caplog.text
    assert read_run(folder).kept_step == 4


@pytest.mark.usefixtures("draws_pictures")
def test_a_picture_that_fails_costs_no_model(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Block(L.Callback):
        """Stands where a picture is to go."""

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            (Path(trainer.log_dir or "") / "dual.svg").mkdir()

    export = ExportModel(str(tmp_path / "kept"))
    with pytest.warns(UserWarning, match=r"the pictures could not be drawn \('.*dual\.svg' cannot be written"):
        fit(unlearn(tiny_lm(), keep="last"), make_trainer, tmp_path, Block(), export, picture=RunPicture(0))
    assert (tmp_path / "kept" / "model.safetensors").is_file()


def test_answers_are_plain(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    picture = RunPicture(1)
    fit(unlearn(tiny_lm()), make_trainer, tmp_path, picture=picture, epochs=1)
    state = picture.state_dict()
    assert json.loads(json.dumps(state)) == state  # what any checkpoint format can hold
    assert [set(answer) for answer in state["answers"]] == [set(RecordedAnswer._fields)] * 2
