"""Settings of the Trainer, the optimizer and the constraints that cannot be meant: one sentence each, before anything starts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    ForgetRetain,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    Schedule,
    cli,
)
from lit_unlearn.errors import ConfigError, DataError


class SmallFinder(BatchSizeFinder):
    """A class of the user's, derived from one that is refused."""


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command and returns its exit code and what it printed."""
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.err


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], key: str | None = None) -> str:
    """What a command prints that is refused before anything was written."""
    code, printed = run(arguments, capsys)
    message = printed[printed.index("lit-unlearn: error: ") :].strip()
    assert code == 2, printed
    assert len(message.splitlines()) <= 2
    assert key is None or f"`{key}`" in message
    assert not Path("out").exists()
    return message


def make(lm: LanguageModel, **settings: Any) -> LitUnlearn:
    constraints = {"nll": Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0), settings.pop("stream", "retain"))}
    constraints = settings.pop("constraints", constraints)
    optimizer = settings.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.01))
    return LitUnlearn(lm, LogitMargin(), constraints, optimizer, **settings)


def rows(**settings: Any) -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200, **settings)


# Callbacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("BatchSizeFinder", "micro_batch_size"),
        ("LearningRateFinder", "`lr`"),
        ("GradientAccumulationScheduler", "micro_batch_size"),
        ("StochasticWeightAveraging", "EMAWeightAveraging"),
        ("faults.test_trainer_settings.SmallFinder", "micro_batch_size"),
    ],
)
def test_a_callback_that_cannot_work(
    name: str, instead: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [f"--trainer.callbacks={name}"]
    if name == "GradientAccumulationScheduler":
        extra.append("--trainer.callbacks.scheduling={0: 2}")
    if name == "StochasticWeightAveraging":
        extra.append("--trainer.callbacks.swa_lrs=0.1")
    message = refused(quick(model_dir, *extra), capsys, "trainer.callbacks")
    assert name.rpartition(".")[2] in message
    assert instead in message
    assert not list(in_tmp.glob(".scale*"))


@pytest.mark.parametrize(
    "callback",
    [
        SmallFinder(),
        LearningRateFinder(),
        GradientAccumulationScheduler({0: 2}),
        StochasticWeightAveraging(swa_lrs=0.1),
    ],
)
def test_a_callback_that_cannot_work_in_python(
    callback: L.Callback, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    lm = tiny_lm()
    with pytest.raises(ConfigError, match=type(callback).__name__):
        make_trainer(max_epochs=1, callbacks=[callback]).fit(make(lm), datamodule=rows())
    assert not lm.is_loaded


def test_averages_that_are_validated_are_allowed(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    trainer = make_trainer(max_steps=1, callbacks=[EMAWeightAveraging()])
    trainer.fit(make(tiny_lm()), datamodule=rows())
    assert trainer.global_step == 1


# Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        (["--trainer.max_epochs=-1"], "trainer.max_epochs"),
        (["--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:05"], "trainer.max_epochs"),
        (["--trainer.val_check_interval=50"], "trainer.val_check_interval"),
        (["--trainer.val_check_interval=50", "--model.scheduler=null"], "trainer.val_check_interval"),
        (["--trainer.limit_train_batches=0.001"], "trainer.limit_train_batches"),
        (["--trainer.limit_val_batches=0.001"], "trainer.limit_val_batches"),
        (["--model.optimizer.lr=-1"], "model.optimizer"),
        (["--model.optimizer.lr=.nan"], "model.optimizer"),
        (["--model.optimizer.weight_decay=-1"], "model.optimizer"),
        (["--model.scheduler.name=lineal"], "model.scheduler"),
        (["--model.scheduler.warmup_epochs=-1"], "model.scheduler.warmup_epochs"),
        (["--model.scheduler.warmup_epochs=.nan"], "model.scheduler.warmup_epochs"),
    ],
)
def test_a_number_that_cannot_be_meant(
    extra: list[str], key: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(quick(model_dir, *extra), capsys, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "steps"),
    [
        (["--trainer.max_epochs=-1", "--trainer.max_steps=3"], 3),
        (["--trainer.max_epochs=-1", "--trainer.max_steps=3", "--model.scheduler.warmup_epochs=0.5"], 3),
        (["--trainer.max_time=00:01:00:00"], 4),
        (["--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"], 4),
    ],
)
def test_runs_without_an_epoch_limit(
    extra: list[str], steps: int, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run(quick(model_dir, "--picture.answers=0", *extra), capsys)
    assert code == 0, printed
    assert json.loads(Path("log/run/version_0/report.json").read_text(encoding="utf-8"))["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("update_every", ["step", "epoch"])
def test_a_run_that_only_time_ends(
    update_every: str,
    in_tmp: Path,
    model_dir: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    extra = ["--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01", "--model.scheduler=null"]
    extra += [f"--model.constraints.nll.update_every={update_every}", "--trainer.enable_progress_bar=true"]
    with caplog.at_level("INFO"):
        code, printed = run(quick(model_dir, "--picture.answers=0", *extra), capsys)
    assert code == 0, printed
    assert not re.search(r"\b(inf|nan)\b", caplog.text)


def test_the_schedule_ends_with_the_steps(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = make(tiny_lm(), scheduler=Schedule("linear", warmup_epochs=0.5))
    trainer = make_trainer(max_epochs=-1, max_steps=4)
    trainer.fit(module, datamodule=rows())
    # Half an epoch of two steps up, and down to 0 after four.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


# Learned positions ------------------------------------------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 24,
    "word_embed_proj_dim": 32,
}


@pytest.mark.parametrize("config", [GPT2, OPT], ids=["gpt2", "opt"])
def test_an_example_longer_than_the_learned_positions(
    config: dict[str, Any], tokenizer_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    def fit(max_length: int) -> L.Trainer:
        data = ForgetRetain(f"{rows_dir}/forget.jsonl", f"{rows_dir}/retain.jsonl", max_length=max_length, batch_size=5)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(make(LanguageModel(config=config, tokenizer=tokenizer_dir)), datamodule=data)
        lengths = [len(example.input_ids) for examples in data.examples.values() for example in examples]
        assert max(lengths) <= 24
        return trainer

    with pytest.raises(DataError, match=r"row \d+ of the forget set .*24 positions") as error:
        fit(512)
    assert error.value.argument == "max_length"
    assert fit(24).global_step == 2


def test_rotary_positions_go_on(
    tiny_lm: Callable[..., LanguageModel], rows_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    data = ForgetRetain(f"{rows_dir}/forget.jsonl", f"{rows_dir}/retain.jsonl", batch_size=5)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make(tiny_lm(max_position_embeddings=8)), datamodule=data)
    assert trainer.global_step == 2


# Constraints ------------------------------------------------------------------------------------------------------


def test_a_stream_that_the_data_do_not_have(in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = "--model.constraints.nll.stream=retainn"
    message = refused(quick(model_dir, extra), capsys, "model.constraints.nll.stream")
    assert "did you mean 'retain'" in message
    assert "'forget'" in message


def test_a_stream_that_the_data_do_not_have_in_python(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    lm = tiny_lm()
    with pytest.raises(ConfigError, match="'generall'"):
        make_trainer(max_epochs=1).fit(make(lm, stream="generall"), datamodule=rows())
    assert not lm.is_loaded


@pytest.mark.parametrize("by", ["option", "file", "yaml"])
def test_a_constraint_that_was_never_made(
    by: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = "{model: {constraints: {nlll: {epsilon: {relative: 0.3}}}}}"
    Path("overlay.yaml").write_text(overlay, encoding="utf-8")
    extra = {
        "option": "--model.constraints.nlll.epsilon.relative=0.3",
        "file": "--config=overlay.yaml",
        "yaml": f"--config={overlay}",
    }
    message = refused(quick(model_dir, extra[by]), capsys)
    assert "'nlll'" in message
    assert "did you mean 'nll'" in message


@pytest.mark.parametrize("name", ["a/b.c", "a b; rm -rf x", "a.b", "keys", "forget", "", "ε"])
def test_a_name_that_cannot_be_a_key(
    name: str,
    in_tmp: Path,
    model_dir: str,
    tiny_lm: Callable[..., LanguageModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    with pytest.raises(ConfigError, match="name"):
        make(tiny_lm(), constraints={name: constraint})
    fields = "{objective: NLL, epsilon: 3.0, multiplier: {class_path: FixedMultiplier, init_args: {value: 1.0}}}"
    refused(quick(model_dir, f"--config={{model: {{constraints: {{{name!r}: {fields}}}}}}}"), capsys)


@pytest.mark.parametrize("name", ["nll", "general-2", "retain_NLL", "2"])
def test_a_name_that_can(name: str, tiny_lm: Callable[..., LanguageModel]) -> None:
    assert make(tiny_lm(), constraints={name: Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))}).constraints


@pytest.mark.parametrize("lr", [-1.0, math.nan])
def test_a_rate_that_the_optimizer_refuses_in_python(
    lr: float, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = make(tiny_lm(), optimizer=lambda p: torch.optim.AdamW(p, lr=lr))
    with pytest.raises(ConfigError) as error:
        make_trainer(max_epochs=1).fit(module, datamodule=rows())
    assert error.value.argument == "optimizer"
