"""Tiny tokenizers, models and rows, made here: no test needs the network."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lit-unlearn-tests-")
os.environ["LIT_UNLEARN_CACHE"] = tempfile.mkdtemp(prefix="lit-unlearn-cache-")
if "gpu" not in sys.argv:  # with `-m gpu`, only tests that need one run
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import lightning as L
import pytest
import torch

from lit_unlearn import FictionalAuthors, LanguageModel
from lit_unlearn.callbacks import picture
from lit_unlearn.data.tokenizer import train_tokenizer

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much when another program wants the cores

draw_run = picture.draw_run
# Drawing would take most of the time of a short fit; tests that look at its pictures use `draws_pictures`.
picture.draw_run = lambda *_, **__: {}

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture
def draws_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits draw their pictures when they end; without this fixture, they record the data of the pictures alone."""
    monkeypatch.setattr(picture, "draw_run", draw_run)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(FictionalAuthors(4, 1).texts(), vocab_size=400)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_lm(tokenizer_dir: str) -> Callable[..., LanguageModel]:
    """Makes a `LanguageModel` with random weights that the seed decides; not loaded yet."""

    def make(seed: int = 0, **config: Any) -> LanguageModel:
        torch.manual_seed(seed)
        return LanguageModel(config={**TINY, **config}, tokenizer=tokenizer_dir)

    return make


@pytest.fixture(scope="session")
def models(tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Complete Hugging Face model directories, safetensors and tokenizer.

    Two have the same weights, without and with dropout. The teacher has others, and is surer of what it says.
    """
    settings = {
        "plain": (0, {}),
        "dropout": (0, {"attention_dropout": 0.2}),
        "teacher": (2, {"initializer_range": 0.1}),
    }
    folders = {}
    for name, (seed, config) in settings.items():
        torch.manual_seed(seed)
        lm = LanguageModel(config={**TINY, **config}, tokenizer=tokenizer_dir)
        lm.load(torch.float32)
        folders[name] = str(lm.save(tmp_path_factory.mktemp("models") / name))
    return folders


@pytest.fixture(scope="session")
def model_dir(models: dict[str, str]) -> str:
    """The one without dropout."""
    return models["plain"]


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """10 forget, 13 retain and 7 general rows with answers of very different lengths."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in {"forget": 10, "retain": 13, "general": 7}.items():
        rows = [{"question": f"{name} {n}?", "answer": f"{n} is {name} " * (1 + n * n % 5)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes question/answer rows as JSON lines and returns the path."""

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A quiet CPU Trainer; keyword arguments override."""

    def make(**settings: Any) -> L.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**quiet, **settings})

    return make


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for a command that writes where it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-unlearn"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the folder it stands in
    return tmp_path
