"""Which run a checkpoint belongs to, and what the exit code of a run without a step means."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    ForgetRetain,
    LanguageModel,
    LitFinetune,
    LitUnlearn,
    LogitMargin,
    cli,
)
from lit_unlearn.callbacks import ResumeCheckpoint, default_callbacks
from lit_unlearn.callbacks.identity import find_differences, identify_run
from lit_unlearn.errors import CheckpointError
from lit_unlearn.export.ledger import read_ledger
from lit_unlearn.training.evaluator import Evaluator
from lit_unlearn.utils.folders import replace_folder
from lit_unlearn.utils.io import write_json


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command and returns its exit code and what it printed."""
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err


# A finished run, given again --------------------------------------------------------------------------------------


def arguments(model_dir: str) -> list[str]:
    return [*quick(model_dir, "--data.batch_size=10"), "--picture.answers=0", "--ckpt_path=last"]


@pytest.fixture(scope="module")
def finished_folder(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that has finished after 2 steps, moved to `moved` beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["lit-unlearn"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        cli.main(arguments(model_dir))
    folder.rename(folder.with_name("moved"))
    return folder


@pytest.fixture
def finished(in_tmp: Path, finished_folder: Path, model_dir: str) -> Iterator[list[str]]:
    """The arguments of that run, in a copy of its directory, which the path in its checkpoint leads to."""
    shutil.copytree(finished_folder.with_name("moved"), in_tmp, dirs_exist_ok=True)
    finished_folder.symlink_to(in_tmp)
    yield arguments(model_dir)
    finished_folder.unlink()


def test_a_finished_run_has_nothing_to_do(
    finished: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    with caplog.at_level("INFO"):
        assert run(finished, capsys)[0] == 0
    (line,) = [message for message in caplog.messages if "already finished at step 2" in message]
    assert "out" in line
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}


def test_a_finished_run_whose_last_model_was_measured_after_its_checkpoint(
    in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    every_second = ["--trainer.max_epochs=3", "--trainer.max_steps=-1", "--trainer.check_val_every_n_epoch=2"]
    command = [
        *arguments(model_dir),
        *every_second,
        "--model.constraints.nll.epsilon=100",
        "--model.constraints.nll.multiplier.init=0",
    ]
    assert run(command, capsys)[0] == 0
    record = json.loads(Path("out/unlearning.json").read_text(encoding="utf-8"))
    assert record["step"] == record["steps"]
    code, printed = run(command, capsys)
    assert code == 0, printed


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("other place", "copy that"),
        ("gone", "lit-unlearn export"),
        ("other steps", "`steps` 9"),
        ("other data", "`data`"),
    ],
)
def test_a_finished_run_without_its_export_is_no_success(
    spoil: str, expected: str, finished: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    extra = []
    record = json.loads(Path("out/unlearning.json").read_text(encoding="utf-8"))
    if spoil == "other place":
        extra = ["--export.dirpath=elsewhere", "--model.optimizer.lr=1e-2"]
    elif spoil == "gone":
        shutil.rmtree("out")
    else:
        # An export that is whole, of another run.
        if spoil == "other steps":
            record["steps"] = 9
        else:
            record["data"]["sets"]["forget"]["sha256"] = "of other rows"
        with replace_folder(Path("out"), keeps_others=True) as staging:
            write_json(staging / "unlearning.json", record)
    code, printed = run([*finished, *extra], capsys)
    assert code == 1
    assert expected in printed
    assert not Path("elsewhere").exists()
    if spoil == "other place":
        assert "finished0/run/out" in printed


def test_a_finished_run_whose_export_was_changed(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with Path("out/config.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    code, printed = run(finished, capsys)
    assert code == 2
    assert "config.json" in printed


@pytest.mark.parametrize(
    "requirement",
    [
        ["--report.max_forget_probability=1e-9", "--report.require_forgotten=true"],
        ["--report.require_feasible=true", "--model.constraints.nll.epsilon.relative=-0.9"],
    ],
)
def test_a_finished_run_that_missed_a_requirement_misses_it_again(
    requirement: list[str], finished: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run([*finished, *requirement], capsys)
    assert code == 1, printed
    assert "1e-09" in printed or "> epsilon" in printed


def test_the_export_that_is_gone_can_be_made_as_it_is_said(
    finished: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")
    code, printed = run(finished, capsys)
    command = re.search(r"`lit-unlearn (export \S+ \S+)`", printed)
    assert command is not None, printed
    assert code == 1
    assert run(command[1].split(), capsys)[0] == 0
    assert Path("out/model.safetensors").read_bytes() == weights
    assert run(finished, capsys)[0] == 0


@pytest.mark.parametrize(
    ("extra", "argument"),
    [
        ("--trainer.max_epochs=0", "max_epochs"),
        ("--trainer.max_steps=0", "max_steps"),
        ("--trainer.limit_train_batches=0", "limit_train_batches"),
        ("--trainer.max_time=00:00:00:00", None),
    ],
)
def test_settings_without_a_step(
    extra: str, argument: str | None, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run([*quick(model_dir), extra], capsys)
    assert code == 2, printed
    assert argument is None or f"`trainer.{argument}`" in printed
    assert not Path("out").exists()


def test_a_checkpoint_beyond_the_last_epoch(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run([*finished, "--trainer.max_epochs=1"], capsys)
    assert code == 2
    assert "2 epochs" in printed
    assert "`trainer.max_epochs`" in printed


# A run that was interrupted at its end ------------------------------------------------------------------------------

# Where a fit that has made its last checkpoint can still fail: before the report, before the export's record, before the ledger.
ENDS = {
    "report": "lit_unlearn.callbacks.report.RunReport.on_train_end",
    "record": "lit_unlearn.callbacks.export.ExportModel.on_train_end",
    "ledger": "lit_unlearn.callbacks.export.append_entry",
}


def keeps_first_step(model_dir: str, *extra: str) -> list[str]:
    """The arguments of a run that keeps the model of step 1 of 2: warmup leaves it as it was, then epsilon is violated."""
    ledger = ["--export.ledger=ledger.jsonl", "--export.request=c-17"]
    return [*arguments(model_dir), "--model.optimizer.lr=0.3", *ledger, *extra]


def interrupt(arguments: list[str], target: str) -> None:
    """Runs a command whose fit ends where it calls a function."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the machine went down")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(target, fail)
        with pytest.raises(OSError, match="went down"):
            cli.main(arguments)


def read_files(*patterns: str) -> dict[Path, bytes]:
    files = {}
    for pattern in patterns:
        for path in Path().glob(pattern):
            files[path] = path.read_bytes()
    return files


def read_end() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Returns report, record and ledger of the run in the working directory, without what another start has otherwise."""
    (report_file,) = Path().rglob("report.json")
    (record_file,) = Path().rglob("unlearning.json")
    report, record = (json.loads(file.read_text(encoding="utf-8")) for file in (report_file, record_file))
    for name in ("seconds", "peak_memory_mib", "peak_memory_device"):
        del report[name]
    del record["created"]
    entries = read_ledger(Path("ledger.jsonl"))
    for entry in entries:
        del entry["created"]
    return report, record, entries


@pytest.fixture(scope="module")
def uninterrupted_end(
    model_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("uninterrupted"))
        monkeypatch.setattr(sys, "argv", ["lit-unlearn"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        cli.main(keeps_first_step(model_dir))
        report, record, entries = read_end()
    assert (report["kept_step"], report["steps"]) == (record["step"], record["steps"]) == (1, 2)
    assert len(entries) == 1
    return report, record, entries


@pytest.mark.parametrize(
    ("end", "extra"),
    [
        ("report", []),
        ("record", []),
        ("ledger", []),
        ("report", ["--export.dirpath=null", "--report.dirpath=reports"]),
    ],
)
def test_the_end_of_a_run_that_was_interrupted_there_is_made_up_for(
    end: str,
    extra: list[str],
    uninterrupted_end: tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]],
    in_tmp: Path,
    model_dir: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = keeps_first_step(model_dir, *extra)
    interrupt(command, ENDS[end])
    assert not Path("ledger.jsonl").exists()
    assert len(list(Path().rglob("report.json"))) == (0 if end == "report" else 1)

    code, printed = run(command, capsys)
    assert code == 0, printed
    report, record, entries = read_end()
    for ended, expected in zip((report, record, entries), uninterrupted_end, strict=True):
        assert ended == expected

    # It is complete now: another start writes nothing, and measures nothing.
    patterns = ("out/*", "log/run/*/model/*", "**/report.json", "ledger.jsonl")
    files = read_files(*patterns)
    monkeypatch.setattr(Evaluator, "measure", lambda self: pytest.fail("the model was measured"))
    code, printed = run(command, capsys)
    assert code == 0, printed
    assert "step 1 of 2" not in printed
    assert read_files(*patterns) == files


def test_an_interrupted_run_that_misses_a_requirement_says_so(
    in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = keeps_first_step(model_dir, "--report.require_forgotten=true", "--report.max_forget_probability=1e-9")
    interrupt(command, ENDS["report"])
    for _ in range(2):
        code, printed = run(command, capsys)
        assert code == 1, printed
        assert "`require_forgotten`" in printed
        _, record, entries = read_end()
        assert record["steps"] == 2
        assert len(entries) == 1


def test_an_interrupted_run_whose_model_was_not_exported(
    in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `keep='last'`, only the end of a run exports; the model can be made of the checkpoint, and the rest follows."""
    command = keeps_first_step(model_dir, "--model.keep=last")
    interrupt(command, ENDS["report"])
    code, printed = run(command, capsys)
    remedy = re.search(r"`lit-unlearn (export \S+ \S+)`", printed)
    assert remedy is not None, printed
    assert code == 1
    assert not Path("ledger.jsonl").exists()
    assert run(remedy[1].split(), capsys)[0] == 0
    for _ in range(2):
        assert run(command, capsys)[0] == 0
        report, record, entries = read_end()
        assert report["kept_step"] == record["steps"] == 2
        assert len(entries) == 1


# Checkpoints that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "tensor", "sharded", "folder"])
@pytest.mark.parametrize("by", ["path", "last"])
def test_a_checkpoint_that_cannot_be_resumed(
    kind: str, by: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = in_tmp / "log" / "run" / "checkpoints" / "last-step=3.ckpt"
    path.parent.mkdir(parents=True)
    whole = {"global_step": 3, "loops": {}, "pytorch-lightning_version": "2.6.6", "callbacks": {}}
    if kind in ("truncated", "foreign"):
        torch.save({"epoch": 3} if kind == "foreign" else {"weights": torch.zeros(10_000)}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5_000])
    elif kind == "empty":
        path.touch()
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind in ("sharded", "folder"):
        path.mkdir()
        if kind == "sharded":
            torch.save(whole, path / "meta.pt")
    code, printed = run([*quick(model_dir), f"--ckpt_path={'last' if by == 'last' else path}"], capsys)
    if kind == "folder" and by == "last":
        assert code == 0  # an interruption left it, before the file that makes it a checkpoint
        return
    assert code == 2, printed
    assert path.name in printed
    assert ("fsdp2.yaml" in printed) == (kind == "sharded")
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["best", "hpc"])
def test_names_that_lightning_would_look_up(
    name: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run([*quick(model_dir), f"--ckpt_path={name}"], capsys)
    assert code == 2
    assert "`ckpt_path`" in printed


def test_a_checkpoint_of_weights_alone(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make(tiny_lm()), datamodule=rows())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="without the optimizer"):
        make_trainer(max_epochs=2).fit(make(tiny_lm()), datamodule=rows(), ckpt_path=tmp_path / "weights.ckpt")


# Runs that share a folder -----------------------------------------------------------------------------------------


def make(lm: LanguageModel, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01), **settings)


def rows(**settings: Any) -> FictionalAuthors:
    fixed: dict[str, Any] = {"num_authors": 4, "forget_authors": 1, "batch_size": 5, "retain_batch_size": 4}
    return FictionalAuthors(**{**fixed, "max_length": 200, **settings})


@pytest.mark.parametrize(
    ("module", "data", "difference"),
    [
        ({}, {}, None),
        ({"forget_weight": 2.0, "keep": "last"}, {"eval_batch_size": 3}, None),
        ({"seed": 3}, {}, "seed of the module"),
        ({}, {"seed": 3}, "seed of the data"),
        ({}, {"num_authors": 5}, "forget rows"),
        ({"config": {"num_hidden_layers": 1}}, {}, "base model"),
        ({"kind": "fine-tuning"}, {"train_on": "all"}, "class of the module"),
    ],
)
def test_last_is_a_checkpoint_of_the_same_run_or_none(
    module: dict[str, Any],
    data: dict[str, Any],
    difference: str | None,
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fit(module: LitUnlearn | LitFinetune, data: FictionalAuthors, epochs: int, path: str | None) -> int:
        saver = ResumeCheckpoint()
        trainer = make_trainer(
            max_epochs=epochs, callbacks=[saver], logger=CSVLogger(tmp_path, "run"), enable_checkpointing=True
        )
        trainer.fit(module, datamodule=data, ckpt_path=path)
        return trainer.fit_loop.epoch_progress.total.ready

    fit(make(tiny_lm()), rows(), 1, None)
    module = dict(module)
    lm = tiny_lm(**module.pop("config", {}))
    if module.pop("kind", None):
        second: Any = LitFinetune(lm, lambda p: torch.optim.SGD(p, lr=0.01))
    else:
        second = make(lm, **module)
    with caplog.at_level("INFO"):
        epochs = fit(second, rows(**data), 2, "last")
    skipped = [message for message in caplog.messages if message.startswith("skipped")]
    if difference is None:
        assert not skipped
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    else:
        assert len(skipped) == 1
        assert difference in skipped[0]
        assert "last-step=2.ckpt" in skipped[0]
        # The other run's is still there.
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    assert epochs == 2


def test_a_moved_run_is_the_same_run(
    models: dict[str, str], rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def identify(model: str, folder: str) -> dict[str, str]:
        trainer = make_trainer()
        module = make(LanguageModel(model))
        data = ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl")
        trainer._data_connector.attach_data(module, datamodule=data)
        trainer.strategy._lightning_module = module
        return identify_run(trainer)

    first = identify(models["plain"], rows_dir)
    shutil.copytree(models["plain"], tmp_path / "model")
    shutil.copytree(rows_dir, tmp_path / "rows")
    assert first == identify(str(tmp_path / "model"), str(tmp_path / "rows"))
    with (tmp_path / "rows" / "retain.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "One more?", "answer": "Yes."}\n')
    assert find_differences(first, identify(models["plain"], str(tmp_path / "rows"))) == ["retain rows"]
    # Trained weights differ all over.
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(byte ^ 1 for byte in content[len(content) // 2 :])
    file.write_bytes(bytes(content))
    assert find_differences(first, identify(str(tmp_path / "model"), rows_dir)) == ["base model"]


class ProjectLogger(DummyLogger):
    """Like that of W&B: the name is the project's, and every run has an id."""

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__()
        self._folder, self._run = folder, run

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return self._run


def test_runs_of_a_project_have_folders_of_their_own(
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fit(name: str, epochs: int) -> int:
        callbacks = default_callbacks(progress_bar=False)
        logger = ProjectLogger(tmp_path, name)
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, logger=logger, enable_checkpointing=True)
        trainer.fit(make(tiny_lm()), datamodule=rows(), ckpt_path="last")
        return len(list(tmp_path.glob(f"project/{name}/checkpoints/*.ckpt")))

    monkeypatch.chdir(tmp_path)
    assert fit("a1", 1) == 1
    assert fit("b2", 1) == 1
    assert fit("a1", 2) == 1
    assert not (tmp_path / "project" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["fit", "--x=a b"], "lit-unlearn fit '--x=a b' --ckpt_path=last"),
        (["fit", "--ckpt_path=old.ckpt", "--x=1"], "lit-unlearn fit --x=1 --ckpt_path=last"),
        (["fit", "--ckpt_path", "last", "--x=1"], "lit-unlearn fit --x=1 --ckpt_path=last"),
    ],
)
def test_the_command_that_resumes(
    given: list[str], expected: str, make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-unlearn", *given])
    saver = ResumeCheckpoint()
    saver.best_model_path = os.fspath(Path("project/a1/checkpoints/last-step=4.ckpt"))
    assert saver._resuming_command(make_trainer()) == expected
    by_project = make_trainer(logger=ProjectLogger(Path(), "a1"))
    assert saver._resuming_command(by_project).endswith(f"--ckpt_path={saver.best_model_path}")
