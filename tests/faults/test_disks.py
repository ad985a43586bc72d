"""Full and read-only disks: told before the training where that is possible, and in one sentence; no file is left half written."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    cli,
    default_callbacks,
)
from lit_unlearn.callbacks import AtomicCheckpointIO, ExportModel, ResumeCheckpoint, default_plugins
from lit_unlearn.errors import ConfigError, OutputError
from lit_unlearn.evaluation.judge_client import ReplyCache
from lit_unlearn.utils import io
from lit_unlearn.utils.io import check_writable, format_size, write_json

LIMIT = 40_000  # bytes of a file, less than the weights of the tiny model


def make(lm: LanguageModel) -> LitUnlearn:
    constraint = Constraint(NLL(), 50.0, DualAscent(lr=5.0, init=3.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01))


def data() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


# Before the training --------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_known_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    check_writable(tmp_path / "not" / "there" / "yet", size=1)
    with pytest.raises(ConfigError, match="is no folder"):
        check_writable(file / "out")
    with pytest.raises(ConfigError, match=r"takes about 1e\+15 TB"):
        check_writable(tmp_path / "out", size=10**27)
    monkeypatch.setattr(
        io.os, "access", lambda place, mode: False
    )  # which never happens to root, who runs tests in containers
    with pytest.raises(ConfigError, match="read-only"):
        check_writable(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make_callback", [ExportModel, lambda folder: ResumeCheckpoint(dirpath=str(folder))])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    make_callback: Any,
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    lm = tiny_lm()
    for folder in (tmp_path / "file" / "out", Path("/proc/out")):
        trainer = make_trainer(max_epochs=1, callbacks=[make_callback(folder)], enable_checkpointing=True)
        with pytest.raises(ConfigError, match="cannot be written") as caught:
            trainer.fit(make(lm), datamodule=data())
        assert caught.value.argument == "dirpath"
    assert not lm.is_loaded


def test_too_little_space_is_refused_before_the_first_step(
    model_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=LIMIT)
    monkeypatch.setattr(io.shutil, "disk_usage", lambda path: usage)
    lm = LanguageModel(model_dir)
    for callback in (ExportModel(tmp_path / "out"), ResumeCheckpoint(dirpath=str(tmp_path / "saved"))):
        trainer = make_trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=True)
        with pytest.raises(ConfigError, match=r"and 40 kB are free"):
            trainer.fit(make(lm), datamodule=data())
        assert trainer.global_step == 0
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_readable() -> None:
    assert [format_size(size) for size in (0, 999, 1000, 1.6e9, 2e15)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1.6 GB",
        "2e+03 TB",
    ]


# While writing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Any:
    """No file may grow beyond `LIMIT`, which a program sees as it sees a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    saver, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"number": 1}, path)
    for tensors in (1, 100):
        large = {"number": 2, **{str(n): torch.zeros(LIMIT) for n in range(tensors)}}
        with pytest.raises(OutputError, match=r"last\.ckpt' cannot be written: File too large"):
            saver.save_checkpoint(large, path)
    assert torch.load(path) == {"number": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_does_not_pass_through_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    AtomicCheckpointIO().save_checkpoint({"number": 1}, tmp_path / "new" / "last.ckpt")
    assert torch.load(tmp_path / "new" / "last.ckpt") == {"number": 1}


def test_an_error_of_torch_that_is_no_full_disk_stays_what_it_is(tmp_path: Path) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        AtomicCheckpointIO().save_checkpoint({"number": Odd()}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_does_not_fit_leaves_the_one_before(
    model_dir: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32)
    lm.save(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    request.getfixturevalue("full_disk")
    for target in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(OutputError, match=r"cannot be written: File too large"):
            lm.save(target)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == {
        **before,
        tmp_path / "out": before_of(tmp_path),
    }


def before_of(folder: Path) -> int:
    # The folder's own time changes, as files were written and removed in it.
    return (folder / "out").stat().st_mtime_ns


@pytest.mark.usefixtures("full_disk")
def test_a_report_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File too large"):
        write_json(tmp_path / "report.json", {"text": "x" * 2 * LIMIT})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_a_logger_is_one_sentence(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> None:
        raise OSError(28, "No space left on device", "log/metrics.csv")

    monkeypatch.setattr("lit_unlearn.cli.methods.run", run)
    with pytest.raises(SystemExit) as end:
        cli.main(["methods"])
    assert end.value.code == 1
    assert "'log/metrics.csv' cannot be written: No space left on device." in capsys.readouterr().err
    monkeypatch.setattr("lit_unlearn.cli.methods.run", lambda arguments: Path("/no/such/file").read_text())
    with pytest.raises(FileNotFoundError):  # a bug keeps its traceback
        cli.main(["methods"])


def has_mounts() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not has_mounts(), reason="the system does not let this user mount a small disk")
@pytest.mark.parametrize("size", [60, 700])
def test_a_run_on_a_disk_that_fills_up_ends_with_one_sentence(size: int, model_dir: str, tmp_path: Path) -> None:
    """Too small for the export, and for a second checkpoint."""
    (tmp_path / "disk").mkdir()
    fit = quick(model_dir, "--logs.save_dir=disk", "--export.dirpath=disk/out", "--trainer.max_epochs=4")
    script = f'mount -t tmpfs -o size={size}k none disk && {{ "$@"; code=$?; find disk -type f; exit $code; }}'
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-m",
        "lit_unlearn",
        *fit,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (1, 2), done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    error = done.stderr[done.stderr.index("lit-unlearn: error: ") :]
    assert "No space left" in error or "are free" in error
    assert not [name for name in done.stdout.splitlines() if "unfinished" in name]


# Permissions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(
    umask: int, mode: int, model_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        callbacks = default_callbacks(export=ExportModel(tmp_path / "out"), progress_bar=False)
        settings = {"callbacks": callbacks, "plugins": default_plugins(), "enable_checkpointing": True}
        trainer = make_trainer(max_epochs=1, **settings)
        trainer.fit(make(LanguageModel(model_dir, adapter={"r": 4})), datamodule=data())
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors", "last-step=2.ckpt", "report.json"} <= {
        f.name for f in files
    }
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: mode for path in files}


def test_caches_are_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_UNLEARN_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o000)
    try:
        ReplyCache("judge").write_reply("a question and its answer", "7")
    finally:
        os.umask(before)
    (file,) = (tmp_path / "cache" / "judge").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert ReplyCache("judge").read_reply("a question and its answer") == "7"
