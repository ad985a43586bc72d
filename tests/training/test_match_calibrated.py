"""`MatchCalibrated` in a run: each answer has a level of its own, from the base model and from rows that neither model saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, MatchCalibrated
from lit_unlearn.callbacks import ResumeCheckpoint, RunReport
from lit_unlearn.data.example import collate
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.objectives.match_calibrated import MIN_TEMPERATURE, SHARPNESSES, TeacherTemperature


@pytest.fixture
def base_dir(tiny_lm: Callable[..., LanguageModel], tmp_path: Path) -> str:
    """Another model with the same tokenizer."""
    lm = tiny_lm(seed=5)
    lm.load(torch.float32)
    return str(lm.save(tmp_path / "base"))


@pytest.fixture
def sharper_dir(base_dir: str, tmp_path: Path) -> str:
    """A model that says the same as the base model, and is surer of it: its logits are 1.6 times the other's."""
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(1.6 * head.weight.detach())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "sharper")
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(tmp_path / "sharper")
    return str(tmp_path / "sharper")


def make(model_dir: str, teacher_dir: str, **settings: Any) -> LitUnlearn:
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=0.0))
    lm = LanguageModel(model_dir, teacher=teacher_dir)
    return LitUnlearn(lm, MatchCalibrated(**settings), {"nll": bound}, lambda p: torch.optim.Adam(p, lr=3e-3))


def read_rows(folder: str) -> ForgetRetain:
    streams = {"unseen": f"{folder}/general.jsonl"}
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", streams=streams, batch_size=5)


@torch.no_grad()
def compute_nll(model: torch.nn.Module, data: ForgetRetain, temperature: float = 1.0) -> torch.Tensor:
    """NLL per token of every forget answer, from transformers' own logits."""
    values = []
    for example in data.examples["forget"]:
        batch = collate([example._replace(alternate=None)], 0)
        labels = batch["labels"][0, 1:]
        logp = (model(batch["input_ids"]).logits[0, :-1] / temperature).log_softmax(-1)
        answer = labels != -100
        values.append(-logp[answer].gather(1, labels[answer][:, None]).mean())
    return torch.stack(values)


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_answers_are_led_to_their_own_levels(
    temperature: float,
    make_trainer: Callable[..., L.Trainer],
    model_dir: str,
    base_dir: str,
    rows_dir: str,
    tmp_path: Path,
) -> None:
    data, module = read_rows(rows_dir), make(model_dir, base_dir, temperature=temperature)
    make_trainer(max_epochs=10).fit(module, datamodule=data)
    before, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_dir, base_dir))
    levels = compute_nll(teacher, data, temperature)
    after = compute_nll(AutoModelForCausalLM.from_pretrained(module.lm.save(tmp_path / "out")), data)
    distances = [(nll - levels).square().mean() for nll in (compute_nll(before, data), after)]
    assert distances[1] < distances[0] / 10


def test_the_temperature_makes_the_teacher_as_sure_as_the_model_is_of_unseen_rows(
    make_trainer: Callable[..., L.Trainer], base_dir: str, sharper_dir: str, rows_dir: str, tmp_path: Path
) -> None:
    saver, report = ResumeCheckpoint(dirpath=str(tmp_path / "checkpoints")), RunReport()
    module = make(sharper_dir, base_dir)
    trainer = make_trainer(max_epochs=2, callbacks=[report, saver], enable_checkpointing=True)
    trainer.fit(module, datamodule=read_rows(rows_dir))
    assert module.forget.temperature == pytest.approx(1 / 1.6, abs=0.01)
    # At this temperature, the teacher says the same as the model.
    assert report.state_dict()["values"]["forget/loss"] == pytest.approx(0, abs=1e-5)

    resumed = make(sharper_dir, base_dir)
    saver = ResumeCheckpoint(dirpath=str(tmp_path / "checkpoints"))
    trainer = make_trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(resumed, datamodule=read_rows(rows_dir), ckpt_path="last")
    assert resumed.forget.temperature == module.forget.temperature


def test_a_teacher_is_not_made_less_sure(
    make_trainer: Callable[..., L.Trainer], base_dir: str, sharper_dir: str, rows_dir: str
) -> None:
    module = make(base_dir, sharper_dir)
    make_trainer(max_steps=1).fit(module, datamodule=read_rows(rows_dir))
    assert module.forget.temperature == 1


@pytest.mark.parametrize(("wanted", "sharpness"), [(0.03, 1.0), (0.05, 1.5), (9.0, 1 / MIN_TEMPERATURE)])
def test_the_temperature_is_where_the_nll_rises_to_the_wanted_one(wanted: float, sharpness: float) -> None:
    # Least at a sharpness of 1.2, as the NLL of a teacher is that says everything too carefully.
    of_teacher = [0.02 + (sharpness - 1.2) ** 2 / 3 for sharpness in SHARPNESSES]
    temperature = TeacherTemperature("unseen").measure(lambda objective: [wanted, *of_teacher])
    assert temperature == pytest.approx(1 / sharpness, abs=0.01)


def test_a_temperature_to_be_measured_needs_unseen_rows(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str
) -> None:
    data = ForgetRetain(f"{rows_dir}/forget.jsonl", f"{rows_dir}/retain.jsonl", batch_size=5)
    with pytest.raises(DataError, match=r"MatchCalibrated needs examples that the model has never seen.*'unseen'"):
        make_trainer(max_steps=1).fit(make(model_dir, base_dir), datamodule=data)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"`temperature`.*above 0"):
        MatchCalibrated(temperature=temperature)
