"""Collect every public name and key: what users write, and what they read back.

``python tests/snapshot.py`` writes ``tests/snapshot.json`` anew. Do that only when a name is meant to change, and say so in the
CHANGELOG.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import lit_unlearn
from lit_unlearn import cli

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("snapshot.json")


def collect(model_dir: str, folder: Path) -> dict[str, Any]:
    """Collect the names of all parts.

    Args:
        model_dir: A small model with its tokenizer.
        folder: Empty; runs are written into it.
    """
    fit = ["fit", "--config=demo/unlearn.yaml", f"--model.lm.model={model_dir}", "--data.max_length=200"]
    fit += ["--data.num_authors=3", "--data.forget_authors=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    fit += ["--report.require_feasible=false", "--report.require_forgotten=false", "--logs.name=run"]
    fit += [f"--logs.save_dir={folder}", f"--export.dirpath={folder}/out", "--trainer.enable_progress_bar=false"]
    rows = folder / "rows.jsonl"
    rows.write_text(
        '{"question": "Who?", "answer": "He."}\n{"question": "Where?", "answer": "There."}\n', encoding="utf-8"
    )
    test = ["test", "--config=eval/tofu.yaml", f"--model.lm.model={model_dir}", f"--logs.save_dir={folder}"]
    test += _benchmark_arguments(rows, folder)
    run(fit)
    run(test)
    version = folder / "run" / "version_0"
    (checkpoint,) = (folder / "run" / "checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    with (version / "metrics.csv").open(encoding="utf-8") as file:
        log_names = sorted(next(csv.reader(file)))
    return {
        "public names": sorted(lit_unlearn.__all__),
        "commands": sorted(cli.COMMANDS),
        "log names": log_names,
        "checkpoint keys": sorted(_keys({key: value for key, value in content.items() if key in _OUR_CHECKPOINT_KEYS})),
        "checkpoint callbacks": sorted(content["callbacks"]),
        "report keys": sorted(_keys(_read(version / "report.json"))),
        "record keys": sorted(_keys(_read(folder / "out" / "unlearning.json"), skip=("config", "files"))),
        "results keys": sorted(_keys(_read(folder / "results.json"))),
    }


def _benchmark_arguments(rows: Path, folder: Path) -> list[str]:
    init = {"forget": str(rows), "retain": str(rows), "max_new_tokens": 2}
    benchmark = json.dumps({"class_path": "QABenchmark", "init_args": init})
    return [f"--model.benchmark={benchmark}", f"--model.results={folder}/results.json"]


_OUR_CHECKPOINT_KEYS = ("run", "constraints", "ForgetRetain", "FictionalAuthors")


def config_keys(file: Path) -> list[str]:
    """List the YAML keys of a configuration, as ``--print_config`` shows them."""
    command = "test" if file.parent.name == "eval" else "fit"
    name = file.relative_to(ROOT / "configs").as_posix()
    before = ["--config=own_data.yaml"] if file.parent.name in ("method", "hardware", "paper") else []
    if name == "demo/tofu_eval.yaml":
        command, before = "test", ["--config=eval/tofu.yaml"]
    if name == "demo/tofu_unlearn.yaml":
        before = ["--config=tofu.yaml"]
    if name == "real/retain_only.yaml":
        before = ["--config=real/target.yaml"]
    if name.startswith("paper/"):
        before = [f"--config={file.stem.split('_')[0]}.yaml"]
    printed = run([command, *before, f"--config={name}", "--print_config"])
    return sorted(_keys(yaml.safe_load(printed)))


def config_files() -> list[Path]:
    """List every packaged configuration of ``fit`` and ``test``."""
    files = (ROOT / "configs").rglob("*.yaml")
    return sorted(
        file for file in files if "tokenizer" not in file.stem and file.parent.name not in ("policy", "attack", "sweep")
    )


def run(arguments: list[str]) -> str:
    """Run one command and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return printed.getvalue()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _keys(value: Any, prefix: str = "", skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield dotted names; items of a list share one name, and digests count as names of files."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            if key not in skip:
                yield from _keys(part, f"{prefix}.{key}" if prefix else str(key), skip)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from {name for item in value for name in _keys(item, f"{prefix}[]", skip)}
    else:
        yield prefix


def main() -> None:
    """Write the snapshot anew."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TINY

    with tempfile.TemporaryDirectory() as work:
        os.environ["LIT_UNLEARN_CACHE"] = work
        folder = Path(work)
        tokenizer = lit_unlearn.data.tokenizer.train_tokenizer(
            lit_unlearn.FictionalAuthors(4, 1).texts(), vocab_size=400
        )
        tokenizer.save_pretrained(folder / "tokenizer")
        lm = lit_unlearn.LanguageModel(config=dict(TINY), tokenizer=str(folder / "tokenizer"))
        lm.load(torch.float32)
        model = lm.save(folder / "model")
        (folder / "runs").mkdir()
        names = collect(str(model), folder / "runs")
    keys = {file.relative_to(ROOT).as_posix(): config_keys(file) for file in config_files()}
    shared = set.intersection(*map(set, keys.values()))
    names["config keys"] = {"every configuration": sorted(shared)}
    names["config keys"] |= {name: [key for key in own if key not in shared] for name, own in keys.items()}
    FILE.write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
