"""λ, slack and counts are exact at any precision; a step that a gradient scaler leaves out moves nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin, Schedule


def half(scale: float) -> MixedPrecision:
    """16-mixed with its scaler on a CPU, where Lightning's flag would turn into bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def fit(lm: LanguageModel, trainer: L.Trainer, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    module = LitUnlearn(
        lm,
        LogitMargin(),
        {"nll": constraint},
        **{"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01), **settings},
    )
    trainer.fit(module, datamodule=FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200))
    return module


class Watch(L.Callback):
    """What every step did to λ, the learning rate and the weights."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        scaler = pl_module.primal_step._scaler
        self.steps.append(
            {
                "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
                "multiplier": pl_module.constraints["nll"].multiplier.value,
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "weight": pl_module.lm.model.get_output_embeddings().weight.detach().clone(),
                "scale": scaler and scaler.get_scale(),
            }
        )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_the_multiplier_is_never_rounded(
    precision: str, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    watch = Watch()
    how = {"plugins": [half(128.0)]} if precision == "16-mixed" else {"precision": precision}
    module = fit(tiny_lm(), make_trainer(max_epochs=3, callbacks=[watch], **how))
    expected = 3.0
    assert len(watch.steps) == 6
    for step in watch.steps:
        violation = step["logged"]["constraint/nll/violation"]
        assert violation == pytest.approx(step["logged"]["constraint/nll/value"] - 5.0, abs=1e-6)
        expected += 5.0 * violation
        assert step["multiplier"] == pytest.approx(expected, rel=1e-6)  # logged values are float32; λ is not
    values = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert values["val/constraint/nll/slack"] == pytest.approx(5.0 - values["val/constraint/nll/value"], abs=1e-5)
    reference = 5.9  # all rows were counted, the loss is what it is at float32 but for rounding
    assert values["val/constraint/nll/value"] == pytest.approx(reference, abs=0.2)


@pytest.mark.slow
def test_a_step_that_overflows_leaves_weights_schedule_and_multiplier(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    watch = Watch()
    module = fit(
        tiny_lm(),
        make_trainer(max_epochs=8, callbacks=[watch], plugins=[half(2.0**24)]),
        scheduler=Schedule("linear", warmup_epochs=0),
    )
    scales = [2.0**24, *[step["scale"] for step in watch.steps]]
    skipped = [after < before for before, after in pairwise(scales)]
    assert 2 <= sum(skipped) <= 14
    assert skipped[0]
    assert not skipped[-1]
    before = {"multiplier": 3.0, "lr": 0.01, "weight": watch.steps[0]["weight"]}
    for step, skip in zip(watch.steps, skipped, strict=True):
        assert (step["multiplier"] == before["multiplier"]) == skip
        assert (step["lr"] == before["lr"]) == skip
        assert torch.equal(step["weight"], before["weight"]) == skip
        assert step["logged"]["constraint/nll/value"] > 5.0  # measured and logged all the same
        before = step
    taken = len(skipped) - sum(skipped)
    assert watch.steps[-1]["lr"] == pytest.approx(0.01 * (1 - taken / 16))
    assert module.lm.model.get_output_embeddings().weight.isfinite().all()  # type: ignore[union-attr]


def test_a_gradient_that_is_not_finite_is_refused_where_no_scaler_leaves_it_out(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    class Spoil(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:
                pl_module.lm.model.get_output_embeddings().weight.grad[0, 0] = torch.inf

    watch = Watch()
    with pytest.raises(ValueError, match="the gradient's norm is inf; the step was not taken") as error:
        fit(tiny_lm(), make_trainer(max_epochs=2, callbacks=[watch, Spoil()]))
    assert "Lower the learning rate" in str(error.value)
    assert len(watch.steps) == 1
