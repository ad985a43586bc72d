"""Examples stay inside the run's folder, and `lit-unlearn clean` finds what holds them there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from command_line import quick
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_unlearn import (
    DPO,
    NLL,
    Constraint,
    DualAscent,
    ForgetRetain,
    LanguageModel,
    LitUnlearn,
    QABenchmark,
    cli,
    default_callbacks,
)
from lit_unlearn.callbacks import ExportModel, Report, RunPicture, default_plugins
from lit_unlearn.data.source import Source
from lit_unlearn.evaluation.judge_client import ReplyCache
from lit_unlearn.plotting import read_run
from lit_unlearn.utils.folders import check_export_target, lock_folder

CANARY = "quokkacanary"
ROWS = [{"question": f"Who lives in house {n}?", "answer": f"{CANARY} number {n}."} for n in range(6)]
RETAIN = [{"question": f"Which colour has house {n}?", "answer": "It is blue."} for n in range(8)]


def holders(*folders: Path) -> set[Path]:
    """The files in which the canary can be read, also in pieces as a list of tokens has it."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path for path in files if CANARY.encode() in re.sub(rb'[",\s]', b"", path.read_bytes())}


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every folder outside of the run's that something might be left in."""
    folder = tmp_path / "caches"
    for name in ("hf", "own", "tmp"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    monkeypatch.setenv("LIT_UNLEARN_CACHE", str(folder / "own"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_reading_a_file_leaves_no_copy(suffix: str, caches: Path, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    rows = datasets.Dataset.from_list(ROWS)
    if suffix == ".csv":
        rows.to_csv(file)
    elif suffix == ".parquet":
        rows.to_parquet(file)
    else:
        rows.to_json(file)
    loaded = Source(str(file), max_rows=4).load("forget")
    assert loaded["answer"][3] == ROWS[3]["answer"]
    assert [path for path in caches.rglob("*") if path.is_file()] == []


def test_reading_a_file_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/none"))
    assert len(Source(write_rows("rows.jsonl", ROWS)).load("forget")) == len(ROWS)


def make(model: str, rows: str | None = None) -> LitUnlearn:
    """DPO needs the reference's log-probabilities, which are cached; the benchmark writes answers."""
    benchmark = None if rows is None else QABenchmark(rows, Source.from_rows(RETAIN), max_new_tokens=2)
    every = None if rows is None else 1
    return LitUnlearn(
        LanguageModel(model),
        DPO(),
        {"nll": Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=3.0))},
        lambda p: torch.optim.SGD(p, lr=0.01),
        benchmark=benchmark,
        benchmark_every_n_epochs=every,
    )


def fit(
    model: str,
    rows: str,
    root: Path,
    epochs: int = 1,
    benchmark: bool = False,
    picture: RunPicture | None = None,
    **settings: Any,
) -> list[L.Callback]:
    export, given = ExportModel(root / "out"), settings.pop("given", [])
    callbacks = default_callbacks(export=export, picture=picture, progress_bar=False, given=given)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(root, "run"),
        log_every_n_steps=1,
        callbacks=callbacks + settings.pop("more", []),
        plugins=default_plugins(),
        enable_progress_bar=False,
    )
    trainer.fit(
        make(model, rows if benchmark else None), datamodule=ForgetRetain(rows, RETAIN, batch_size=3), **settings
    )
    return callbacks


@pytest.mark.parametrize("picture", [None, RunPicture(3)], ids=["as it is", "answers asked for"])
def test_examples_stay_in_the_runs_folder_and_out_of_checkpoints(
    picture: RunPicture | None, model_dir: str, write_rows: Callable[..., str], caches: Path, tmp_path: Path
) -> None:
    rows = write_rows("rows.jsonl", ROWS)
    fit(model_dir, rows, tmp_path / "runs", benchmark=True, picture=picture)
    run = tmp_path / "runs" / "run"
    (start,) = run.glob("version_*")
    assert (run / "checkpoints" / "last-step=2.ckpt").is_file()
    assert list((caches / "own").rglob("*.json"))  # what is cached holds no text
    expected = {start / "qa-step=2.json", Path(rows)}
    assert holders(tmp_path) == (expected if picture is None else expected | {start / "pictures.json"})
    assert [path for path in (caches / "tmp").rglob("*") if path.is_file()] == []
    assert [path for path in (caches / "hf").rglob("*") if path.is_file()] == []


def test_a_resumed_run_still_draws_the_answers_with_their_texts(
    model_dir: str, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = write_rows("rows.jsonl", ROWS)
    fit(model_dir, rows, tmp_path, picture=RunPicture(3))
    first = read_run(tmp_path / "run" / "version_0").answers
    picture = RunPicture(3)
    fit(model_dir, rows, tmp_path, 2, picture=picture, ckpt_path="last")
    second = read_run(tmp_path / "run" / "version_1").answers
    assert [answer._replace(after=None) for answer in first] == [answer._replace(after=None) for answer in second]
    assert CANARY in "".join(second[0].tokens)
    assert all(answer["tokens"] == [] and answer["prompt"] == "" for answer in picture.state_dict()["answers"])


# Clean ----------------------------------------------------------------------------------------------------------------


def clean(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    cli.main(["clean", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.usefixtures("draws_pictures")
def test_clean_lists_and_then_removes_what_holds_examples_and_keeps_model_and_record(
    model_dir: str, write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caches: Path
) -> None:
    rows = write_rows("rows.jsonl", ROWS)
    root = tmp_path / "runs"
    own = ModelCheckpoint(dirpath=root / "mine", filename="best")
    fit(model_dir, rows, root, benchmark=True, picture=RunPicture(3), more=[own])
    start = root / "run" / "version_0"
    (start / "qa.partial").mkdir()
    (start / "qa.partial" / "forget.json").write_text(json.dumps({"key": "k", "examples": [{"generated": CANARY}]}))
    (root / "run" / "checkpoints" / ".last-step=3.ckpt.unfinished").write_text("half")
    (root / "out" / ".unfinished-1234").mkdir()
    (root / "out" / ".unfinished-1234" / "model.safetensors").write_text("half")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}

    listed = clean(root, capsys=capsys)
    assert "--yes" in listed
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    removed = {
        root / "mine" / "best.ckpt",
        root / "run" / "checkpoints" / "last-step=2.ckpt",
        root / "run" / "checkpoints" / ".last-step=3.ckpt.unfinished",
        root / "out" / ".unfinished-1234" / "model.safetensors",
        start / "pictures.json",
        start / "qa-step=2.json",
        start / "qa.partial" / "forget.json",
        start / "tokens.png",
        start / "tokens.svg",
    }
    assert removed <= before.keys()
    for path in removed:
        assert str(path) in listed or str(path.parent) in listed

    clean(root, "--yes", capsys=capsys)
    assert {path for path in root.rglob("*") if path.is_file()} == before.keys() - removed
    assert not (root / "run" / "checkpoints").exists()
    assert holders(root) == set()
    check_export_target(root / "out")  # whole, and ours
    assert (start / "report.json").is_file()
    assert "nothing" in clean(root, "--yes", capsys=capsys)


def test_clean_takes_the_example_out_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caches: Path
) -> None:
    example = {"tokens": [CANARY], "supervised": [True]}
    report = Report(1, 1, {}, {}, {}, seconds=1.0, peak_memory_mib=1.0, example=example)
    report.write(tmp_path / "report.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text(json.dumps({"example": CANARY}), encoding="utf-8")
    assert "1 files and folders" in clean(tmp_path, "--yes", capsys=capsys)
    assert Report.read(tmp_path / "report.json") == dataclasses.replace(report, example=None)
    assert CANARY in (tmp_path / "other" / "report.json").read_text(encoding="utf-8")
    assert "nothing" in clean(tmp_path, "--yes", capsys=capsys)


def test_clean_touches_nothing_that_this_package_did_not_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caches: Path
) -> None:
    """Names as ours, in a folder that was given by mistake."""
    project, other = tmp_path / "project", tmp_path / "other"
    (project / "checkpoints").mkdir(parents=True)
    (project / "data.partial").mkdir()
    (project / ".unfinished-2024").mkdir()
    torch.save({"state_dict": {}, "epoch": 3}, project / "checkpoints" / "best.ckpt")
    (project / "checkpoints" / "broken.ckpt").write_text("no archive")
    (project / "checkpoints" / "last-step=3.ckpt").write_text("no archive either")
    (project / "checkpoints" / "notes.ckpt.unfinished").write_text("no name of ours")
    (project / "checkpoints" / "last-step=4.ckpt").mkdir()
    (project / "checkpoints" / "last-step=4.ckpt" / "thesis.txt").write_text("years of work")
    (project / "checkpoints" / "folder.ckpt").mkdir()
    (project / "tokens.png").write_text("my own picture")
    (project / "pictures.json").write_text('{"album": []}')
    (project / "results.json").write_text('{"examples": [1, 2]}')
    (project / "data.partial" / "forget.json").write_text('{"mine": 1}')
    (project / ".unfinished-2024" / "a.tex").write_text("years of work")
    other.mkdir()
    (other / "last-step=2.ckpt").write_text("elsewhere")
    (project / "link").symlink_to(other)
    (project / "last-step=1.ckpt").symlink_to(other / "last-step=2.ckpt")
    before = {path for folder in (project, other) for path in folder.rglob("*")}
    clean(project, "--yes", capsys=capsys)
    assert {path for folder in (project, other) for path in folder.rglob("*")} == before


def test_clean_removes_what_an_interrupted_audit_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("audit", "own"):
        (tmp_path / f"{name}.partial/model/relearn").mkdir(parents=True)
        file = tmp_path / f"{name}.partial/model/relearn/forget.json"
        file.write_text('{"key": "k", "examples": [{"question": "CANARY"}]}', encoding="utf-8")
    (tmp_path / "own.partial/model/notes.txt").write_text("of the user's", encoding="utf-8")
    assert "1 files and folders" in clean(tmp_path, "--yes", capsys=capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["own.partial"]


def test_clean_refuses_what_is_no_folder_and_a_run_that_goes_on(tmp_path: Path, caches: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["clean", str(tmp_path / "none")])
    assert end.value.code == 2
    checkpoint = tmp_path / "checkpoints" / "last-step=2.ckpt"
    checkpoint.parent.mkdir()
    torch.save({}, checkpoint)
    command = [sys.executable, "-m", "lit_unlearn", "clean", str(tmp_path), "--yes"]
    with lock_folder(checkpoint.parent):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 2
    assert f"process {os.getpid()} is writing" in done.stderr
    assert checkpoint.is_file()


def test_clean_mentions_the_judges_cache_which_it_keeps(
    tmp_path: Path, caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(caches / "own" / "judge") not in clean(tmp_path / "caches" / "tmp", capsys=capsys)
    ReplyCache("judge").write_reply(f"a question and {CANARY}", "7")
    assert str(caches / "own" / "judge") in clean(tmp_path / "caches" / "tmp", "--yes", capsys=capsys)
    assert holders(caches)


@pytest.mark.slow
def test_from_the_command_line_too(in_tmp: Path, model_dir: str, write_rows: Callable[..., str], caches: Path) -> None:
    rows = write_rows("rows.jsonl", ROWS)
    general = [argument for argument in quick(model_dir) if "author" not in argument]
    own = [
        "--config=own_data.yaml",
        f"--data.forget={rows}",
        f"--data.retain={write_rows('retain.jsonl', RETAIN)}",
        *general[2:],
    ]
    cli.main(["fit", *own, "--logs.save_dir=log", "--picture.answers=2"])
    outside = {path for path in holders(in_tmp) if "log" not in path.relative_to(in_tmp).parts}
    assert outside == {Path(rows)}
    assert holders(in_tmp / "log", caches)
    cli.main(["clean", "log", "--yes"])
    assert holders(in_tmp / "log", in_tmp / "out", caches) == set()
