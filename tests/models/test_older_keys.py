"""Exports in older versions of transformers: the keys that those read, beside the new ones, and the same logits everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import LanguageModel
from lit_unlearn.export.record import digest_export
from lit_unlearn.models.older_keys import write_older_keys
from lit_unlearn.utils.folders import read_digests
from lit_unlearn.utils.io import file_digest

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
IDS = torch.arange(24).view(1, 24)

DEFAULT = {"rope_type": "default", "rope_theta": 100_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 500_000.0}
SHORTER = {"original_max_position_embeddings": 64}  # which the two fields of old cannot say
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 50_000.0}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
GEMMA3 |= {"sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}}

# Model type, fields, and what transformers 4 has to find.
ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"rope_parameters": DEFAULT}, {"rope_theta": 100_000.0, "rope_scaling": None}),
    "llama3": (
        {"rope_parameters": LLAMA3},
        {
            "rope_theta": 500_000.0,
            "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
        },
    ),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0, **SHORTER}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, **SHORTER}},
    ),
    "partial": (
        {"model_type": "phi", "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.25}},
        {"rope_theta": 100_000.0, "partial_rotary_factor": 0.25},
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 100_000.0, "rotary_pct": 0.5},
    ),
    "phi3": (
        {
            "model_type": "phi3",
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": LONG,
        },
        {
            "rope_theta": 50_000.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 4,
            "rope_parameters": GEMMA3,
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 20_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def build(tokenizer_dir: str, fields: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(config={**TINY, **fields}, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    return lm


@pytest.fixture(scope="module")
def chat_tokenizer_dir(tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a chat template, and special tokens beside the named ones."""
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def exported(chat_tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with its record, and ``logits.pt`` beside it."""
    lm = build(chat_tokenizer_dir, {"rope_parameters": LLAMA3})
    folder = tmp_path_factory.mktemp("exports")
    torch.save(logits_of(lm.model), folder / "logits.pt")
    return lm.save(folder / "model")


@pytest.mark.parametrize("kind", ROPE)
def test_the_config_has_the_older_keys_and_is_read_as_before(kind: str, tokenizer_dir: str, tmp_path: Path) -> None:
    fields, older = ROPE[kind]
    lm = build(tokenizer_dir, fields)
    folder = lm.save(tmp_path / "out")
    config = read(folder / "config.json")
    assert {name: config[name] for name in older} == older
    assert config["rope_parameters"]
    assert (config["torch_dtype"], config["dtype"]) == ("float32", "float32")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(again), logits_of(lm.model))
    # Once more: the keys that it reads are not those that it writes.
    once_more = LanguageModel(str(folder))
    once_more.load(torch.float32)
    assert read(once_more.save(tmp_path / "again") / "config.json")["rope_theta"] == config["rope_theta"]


def test_without_rotary_positions_there_is_nothing_to_add(tokenizer_dir: str, tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = read(build(tokenizer_dir, gpt2).save(tmp_path / "out") / "config.json")
    assert not {name for name in config if "rope" in name}
    assert config["torch_dtype"] == "float32"


def test_a_config_that_would_be_read_otherwise_stays_as_it_is(tmp_path: Path) -> None:
    """A model that transformers does not know, and one whose class refuses the parameters."""
    rope = {"some_attention": DEFAULT, "other_attention": LLAMA3}
    for model_type in ("llama9", "modernbert-decoder"):
        content = {"model_type": model_type, "rope_parameters": rope, "dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        write_older_keys(tmp_path)
        assert read(tmp_path / "config.json") == {**content, "torch_dtype": "bfloat16"}


def test_the_dtype_of_the_export_has_both_names(model_dir: str, tmp_path: Path) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32)
    config = read(lm.save(tmp_path / "out", dtype=torch.bfloat16) / "config.json")
    assert (config["torch_dtype"], config["dtype"]) == ("bfloat16", "bfloat16")


def test_the_tokenizer_has_the_older_class_template_and_list(exported: Path, chat_tokenizer_dir: str) -> None:
    config = read(exported / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == TEMPLATE
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    # A list under this name cannot be loaded there.
    assert "extra_special_tokens" not in config

    tokenizer, before = AutoTokenizer.from_pretrained(exported), AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.extra_special_tokens == before.extra_special_tokens
    text = "Where was<|im_end|> the author born?"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]


def test_several_templates_are_a_list(tokenizer_dir: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    tokenizer.save_pretrained(tmp_path)
    write_older_keys(tmp_path)
    templates = read(tmp_path / "tokenizer_config.json")["chat_template"]
    assert templates == [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_the_digests_are_those_of_the_files_with_the_older_keys(chat_tokenizer_dir: str, tmp_path: Path) -> None:
    recorded: dict[str, str] = {}

    def finish(folder: Path) -> None:
        recorded.update(digest_export(folder))

    folder = build(chat_tokenizer_dir, {}).save(tmp_path / "out", finish=finish)
    listed = read_digests(folder)
    for name in ("config.json", "tokenizer_config.json"):
        digest = file_digest(folder / name)
        assert (recorded[name], listed[name]) == (digest, {digest})
    assert "torch_dtype" in read(folder / "config.json")


OLDER = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(24).view(1, 24), use_cache=False).logits
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "Hi"}]
print(json.dumps({
    "version": transformers.__version__,
    "equal": torch.equal(logits, torch.load(folder.parent / "logits.pt")),
    "ids": tokenizer("Where was<|im_end|> the author born?")["input_ids"],
    "chat": tokenizer.apply_chat_template(messages, tokenize=False),
}))
"""


@pytest.mark.slow
def test_an_older_transformers_computes_the_same(exported: Path, chat_tokenizer_dir: str) -> None:
    """The folder named by the variable has transformers 4 with its tokenizers and huggingface_hub, from `pip install --target`."""
    older = os.environ.get("LIT_UNLEARN_OLD_TRANSFORMERS")
    if not older:
        pytest.skip("LIT_UNLEARN_OLD_TRANSFORMERS names no folder with an older transformers")
    environment = {**os.environ, "PYTHONPATH": older}
    done = subprocess.run(
        [sys.executable, "-c", OLDER, str(exported)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"].startswith("4.")
    assert result["equal"]
    before = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    assert result["ids"] == before("Where was<|im_end|> the author born?")["input_ids"]
    assert result["chat"] == "<|im_start|>Hi<|im_end|>\n"
