"""Models in GGUF: the weights that are in the file, an export in safetensors, and what is told when something is missing."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import LanguageModel
from lit_unlearn.errors import ConfigError, LitUnlearnError, MissingFileError, ModelError

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")

IDS = torch.arange(24).view(1, 24)
# The names of llama.cpp for those of transformers.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in fixed:
        return f"{fixed[name]}.weight"
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def write_gguf(file: Path, model: Any, tokenizer: Any, kind: str) -> None:
    """Write a Llama as llama.cpp's converter does, matrices in one of its types."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbours, transformers halves.
            heads = config.num_attention_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        values = weight.contiguous().numpy()
        quantization = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_dir(model_dir: str, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with the tiny model as ``tiny.gguf``."""

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        write_gguf(folder / "tiny.gguf", model, AutoTokenizer.from_pretrained(model_dir), kind)
        return folder

    return make


def loaded(folder: Path, **settings: Any) -> LanguageModel:
    lm = LanguageModel(str(folder), gguf_file="tiny.gguf", **settings)
    lm.load(torch.float32)
    return lm


@needs_gguf
def test_a_file_of_floats_is_the_model_that_it_was_made_of(gguf_dir: Any, model_dir: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost
        lm = loaded(gguf_dir("F32"))
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.testing.assert_close(logits_of(lm.model), logits_of(before), rtol=0, atol=1e-6)
    assert lm.linear_head
    assert all(parameter.requires_grad for parameter in lm.parameters())

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert lm.tokenizer is not None
    text = "Where was the author born?"
    assert lm.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert lm.tokenizer.eos_token == tokenizer.eos_token

    path = lm.save(tmp_path / "out")
    assert sorted(file.suffix for file in path.glob("model*")) == [".safetensors"]
    again = LanguageModel(str(path))
    again.load(torch.float32)
    assert torch.equal(logits_of(again.model), logits_of(lm.model))
    assert again.tokenizer is not None
    assert again.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


@needs_gguf
def test_quantised_weights_are_dequantised_and_one_line_says_what_is_lost(gguf_dir: Any, tmp_path: Path) -> None:
    import gguf

    folder = gguf_dir("Q8_0")
    with pytest.warns(UserWarning, match=r"'tiny\.gguf' were rounded to Q8_0.*exports are safetensors") as told:
        lm = loaded(folder)
    assert len([warning for warning in told if "tiny.gguf" in str(warning.message)]) == 1

    reader = gguf.GGUFReader(folder / "tiny.gguf")
    (tensor,) = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight"]
    expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    weights = lm.causal_lm.state_dict()
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], expected)
    path = lm.save(tmp_path / "out")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(path)), logits_of(lm.model))


@needs_gguf
def test_the_path_of_the_file_will_do(gguf_dir: Any) -> None:
    folder = gguf_dir("F32")
    lm = LanguageModel(str(folder / "tiny.gguf"))
    assert (lm.name, lm.tokenizer_name) == (str(folder), str(folder))
    lm.load(torch.float32)
    assert torch.equal(logits_of(lm.model), logits_of(loaded(folder).model))


@needs_gguf
def test_an_adapter_on_a_file(gguf_dir: Any, tmp_path: Path) -> None:
    lm = loaded(gguf_dir("F32"), adapter={"r": 2})
    assert lm.has_adapter
    assert (lm.save(tmp_path / "out") / "adapter" / "adapter_config.json").is_file()


@needs_gguf
def test_the_record_and_the_identity_know_the_file(gguf_dir: Any) -> None:
    folder = gguf_dir("F32")
    (folder / "other.safetensors").write_bytes(b"")  # not read
    lm = loaded(folder)
    assert list(lm.origin()["weights"]) == ["tiny.gguf"]
    assert lm.files is not None
    assert lm.files_dtype is None
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    assert lm.files.export_size() == 4 * parameters

    sample = lm.files.sample()
    content = bytearray((folder / "tiny.gguf").read_bytes())
    content[-1] ^= 1
    (folder / "tiny.gguf").write_bytes(content)
    assert lm.files.sample() != sample


@needs_gguf
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("missing", MissingFileError, r"has no file 'tiny\.gguf'.*\['other\.gguf'\]"),
        ("truncated", ModelError, r"tiny\.gguf' cannot be read: .*complete copy"),
        ("pointer", ModelError, "is a git-lfs pointer"),
        ("no gguf", ModelError, r"tiny\.gguf' cannot be read"),
    ],
)
def test_damaged_files_are_one_sentence_at_once(
    damage: str, error: type[LitUnlearnError], message: str, gguf_dir: Any
) -> None:
    folder = gguf_dir("F32")
    file = folder / "tiny.gguf"
    if damage == "missing":
        file.rename(folder / "other.gguf")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "pointer":
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 3608064\n")
    else:
        file.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(error, match=message) as raised:
        LanguageModel(str(folder), gguf_file="tiny.gguf")
    assert raised.value.argument == "gguf_file"
    assert raised.value.exit_code == 2
    assert len(str(raised.value)) < 500


@needs_gguf
def test_one_part_of_several_is_refused(gguf_dir: Any) -> None:
    folder = gguf_dir("F32")
    (folder / "tiny.gguf").rename(folder / "tiny-00001-of-00003.gguf")
    with pytest.raises(ModelError, match=r"one of 3 parts.*--merge"):
        LanguageModel(str(folder), gguf_file="tiny-00001-of-00003.gguf")


def test_without_the_package_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "gguf" else find(name))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    for settings in ({"model": str(tmp_path), "gguf_file": "tiny.gguf"}, {"model": str(tmp_path / "tiny.gguf")}):
        with pytest.raises(ModelError, match="`pip install gguf`") as error:
            LanguageModel(**settings)
        assert error.value.argument == "gguf_file"


def test_a_folder_that_has_only_the_file_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingFileError, match=r"set `gguf_file`, such as 'tiny\.gguf'"):
        LanguageModel(str(tmp_path))


def test_a_file_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="`gguf_file` is the name of a file in `model`"):
        LanguageModel(config=TINY, gguf_file="tiny.gguf")


@needs_gguf
def test_a_file_is_not_quantised_again(gguf_dir: Any) -> None:
    settings: dict[str, Any] = {"quantization": {"load_in_4bit": True}, "adapter": {"r": 2}}
    with pytest.raises(ConfigError, match="GGUF"):
        LanguageModel(str(gguf_dir("F32")), gguf_file="tiny.gguf", **settings)
