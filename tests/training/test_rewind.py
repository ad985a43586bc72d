"""`rewind`: before the first step the weights go a share of the way back to the teacher's, once per run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, LogitMargin, Relative
from lit_unlearn.callbacks import ResumeCheckpoint, RunAdvice, RunReport
from lit_unlearn.errors import ConfigError, ModelError


@pytest.fixture
def base_dir(tiny_lm: Callable[..., LanguageModel], tmp_path: Path) -> str:
    """Another model of the same architecture."""
    lm = tiny_lm(seed=5)
    lm.load(torch.float32)
    return str(lm.save(tmp_path / "base"))


def make(model: str, rewind: float, lr: float = 0.0, **lm: Any) -> LitUnlearn:
    bound = Constraint(NLL(), Relative(0.5), DualAscent(lr=1.0, init=1.0))
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=lr)  # noqa: E731
    return LitUnlearn(LanguageModel(model, **lm), LogitMargin(), {"nll": bound}, optimizer, rewind=rewind)


def rows(folder: str) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5)


def test_weights_go_a_share_of_the_way_and_bounds_stay_those_of_the_model(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str
) -> None:
    plain, module, report = make(model_dir, 0.0), make(model_dir, 0.25, teacher=base_dir), RunReport()
    make_trainer(max_steps=1).fit(plain, datamodule=rows(rows_dir))
    # A rate of zero: what has moved the weights is `rewind`.
    make_trainer(max_steps=1, callbacks=[report]).fit(module, datamodule=rows(rows_dir))
    own, base = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model_dir, base_dir))
    for name, value in module.lm.causal_lm.state_dict().items():
        torch.testing.assert_close(value, 0.75 * own[name] + 0.25 * base[name], rtol=1e-5, atol=1e-7)
    assert module.constraints["nll"].epsilon == plain.constraints["nll"].epsilon
    before = report.state_dict()["values"]["retain/nll"]
    assert module.constraints["nll"].epsilon == pytest.approx(1.5 * before)


def test_no_advice_calls_the_value_after_rewinding_the_one_before_unlearning(
    make_trainer: Callable[..., L.Trainer], models: dict[str, str], rows_dir: str
) -> None:
    module = make(models["plain"], 0.9, teacher=models["teacher"])
    module.constraints["nll"] = Constraint(NLL(), Relative(0.001), DualAscent(lr=1e-3, init=1.0))
    # Six epochs, as many as a λ needs for its ten steps.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_epochs=6, callbacks=[RunAdvice()]).fit(module, datamodule=rows(rows_dir))
    assert module.measure()["constraint/nll/value"] > module.constraints["nll"].epsilon
    assert not [text for entry in caught if (text := str(entry.message)).startswith("constraint 'nll'")]


def test_a_resumed_run_is_not_rewound_again(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str, tmp_path: Path
) -> None:
    whole = make(model_dir, 0.5, lr=1e-2, teacher=base_dir)
    make_trainer(max_epochs=2).fit(whole, datamodule=rows(rows_dir))
    for epochs, path in ((1, None), (2, "last")):
        saver = ResumeCheckpoint(dirpath=str(tmp_path / "checkpoints"))
        module = make(model_dir, 0.5, lr=1e-2, teacher=base_dir)
        trainer = make_trainer(max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
        trainer.fit(module, datamodule=rows(rows_dir), ckpt_path=path)
    resumed = module.lm.causal_lm.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.lm.causal_lm.state_dict().items())


def test_without_a_teacher_or_with_an_adapter_it_is_refused(
    make_trainer: Callable[..., L.Trainer], model_dir: str, base_dir: str, rows_dir: str
) -> None:
    with pytest.raises(ConfigError, match="`rewind`, needs a teacher"):
        make_trainer(max_steps=1).fit(make(model_dir, 0.5), datamodule=rows(rows_dir))
    with pytest.raises(ConfigError, match="an adapter cannot be moved"):
        make_trainer(max_steps=1).fit(
            make(model_dir, 0.5, teacher=base_dir, adapter={"r": 4}), datamodule=rows(rows_dir)
        )
    with pytest.raises(ConfigError, match=r"`rewind` must be .* below 1"):
        make(model_dir, 1.0, teacher=base_dir)


def test_a_teacher_of_another_shape_is_refused_and_changes_nothing(
    make_trainer: Callable[..., L.Trainer],
    tiny_lm: Callable[..., LanguageModel],
    model_dir: str,
    rows_dir: str,
    tmp_path: Path,
) -> None:
    wider = tiny_lm(intermediate_size=160)
    wider.load(torch.float32)
    module = make(model_dir, 0.5, teacher=str(wider.save(tmp_path / "wider")))
    with pytest.raises(ModelError, match="another shape") as error:
        make_trainer(max_steps=1).fit(module, datamodule=rows(rows_dir))
    assert (error.value.owner, error.value.argument) == (module.lm, "teacher")
    own = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(own[name], value) for name, value in module.lm.causal_lm.state_dict().items())
