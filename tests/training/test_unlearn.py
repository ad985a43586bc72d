"""The training step: gradients, dual trajectory, evaluation, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    FixedMultiplier,
    LanguageModel,
    LitFinetune,
    LitUnlearn,
    LogitMargin,
    Relative,
    Schedule,
)
from lit_unlearn.data.example import collate


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def authors(**settings: Any) -> FictionalAuthors:
    return FictionalAuthors(4, 1, **{"batch_size": 5, "retain_batch_size": 4, "max_length": 200, **settings})


def unlearner(
    lm: LanguageModel, *, epsilon: float | Relative = 2.0, warmup_epochs: int = 0, **settings: Any
) -> LitUnlearn:
    constraint = Constraint(NLL(), epsilon, DualAscent(lr=5.0, init=3.0), warmup_epochs=warmup_epochs)
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, **{"optimizer": sgd, **settings})


class Recorder(L.Callback):
    """Keeps what every step logged, and the λ after it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.batches: list[dict[str, dict[str, Tensor]]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append({name: collate(part, 0) for name, part in batch.items()})
        logged = {n: float(v) for n, v in trainer.callback_metrics.items() if not n.startswith("val/")}
        self.steps.append({**logged, "after": pl_module.constraints["nll"].multiplier.value})  # type: ignore[union-attr, index]


def merged(results: list[dict[str, float]]) -> dict[str, float]:
    """Lightning returns one dict per loader."""
    return {name: value for result in results for name, value in result.items()}


def dense_terms(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared margin and NLL of a padded batch from full logits: token means, float64."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    logits, labels = logits[labels != -100], labels[labels != -100]
    margin = logits.max(-1).values - logits.mean(-1)
    return margin.pow(2).mean(), torch.nn.functional.cross_entropy(logits, labels)


def test_one_step_descends_the_lagrangian(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module, recorder = unlearner(tiny_lm(), forget_weight=0.5), Recorder()
    module.configure_model()
    reference = tiny_lm()
    reference.load(torch.float32)
    reference.load_state_dict(module.lm.state_dict())
    make_trainer(max_steps=1, callbacks=[recorder]).fit(module, datamodule=authors())
    batch = recorder.batches[0]
    forget, retain = dense_terms(reference.model, batch["forget"])[0], dense_terms(reference.model, batch["retain"])[1]
    (0.5 * forget + 3.0 * retain).backward()
    for (name, moved), before in zip(module.lm.named_parameters(), reference.parameters(), strict=True):
        assert before.grad is not None
        assert before.grad.abs().max() > 0, name  # every tensor gets a gradient
        torch.testing.assert_close(moved, before - 0.1 * before.grad, rtol=1e-4, atol=1e-6, msg=name)
    step = recorder.steps[0]
    assert step["forget/loss"] == pytest.approx(forget.item(), rel=1e-5)
    assert step["constraint/nll/value"] == pytest.approx(retain.item(), rel=1e-5)


def test_dual_trajectory_equals_the_hand_computed_one(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    recorder = Recorder()
    trainer = make_trainer(max_epochs=4, callbacks=[recorder])
    trainer.fit(unlearner(tiny_lm(), epsilon=5.0, warmup_epochs=2), datamodule=authors(batch_size=4))
    assert len(recorder.steps) == 12  # 10 forget rows: 3 batches an epoch
    expected = 3.0
    for number, step in enumerate(recorder.steps):
        assert step["multiplier/nll"] == pytest.approx(expected, rel=1e-6)  # the λ of this primal step
        assert step["constraint/nll/violation"] == pytest.approx(step["constraint/nll/value"] - 5.0, abs=1e-6)
        if number >= 6:  # two epochs of warm-up are exactly six steps
            expected = max(0.0, expected + 5.0 * (step["constraint/nll/value"] - 5.0))
        assert step["after"] == pytest.approx(expected, rel=1e-5)
    assert recorder.steps[5]["after"] == 3.0 != recorder.steps[6]["after"]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_change_nothing(
    micro_batch_size: int, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    states, multipliers = [], []
    for size in (None, micro_batch_size):
        L.seed_everything(0)
        # a rate at which the run converges: one that diverges would magnify rounding
        module = unlearner(tiny_lm(), micro_batch_size=size, optimizer=partial(torch.optim.SGD, lr=0.01))
        make_trainer(max_epochs=2).fit(module, datamodule=authors())
        states.append(module.lm.state_dict())
        multipliers.append(module.constraints["nll"].multiplier.value)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6, msg=name)
    assert multipliers[1] == pytest.approx(multipliers[0], rel=1e-6)


def test_frozen_parameters_stay(tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]) -> None:
    module = unlearner(tiny_lm())
    module.configure_model()
    frozen = module.lm.model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[union-attr]
    before = {name: p.detach().clone() for name, p in module.lm.named_parameters()}
    make_trainer(max_steps=2).fit(module, datamodule=authors())
    for name, parameter in module.lm.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter is frozen), name


def test_nan_is_refused_before_the_step(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    pl_module.lm.model.get_output_embeddings().weight[0] = math.nan  # type: ignore[union-attr]

    module = unlearner(tiny_lm())
    with pytest.raises(
        ValueError, match=r"NLL on 'retain' measured nan nats per token \(epsilon 2\).*its multiplier stays"
    ) as error:
        make_trainer(max_epochs=3, callbacks=[Poison()]).fit(module, datamodule=authors())
    assert "Lower the optimizer's `lr`" in str(error.value)
    assert math.isfinite(module.constraints["nll"].multiplier.value)
    body = module.lm.model.base_model.state_dict()  # type: ignore[union-attr]
    assert all(value.isfinite().all() for value in body.values())


@pytest.mark.parametrize("train_loaders_only", [False, True])
def test_relative_epsilon_is_measured_over_the_whole_retain_stream(
    train_loaders_only: bool, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module, data = unlearner(tiny_lm(), epsilon=Relative(0.5)), authors(tokenizer=tiny_lm().tokenizer_name)
    module.configure_model()
    data.setup("fit")
    totals = [0.0, 0]
    with torch.no_grad():
        for batch in data.val_dataloader()["retain"]:
            batch = collate(batch, 0)
            count = int((batch["labels"][:, 1:] != -100).sum())
            totals[0] += dense_terms(module.lm.model, batch)[1].item() * count
            totals[1] += count
    loaders: dict[str, Any] = {"datamodule": data}
    if train_loaders_only:
        loaders = {"train_dataloaders": data.val_dataloader()}  # finite: the epoch ends with the shorter of the two
    make_trainer(max_steps=1).fit(module, **loaders)
    assert module.constraints["nll"].epsilon == pytest.approx(1.5 * totals[0] / totals[1], rel=1e-5)
    assert module.lm.model.training  # measuring is over  # type: ignore[union-attr]


def test_validation_equals_dense(tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]) -> None:
    module, data = unlearner(tiny_lm(), epsilon=7.0), authors(eval_batch_size=3)
    values = merged(make_trainer().validate(module, datamodule=data, verbose=False))
    for stream, rows in data.examples.items():
        nll, probability, margin, entropy = [], [], [], []
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
            logits = module.lm.model(input_ids=ids).logits[0, :-1].double()[labels != -100]  # type: ignore[misc, union-attr]
            logp = logits.log_softmax(-1)
            right = logp.gather(1, labels[labels != -100][:, None])[:, 0]
            nll += (-right).tolist()
            probability.append(right.mean().exp().item())
            margin += (logits.max(-1).values - logits.mean(-1)).tolist()
            entropy += (-(logp.exp() * logp).sum(-1) / math.log(logits.shape[-1])).tolist()
        for name, expected in {"nll": nll, "probability": probability, "margin": margin, "entropy": entropy}.items():
            assert values[f"val/{stream}/{name}"] == pytest.approx(sum(expected) / len(expected), rel=1e-4), (
                stream,
                name,
            )
    assert values["val/constraint/nll/slack"] == pytest.approx(7.0 - values["val/retain/nll"], abs=1e-5)


def test_validation_before_fit_says_no_slack_for_a_relative_epsilon(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = unlearner(tiny_lm(), epsilon=Relative(0.5))
    values = merged(make_trainer().test(module, datamodule=authors(), verbose=False))
    assert "test/constraint/nll/value" in values
    assert "test/constraint/nll/slack" not in values


@pytest.mark.parametrize("stop", ["epoch end", "mid-epoch"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    stop: str, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def run(name: str, seed: int, **settings: Any) -> tuple[dict[str, Tensor], float, list[dict[str, float]]]:
        L.seed_everything(seed)  # a differently initialised module must not matter
        recorder = Recorder()
        when = {"every_n_epochs": 1} if stop == "epoch end" else {"every_n_train_steps": 4}
        saver = ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{step}", **when)
        module = unlearner(
            tiny_lm(seed, attention_dropout=0.2),
            epsilon=Relative(-0.2),  # out of reach, so that λ moves
            warmup_epochs=1,
            optimizer=adam,
            scheduler=Schedule("linear", warmup_epochs=0.5),
        )
        trainer = make_trainer(max_epochs=4, callbacks=[recorder, saver], enable_checkpointing=True)
        trainer.fit(module, datamodule=authors(batch_size=4), **settings)
        return module.lm.state_dict(), module.constraints["nll"].multiplier.value, recorder.steps

    weights, multiplier, steps = run("whole", 0)
    after = 6 if stop == "epoch end" else 4
    resumed_weights, resumed_multiplier, resumed_steps = run(
        "resumed", 1, ckpt_path=tmp_path / "whole" / f"step={after}.ckpt"
    )
    assert resumed_steps == steps[after:]
    assert resumed_multiplier == multiplier > 3.0
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_checkpoints_hold_plain_types_and_other_constraints_are_refused(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.fit(unlearner(tiny_lm()), datamodule=authors())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["constraints"]["nll"]["multiplier"]["value"] > 0
    other = LitUnlearn(tiny_lm(), LogitMargin(), {"other": Constraint(NLL(), 1.0, FixedMultiplier(1.0))}, sgd)
    with pytest.raises(ValueError, match=r"the checkpoint has the constraints \['nll'\], this run \['other'\]"):
        make_trainer(max_steps=2).fit(other, datamodule=authors(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_precision_decides_the_dtype_and_never_touches_the_multiplier(
    precision: str, dtype: torch.dtype, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    recorder, module = Recorder(), unlearner(tiny_lm(), epsilon=5.0)
    make_trainer(max_steps=3, precision=precision, callbacks=[recorder]).fit(module, datamodule=authors())
    assert {p.dtype for p in module.lm.parameters()} == {dtype}
    expected = 3.0
    for step in recorder.steps:
        expected += 5.0 * (step["constraint/nll/value"] - 5.0)
    assert recorder.steps[-1]["after"] == pytest.approx(max(expected, 0), rel=1e-6)


def test_clipping_limits_the_update(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = unlearner(tiny_lm(), gradient_clip_val=0.01)
    module.configure_model()
    before = [p.detach().clone() for p in module.lm.parameters()]
    make_trainer(max_steps=1).fit(module, datamodule=authors())
    moved = sum((p - b).pow(2).sum() for p, b in zip(module.lm.parameters(), before, strict=True)) ** 0.5
    assert moved.item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # learning rate times the limit


@pytest.mark.slow
def test_finetune_teaches_all_rows_or_only_the_retain_rows(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    results = {}
    for rows in ("all", "retain"):
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
        module = LitFinetune(tiny_lm(), optimizer, Schedule("constant_with_warmup", warmup_epochs=1))
        trainer = make_trainer(max_epochs=25)
        data = FictionalAuthors(3, 1, batch_size=10, train_on=rows)  # type: ignore[arg-type]
        trainer.fit(module, datamodule=data)
        results[rows] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert results["retain"]["val/retain/nll"] < 0.8 * results["retain"]["val/forget/nll"]
    assert results["all"]["val/forget/nll"] < 0.9 * results["retain"]["val/forget/nll"]


def test_settings_out_of_range_are_refused(tiny_lm: Callable[..., LanguageModel]) -> None:
    for settings, message in [
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val"),
        ({"forget_weight": -1.0}, "forget_weight"),
        ({"forget_weight": math.nan}, "forget_weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            unlearner(tiny_lm(), **settings)
    with pytest.raises(ValueError, match="`constraints` is empty"):
        LitUnlearn(tiny_lm(), LogitMargin(), {}, sgd)


def test_a_fit_after_a_validation_of_the_same_module(model_dir: str, make_trainer: Callable[..., L.Trainer]) -> None:
    """Lightning validates in inference mode, where metrics are reset."""
    bound = Constraint(NLL(), 5.0, DualAscent(lr=1.0, init=1.0))
    module = LitUnlearn(LanguageModel(model_dir), LogitMargin(), {"nll": bound}, lambda p: torch.optim.SGD(p, lr=0.01))
    data = FictionalAuthors(3, 1, max_length=200)
    make_trainer().validate(module, datamodule=data, verbose=False)
    make_trainer(max_epochs=1).fit(module, datamodule=data)
