"""Robustness options: the gradients of their definitions, and weights that are what they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_unlearn import (
    NLL,
    Constraint,
    FixedMultiplier,
    ForgetRetain,
    GradAscent,
    GradientProjection,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    Objective,
    SharpnessAware,
)
from lit_unlearn.errors import ConfigError
from lit_unlearn.models.weights import shifted
from lit_unlearn.training.robustness import Robustness

LR, WEIGHT = 0.1, 0.7
FORGET_WEIGHT = 2.0


def rows(folder: str) -> ForgetRetain:
    """A step has every row of both sets."""
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=10, retain_batch_size=13)


def take_step(
    make_trainer: Callable[..., L.Trainer],
    model: str,
    data: ForgetRetain,
    forget: Objective,
    robustness: Robustness | None,
    lr: float = LR,
    precision: str = "64-true",
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the weights after one step of SGD, and what it logged."""
    module = LitUnlearn(
        LanguageModel(model),
        forget,
        {"nll": Constraint(NLL(), 50.0, FixedMultiplier(WEIGHT))},
        lambda p: torch.optim.SGD(p, lr=lr),
        forget_weight=FORGET_WEIGHT,
        robustness=robustness,
        **settings,
    )
    trainer = make_trainer(max_steps=1, limit_val_batches=0, precision=precision)
    trainer.fit(module, datamodule=data)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {name: p.detach() for name, p in module.lm.causal_lm.named_parameters()}, logged


class Slow:
    """The same model in float64, whose gradients autograd gives as vectors over all parameters."""

    def __init__(self, model: str, data: ForgetRetain) -> None:
        self.lm = LanguageModel(model)
        self.lm.load(torch.float64)
        self.lm.eval()
        self.names = [name for name, _ in self.lm.causal_lm.named_parameters()]
        self.parameters = [p for _, p in self.lm.causal_lm.named_parameters()]
        self.data = data
        self.start = self.weights()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def gradient(self, objective: Objective, stream: str, weights: Tensor | None = None) -> Tensor:
        """Return the gradient of an objective's mean over a stream, at given weights."""
        torch.nn.utils.vector_to_parameters(self.start if weights is None else weights, self.parameters)
        examples = [example._replace(alternate=None) for example in self.data.examples[stream]]
        parts = torch.autograd.grad(self.lm.loss(objective, examples), self.parameters)
        return torch.cat([part.flatten() for part in parts])

    def assert_step(self, weights: dict[str, Tensor], gradient: Tensor) -> None:
        moved = torch.cat([weights[name].flatten() for name in self.names])
        # transformers computes norms and rotations in float32, packed and padded.
        assert ((self.start - moved) / LR - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 3}, {"passes": "sequential"}], ids=str)
@pytest.mark.parametrize("rho", [0.01, 1.0])
def test_sharpness_aware_gradient_is_that_of_its_definition(
    rho: float, settings: Any, make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str
) -> None:
    data, forget = rows(rows_dir), LogitMargin()
    weights, _ = take_step(make_trainer, model_dir, data, forget, SharpnessAware(rho), **settings)
    slow = Slow(model_dir, data)
    direction = slow.gradient(forget, "forget")
    at_worst = slow.gradient(forget, "forget", slow.start + rho * direction / direction.norm())
    constraint = slow.gradient(NLL(), "retain")
    slow.assert_step(weights, FORGET_WEIGHT * at_worst + WEIGHT * constraint)
    assert (at_worst - direction).norm() > 1e-3 * rho * direction.norm()  # the two can be told apart


@pytest.mark.parametrize("forget", [GradAscent(), NLL()], ids=["conflict", "agreement"])
def test_projected_gradient_is_that_of_its_definition(
    forget: Objective, make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str
) -> None:
    data = rows(rows_dir)
    weights, _ = take_step(make_trainer, model_dir, data, forget, GradientProjection(), micro_batch_size=3)
    slow = Slow(model_dir, data)
    forget_gradient = FORGET_WEIGHT * slow.gradient(forget, "forget")
    constraint = WEIGHT * slow.gradient(NLL(), "retain")
    product = forget_gradient @ constraint
    assert (product < 0) == isinstance(forget, GradAscent)
    if product < 0:
        forget_gradient = forget_gradient - product / (constraint @ constraint) * constraint
        assert abs(forget_gradient @ constraint) < 1e-9
    slow.assert_step(weights, forget_gradient + constraint)


@pytest.mark.parametrize("robustness", [SharpnessAware(), GradientProjection()], ids=lambda r: type(r).__name__)
def test_values_are_those_at_the_present_weights(
    robustness: Robustness, make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str
) -> None:
    """The multiplier and the logs must not see the changed weights."""
    _, plain = take_step(make_trainer, model_dir, rows(rows_dir), LogitMargin(), None)
    _, logged = take_step(make_trainer, model_dir, rows(rows_dir), LogitMargin(), robustness)
    for name in ("forget/loss", "constraint/nll/value", "multiplier/nll"):
        assert logged[name] == pytest.approx(plain[name], rel=1e-6), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_of_length_zero_leaves_the_weights_bit_for_bit(
    precision: str, make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str
) -> None:
    before = LanguageModel(model_dir)
    before.load(torch.float32)
    weights, _ = take_step(
        make_trainer, model_dir, rows(rows_dir), LogitMargin(), SharpnessAware(1.0), 0.0, precision=precision
    )
    for name, parameter in before.causal_lm.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_autocast_sees_the_changed_weights() -> None:
    """It keeps casts of weights for a whole step, which would be those before the change."""
    weight, x = torch.nn.Parameter(torch.ones(2, 2)), torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = torch.nn.functional.linear(x, weight)
        with shifted([weight], [torch.ones(2, 2)], 1.0):
            assert torch.equal(torch.nn.functional.linear(x, weight), 2 * before)
        assert torch.equal(torch.nn.functional.linear(x, weight), before)


def test_shifted_weights_are_restored_after_an_error_too() -> None:
    weight = torch.nn.Parameter(torch.full((3,), 0.1))
    before = weight.detach().clone()
    seen = []

    def fail() -> None:
        with shifted([weight], [torch.ones(3)], 0.25):
            seen.append(weight.detach().clone())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(seen[0], before + 0.25)
    assert torch.equal(weight, before)
    with shifted([weight], [torch.full((3,), math.inf)], 0.0):
        assert torch.equal(weight, before)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_weights_of_16_bits_are_refused(make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"SharpnessAware .*16 bits.*`precision`"):
        take_step(make_trainer, model_dir, rows(rows_dir), LogitMargin(), SharpnessAware(), precision="bf16-true")


@pytest.mark.parametrize("rho", [0, -0.1, math.nan, math.inf])
def test_a_length_that_is_none_is_refused(rho: float) -> None:
    with pytest.raises(ConfigError, match=r"SharpnessAware: `rho`.*above 0"):
        SharpnessAware(rho)


def test_it_is_no_part_of_what_is_saved(
    make_trainer: Callable[..., L.Trainer], model_dir: str, rows_dir: str, tmp_path: Path
) -> None:
    """A run may be resumed with another one, or without."""
    module = LitUnlearn(
        LanguageModel(model_dir),
        LogitMargin(),
        {"nll": Constraint(NLL(), 50.0, FixedMultiplier(WEIGHT))},
        lambda p: torch.optim.SGD(p, lr=1e-3),
        robustness=SharpnessAware(),
    )
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=rows(rows_dir))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = {
        name.removeprefix("lm.model.") for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    }
    assert names == module.lm.causal_lm.state_dict().keys()
