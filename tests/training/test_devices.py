"""What has to hold on every device: gradients in every precision, adapters, 4-bit weights, resuming, the scaler, answers.

The tests of a device run where it is: those of the CPU always, those of a GPU with ``pytest -m gpu``. That a step on a GPU waits for
it only once is in ``test_read_backs.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from objectives.forms import CASES, DOCUMENTED, B, located
from objectives.models import batch, build, dense, move
from torch import Tensor

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.callbacks import ResumeCheckpoint
from lit_unlearn.models.generation import generate

MakeTrainer = Callable[..., L.Trainer]

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows"),
]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])

# Of the gradient of one pass, relative to its norm, beside one in float64 at the same weights. Measured on a CPU: at most 3e-6,
# 0.003 and 0.023. A GPU sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
ADAPTER = {"r": 4, "lora_alpha": 8}
FREE: dict[str, Any] = {"epsilon": 50.0, "init": 0.0}  # the constraint holds, so that the forget loss alone decides
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def device_trainer(make_trainer: MakeTrainer) -> Callable[..., L.Trainer]:
    def make(device: str, **settings: Any) -> L.Trainer:
        return make_trainer(accelerator="gpu" if device == "cuda" else "cpu", **settings)

    return make


def make_module(model: str, lr: float = 1e-2, epsilon: float = 5.0, init: float = 3.0, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), epsilon, DualAscent(lr=5.0, init=init))
    lm = LanguageModel(model, **settings)
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.AdamW(p, lr=lr), keep="last")


def rows(folder: str) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5)


class Losses(L.Callback):
    """The forget loss and λ after every step."""

    def __init__(self) -> None:
        self.forget: list[float] = []
        self.multiplier: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.forget.append(float(trainer.callback_metrics["forget/loss"]))
        self.multiplier.append(pl_module.constraints["nll"].multiplier.value)


def to_cpu(module: LitUnlearn) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


# Gradients ------------------------------------------------------------------------------------------------------------


def flatten_gradients(lm: LanguageModel) -> Tensor:
    parts = []
    for parameter in lm.parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.flatten().cpu().double())
    return torch.cat(parts)


def through_package(lm: LanguageModel, case: str, device: torch.device) -> Tensor:
    objective, _ = CASES[case]
    inputs = {key: value.to(device) for key, value in batch().items()}
    return lm(
        inputs,
        lambda tokens: objective(lm, tokens),
        index=[located(objective, range(B)).to(device)],
        reference="reference" in objective.needs,
        layers=objective.layers,
        teacher="teacher" in objective.needs,
    )


@every_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != DOCUMENTED])
def test_values_and_gradients_of_every_objective_are_those_of_float64(
    case: str, dtype: torch.dtype, device: str
) -> None:
    lm = move(build("llama", dtype))
    wide = copy.deepcopy(lm).double()
    values = CASES[case][1](dense(wide))
    values.mean().backward()
    wanted = flatten_gradients(wide)

    target = torch.device(device)
    lm.to(target)
    actual = through_package(lm, case, target)
    actual.mean().backward()
    error = (flatten_gradients(lm) - wanted).norm() / wanted.norm()
    assert wanted.norm() > 1e-4
    assert error < TOLERANCE[dtype]
    assert actual.dtype in (torch.float32, torch.float64)
    assert actual.mean().item() == pytest.approx(values.mean().item(), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


# Steps ----------------------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 0.02), ("bf16-true", 0.02)])
def test_steps_are_those_of_the_cpu_in_float64(
    precision: str, tolerance: float, device: str, model_dir: str, rows_dir: str, device_trainer: MakeTrainer
) -> None:
    recorded = []
    for place, kind in (("cpu", "64-true"), (device, precision)):
        losses = Losses()
        trainer = device_trainer(place, max_steps=4, precision=kind, callbacks=[losses], limit_val_batches=0)
        trainer.fit(make_module(model_dir, lr=1e-3), datamodule=rows(rows_dir))
        recorded.append(losses)
    wanted, actual = recorded
    assert len(wanted.forget) == 4
    assert actual.forget == pytest.approx(wanted.forget, rel=tolerance)
    assert actual.multiplier == pytest.approx(wanted.multiplier, rel=tolerance)


@every_device
def test_an_adapter_learns_in_float32_beside_frozen_weights(
    device: str, model_dir: str, rows_dir: str, device_trainer: MakeTrainer
) -> None:
    losses = Losses()
    module = make_module(model_dir, **FREE, adapter=ADAPTER)
    trainer = device_trainer(device, max_epochs=6, precision="bf16-true", callbacks=[losses], limit_val_batches=0)
    trainer.fit(module, datamodule=rows(rows_dir))
    assert {p.dtype for p in module.lm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.lm.parameters() if not p.requires_grad} == {torch.bfloat16}
    # Of the last epoch's two steps, and of the first one's.
    assert sum(losses.forget[-2:]) < 0.9 * sum(losses.forget[:2])


@every_device
def test_an_adapter_learns_beside_weights_in_4_bits(
    device: str, model_dir: str, rows_dir: str, device_trainer: MakeTrainer
) -> None:
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    losses = Losses()
    module = make_module(model_dir, **FREE, adapter=ADAPTER, quantization=NF4)
    trainer = device_trainer(device, max_epochs=6, callbacks=[losses], limit_val_batches=0)
    trainer.fit(module, datamodule=rows(rows_dir))
    dtypes = {p.dtype for p in module.lm.parameters() if not p.requires_grad}
    assert torch.uint8 in dtypes  # two weights of 4 bits each
    # Of the last epoch's two steps, and of the first one's.
    assert sum(losses.forget[-2:]) < 0.9 * sum(losses.forget[:2])


@every_device
def test_a_resumed_run_is_the_uninterrupted_one(
    device: str, model_dir: str, rows_dir: str, device_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(folder: Path, epochs: int, ckpt_path: str | None = None) -> LitUnlearn:
        module = make_module(model_dir, lr=1e-3)
        callbacks = [ResumeCheckpoint(dirpath=str(folder))]
        trainer = device_trainer(device, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, datamodule=rows(rows_dir), ckpt_path=ckpt_path)
        return module

    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "parts", 1)
    resumed = fit(tmp_path / "parts", 2, "last")
    # Sums of a GPU have no fixed order, so that even two equal runs differ in the last digits.
    tolerance = 0.0 if device == "cpu" else 1e-4
    assert resumed.constraints["nll"].multiplier.value == pytest.approx(
        whole.constraints["nll"].multiplier.value, rel=tolerance, abs=0
    )
    weights = to_cpu(resumed)
    for name, value in to_cpu(whole).items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance)


@every_device
def test_the_scaler_of_float16_skips_what_overflows(
    device: str, model_dir: str, rows_dir: str, device_trainer: MakeTrainer
) -> None:
    """Weights and λ stay in a step that is skipped, and move in the others."""

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.steps: list[tuple[float, float, Tensor]] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            weight = pl_module.lm.model.get_output_embeddings().weight.detach().clone()
            self.steps.append((scaler.get_scale(), pl_module.constraints["nll"].multiplier.value, weight))

    scaler, watch = torch.amp.GradScaler(device, init_scale=2.0**24), Watch()
    # Lightning's flag would turn into bfloat16 on a CPU.
    plugin = MixedPrecision("16-mixed", device, scaler)
    module = make_module(model_dir, lr=1e-3)
    trainer = device_trainer(device, max_epochs=8, plugins=[plugin], callbacks=[watch], limit_val_batches=0)
    trainer.fit(module, datamodule=rows(rows_dir))
    skipped = taken = 0
    scale, multiplier, weight = watch.steps[0]
    assert scale < 2.0**24
    for step in watch.steps[1:]:
        if step[0] < scale:
            skipped += 1
            assert step[1] == multiplier
            assert torch.equal(step[2], weight)
        else:
            taken += 1
            assert step[1] != multiplier
            assert not torch.equal(step[2], weight)
        scale, multiplier, weight = step
    assert skipped > 0
    assert taken > 0
    assert weight.isfinite().all()


# Answers --------------------------------------------------------------------------------------------------------------


@every_device
def test_batches_give_the_answers_of_single_prompts(device: str, model_dir: str) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32, device)
    # Random weights have near ties, which rounding would decide.
    with torch.no_grad():
        lm.causal_lm.get_output_embeddings().weight.mul_(30)
    prompts = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25], [8, 30]]
    together = generate(lm, prompts, max_new_tokens=8)
    assert together == [generate(lm, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert any(together)
