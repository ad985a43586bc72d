"""Loading against a limit: a hub that does not answer is told within seconds, too little memory with the need."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lit_unlearn import ForgetRetain, LanguageModel
from lit_unlearn.data.source import Source
from lit_unlearn.errors import LitUnlearnError, MissingFileError, ModelError
from lit_unlearn.models import hub, loading


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub that takes connections and never answers, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.3)
        yield


@pytest.mark.parametrize(
    ("load", "argument"),
    [
        (lambda: LanguageModel("owner/model").load(torch.float32), "model"),
        (lambda: LanguageModel("owner/model").tokenizer, "model"),
        (lambda: ForgetRetain([], [], tokenizer="owner/model")._load_tokenizer(), "tokenizer"),
    ],
)
def test_a_hub_that_does_not_answer(load: Callable[[], Any], argument: str, silent_hub: None) -> None:
    start = time.monotonic()
    with pytest.raises(MissingFileError, match="does not answer within") as error:
        load()
    assert time.monotonic() - start < 5
    assert error.value.argument == argument


def test_rows_of_a_hub_that_does_not_answer(silent_hub: None) -> None:
    start = time.monotonic()
    with pytest.warns(UserWarning, match="does not answer within"), pytest.raises(LitUnlearnError):
        Source("owner/rows").load("forget")
    assert time.monotonic() - start < 5
    assert constants.HF_HUB_OFFLINE


def test_a_cached_model_needs_no_hub(
    silent_hub: None, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(model_dir)
    # transformers reads the place of the cache when it is imported.
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    lm = LanguageModel("owner/model")
    with pytest.warns(UserWarning, match="only its cache"):
        lm.load(torch.float32)
    assert lm.tokenizer is not None


def test_offline_mode_and_local_paths_ask_no_hub(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_hub_answers", fail)
    hub.check_hub("owner/model", cached_file="config.json")  # HF_HUB_OFFLINE=1 in all tests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.check_hub(model_dir, cached_file="config.json")


def test_memory_that_is_left_decides(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("whatever torch says")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="whatever torch says"):
        LanguageModel(model_dir).load(torch.float32)
    monkeypatch.setattr(loading, "_free_memory", lambda: 1000.0)
    with pytest.raises(ModelError, match=r"not enough memory.*model\.safetensors") as error:
        LanguageModel(model_dir).load(torch.float32)
    assert error.value.argument == "model"


SCRIPT = """
import resource, sys
from pathlib import Path
import torch, transformers
from transformers import LlamaForCausalLM, AutoModelForCausalLM
from lit_unlearn import LanguageModel
from lit_unlearn.errors import ModelError

model, small = sys.argv[1:]
LanguageModel(small).load(torch.float32)  # imports everything
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
try:
    LanguageModel(model).load(torch.float32)
except ModelError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_memory_limit(model_dir: str, tokenizer_dir: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=20_000, hidden_size=512, intermediate_size=512, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")  # 90 MB
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "large"), model_dir], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert "model.safetensors" in line
    assert "MiB in float32" in line
    assert "32 MiB were left" in line
