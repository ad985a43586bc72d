"""Completion, driven as a shell drives it; that of options and values is shtab's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lit_unlearn import cli
from lit_unlearn.cli.completion import build_script

DRIVE = """
source {script}
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_TYPE=9
_shtab_lit_unlearn lit-unlearn "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(build_script(shell), encoding="utf-8")
    return {shell: folder / shell for shell in ("bash", "zsh", "fish")}


def test_the_script_is_read_at_every_start_of_a_shell(scripts: dict[str, Path]) -> None:
    """A class that has one of its own kind as an argument must not be listed down to the recursion limit."""
    # About 1 MB; classes of other tests in this process count, too.
    assert all(script.stat().st_size < 2**22 for script in scripts.values())


def complete(script: Path, *words: str) -> list[str]:
    command = ["bash", "-c", DRIVE.format(script=script), "bash", "lit-unlearn", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert done.stderr == ""  # nor is there a Python on the path that could import something
    return done.stdout.splitlines()


LM_OPTIONS = ("teacher", "teacher_revision", "tokenizer", "trust_remote_code")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["f"], {"fit"}),
        (["comp"], {"compare", "completion"}),
        (["fit", "--trainer.max_e"], {"--trainer.max_epochs"}),
        (["fit", "--model.lm.tea"], {"--model.lm.teacher", "--model.lm.teacher_revision"}),
        (["fit", "--model.lm.t"], {f"--model.lm.{name}" for name in LM_OPTIONS}),
        (["fit", "--data.forget_s"], {"--data.forget_split", "--data.forget_set"}),
        (["fit", "--model.benchmark.so"], {"--model.benchmark.source"}),
        (["evaluate", "m", "--suite", "t"], {"tofu"}),
        (["compare", "--fi"], {"--figure"}),
        (["compare", "--format", "m"], {"markdown"}),
        (["fit", "--config", "demo/un"], {"demo/unlearn.yaml"}),
        (["fit", "-c", "mine"], {"mine too.yaml"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str], scripts: dict[str, Path], in_tmp: Path) -> None:
    Path("mine too.yaml").touch()
    Path("mine.ckpt").touch()
    assert set(complete(scripts["bash"], *words)) == offered


def test_bash_lists_every_packaged_configuration(scripts: dict[str, Path], in_tmp: Path) -> None:
    folder = next(folder for folder in cli.CONFIGS if folder.is_dir())
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml"))
    names = [name for name in names if not name.startswith(("policy/", "sweep/"))]
    assert complete(scripts["bash"], "fit", "--config", "") == names


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text(encoding="utf-8")
    assert all(command in text for command in cli.COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", scripts[shell]], check=True)


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["completion", "tcsh"])
    assert end.value.code == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
