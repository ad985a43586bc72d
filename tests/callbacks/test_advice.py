from __future__ import annotations

import logging
import warnings
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
    FixedMultiplier,
    GradAscent,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    MatchUnseen,
    Multiplier,
    Objective,
    Relative,
)
from lit_unlearn.callbacks import RunAdvice, RunReport


@pytest.fixture
def advise(tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]) -> Callable[..., list[str]]:
    """Runs a fit and returns what it warned of; the random model has an NLL of about 6."""

    def run(
        epsilon: float | Relative,
        multiplier: Multiplier,
        epochs: int,
        lr: float = 0.01,
        advice: RunAdvice | None = None,
        forget: Objective | None = None,
        **how: Any,
    ) -> list[str]:
        constraint = Constraint(NLL(), epsilon, multiplier, **how)
        module = LitUnlearn(
            tiny_lm(), forget or LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=lr)
        )
        data = FictionalAuthors(
            4, 1, unseen_authors=1, batch_size=5, retain_batch_size=4, max_length=200
        )  # 2 steps an epoch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(max_epochs=epochs, callbacks=[advice or RunAdvice()]).fit(module, datamodule=data)
        return [str(w.message) for w in caught if str(w.message).startswith("constraint 'nll': ")]

    return run


def test_a_run_opens_with_what_it_will_do(advise: Callable[..., list[str]], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert advise(10.0, DualAscent(lr=500.0, init=1.0), 6) == []
    opening = [message for message in caplog.messages if message.startswith("run: ")]
    assert opening == [
        "run: 12 steps, 2 per epoch, each of 5 forget and 4 retain examples; SingleDeviceStrategy on 1 × cpu, 32-true"
    ]
    assert "constraint nll: NLL on 'retain' ≤ 10 as configured; DualAscent, λ = 1" in caplog.messages


def test_an_epsilon_below_the_loss_before_unlearning(advise: Callable[..., list[str]]) -> None:
    for epsilon in (0.3, Relative(-0.5)):
        (said,) = advise(epsilon, DualAscent(lr=1.0, init=1.0), 6)
        assert "`epsilon`" in said
        assert "Relative(0.5)" in said
    assert advise(0.3, FixedMultiplier(1.0), 6) == []  # only reports
    assert advise(0.3, DualAscent(lr=1.0, init=1.0), 6, stream="forget") == []  # to be reached, not preserved


def test_a_dual_variable_that_hardly_moves(advise: Callable[..., list[str]]) -> None:
    steps = DualAscent(lr=500.0, init=1.0)
    assert "8 dual steps" in advise(10.0, steps, 6, warmup_epochs=2)[0]
    assert "5 dual steps" in advise(10.0, DualAscent(lr=500.0, init=1.0), 6, update_every="epoch")[0]
    assert advise(10.0, DualAscent(lr=500.0, init=1.0), 5) == []  # ten times


def test_a_multiplier_at_its_cap(advise: Callable[..., list[str]]) -> None:
    said = advise(1.0, DualAscent(lr=10.0, init=1.0, max=2.0), 6)
    assert len(said) == 2  # the other is about epsilon; each is said once, not every epoch
    assert "cap of 2" in said[1]
    assert "`max`" in said[1]


def test_slack_that_nothing_uses(advise: Callable[..., list[str]]) -> None:
    (said,) = advise(20.0, DualAscent(lr=0.001, init=100.0), 6, lr=1e-5)
    assert "no step of epoch 1 used a quarter" in said
    assert "falls too slowly" in said
    assert advise(20.0, DualAscent(lr=10.0, init=100.0), 6, lr=1e-5) == []  # λ is on its way
    assert advise(20.0, DualAscent(lr=0.001, init=100.0), 6, lr=1e-5, forget=MatchUnseen()) == []  # wants no more
    assert "epoch 3" in advise(20.0, DualAscent(lr=0.001, init=100.0), 8, lr=1e-5, warmup_epochs=2)[0]


def test_every_fit_is_advised_anew(advise: Callable[..., list[str]]) -> None:
    advice = RunAdvice()
    first, second = (advise(0.3, DualAscent(lr=1.0, init=1.0), 6, advice=advice) for _ in range(2))
    assert first == second != []


def test_a_run_that_forgot_hardly_anything_says_what_to_do(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    def lesson(epsilon: float, lr: float, scale: float) -> str:
        constraint = Constraint(NLL(), epsilon, FixedMultiplier(0.0))
        module = LitUnlearn(tiny_lm(), GradAscent(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=lr))
        module.forget_weight = scale
        data = FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)
        trainer = make_trainer(
            max_epochs=2, callbacks=[RunReport(max_forget_probability=1e-4)], check_val_every_n_epoch=1
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, datamodule=data)
        return " ".join(str(w.message) for w in caught if "forgotten" in str(w.message))

    assert "optimizer's `lr`" in lesson(100.0, 1e-6, 1.0)
    assert lesson(1e9, 0.5, 10.0) == ""  # it forgot
