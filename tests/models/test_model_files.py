"""Models whose weights are in several files: loaded, known by all of them, refused when one is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import LanguageModel
from lit_unlearn.errors import ModelError
from lit_unlearn.models.files import ModelFiles, count_parameters
from lit_unlearn.utils.io import file_digest

IDS = torch.arange(24).view(2, 12)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def sharded(model_dir: str, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_shards_are_one_model(sharded: Path, model_dir: str, tmp_path: Path) -> None:
    lm = LanguageModel(str(sharded))
    lm.load(torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    assert torch.equal(logits_of(lm.model), logits_of(whole))
    assert lm.files_dtype == torch.bfloat16
    files = sorted(sharded.glob("*.safetensors"))
    assert lm.origin()["weights"] == {file.name: file_digest(file) for file in files}
    again = AutoModelForCausalLM.from_pretrained(lm.save(tmp_path / "out"))
    assert torch.equal(logits_of(again), logits_of(whole))


def test_sizes_and_samples_count_every_shard(sharded: Path, model_dir: str) -> None:
    files = ModelFiles(str(sharded))
    shards = files.weight_files()
    assert files.export_size() == sum(shard.stat().st_size for shard in shards)
    parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model_dir).parameters())
    assert sum(map(count_parameters, shards)) == parameters

    samples = {files.sample()}
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        samples.add(files.sample())
    assert len(samples) == len(shards) + 1
    moved = shutil.copytree(sharded, sharded.with_name("moved"))
    assert ModelFiles(str(moved)).sample() == files.sample()


@pytest.mark.parametrize("how", ["missing", "truncated", "pointer"])
def test_a_shard_that_is_not_whole_is_named(how: str, sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:3000])
    else:
        shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 3608064\n")
    with pytest.raises(ModelError, match=str(sharded) if how == "truncated" else shard.name) as error:
        LanguageModel(str(sharded)).load(torch.float32)
    assert (error.value.exit_code, error.value.argument) == (2, "model")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "AWQ"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "AutoRound"),
    ],
)
@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_weights_that_are_packed_integers_are_refused(
    fields: dict[str, Any], name: str, adapter: dict[str, Any] | None, model_dir: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "packed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))
    with pytest.raises(ModelError, match=rf"is quantised with {name}.*`model`.*`quantization`") as error:
        LanguageModel(str(folder), adapter=adapter).load(torch.float32)
    assert (error.value.exit_code, error.value.argument) == (2, "model")


def test_a_model_that_is_in_no_files(tmp_path: Path) -> None:
    files = ModelFiles("owner/model", "main")
    assert files.folder() is None
    assert files.describe() == {"commit": None, "weights": {}}
    assert (files.export_size(), files.dtype()) == (0, None)
    assert files.sample() != ModelFiles("owner/model", "other").sample()
