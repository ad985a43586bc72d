"""The teacher of `KLToTeacher`: loaded by name where an objective needs it, frozen, and in no checkpoint and no export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import reference
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    ForgetRetain,
    IdkNLL,
    KLToTeacher,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    Objective,
)
from lit_unlearn.callbacks import ResumeCheckpoint, RunReport
from lit_unlearn.callbacks.identity import find_differences, identify_run
from lit_unlearn.data.example import collate
from lit_unlearn.errors import ConfigError, MissingFileError, ModelError
from lit_unlearn.utils.io import file_digest


@pytest.fixture
def base_dir(tiny_lm: Callable[..., LanguageModel], tmp_path: Path) -> str:
    """Another model with the same tokenizer."""
    lm = tiny_lm(seed=5)
    lm.load(torch.float32)
    return str(lm.save(tmp_path / "base"))


def make(model: str, forget: Objective, lr: float = 1e-3, **lm: Any) -> LitUnlearn:
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=0.0))
    return LitUnlearn(LanguageModel(model, **lm), forget, {"nll": bound}, lambda p: torch.optim.Adam(p, lr=lr))


def rows(folder: str, **settings: Any) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", **{"batch_size": 5, **settings})


def dense_kl(model_dir: str, base_dir: str, data: ForgetRetain) -> float:
    """KL(p_teacher‖p), the mean over the tokens of all forget answers, from transformers' own logits."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (base_dir, model_dir)]
    values = []
    for example in data.examples["forget"]:
        batch = collate([example._replace(alternate=None)], 0)
        with torch.no_grad():
            teacher, own = (model(batch["input_ids"]).logits[0, :-1].log_softmax(-1) for model in models)
        values.append(reference.kl(teacher, own)[batch["labels"][0, 1:] != -100])
    return torch.cat(values).mean().item()


@pytest.mark.parametrize(("adapter", "lr"), [(None, 1e-3), ({"r": 4}, 1e-2)])
def test_a_run_moves_the_model_towards_the_teacher_and_keeps_nothing_of_it(
    adapter: Any,
    lr: float,
    make_trainer: Callable[..., L.Trainer],
    model_dir: str,
    base_dir: str,
    rows_dir: str,
    tmp_path: Path,
) -> None:
    module = make(model_dir, KLToTeacher(), lr=lr, teacher=base_dir, adapter=adapter)
    data, report = rows(rows_dir), RunReport()
    trainer = make_trainer(max_epochs=4, callbacks=[report])
    trainer.fit(module, datamodule=data)
    before = report.state_dict()["values"]["forget/loss"]
    assert before == pytest.approx(dense_kl(model_dir, base_dir, data), rel=1e-3)  # small, in float32
    assert trainer.callback_metrics["val/forget/loss"].item() < before

    assert module.lm.teacher is not None
    weights = AutoModelForCausalLM.from_pretrained(base_dir).state_dict()
    for name, value in module.lm.teacher.causal_lm.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(not p.requires_grad and p.grad is None for p in module.lm.teacher.parameters())
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in module.lm.teacher.parameters()}

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert not any("teacher" in name for name in torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    exported = AutoModelForCausalLM.from_pretrained(module.lm.save(tmp_path / "out"))
    assert exported.state_dict().keys() == weights.keys()
    assert base_dir in module.lm.inputs  # whose folder no export replaces


def test_a_resumed_run_takes_the_steps_of_the_whole_one(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str, tmp_path: Path
) -> None:
    whole = make(model_dir, KLToTeacher(), teacher=base_dir)
    make_trainer(max_epochs=3).fit(whole, datamodule=rows(rows_dir))
    for epochs, path in ((2, None), (3, "last")):
        saver = ResumeCheckpoint(dirpath=str(tmp_path / "checkpoints"))
        module = make(model_dir, KLToTeacher(), teacher=base_dir)
        trainer = make_trainer(max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
        trainer.fit(module, datamodule=rows(rows_dir), ckpt_path=path)
    resumed = module.lm.causal_lm.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.lm.causal_lm.state_dict().items())


def test_the_record_tells_the_weights_of_a_teacher_that_took_part(model_dir: str, base_dir: str) -> None:
    lm = LanguageModel(model_dir, teacher=base_dir)
    lm.load(torch.float32)
    assert lm.origin()["teacher"] is None  # nothing needs it
    lm.keep_teacher()
    teacher = lm.origin()["teacher"]
    assert teacher["name"] == base_dir
    assert teacher["weights"] == {"model.safetensors": file_digest(Path(base_dir) / "model.safetensors")}


def test_a_run_with_another_teacher_is_another_run(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str
) -> None:
    def identify(teacher: str) -> dict[str, str]:
        trainer = make_trainer()
        trainer.strategy._lightning_module = make(model_dir, KLToTeacher(), teacher=teacher)
        return identify_run(trainer)

    assert find_differences(identify(base_dir), identify(base_dir)) == []
    assert find_differences(identify(base_dir), identify(model_dir)) == ["teacher"]


def test_the_revision_is_that_of_a_teacher(model_dir: str, base_dir: str) -> None:
    lm = LanguageModel(model_dir, teacher=base_dir, teacher_revision="c0ffee")
    assert lm.teacher is not None
    assert lm.teacher.hub_settings["revision"] == "c0ffee"
    assert lm.hub_settings["revision"] is None
    with pytest.raises(ConfigError) as error:
        LanguageModel(model_dir, teacher_revision="c0ffee")
    assert error.value.argument == "teacher_revision"


def test_it_is_loaded_only_where_an_objective_needs_it(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str
) -> None:
    module = make(model_dir, LogitMargin(), teacher=base_dir)
    make_trainer(max_steps=1).fit(module, datamodule=rows(rows_dir))
    assert module.lm.teacher is not None
    assert not module.lm.teacher.is_loaded


def test_as_a_constraint_it_bounds_the_distance_to_the_teacher(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str
) -> None:
    module = make(model_dir, IdkNLL(), teacher=base_dir)
    # Fluent answers: alternate ones, read by the forget objective, and these on the same stream.
    module.constraints["fluent"] = Constraint(
        KLToTeacher("alternate"), 1e-5, DualAscent(lr=1.0, init=1.0), stream="forget"
    )
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, datamodule=rows(rows_dir))
    assert module.constraints["fluent"].multiplier.value > 1
    assert trainer.callback_metrics["constraint/fluent/value"] > 1e-5


