"""`MatchUnseen` in a run: the level is measured once, before anything else, and survives a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, MatchUnseen
from lit_unlearn.callbacks import ResumeCheckpoint, RunReport


def make(lm: LanguageModel, lr: float = 0.1, **unseen: Any) -> LitUnlearn:
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=1.0))
    return LitUnlearn(lm, MatchUnseen(**unseen), {"nll": bound}, lambda parameters: torch.optim.SGD(parameters, lr=lr))


def data(rows_dir: str, **settings: Any) -> ForgetRetain:
    streams = {"unseen": f"{rows_dir}/general.jsonl"}
    return ForgetRetain(
        *(f"{rows_dir}/{name}.jsonl" for name in ("forget", "retain")),
        **{"streams": streams, "batch_size": 5, **settings},
    )


def test_the_level_is_the_models_own_before_unlearning(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str, tmp_path: Path
) -> None:
    module = make(tiny_lm(), lr=1e-3, factor=1.5)
    saver = ResumeCheckpoint(dirpath=str(tmp_path))
    first = make_trainer(max_epochs=2, callbacks=[RunReport(), saver], enable_checkpointing=True)
    first.fit(module, datamodule=data(rows_dir))
    before = first.callbacks[0].state_dict()["values"]
    assert module.forget.level.value == pytest.approx(1.5 * before["unseen/nll"])
    assert math.isfinite(before["forget/loss"])  # measured with the level, and not before it was known
    assert first.callback_metrics["val/unseen/nll"].item() != pytest.approx(before["unseen/nll"])
    resumed = make(tiny_lm(seed=1), lr=1e-3, factor=1.5)
    second = make_trainer(max_epochs=3, callbacks=[ResumeCheckpoint(dirpath=str(tmp_path))], enable_checkpointing=True)
    second.fit(resumed, datamodule=data(rows_dir), ckpt_path="last")
    assert resumed.forget.level.value == module.forget.level.value


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_forget_rows_are_led_to_the_level_from_either_side(
    factor: float, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str
) -> None:
    module = make(tiny_lm(), lr=0.02, factor=factor)
    report = RunReport()
    trainer = make_trainer(max_epochs=15, callbacks=[report])
    trainer.fit(module, datamodule=data(rows_dir))
    before, after = report.state_dict()["values"]["forget/nll"], trainer.callback_metrics["val/forget/nll"].item()
    assert (before < module.forget.level.value) == (factor > 1)
    assert abs(after - module.forget.level.value) < abs(before - module.forget.level.value) / 3


def test_without_such_rows_the_run_is_refused(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], rows_dir: str
) -> None:
    with pytest.raises(ValueError, match=r"no stream 'other': name their file in the data module's `streams`"):
        make_trainer(max_epochs=1).fit(make(tiny_lm(), stream="other"), datamodule=data(rows_dir))
