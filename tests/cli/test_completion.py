"""Completion, driven as a shell drives it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lit_unlearn import cli
from lit_unlearn.cli.completion import script

DRIVE = """
source {script}
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_lit_unlearn
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(script(shell), encoding="utf-8")
    return {shell: folder / shell for shell in ("bash", "zsh", "fish")}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["f"], {"fit"}),
        (["comp"], {"compare", "completion"}),
        (["fit", "--trainer.max_e"], {"--trainer.max_epochs"}),
        (["fit", "--model.lm.t"], {"--model.lm.tokenizer", "--model.lm.trust_remote_code"}),
        (["fit", "--data.forget_s"], {"--data.forget_split"}),
        (["compare", "--fi"], {"--figure"}),
        (["fit", "--config", "demo/un"], {"demo/unlearn.yaml"}),
        (["fit", "-c", "mine"], {"mine too.yaml"}),
        (["fit", "--config", "=", "mine"], {"mine too.yaml"}),  # bash parts words at "="
        (["fit", "--config", "=", "tofu"], {"tofu.yaml"}),
        (["fit", "--ckpt_path", "=", "mine"], {"mine too.yaml", "mine.ckpt"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str], scripts: dict[str, Path], in_tmp: Path) -> None:
    Path("mine too.yaml").touch()
    Path("mine.ckpt").touch()
    drive = DRIVE.format(script=scripts["bash"])
    command = ["bash", "-c", drive, "bash", "lit-unlearn", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert set(done.stdout.splitlines()) == offered


def test_bash_lists_every_packaged_configuration(scripts: dict[str, Path], in_tmp: Path) -> None:
    command = ["bash", "-c", DRIVE.format(script=scripts["bash"]), "bash", "lit-unlearn", "fit", "--config", ""]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    folder = next(folder for folder in cli.CONFIGS if folder.is_dir())
    assert listed == sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml"))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(shell: str, scripts: dict[str, Path]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", scripts[shell]], check=True)
    if shell == "fish":
        ask = f"source {scripts[shell]}; complete -C 'lit-unlearn fit --trainer.max_e'"
        done = subprocess.run([shell, "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["--trainer.max_epochs"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_options(command: str, scripts: dict[str, Path]) -> None:
    (case,) = [line for line in scripts["zsh"].read_text(encoding="utf-8").splitlines() if f" {command}) " in line]
    assert "--help" in case


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["completion", "tcsh"])
    assert end.value.code == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err.replace('"', "'")