def test_loss_in_a_loop_of_your_own(model_dir: str, base_dir: str, rows_dir: str) -> None:
    lm = LanguageModel(model_dir, teacher=base_dir)
    lm.load(torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(RuntimeError, match=r"`teacher`.*`keep_teacher"):
        lm.loss(KLToTeacher(), batch)
    lm.keep_teacher()
    assert lm.loss(KLToTeacher(), batch).item() > 1e-5
    lm.keep_teacher(copy.deepcopy(lm.causal_lm))
    assert lm.loss(KLToTeacher(), batch).item() == pytest.approx(0, abs=1e-6)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_teacher_is_refused_with_the_other_needs(
    make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str
) -> None:
    module = make(model_dir, KLToTeacher())
    with pytest.raises(ConfigError, match=r"- forget \(KLToTeacher\) needs a teacher.*`teacher`"):
        make_trainer(max_steps=1).fit(module, datamodule=rows(rows_dir))


def test_another_tokenizer_and_another_vocabulary_are_refused(
    model_dir: str, tiny_lm: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    bigger = tiny_lm(vocab_size=500)
    bigger.load(torch.float32)
    bigger.save(tmp_path / "bigger")
    lm = LanguageModel(model_dir, teacher=str(tmp_path / "bigger"))
    lm.load(torch.float32)
    with pytest.raises(ModelError, match="gives 500 logits") as error:
        lm.keep_teacher()
    assert (error.value.owner, error.value.argument) == (lm, "teacher")

    other = tiny_lm(seed=5)
    other.load(torch.float32)
    other.save(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["another-entry"])
    tokenizer.save_pretrained(tmp_path / "other")
    lm = LanguageModel(model_dir, teacher=str(tmp_path / "other"))
    lm.load(torch.float32)
    with pytest.raises(ModelError) as error:
        lm.keep_teacher()
    assert (error.value.owner, error.value.argument) == (lm, "teacher")


def test_a_teacher_that_is_not_there_is_named_before_anything_is_loaded(model_dir: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"teacher.*nowhere") as error:
        LanguageModel(model_dir, teacher=str(tmp_path / "nowhere"))
    assert error.value.argument == "teacher"
