"""Folders belong to the user: what may be written as a whole, and what an interruption leaves of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import printed, run_command, start_command

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    cli,
    unlearn,
)
from lit_unlearn.callbacks import ExportModel
from lit_unlearn.errors import OccupiedError, OutputError
from lit_unlearn.utils import folders, io
from lit_unlearn.utils.folders import check_export_target, finish_replacement, lock_folder, read_digests, replace_folder

ROWS = [{"question": f"Who lives in house {n}?", "answer": f"Agent {n * 7}."} for n in range(4)]


def write(folder: Path, **files: str) -> dict[str, str]:
    """Replaces a folder by files with these names, as an export does; ``_`` stands for a dot."""
    named = {name.replace("_", "."): text for name, text in files.items()}
    with replace_folder(folder) as staging:
        for name, text in named.items():
            (staging / name).write_text(text)
    return named


def content(folder: Path) -> dict[str, str]:
    """The files of a folder, also hidden ones, without the list of digests."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in files.items() if name != "files.sha256"}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write(tmp_path / "export", config_json="old", weights="old", stale="old")
    return tmp_path / "export"


# Whose a folder is ----------------------------------------------------------------------------------------------------


def test_what_is_listed_unchanged_is_replaced_and_sha256sum_can_check_it(export: Path) -> None:
    new = write(export, config_json="new", weights="new", more="new")
    assert content(export) == new
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "files.sha256"], cwd=export, check=True)


def test_an_empty_folder_and_none_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none", "deep/er"):
        write(tmp_path / name, weights="new")
        assert content(tmp_path / name) == {"weights": "new"}


def add_file(export: Path) -> None:
    (export / "thesis.tex").write_text("years of work")


def add_git(export: Path) -> None:
    (export / ".git" / "objects").mkdir(parents=True)
    (export / ".git" / "HEAD").write_text("ref: refs/heads/main")


def change_file(export: Path) -> None:
    (export / "weights").write_text("tuned by hand")


def add_link(export: Path) -> None:
    (export / "data").symlink_to(export.parent)


def replace_by_link(export: Path) -> None:
    (export / "weights").rename(export.parent / "weights")
    (export / "weights").symlink_to(export.parent / "weights")


def remove_list(export: Path) -> None:
    (export / "files.sha256").unlink()


def list_own_files(export: Path) -> None:
    lines = (export / "files.sha256").read_text().splitlines()[1:]
    (export / "files.sha256").write_text("\n".join(lines))


@pytest.mark.parametrize(
    "touch", [add_file, add_git, change_file, add_link, replace_by_link, remove_list, list_own_files]
)
def test_a_folder_with_anything_of_the_users_stays_as_it_is(touch: Callable[[Path], None], export: Path) -> None:
    touch(export)
    before = {path: os.lstat(path).st_mtime_ns for path in sorted(export.parent.rglob("*"))}
    with pytest.raises(OccupiedError):
        write(export, config_json="new")
    assert {path: os.lstat(path).st_mtime_ns for path in sorted(export.parent.rglob("*"))} == before


def test_a_project_with_a_config_json_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"theme": 1}')
    (tmp_path / "paper.tex").write_text("draft")
    with pytest.raises(OccupiedError):
        write(tmp_path, config_json="new")
    assert (tmp_path / "paper.tex").read_text() == "draft"


