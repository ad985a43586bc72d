"""What a user reads after a mistake, and the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import quick

from lit_unlearn import NLL, Constraint, FixedMultiplier, ForgetRetain, cli
from lit_unlearn.cli.keys import find_keys
from lit_unlearn.cli.parser import explain
from lit_unlearn.errors import ConfigError


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What the command line prints before it ends with a code, always at most three lines without a trace."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    printed = capsys.readouterr().err
    own = printed[printed.index("lit-unlearn: error: ") :].strip()
    assert end.value.code == code
    assert len(own.splitlines()) <= 3
    assert "Traceback" not in printed
    return own.removeprefix("lit-unlearn: error: ")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        # names
        ("--trainer.max_epoch=3", "there is no setting '--trainer.max_epoch': did you mean '--trainer.max_epochs'?"),
        ("--modle.lm=x", "there is no setting '--modle.lm': did you mean '--model.lm'?"),
        ("--model.lr=1", "model: LitUnlearn has no setting 'lr'; it has lm, forget, constraints, optimizer, "),
        ("--model.lm.modle=x", "model: LitUnlearn has no setting 'lm.modle': did you mean 'lm.model'?"),
        (
            "--model.optimizer.learning_rate=1",
            "model.optimizer: AdamW has no setting 'learning_rate'; it has lr, betas, ",
        ),
        ("once", "unexpected argument 'once': options are written --name=value"),
        # classes
        ("--model=LitUnlern", "model: there is no class 'LitUnlern': did you mean 'LitUnlearn'?"),
        ("--model.optimizer=Adamw", "model.optimizer: there is no class 'Adamw': did you mean 'AdamW'?"),
        (
            "--trainer.callbacks=EarlyStoping",
            "trainer.callbacks: there is no class 'EarlyStoping': did you mean 'EarlyStopping'?",
        ),
        ("--model.forget=FictionalAuthors", "model.forget: the class 'FictionalAuthors' is of another kind than"),
        (
            "--model.forget=[1]",
            "model.forget: expected the name of a class, or {class_path: …, init_args: …}, that is an Objective, not '[1]'",
        ),
        (
            "--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping",
            "trainer.callbacks: EarlyStopping needs monitor",
        ),
        # values
        ("--trainer.max_epochs=ten", "trainer.max_epochs: expected int, not 'ten'"),
        ("--model.passes=jont", "model.passes: expected one of joint, sequential, not 'jont': did you mean 'joint'?"),
        ("--trainer.precision=bf17", "not 'bf17': did you mean 'bf16'?"),
        ("--model.optimizer.lr=abc", "model.optimizer.lr: expected float, not 'abc'"),
        (
            "--model.constraints.nll.epsilon={relative: half}",
            "model.constraints.epsilon.relative: expected float, not 'half'",
        ),
        ("--model.constraints.nll.epsilon=half", "model.constraints.epsilon: expected float, not 'half'"),
        # refused by Trainer, and by what is missing
        ("--trainer.accelerator=gpuu", "You selected an invalid accelerator name: `accelerator='gpuu'`"),
        ("--trainer.devices=abc", "`devices` selected with `CPUAccelerator` should be an int > 0"),
        ("--model.lm.model=./nowhere", "./nowhere"),
        ("--ckpt_path=nowhere.ckpt", "such as 'last-step=100.ckpt'.\n  set in the configuration: `ckpt_path`"),
    ],
)
def test_a_mistake_on_the_command_line(
    extra: str, message: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failed(quick(model_dir, extra), capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {lm: {model: x}}", "there is no setting 'modle.lm"),
        ("trainer: {max_epoch: 3}", "there is no setting 'trainer.max_epoch': did you mean 'trainer.max_epochs'?"),
        ("model: {forget: {class_path: LogitMargin, init_args: {powr: 2}}}", "model.forget: LogitMargin has no setting 'powr': did you mean 'power'?"),
        ("data: {init_args: {num_author: 2}}", "data: FictionalAuthors has no setting 'num_author': did you mean 'num_authors'?"),
        ("trainer:\n  max_epochs: [1, 2\ndata: 3\n", "own.yaml, line 3, column 5: expected ',' or ']', but got ':' while parsing"),
        ("- 1\n- 2\n", "'own.yaml' has no settings: expected `key: value` lines, not a list"),
        ("\x00", "'own.yaml' is no YAML file"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file(
    text: str, message: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text(text, encoding="utf-8")
    command, first, *rest = quick(model_dir)
    assert message in failed([command, first, "--config=own.yaml", *rest], capsys)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("demo/unlern.yaml", "demo/unlearn.yaml"), ("configs/tofuu.yaml", "tofu.yaml"), ("npo.yaml", "method/npo.yaml")],
)
def test_a_file_that_is_not_there(wrong: str, right: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "tokenizer"):
        message = failed([command, "--config", wrong], capsys)
        assert message.startswith(f"there is no configuration file '{wrong}': did you mean '{right}'?")
        assert f"looked in {in_tmp} and among the packaged ones" in message


def test_what_is_required(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(["fit", "--model.forget=LogitMargin", "--data=FictionalAuthors"], capsys)
    assert message.startswith("model: LitUnlearn needs constraints, optimizer; start from a complete configuration")


def test_a_failed_run_has_another_code_than_a_wrong_command(
    in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["--model.optimizer.lr=1e30", "--model.scheduler=null", "--trainer.max_epochs=3"]
    assert "norm is nan" in failed(quick(model_dir, *huge), capsys, code=1)
    assert "there is no results file" in failed(["compare", "nowhere.json"], capsys)
    assert "'fti': did you mean 'fit'?" in failed(["fti"], capsys)


@pytest.mark.parametrize(
    ("extra", "message", "key"),
    [
        (["--model.constraints.nll.epsilon=-0.5"], "-0.5", "model.constraints.nll.epsilon"),
        (["--model.lm.model=./nowhere"], "./nowhere", "model.lm.model"),
        # Not the tokenizer's key, although that is what is read first.
        (["--model.lm.model=nowhere"], "nowhere", "model.lm.model"),
        # Before the fit, which writes it at its end.
        (["--export.ledger=."], "'.' is a folder", "export.ledger"),
        (["--data=ForgetRetain", "--data.forget=none.jsonl", "--data.retain=none.jsonl"], "none.jsonl", "data.forget"),
        (["--data.batch_size=0"], "not 0", "data.batch_size"),
        (["--trainer.overfit_batches=1"], "overfit_batches", "trainer.overfit_batches"),
    ],
)
def test_the_yaml_key_is_added(
    extra: list[str], message: str, key: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = quick(model_dir)
    if extra[0] == "--data=ForgetRetain":
        arguments = [argument for argument in arguments if "authors" not in argument]
    assert_key(failed([*arguments, *extra], capsys), message, key)


@pytest.mark.parametrize(
    ("benchmark", "message", "key"),
    [
        (["--config=eval/tofu.yaml", "--model.benchmark.source=./nowhere"], "./nowhere", "model.benchmark.source"),
        (["--config=eval/tofu.yaml", "--model.benchmark.source=nowhere"], "nowhere", "model.benchmark.source"),
        (["--config=eval/lume.yaml", "--model.benchmark.source=nowhere"], "nowhere", "model.benchmark.source"),
        (
            [
                "--model=LitEvaluate",
                "--model.benchmark=QABenchmark",
                "--model.benchmark.forget=rows.jsonl",
                "--model.benchmark.retain=rows.jsonl",
                "--model.results=.",
            ],
            "'.' is a folder",
            "model.results",
        ),
        (
            ["--config=eval/stress.yaml", "--model.benchmark.benchmark.source=./nowhere"],
            "./nowhere",
            "model.benchmark.benchmark.source",
        ),
        (
            [
                "--model=LitEvaluate",
                "--model.benchmark=QABenchmark",
                "--model.benchmark.forget=rows.jsonl",
                "--model.benchmark.retain=rows.jsonl",
                "--model.benchmark.holdout=none.jsonl",
            ],
            "none.jsonl",
            "model.benchmark.holdout",
        ),
    ],
)
def test_the_yaml_key_of_a_benchmark(
    benchmark: list[str], message: str, key: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"question": "Who?", "answer": "He."}\n')
    arguments = ["test", *benchmark, f"--model.lm.model={model_dir}", "--trainer.accelerator=cpu"]
    assert_key(failed(arguments, capsys), message, key)


def assert_key(printed: str, message: str, key: str) -> None:
    first, *_, last = printed.splitlines()
    assert message in first
    assert last == f"  set in the configuration: `{key}`"


def test_keys_of_several_objects() -> None:
    constraint = {"epsilon": 0.3, "stream": "retain"}
    data = {"class_path": "lit_unlearn.ForgetRetain", "init_args": {"forget": "a", "retain": "b"}}
    settings = {
        "model": {
            "class_path": "lit_unlearn.LitUnlearn",
            "init_args": {"constraints": {"a": constraint, "b": constraint}},
        },
        "data": data,
    }

    def keys(owner: object, argument: str) -> list[str]:
        return find_keys(settings, ConfigError("", owner=owner, argument=argument))

    assert keys(Constraint, "epsilon") == ["model.constraints.a.epsilon", "model.constraints.b.epsilon"]
    named = Constraint(NLL(), 0.3, FixedMultiplier(1.0))
    named.name = "b"
    assert keys(named, "epsilon") == ["model.constraints.b.epsilon"]
    assert keys(ForgetRetain, "forget") == ["data.forget"]
    assert keys(ForgetRetain, "tokenizer") == []
    assert keys(None, "data") == ["data"]


def test_an_interrupt_before_the_run_ends_with_130(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("slow_to_import.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--trainer.callbacks=slow_to_import.Callback"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "lit-unlearn: interrupted\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lit_unlearn", "methods"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_not_understood_stays() -> None:
    assert explain("something else") == "something else"
