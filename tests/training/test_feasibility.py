"""Which model a run keeps: the most forgetful feasible one, else the least violating one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import AutoModelForCausalLM

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    FixedMultiplier,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
)
from lit_unlearn.callbacks import ExportModel, RunReport


def make(lm: LanguageModel, epsilon: float, **settings: Any) -> LitUnlearn:
    """Forgets hard, with a multiplier that does not look: the retain loss rises above any bound in time."""
    constraint = Constraint(NLL(), epsilon, FixedMultiplier(0.0))
    optimizer = settings.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, optimizer, **settings)


def data() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


class Watch(L.Callback):
    """Values and weights at every validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        weights = {name: value.clone() for name, value in pl_module.lm.model.state_dict().items()}
        self.seen.append({"step": trainer.global_step, "values": values, "weights": weights})


def same(directory: Path, weights: dict[str, torch.Tensor]) -> bool:
    state = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return all(torch.equal(state[name], value) for name, value in weights.items())


@pytest.fixture(scope="module")
def watched(tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How the retain loss goes without a bound; the tests put bounds where they want them."""
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=6,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path_factory.mktemp("watched"),
    )
    from conftest import TINY

    torch.manual_seed(0)
    trainer.fit(make(LanguageModel(config=TINY, tokenizer=tokenizer_dir), 1.0), datamodule=data())
    return watch.seen


def losses(seen: list[dict[str, Any]], name: str) -> list[float]:
    return [one["values"][f"val/{name}"] for one in seen]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_best_feasible_model_is_kept_and_exported(
    place: int,
    watched: list[dict[str, Any]],
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    capsys: Any,
) -> None:
    retain, forget = losses(watched, "constraint/nll/value"), losses(watched, "forget/loss")
    epsilon = sorted(retain)[place] + 1e-4
    feasible = [value <= epsilon for value in retain]
    assert 0 < sum(feasible) < len(feasible)
    best = min((i for i in range(6) if feasible[i]), key=lambda i: forget[i])
    saver = ModelCheckpoint(tmp_path / "saved", monitor="val/feasible_forget", filename="{step}")
    callbacks = [Watch(), saver, RunReport(str(tmp_path)), ExportModel(str(tmp_path / "out"))]
    trainer = make_trainer(max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    module = make(tiny_lm(), epsilon)
    trainer.fit(module, datamodule=data())
    expected = [value if holds else math.inf for value, holds in zip(forget, feasible, strict=True)]
    assert losses(callbacks[0].seen, "feasible_forget") == pytest.approx(expected)
    assert module.best is not None
    assert module.best.step == watched[best]["step"]
    assert same(tmp_path / "out", watched[best]["weights"])
    assert f"step={module.best.step}." in saver.best_model_path  # the ordinary callback finds it too
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["kept_step"], report["steps"]) == (module.best.step, 12)
    assert report["constraints"]["nll"]["slack"] == pytest.approx(
        epsilon - retain[best], abs=1e-6
    )  # watched in float32
    printed = capsys.readouterr().out
    assert f"step {module.best.step} of 12" in printed
    assert "(feasible)" in printed


def test_a_run_that_is_never_feasible_keeps_the_least_violating_model_and_says_so(
    watched: list[dict[str, Any]],
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    capsys: Any,
) -> None:
    retain = losses(watched, "constraint/nll/value")
    least = min(range(6), key=lambda i: retain[i])
    callbacks = [Watch(), RunReport(str(tmp_path), require_feasible=True), ExportModel(str(tmp_path / "out"))]
    trainer, module = make_trainer(max_epochs=6, callbacks=callbacks), make(tiny_lm(), 1.0)
    with (
        pytest.warns(UserWarning, match=f"keeps the least violating one, of step {watched[least]['step']}"),
        pytest.raises(RuntimeError, match="constraint 'nll' is violated on its whole stream"),
    ):
        trainer.fit(module, datamodule=data())
    assert set(losses(callbacks[0].seen, "feasible_forget")) == {math.inf}
    assert same(tmp_path / "out", watched[least]["weights"])
    assert "(violated)" in capsys.readouterr().out


def test_the_last_model_is_kept_where_that_is_asked_for(
    watched: list[dict[str, Any]],
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    trainer = make_trainer(max_epochs=6, callbacks=[ExportModel(str(tmp_path / "out"))])
    module = make(tiny_lm(), 1.0, keep="last")
    trainer.fit(module, datamodule=data())
    assert module.best is not None
    assert module.best.step == 12
    assert same(tmp_path / "out", watched[-1]["weights"])


def test_early_stopping_on_the_feasible_forget_loss(
    watched: list[dict[str, Any]], tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    """``check_finite`` must be off: infinite is what an infeasible model has."""
    stop = EarlyStopping("val/feasible_forget", patience=2, check_finite=False)
    trainer = make_trainer(max_epochs=6, callbacks=[stop])
    trainer.fit(make(tiny_lm(), 1.0), datamodule=data())
    assert trainer.current_epoch == 2  # infinite twice, which is no improvement


def test_excess_is_that_of_the_worst_constraint(tiny_lm: Callable[..., LanguageModel]) -> None:
    bounds = {"nll": 2.0, "general": 4.0}
    constraints = {name: Constraint(NLL(), epsilon, FixedMultiplier(0.0)) for name, epsilon in bounds.items()}
    module = LitUnlearn(tiny_lm(), LogitMargin(), constraints, torch.optim.SGD)

    def excess(nll: float, general: float) -> float:
        return module.excess({"constraint/nll/value": nll, "constraint/general/value": general})

    assert excess(3.0, 4.4) == pytest.approx(0.5)
    assert excess(1.0, 5.0) == pytest.approx(0.25)
    assert excess(1.0, 3.0) == pytest.approx(-0.25)
    assert excess(1.0, math.nan) == math.inf
    assert module.excess({}) == 0.0


def test_the_reference_model_is_no_candidate(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = make(tiny_lm(), 100.0)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data())
    assert module.best is not None
    assert module.best.step == 2


def test_what_an_epochs_dual_step_measures_is_not_kept_without_an_export(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """It was: the report then named a model that had never been exported."""
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=1.0), update_every="epoch")
    module = LitUnlearn(tiny_lm(), LogitMargin(), {"nll": bound}, lambda p: torch.optim.SGD(p, lr=1e-3))
    callbacks = [RunReport(str(tmp_path)), ExportModel(str(tmp_path / "model"))]
    make_trainer(max_epochs=5, check_val_every_n_epoch=4, callbacks=callbacks).fit(module, datamodule=data())
    assert module.best is not None
    assert module.best.step in (8, 10)  # the validation, and the end
    assert (tmp_path / "model" / "config.json").is_file()
