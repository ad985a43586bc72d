"""`LogitMargin(until=Unseen(…))` in a run: the level is measured once, before the first step, and survives a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, LogitMargin, Unseen
from lit_unlearn.callbacks import ExportModel, ResumeCheckpoint, RunReport


def make(lm: LanguageModel, **unseen: Any) -> LitUnlearn:
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=1.0))
    forget = LogitMargin(until=Unseen(**unseen))
    return LitUnlearn(lm, forget, {"nll": bound}, lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def data(rows_dir: str, **settings: Any) -> ForgetRetain:
    streams = {"unseen": f"{rows_dir}/general.jsonl"}
    return ForgetRetain(
        *(f"{rows_dir}/{name}.jsonl" for name in ("forget", "retain")),
        **{"streams": streams, "batch_size": 5, **settings},
    )


def test_the_level_is_the_models_own_before_unlearning(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str, tmp_path: Path
) -> None:
    module = make(tiny_lm(), factor=1.5)
    saver = ResumeCheckpoint(dirpath=str(tmp_path))
    first = make_trainer(max_epochs=2, callbacks=[RunReport(), saver], enable_checkpointing=True)
    first.fit(module, datamodule=data(rows_dir))
    level = module.forget.until.level
    before = first.callbacks[0].state_dict()["values"]["unseen/nll"]
    assert level == pytest.approx(1.5 * before)
    assert first.callback_metrics["val/unseen/nll"].item() != pytest.approx(before)  # and not the present one
    resumed = make(tiny_lm(seed=1), factor=1.5)
    second = make_trainer(max_epochs=3, callbacks=[ResumeCheckpoint(dirpath=str(tmp_path))], enable_checkpointing=True)
    second.fit(resumed, datamodule=data(rows_dir), ckpt_path="last")
    assert resumed.forget.until.level == level


def test_rows_that_surprise_already_are_left_alone(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str
) -> None:
    module = make(tiny_lm(), factor=0.01)  # every row has more
    logged: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics["forget/loss"]))

    make_trainer(max_epochs=1, callbacks=[Watch()]).fit(module, datamodule=data(rows_dir))
    assert logged == [0.0, 0.0]


def test_without_such_rows_the_run_is_refused(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str
) -> None:
    with pytest.raises(ValueError, match=r"no stream 'other': name their file in `data\.streams`"):
        make_trainer(max_epochs=1).fit(make(tiny_lm(), stream="other"), datamodule=data(rows_dir))


def test_what_an_epochs_dual_step_measures_is_not_kept_without_an_export(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str, tmp_path: Path
) -> None:
    """It was: the report then named a model that had never been exported."""
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=1.0), update_every="epoch")
    module = LitUnlearn(tiny_lm(), LogitMargin(), {"nll": bound}, lambda p: torch.optim.SGD(p, lr=1e-3))
    callbacks = [RunReport(str(tmp_path)), ExportModel(str(tmp_path / "model"))]
    make_trainer(max_epochs=5, check_val_every_n_epoch=4, callbacks=callbacks).fit(module, datamodule=data(rows_dir))
    assert module.best is not None
    assert module.best.step in (8, 10)  # the validation, and the end
    assert (tmp_path / "model" / "config.json").is_file()
