"""An export converted with llama.cpp's own script, read back by the package, and asked in llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import smollm2
from lit_unlearn import LanguageModel

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def script() -> Path:
    """In the folder that the variable names: llama.cpp's sources, or the part of them that converts."""
    sources = os.environ.get("LIT_UNLEARN_LLAMA_CPP")
    if not sources:
        pytest.skip("LIT_UNLEARN_LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    return Path(sources, "convert_hf_to_gguf.py")


def convert(script: Path, export: str | Path, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), str(export), f"--outfile={file}", "--outtype=f32"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def export(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32; without the script, it is not fetched."""
    lm = LanguageModel(str(smollm2.find_model()))
    lm.load(torch.float32)
    return lm.save(tmp_path_factory.mktemp("llama_cpp") / "export")


@pytest.fixture(scope="module")
def converted(script: Path, export: Path) -> Path:
    file = export.parent / "model.gguf"
    done = convert(script, export, file)
    assert done.returncode == 0, done.stderr[-3000:]
    return file


def test_the_converted_export_is_read_back_as_it_was(export: Path, converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export)
    again = LanguageModel(str(converted))
    again.load(torch.float32)
    assert again.tokenizer is not None
    assert again.tokenizer.chat_template == tokenizer.chat_template
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    read = again.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert read == ids[0].tolist()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(export).eval()(input_ids=ids).logits
        assert torch.equal(again.model.eval()(input_ids=ids).logits, logits)


def test_llama_cpp_answers_as_transformers_does(export: Path, converted: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp itself: pip install xllamacpp")
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    settings = xllamacpp.CommonParams()
    settings.model.path = str(converted)
    settings.n_ctx = 512
    settings.cpuparams.n_threads = 1
    request = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0.0}
    reply = xllamacpp.Server(settings).handle_chat_completions(request)
    assert reply["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]
    answer = reply["choices"][0]["message"]["content"]
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_tokenizer_of_your_own_is_refused(script: Path, model_dir: str, tmp_path: Path) -> None:
    done = convert(script, model_dir, tmp_path / "model.gguf")
    assert done.returncode != 0
    assert "pre-tokenizer was not recognized" in done.stderr
