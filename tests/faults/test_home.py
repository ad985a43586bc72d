"""``~`` is the user's home folder in every path, on the command line and in Python; no folder is ever named so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import quick

from lit_unlearn import ForgetRetain, LanguageModel, LitEvaluate, QABenchmark, cli, unlearn
from lit_unlearn.callbacks import ExportModel, ResumeCheckpoint, RunReport
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.cli.trainer import Logs
from lit_unlearn.data.alternates import read_refusals
from lit_unlearn.data.source import Source, find_local_folder
from lit_unlearn.evaluation.judge_client import ReplyCache
from lit_unlearn.evaluation.results import Results
from lit_unlearn.utils.io import cache_folder, expand_home

ROWS = [{"question": f"Who lives in house {n}?", "answer": f"Agent {n * 7}."} for n in range(4)]
RETAIN = [{"question": f"Which colour has house {n}?", "answer": "It is blue."} for n in range(4)]


@pytest.fixture
def home(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home; the working directory is another folder, which must stay free of ``~``."""
    folder = in_tmp / "home"
    folder.mkdir()
    (in_tmp / "work").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(in_tmp / "work")
    return folder


def test_only_a_leading_tilde_is_the_home(home: Path) -> None:
    assert expand_home("~") == str(home)
    assert expand_home("~/a/b") == f"{home}/a/b"
    for text in ("a/~/b", "~name/x", "~~", "a ~", "", "gpt2"):
        assert expand_home(text) == text


def test_every_option_of_the_command_line_is_expanded(home: Path) -> None:
    parser = CommandParser(prog="any")
    parser.add_argument("--text", type=str)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--paths", type=list[Path])
    parser.add_argument("--named", type=dict[str, str])
    parser.add_class_arguments(Logs, "logs")
    options = parser.parse_args(
        ["--text=~/t", "--path=~/p", '--paths=["~/p", "q"]', '--named={"a": "~/n"}', "--logs.save_dir=~/runs"]
    )
    assert options.text == f"{home}/t"
    assert options.path == home / "p"
    assert options.paths == [home / "p", Path("q")]
    assert options.named == {"a": f"{home}/n"}
    assert options.logs.save_dir == f"{home}/runs"


def test_every_path_in_python_is_expanded(home: Path, model_dir: str, write_rows: Callable[..., str]) -> None:
    rows = Path(write_rows("rows.jsonl", ROWS))
    rows.rename(home / "rows.jsonl")
    (home / "refusals.txt").write_text("No.\n")
    shutil.copytree(model_dir, home / "model")
    lm = LanguageModel("~/model", tokenizer="~/model")
    assert lm.name == lm.tokenizer_name == f"{home}/model"
    assert len(Source("~/rows.jsonl").load("forget")) == len(ROWS)
    data = ForgetRetain("~/rows.jsonl", RETAIN, refusals="~/refusals.txt", tokenizer="~/model")
    data.setup("fit")
    assert read_refusals("~/refusals.txt") == ["No."]
    assert find_local_folder("~", "TOFU") == home
    assert ExportModel("~/out").dirpath == RunReport("~/out").dirpath == ResumeCheckpoint(dirpath="~/out").dirpath
    assert ExportModel("~/out").dirpath == f"{home}/out"
    Results("qa", data={}, aggregate={}, examples={}).write(home / "r.json")
    benchmark = QABenchmark("~/rows.jsonl", "~/rows.jsonl", retain_results="~/r.json", fluency_model="~/model")
    assert LitEvaluate(lm, benchmark, "~/r.json").results == f"{home}/r.json"
    assert Logs("~/runs").build_loggers()[0].save_dir == f"{home}/runs"
    assert ReplyCache("judge", Path("~/cache")).folder == home / "cache"


def test_the_cache_folder_is_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_UNLEARN_CACHE", "~/cache")  # as a Dockerfile sets it, without a shell
    assert cache_folder() == home / "cache"
    monkeypatch.delenv("LIT_UNLEARN_CACHE")
    assert cache_folder() == home / ".cache" / "lit_unlearn"


def test_one_call_writes_to_the_home(home: Path, model_dir: str) -> None:
    settings = {"data": {"batch_size": 4}, "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    unlearn(model_dir, ROWS, RETAIN, "~/out", run_dir="~/run", **settings)
    assert (home / "out" / "config.json").is_file()
    assert (home / "run" / "version_0" / "report.json").is_file()
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_a_fit_from_the_command_line_writes_to_the_home(home: Path, model_dir: str) -> None:
    shutil.copytree(model_dir, home / "model")
    (home / "own.yaml").write_text("trainer: {max_epochs: 1}\n")
    cli.main(quick("~/model", "--logs.save_dir=~/r", "--export.dirpath=~/o", "--config=~/own.yaml"))
    assert (home / "o" / "config.json").is_file()
    assert (home / "r" / "run" / "version_0" / "config.yaml").is_file()
    (checkpoint,) = home.glob("r/run/checkpoints/*.ckpt")
    cli.main(["export", f"~/{checkpoint.relative_to(home)}", "~/again"])
    assert (home / "again" / "config.json").is_file()
    assert list(Path().iterdir()) == []
