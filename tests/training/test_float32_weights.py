"""An optimizer that steps float32 copies: 16-bit weights get where float32 training would bring them, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import run_pair
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, LogitMargin, Schedule
from lit_unlearn.callbacks import ResumeCheckpoint, RunAdvice
from lit_unlearn.training import Float32Weights

LR = 1e-5
ADAMW = partial(torch.optim.AdamW, lr=LR, weight_decay=0.01)
OPTIMIZERS: dict[str, Any] = {
    "adamw": ADAMW,
    "fused adamw": partial(torch.optim.AdamW, lr=LR, fused=True),
    "sgd with momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adafactor": partial(torch.optim.Adafactor, lr=LR),
}


def float32_weights(params: Any) -> Float32Weights:
    return Float32Weights(params, ADAMW)


def gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=generator).bfloat16()
        weight.grad = drawn.to(weight.dtype)


def make_weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in ((20, 30), (7,))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_that_of_float32(name: str) -> None:
    weights = make_weights()
    wide = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer, reference = Float32Weights(weights, OPTIMIZERS[name]), OPTIMIZERS[name](wide)
    for step in range(40):
        gradients(weights, step)
        gradients(wide, step)
        optimizer.step()
        reference.step()
    for weight, wanted in zip(weights, wide, strict=True):
        assert torch.equal(weight, wanted.bfloat16())


def test_wider_weights_and_groups_keep_what_they_have() -> None:
    """An adapter is float32 beside a 16-bit model; the rates of groups differ, and a schedule changes them."""
    half, single = make_weights()[0], nn.Parameter(torch.ones(5))
    wide = nn.Parameter(half.detach().float())
    other = nn.Parameter(torch.ones(5))
    groups = [{"params": [half], "lr": 0.01}, {"params": [single]}]
    optimizer = Float32Weights(groups, partial(torch.optim.SGD, lr=0.5))
    reference = torch.optim.SGD([{"params": [wide], "lr": 0.01}, {"params": [other]}], lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    for step in range(6):
        for pair in ([half, single], [wide, other]):
            gradients(pair, step)
        for one in (optimizer, reference):
            one.param_groups[0]["lr"] = 0.01 / (step + 1)
            one.step()
    assert torch.equal(half, wide.bfloat16())
    assert torch.equal(single, other)
    # A float32 weight needs no copy.
    assert "float32_weight" not in optimizer.state[single]


def test_weights_that_were_changed_from_outside_count_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Float32Weights([weight], partial(torch.optim.SGD, lr=1e-4))
    for step in range(3):
        if step == 2:
            weight.data[0] = 5.0
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    copy = optimizer.state[weight]["float32_weight"]
    torch.testing.assert_close(copy, torch.tensor([5 - 1e-4, *[1 - 3e-4] * 3]))


def test_a_saved_state_continues_with_all_digits(tmp_path: Path) -> None:
    def run(optimizer: Float32Weights, weights: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            gradients(weights, step)
            optimizer.step()

    whole, parts = make_weights(), make_weights()
    run(float32_weights(whole), whole, range(20))
    first = float32_weights(parts)
    run(first, parts, range(10))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = [nn.Parameter(weight.detach().clone()) for weight in parts]
    second = float32_weights(resumed)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(saved)
    run(second, resumed, range(10, 20))
    for weight, wanted in zip(resumed, whole, strict=True):
        assert torch.equal(weight, wanted)


# In a run -------------------------------------------------------------------------------------------------------------


def fit(
    model: str, folder: str, make_trainer: Callable[..., L.Trainer], optimizer: Any, epochs: int, **settings: Any
) -> LitUnlearn:
    constraint = Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=0.0))
    module = LitUnlearn(
        LanguageModel(model),
        LogitMargin(),
        {"nll": constraint},
        optimizer,
        Schedule("constant_with_warmup", warmup_epochs=1),
        keep="last",
    )
    ckpt_path = settings.pop("ckpt_path", None)
    data = ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5)
    trainer = make_trainer(max_epochs=epochs, limit_val_batches=0, **{"precision": "bf16-true", **settings})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def weights_of(module: LitUnlearn) -> Tensor:
    return torch.cat([value.detach().float().flatten() for value in module.lm.parameters()])


def test_small_rates_move_what_they_move_in_float32(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    """Measured: the plain optimizer goes 18 % of the way that float32 goes, and copies go all of it."""
    start = LanguageModel(model_dir)
    start.load(torch.float32, "cpu")
    before = torch.cat([value.detach().flatten() for value in start.parameters()])
    run = partial(fit, model_dir, rows_dir, make_trainer, epochs=20)
    wide = weights_of(run(ADAMW, precision="32-true")) - before
    rounded_start = before.bfloat16().float()
    agreement, moved = {}, {}
    for name, optimizer in {"plain": ADAMW, "copies": float32_weights}.items():
        module = run(optimizer)
        way = weights_of(module) - rounded_start
        moved[name] = (way != 0).float().mean().item()
        if name == "copies":
            states = module.optimizers().state  # type: ignore[union-attr]
            copies = torch.cat([states[p]["float32_weight"].flatten() for p in module.lm.parameters()])
            way = copies - rounded_start
        agreement[name] = (way @ wide / wide.norm() ** 2).item()
    assert agreement["plain"] < 0.5
    assert agreement["copies"] == pytest.approx(1, abs=0.05)
    assert moved["copies"] > 2 * moved["plain"]


def test_a_resumed_run_is_the_uninterrupted_one(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path, recwarn: Any
) -> None:
    def part(folder: str, epochs: int, ckpt_path: str | None = None) -> LitUnlearn:
        callbacks = [ResumeCheckpoint(dirpath=str(tmp_path / folder)), RunAdvice()]
        settings = {"callbacks": callbacks, "enable_checkpointing": True, "ckpt_path": ckpt_path}
        return fit(model_dir, rows_dir, make_trainer, float32_weights, epochs, **settings)

    whole = part("whole", 4)
    part("parts", 2)
    resumed = part("parts", 4, "last")
    assert torch.equal(weights_of(resumed), weights_of(whole))
    states = [module.optimizers().state for module in (whole, resumed)]  # type: ignore[union-attr]
    for one, other in zip(whole.lm.parameters(), resumed.lm.parameters(), strict=True):
        assert torch.equal(states[0][one]["float32_weight"], states[1][other]["float32_weight"])
    # What the weights do not show is not lost.
    assert not any("moved" in str(warning.message) for warning in recwarn)


@pytest.mark.slow
def test_sharded_copies_resume_from_the_command_line(tmp_path: Path, model_dir: str) -> None:
    optimizer = (
        "{class_path: lit_unlearn.training.Float32Weights, init_args: "
        "{optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-5}}}}"
    )
    options = ["--config=hardware/fsdp2.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    options += ["--trainer.precision=bf16-true", f"--model.optimizer={optimizer}", "--model.keep=last"]
    options += ["--model.scheduler=null"]  # its rates depend on the number of epochs
    command = quick(model_dir, *options, "--picture.answers=0")
    tensors = []
    for folder, epochs in (("whole", ["4"]), ("parts", ["2", "4"])):
        (tmp_path / folder).mkdir()
        for number in epochs:
            extra = [f"--trainer.max_epochs={number}", "--ckpt_path=last"]
            codes, text = run_pair(tmp_path / folder, *command, *extra)
            assert codes == [0, 0], text[-3000:]
        assert ("resumed after step" in text) == (folder == "parts")
        tensors.append(load_file(tmp_path / folder / "out" / "model.safetensors"))
    whole, parts = tensors
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
