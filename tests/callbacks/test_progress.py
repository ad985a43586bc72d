from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

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
from lit_unlearn.callbacks import ProgressBar


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def fit(module: L.LightningModule, make_trainer: Callable[..., L.Trainer], bar: ProgressBar, **data: Any) -> None:
    rows = FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200, **data)
    trainer = make_trainer(max_epochs=2, callbacks=[bar], enable_progress_bar=True, check_val_every_n_epoch=1)
    trainer.fit(module, datamodule=rows)


def constrained(lm: LanguageModel, epsilon: float) -> LitUnlearn:
    return LitUnlearn(lm, LogitMargin(), {"nll": Constraint(NLL(), epsilon, DualAscent(lr=5.0, init=3.0))}, sgd)


@pytest.mark.parametrize(("epsilon", "verdict"), [(50.0, "≤ epsilon 50 (feasible)"), (0.5, "> epsilon 0.5 (violated)")])
def test_off_a_terminal_lines_say_in_words_how_it_goes(
    epsilon: float,
    verdict: str,
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.INFO):
        fit(constrained(tiny_lm(), epsilon), make_trainer, ProgressBar())
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == [f"step {n} of 4" for n in (1, 2, 3, 4)]
    assert re.search(rf"forget loss [\d.]+, retain NLL [\d.]+ {re.escape(verdict)}, λ nll 3 \(\d+ s", lines[0])
    assert "forget margin" in lines[-1]  # validated by then
    assert "Epoch" not in capsys.readouterr().out  # no bar


def test_a_long_run_has_few_lines_and_fine_tuning_has_them_too(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    bar = ProgressBar()
    with caplog.at_level(logging.INFO):
        fit(LitFinetune(tiny_lm(), sgd), make_trainer, bar, train_on="all")
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert len(lines) == 16
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(LitFinetune(tiny_lm(), sgd), make_trainer, ProgressBar(7), train_on="all")
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["7", "14", "16"]
    assert "train/nll" in lines[0]


def test_on_a_terminal_the_bar_has_the_same_words(
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(constrained(tiny_lm(), 50.0), make_trainer, ProgressBar())
    out = capsys.readouterr().out
    assert "epoch 2 of 2: 100%" in out
    assert re.search(r"retain NLL=[\d.]+ ≤ epsilon 50 \(feasible\), λ nll=", out)
