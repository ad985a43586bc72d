"""Nothing long happens without a word, and the time that is left includes the validations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.callbacks import default_callbacks, progress
from lit_unlearn.callbacks.progress import RunClock
from lit_unlearn.training import pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def fit(lm: LanguageModel, trainer: L.Trainer) -> None:
    constraint = Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=3.0))
    module = LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01))
    trainer.fit(module, datamodule=FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200))


def test_each_long_thing_has_a_line_before_it(
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "_LONG_PAUSE", 0.0)
    monkeypatch.setattr(pace, "SECONDS_PER_LINE", 0.0)
    trainer = make_trainer(max_epochs=2, callbacks=default_callbacks(checkpoint=False), enable_progress_bar=True)
    with caplog.at_level(logging.INFO):
        fit(tiny_lm(), trainer)
    expected = [
        "loading the model",
        "model: ",
        "measuring the model before the first step",
        "measuring: 1 of 2 batches",
        "step 1 of 4",
        "step 2 of 4",
        "validation after step 2",
        "validation: 1 of 2 batches",
        "exporting the model of step 2",
        "step 3 of 4",
        "step 4 of 4",
        "validation after step 4",
        "validation: 1 of 2 batches",
        "exporting the model of step 4",
        "fit: ",
    ]
    lines = iter(caplog.messages)
    for begin in expected:
        assert any(line.startswith(begin) for line in lines), begin


def test_quick_validations_have_no_lines(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_epochs=2, callbacks=default_callbacks(checkpoint=False), enable_progress_bar=True)
    with caplog.at_level(logging.INFO):
        fit(tiny_lm(), trainer)
    assert not [line for line in caplog.messages if line.startswith("validation")]


class Slow(L.Callback):
    """Makes the measurement before the first step take 30 s, steps 2 s, and validations 100 s."""

    def __init__(self, now: list[float]) -> None:
        self._now = now

    def on_train_start(self, *_: Any) -> None:
        self._now[0] += 30

    def on_train_batch_start(self, *_: Any) -> None:
        self._now[0] += 2

    def on_validation_end(self, *_: Any) -> None:
        self._now[0] += 100


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        # Before the first validation has ended, it is taken to be as long as the measurement before the first step.
        ({}, [2 * 3 + 2 * 30, 2 * 2 + 2 * 30, 2 + 100, 100]),
        ({"check_val_every_n_epoch": 2}, [2 * 3 + 30, 2 * 2 + 30, 2 + 30, 30]),
        ({"val_check_interval": 1}, [2 * 3 + 4 * 30, 2 * 2 + 3 * 100, 2 + 2 * 100, 100]),
        ({"limit_val_batches": 0}, [6, 4, 2]),
    ],
)
def test_the_time_left_includes_validations(
    settings: dict[str, Any],
    left: list[int],
    clock: list[float],
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "format_seconds", lambda seconds: f"{seconds:.0f}")
    callbacks = [progress.ProgressBar(), Slow(clock)]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks, enable_progress_bar=True, **settings)
    with caplog.at_level(logging.INFO):
        fit(tiny_lm(), trainer)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    estimates = [int(line.split(", about ")[1].split()[0]) for line in lines if ", about " in line]
    assert estimates == left


def test_a_resumed_run_estimates_from_its_own_steps(clock: list[float]) -> None:
    run = RunClock()
    run.start(100)
    clock[0] += 50  # the start takes long
    assert run.estimate_left(100, 200, 3) is None
    run.go_on()
    clock[0] += 20
    assert run.estimate_left(110, 200, 0) == pytest.approx(2 * 90)
    run.pause()
    clock[0] += 300
    run.go_on()
    assert run.last_pause == pytest.approx(300)
    assert run.estimate_left(110, 200, 3) == pytest.approx(2 * 90 + 3 * 300)


def test_a_long_pass_says_how_far_it_is(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    counter = pace.Pace("measuring", 10)
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            clock[0] += 8
            counter.count_batch()
    assert [line.split(" batches")[0] for line in caplog.messages] == [f"measuring: {n} of 10" for n in (2, 4, 6, 8)]
    assert "64 s left" in caplog.messages[0]
