"""Training with 16-bit weights: adapters stay in float32, and a run whose steps are rounded away says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import run_pair
from safetensors.torch import load_file
from torch import nn

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.callbacks import ResumeCheckpoint, RunAdvice, RunReport
from lit_unlearn.callbacks.movement import WeightMovement

ADAPTER = {"r": 8, "lora_alpha": 16}


def make(model: str, lr: float, adapter: dict[str, Any] | None = None) -> LitUnlearn:
    constraint = Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=0.0))
    lm = LanguageModel(model, adapter=adapter)
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.AdamW(p, lr=lr), keep="last")


def rows(folder: str) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5)


def trainable(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", ["bf16-true", "32-true", "64-true"])
def test_an_adapter_is_as_wide_as_its_updates_need(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], precision: str
) -> None:
    module = make(model_dir, 1e-4, ADAPTER)
    make_trainer(max_epochs=1, precision=precision).fit(module, datamodule=rows(rows_dir))
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for value in trainable(module.lm).values()} == {wide}
    base = {p.dtype for p in module.lm.parameters() if not p.requires_grad}
    assert base == {{"bf16-true": torch.bfloat16, "32-true": torch.float32, "64-true": torch.float64}[precision]}


def test_a_bfloat16_base_forgets_as_a_float32_one_does(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    """With an adapter of 16 bits the same run reached a quarter of the NLL."""
    measured = {}
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        module = make(model_dir, 3e-3, ADAPTER)
        report = RunReport()
        make_trainer(max_epochs=20, precision=precision, callbacks=[report]).fit(module, datamodule=rows(rows_dir))
        assert report.report is not None
        before, after = report.report.before["forget/loss"], report.report.after["forget/loss"]
        measured[precision] = before - after
    assert measured["32-true"] > 0
    # Measured: within 3 %.
    assert measured["bf16-true"] == pytest.approx(measured["32-true"], rel=0.2)


def test_moving_and_converting_keeps_the_adapter(model_dir: str) -> None:
    lm = LanguageModel(model_dir, adapter=ADAPTER)
    lm.load(torch.bfloat16, "cpu")
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 1 / 3
    before = trainable(lm)
    for convert in (lm.bfloat16, lm.half, lambda: lm.to(torch.bfloat16), lambda: nn.ModuleList([lm]).to("cpu")):
        convert()
        after = trainable(lm)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    lm.double()
    assert {value.dtype for value in trainable(lm).values()} == {torch.float64}


def test_a_resumed_adapter_is_that_of_the_uninterrupted_run(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def fit(folder: Path, epochs: int, ckpt_path: str | None = None) -> LitUnlearn:
        torch.manual_seed(0)
        module = make(model_dir, 1e-3, ADAPTER)
        callbacks = [ResumeCheckpoint(dirpath=str(folder))]
        trainer = make_trainer(max_epochs=epochs, precision="bf16-true", callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, datamodule=rows(rows_dir), ckpt_path=ckpt_path)
        return module

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 2)
    resumed = fit(tmp_path / "parts", 3, "last")
    for name, value in trainable(whole.lm).items():
        assert torch.equal(value, trainable(resumed.lm)[name])


def test_the_merged_export_has_the_dtype_of_the_base(model_dir: str, tmp_path: Path) -> None:
    lm = LanguageModel(model_dir, adapter=ADAPTER)
    lm.load(torch.bfloat16, "cpu")
    wrapped = LanguageModel.wrap(lm.model, lm.tokenizer)  # knows no files whose dtype it would take
    tensors = load_file(wrapped.save(tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


# Full fine-tuning ----------------------------------------------------------------------------------------------------


def test_a_run_says_that_its_steps_are_rounded_away(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    advice, report = RunAdvice(), RunReport()
    trainer = make_trainer(max_epochs=1, precision="bf16-true", callbacks=[report, advice])
    with pytest.warns(UserWarning, match="bfloat16") as caught:
        trainer.fit(make(model_dir, 1e-6), datamodule=rows(rows_dir))
    messages = [str(warning.message) for warning in caught]
    (told,) = (message for message in messages if "bfloat16" in message)
    assert "step 1 moved" in told
    assert all(remedy in told for remedy in ("'32-true'", "'bf16-mixed'", "`adapter`", "`lr`"))
    assert advice.movement.share is not None
    assert advice.movement.share < 0.05
    assert not any("ten times" in message for message in messages)


@pytest.mark.parametrize(("precision", "lr"), [("bf16-true", 1e-1), ("32-true", 1e-6), ("bf16-mixed", 1e-6)])
def test_a_run_whose_steps_count_is_not_warned(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], precision: str, lr: float, recwarn: Any
) -> None:
    advice = RunAdvice()
    trainer = make_trainer(max_epochs=1, precision=precision, callbacks=[advice])
    trainer.fit(make(model_dir, lr), datamodule=rows(rows_dir))
    assert not any("moved" in str(warning.message) for warning in recwarn)
    assert (advice.movement.share is None) == (precision != "bf16-true")


def test_the_share_is_that_of_all_weights_with_a_gradient() -> None:
    """Against a count of all weights; a warm-up is waited for."""
    torch.manual_seed(0)
    model = nn.Linear(50, 60, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    gradient = torch.randn(60, 50).bfloat16() * model.weight.detach().abs() * 2**-7
    gradient[:10] = 0
    movement = WeightMovement()
    for lr, is_measured in ((0.0, False), (0.1, False), (1.0, True)):
        before = model.weight.detach().clone()
        model.weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = lr
        movement.note_weights(model, optimizer)
        optimizer.step()
        assert (movement.compare_weights(1) is not None) == is_measured
    moved = (model.weight != before)[10:].float().mean().item()
    assert 0.1 < moved < 0.9
    assert movement.share == pytest.approx(moved)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["fsdp2"])
def test_sharded_and_copied_adapters_keep_their_width(tmp_path: Path, model_dir: str, overlay: str) -> None:
    options = [f"--config=hardware/{overlay}.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    options += [
        "--trainer.precision=bf16-true",
        "--model.lm.adapter={r: 4}",
        "--model.keep=last",
        "--picture.answers=0",
    ]
    command = quick(model_dir, *options)
    codes, text = run_pair(tmp_path, *command)
    assert codes == [0, 0], text[-3000:]
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    codes, text = run_pair(tmp_path, *command, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert codes == [0, 0], text[-3000:]