def test_the_working_directory_inputs_and_what_is_above_are_never_written(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = in_tmp / "models" / "base"
    write(base, config_json="ours, and unchanged")
    (in_tmp / "link").symlink_to(base)
    (in_tmp / "work" / "inner").mkdir(parents=True)
    for target in (base, base.parent, in_tmp / "link", Path("models/../models/base")):
        with pytest.raises(OccupiedError):
            check_export_target(target, ["no/such/name", str(base), None])
    with pytest.raises(OccupiedError):
        check_export_target(base, [in_tmp / "link"])
    monkeypatch.chdir(in_tmp / "work" / "inner")
    for target in (Path(), Path(".."), in_tmp / "work", Path("/")):
        with pytest.raises(OccupiedError):
            check_export_target(target)
    check_export_target(in_tmp / "work" / "inner" / "out", [str(base)])


def test_a_link_to_a_folder_stays_a_link(export: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(export)
    (tmp_path / "dangling").symlink_to(tmp_path / "big" / "disk")
    inode = export.stat().st_ino
    for name in ("link", "dangling"):
        write(tmp_path / name, weights="new")
        assert (tmp_path / name).is_symlink()
    assert content(export) == content(tmp_path / "big" / "disk") == {"weights": "new"}
    assert export.stat().st_ino == inode  # so a mounted disk stays mounted


def test_a_list_that_names_files_elsewhere_removes_none(export: Path) -> None:
    outside = export.parent / "thesis.tex"
    outside.write_text("years of work")
    with (export / "files.sha256").open("a") as file:
        file.write(f"{io.file_digest(outside)}  ../thesis.tex\n")
    write(export, weights="new")
    assert outside.read_text() == "years of work"


def test_a_change_back_and_forth_is_seen(export: Path) -> None:
    """Digests are kept while a file has the same inode, size and time."""
    for text in ("abc", "abd", "abc"):
        write(export, weights=text)
        assert read_digests(export)["weights"] == {io.file_digest(export / "weights")}
        (export / "weights").write_text("xyz")
        with pytest.raises(OccupiedError):
            check_export_target(export)
        (export / "weights").write_text(text)
        check_export_target(export)


# Interruptions --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a SIGKILL: it ends the process, so no code of ours cleans up after it."""


def replace_until(export: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Replaces an export, is killed before the n-th change of a file's place, and returns whether it came to that."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return change(*arguments, **settings)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(folders.shutil, "rmtree", counted(shutil.rmtree))
        try:
            write(export, config_json="new", weights="new", more="new")
        except Killed:
            return True
    return False


def test_a_kill_at_any_point_leaves_the_old_export_or_one_that_the_next_run_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"config.json": "old", "weights": "old", "stale": "old"}
    new = {"config.json": "new", "weights": "new", "more": "new"}
    outcomes = []
    for number in range(40):
        export = tmp_path / str(number)
        write(export, config_json="old", weights="old", stale="old")
        was_killed = replace_until(export, number, monkeypatch)
        visible = {name: text for name, text in content(export).items() if not name.startswith(".unfinished-")}
        if "config.json" in visible:  # what loads is of one model
            model = {name: visible.get(name) for name in ("config.json", "weights")}
            assert model in ({"config.json": "old", "weights": "old"}, {"config.json": "new", "weights": "new"})
        check_export_target(export)  # still ours, so that the next run may go on
        finish_replacement(export)
        assert content(export) in (old, new)
        outcomes.append(content(export) == new)
        if not was_killed:
            break
    assert not was_killed
    assert outcomes == sorted(outcomes)  # from some point on it is the new one
    assert True in outcomes[:-1]
    assert False in outcomes


def test_a_damaged_staged_file_is_not_put_in_place(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_put_in_place", stop)
        with pytest.raises(Killed):
            write(export, config_json="new", weights="new")
    (staged,) = export.glob(".unfinished-*")
    (staged / "weights").write_text("half")
    finish_replacement(export)
    assert content(export) == {"config.json": "old", "weights": "old", "stale": "old"}


def fail(folder: Path, error: BaseException) -> None:
    with replace_folder(folder) as staging:
        (staging / "weights").write_text("half")
        raise error


def test_what_fails_before_the_end_changes_nothing(export: Path) -> None:
    before = content(export)
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143), RuntimeError()):
        with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
            fail(export, error)
        assert content(export) == before


# Two processes --------------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from lit_unlearn.utils.folders import lock_folder\n"
HOLD += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_folder_is_written_by_one_process_and_free_again_after_a_kill(export: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(export)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OccupiedError, match=rf"process {holder.pid} is writing"):
            write(export, weights="new")
    finally:
        holder.kill()
        holder.wait()
    assert content(export)["weights"] == "old"
    with lock_folder(export):
        write(export, weights="new")  # the same process may
    assert content(export) == {"weights": "new"}


# The writers ----------------------------------------------------------------------------------------------------------


def make(lm: LanguageModel) -> LitUnlearn:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.01))


def fit(lm: LanguageModel, trainer: L.Trainer) -> None:
    trainer.fit(make(lm), datamodule=FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200))


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **settings: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(LanguageModel, "load", load)


