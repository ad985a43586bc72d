"""Run every command and script of README and docs as it stands there, on a tiny model and a few rows."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT, instantiate, quick
from evaluation.rows import TOFU

from benchmarks import readme
from lit_unlearn import cli

PAGES = (
    "README.md",
    "docs/choosing_a_method.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/index.md",
    "docs/methods.md",
    "docs/outputs.md",
    "docs/own_data.md",
    "docs/running.md",
)
ALL_PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))))
SHORT = ["--data.num_authors=4", "--data.max_length=200", "--trainer.max_epochs=1"]
LENIENT = ["--report.require_feasible=false", "--report.require_forgotten=false"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> Iterator[str]:
    """Yield the commands of a page's shell blocks, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.partition(" #")[0].strip():
                yield command


@pytest.fixture(scope="session")  # not "module": processes that share the tests leave and enter it often
def made_world(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the demo was run, with files under the names that the pages use."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lit-unlearn"])
        make_world(model_dir)
    return folder


@pytest.fixture
def world(made_world: Path, in_tmp: Path) -> Path:
    """Return a copy of it, which is the working directory."""
    shutil.copytree(made_world, in_tmp, dirs_exist_ok=True)
    return in_tmp


def make_world(model_dir: str) -> None:
    for name in ("target", "retain_only", "unlearned"):
        shutil.copytree(model_dir, f"runs/demo/{name}")
    shutil.copytree(model_dir, "runs/tofu/target")
    cli.main(quick(model_dir))
    shutil.copytree("log/run", "runs/demo/unlearn")
    (checkpoint,) = Path("runs/demo/unlearn/checkpoints").iterdir()
    checkpoint.rename(checkpoint.with_name("last-step=100.ckpt"))
    for name in ("forget", "retain", "general", "unseen"):
        rows = [{"question": f"{name} {n}?", "answer": f"{n} is {name}."} for n in range(9)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    customers = [{"question": f"{n}?", "answer": f"It is {n}.", "customer": f"c-{16 + n % 3}"} for n in range(9)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in customers), encoding="utf-8")
    own = (ROOT / "configs/own_data.yaml").read_text(encoding="utf-8").replace("path/or/hub-name", model_dir)
    for name in ("own_data.yaml", "mine.yaml"):
        Path(name).write_text(own, encoding="utf-8")
    (example,), (overlay,) = blocks("docs/methods.md", "python"), blocks("docs/methods.md", "yaml")
    Path("my_methods.py").write_text(example, encoding="utf-8")
    Path("my_method.yaml").write_text(overlay, encoding="utf-8")
    shutil.copytree(ROOT / "examples/data", "examples/data")
    Path("tofu").mkdir()
    for name, rows in TOFU.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path("tofu", f"{name.replace('forget01', 'forget10')}.json").write_text(lines, encoding="utf-8")
    measure = ["--config=eval/tofu.yaml", f"--model.lm.model={model_dir}", "--model.benchmark.source=tofu"]
    cli.main(
        ["test", *measure, "--model.benchmark.max_new_tokens=4", "--trainer.accelerator=cpu", "--model.results=a.json"]
    )
    for name in ("b", "retain_only", "target", "unlearned"):
        shutil.copy("a.json", f"{name}.json")


def run(command: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of a page; one that needs several devices or a large model is only instantiated."""
    text = re.sub(r"\b(MODEL|BASE)\b", model, command.replace("DIR_WITH_TOFU", "tofu"))
    words = shlex.split(re.sub(r"(lm\.model[= ])DIR\b", rf"\1{model}", text).replace(" DIR", " exported"))[1:]
    if words[0] in ("fit", "validate", "test") and "--print_config" not in words:
        words += ["--trainer.accelerator=cpu"]
        if "configs/demo/unlearn.yaml" in words:
            words += SHORT
        elif words[0] == "fit":
            # The tiny model knows none of the rows, so there is nothing that it could be required to forget.
            words += ["--trainer.max_epochs=1", *LENIENT]
        elif words[0] == "test":
            words += ["--model.benchmark.max_new_tokens=4"]
        if words[0] == "fit" and ("own_data" in command or "configs/demo/unlearn.yaml" in words):
            words += LENIENT
        if "hardware" in command or "configs/tofu.yaml" in words:
            instantiate([word.replace("devices=8", "devices=1") for word in words], monkeypatch)
            return
    elif words[0] == "evaluate":
        words += ["--trainer.accelerator=cpu", "--max_new_tokens=4"]
    cli.main(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page: str, world: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    for command in commands(page):
        program, *rest = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), command
        elif program == "python" and rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]), command
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), command
        elif program == "lit-unlearn":
            with monkeypatch.context() as patch:
                try:
                    run(command, model_dir, patch)
                except SystemExit as done:
                    if done.code:
                        raise AssertionError(f"{command}: {done.code}") from done
                finally:
                    sys.modules.pop("my_methods", None)
            seen += 1
        else:
            raise AssertionError(f"{page} has a command of another program, which nothing tests: {command}")
    assert seen


@pytest.mark.slow
def test_the_script_runs(world: Path, model_dir: str) -> None:
    (script,) = blocks("README.md", "python")
    script = script.replace("path/or/hub-name", model_dir).replace("max_epochs=20", "max_epochs=1, accelerator='cpu'")
    exec(compile(script, "README.md", "exec"), {})
    assert Path("unlearned/model.safetensors").is_file()


def test_the_overlays_are_yaml() -> None:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            assert isinstance(yaml.safe_load(block), dict)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", readme.PAGES)
def test_generated_blocks_have_their_place(page: str) -> None:
    """`make readme` fills these: nothing is typed by hand that a run can write."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names: list[Any] = re.findall(r"<!-- begin (\w+) -->\n.+?<!-- end (\w+) -->", text, re.DOTALL)
    assert names == [(name, name) for name in readme.PAGES[page]]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
