"""The examples and commands of the documentation work."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from command_line import ROOT, quick

from lit_unlearn import cli

METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_a_method_of_your_own(in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/methods.md is saved and run as the page says."""
    (example,) = blocks(METHODS, "python")
    (overlay,) = blocks(METHODS, "yaml")
    assert example.count("\n") < 30
    Path("my_methods.py").write_text(example, encoding="utf-8")
    Path("my_method.yaml").write_text(overlay, encoding="utf-8")
    monkeypatch.syspath_prepend(str(in_tmp))
    command, base, *rest = quick(model_dir)
    try:
        cli.main([command, base, "--config=my_method.yaml", *rest, "--model.forget.init_args.target=6.5"])
    finally:
        sys.modules.pop("my_methods", None)
    (report,) = [json.loads(file.read_text("utf-8")) for file in in_tmp.rglob("report.json")]
    assert 0 < report["after"]["forget/loss"] < report["before"]["forget/loss"]


def test_the_command_finds_modules_where_it_is_run(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed command has its own folder on the path, not the one where it was started."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(in_tmp))])
    cli.main(["methods", "--json"])
    assert sys.path[-1] == str(in_tmp)  # last, so that a file there cannot hide an installed package


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "docs/evaluation.md"])
def test_the_commands_name_files_that_exist(page: str) -> None:
    named = re.findall(r"configs/[\w/]+\.yaml", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_the_tests_that_keep_the_promises_exist() -> None:
    """docs/safety.md names a test beside every promise."""
    lines = [line for line in (ROOT / "docs" / "safety.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    promises = [line for line in lines if not line.startswith("| promise |")]
    assert len(promises) > 30
    for line in promises:
        names = re.findall(r"`([\w/.]*)::(test_\w+)`", line)
        assert names, line
        file = ""
        for path, name in names:
            # A line names a file once.
            file = path or file
            folder = ROOT if "/" in file else ROOT / "tests" / "faults"
            assert re.search(rf"^def {name}\(", (folder / file).read_text("utf-8"), re.MULTILINE), (file, name)