@pytest.mark.usefixtures("never_loads")
def test_every_writer_refuses_before_the_model_is_loaded(
    in_tmp: Path, model_dir: str, make_trainer: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    base = in_tmp / "base"
    shutil.copytree(model_dir, base)
    digests = read_digests(base)
    for target in (base, in_tmp / "base" / "..", Path()):
        with pytest.raises(OccupiedError):
            fit(LanguageModel(str(base)), make_trainer(max_epochs=1, callbacks=[ExportModel(target)]))
        with pytest.raises(OccupiedError):
            unlearn(str(base), ROWS, ROWS, target)
        with pytest.raises(OccupiedError):
            LanguageModel(str(base)).save(target)
    commands = [quick(str(base), f"--export.dirpath={base}")]
    commands += [
        ["tokenizer", "--config=demo/tokenizer.yaml", f"--output={target}"] for target in ("base/config.json", ".")
    ]
    for command in commands:
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 2
    assert "`export.dirpath`" in capsys.readouterr().err
    assert read_digests(base) == digests
    check_export_target(base)  # as it was


@pytest.mark.slow
def test_the_export_command_refuses_the_base_model(in_tmp: Path, model_dir: str) -> None:
    shutil.copytree(model_dir, "base")
    cli.main(quick("base"))
    (checkpoint,) = Path().glob("log/run/checkpoints/last-*.ckpt")
    for target in ("base", "."):
        with pytest.raises(SystemExit) as end:
            cli.main(["export", str(checkpoint), target])
        assert end.value.code == 2
    cli.main(["export", str(checkpoint), "out"])  # the export of the fit is ours
    model = {"files": {"model.safetensors": io.file_digest(in_tmp / "out/model.safetensors")}}
    results = {"suite": "qa", "aggregate": {}, "examples": {}, "data": {}, "model": model}
    (in_tmp / "results.json").write_text(json.dumps(results))
    cli.main(["export", "out", "out", "--results", "results.json"])
    check_export_target(Path("out"))
    (in_tmp / "out" / "notes.txt").write_text("mine")
    for source in (str(checkpoint), "out"):
        with pytest.raises(SystemExit) as end:
            cli.main(["export", source, "out"])
        assert end.value.code == 2
    assert (in_tmp / "out" / "notes.txt").read_text() == "mine"


def test_a_fit_locks_its_folder_and_leaves_none_when_it_fails(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            command = [sys.executable, "-c", HOLD, str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert f"process {os.getpid()} is writing" in done.stderr
            raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"):
        fit(tiny_lm(), make_trainer(max_epochs=1, callbacks=[ExportModel(out), Look()]))
    assert not out.exists()
    out.mkdir()  # the user's own
    with pytest.raises(RuntimeError, match="seen"):
        fit(tiny_lm(), make_trainer(max_epochs=1, callbacks=[ExportModel(out), Look()]))
    assert out.is_dir()
    assert not folders._held_folders


@pytest.mark.slow
def test_the_demo_can_be_given_twice(in_tmp: Path) -> None:
    """The commands of ``make demo``, with fewer rows and epochs."""
    short = ["--data.num_authors=4", "--data.forget_authors=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    commands = [
        ["tokenizer", "--config=demo/tokenizer.yaml", *short[:2]],
        ["fit", "--config=demo/target.yaml", *short],
        ["fit", "--config=demo/unlearn.yaml", "--report={require_forgotten: false, require_feasible: false}", *short],
    ]
    for command in commands * 2:
        cli.main(command)
    for name in ("tokenizer", "target", "unlearned"):
        check_export_target(in_tmp / "runs" / "demo" / name)


@pytest.mark.slow
def test_of_two_runs_into_one_folder_the_second_is_refused(tmp_path: Path, model_dir: str) -> None:
    long = quick(model_dir, "--trainer.max_epochs=5000", "--trainer.check_val_every_n_epoch=5000")
    first = start_command(tmp_path, *long)
    try:
        end = time.monotonic() + 300
        while "run: " not in printed(tmp_path):
            assert first.is_alive(), printed(tmp_path)[-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        # One into the same export, one into the same folder of checkpoints.
        for other, key in (("--logs.name=other", "`export.dirpath`"), ("--export.dirpath=other", "checkpoints")):
            code, text = run_command(tmp_path, *quick(model_dir, other))
            assert code == 2, text[-3000:]
            assert f"process {first.pid} is writing" in text
            assert key in text
            assert not (tmp_path / "other").exists()
    finally:
        first.kill()
        first.join()
