"""A saved adapter as the model: merged into its base model, or trained further, with the right reference model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import OBJECTIVES, packed_batch, through_package
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_unlearn import LanguageModel
from lit_unlearn.errors import ConfigError, LitUnlearnError, MissingFileError, ModelError
from lit_unlearn.utils.io import file_digest

IDS = torch.arange(24).view(2, 12)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8},
    "dora": {"r": 4, "use_dora": True},
    "loha": {"peft_type": "loha", "r": 4},
    "vera": {"peft_type": "vera", "r": 4},
    "modules_to_save": {"r": 4, "modules_to_save": ["model.norm"], "target_modules": ["q_proj"]},
}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def move(lm: LanguageModel, seed: int = 1) -> LanguageModel:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter)
    return lm


def make_adapter(folder: Path, base: str, fields: dict[str, Any]) -> str:
    """Save a trained adapter as people have it: peft's folder, with the path of the base model."""
    lm = LanguageModel(base, adapter=fields)
    lm.load(torch.float32)
    move(lm)
    model: Any = lm.model
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def adapter_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "lora", model_dir, KINDS["lora"])


def edit_config(folder: str, **fields: Any) -> None:
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def loaded(folder: str, dtype: torch.dtype = torch.float32, **settings: Any) -> LanguageModel:
    lm = LanguageModel(folder, **settings)
    lm.load(dtype)
    return lm


def peft_logits(folder: str, base: str) -> Tensor:
    return logits_of(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


# Training it further -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_being_trained_and_is_its_own_reference(kind: str, model_dir: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", model_dir, KINDS[kind])
    wanted = peft_logits(folder, model_dir)
    lm = loaded(folder)
    assert lm.has_adapter
    assert torch.equal(logits_of(lm.model), wanted)

    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in lm.state_dict() if ".default" in name and name in dict(lm.named_parameters())}
    move(lm, seed=2)
    moved = logits_of(lm.model)
    assert not torch.equal(moved, wanted)
    lm.train()
    with lm.reference():
        assert torch.equal(logits_of(lm.model), wanted)
        for objective in OBJECTIVES.values():
            assert not through_package(lm, packed_batch(), objective).requires_grad
    assert torch.equal(logits_of(lm.model), moved)
    assert {name for name, parameter in lm.named_parameters() if parameter.requires_grad} == trained

    path = lm.save(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(logits_of(merged), moved, rtol=0, atol=1e-5 * moved.abs().max().item())
    assert sorted(file.name for file in (path / "adapter").iterdir() if file.is_dir()) == []
    assert torch.equal(peft_logits(str(path / "adapter"), model_dir), moved)


def test_gradients_reach_the_adapter_although_the_reference_runs_in_between(adapter_dir: str) -> None:
    lm = loaded(adapter_dir)
    rows = packed_batch()

    def compare(tokens: Any) -> Tensor:
        reference = lm.token_logp(tokens._replace(hidden=tokens.reference.hidden)).detach()
        return (lm.token_logp(tokens) - reference).square().sum() + lm.token_logp(tokens).sum()

    value = lm(rows, compare, reference=True)
    value.backward()
    for name, parameter in lm.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # Before the first step both are the same model.
    difference = lm(rows, lambda tokens: tokens.hidden - tokens.reference.hidden, reference=True)
    lm.eval()
    assert not difference.any()


def test_the_reference_while_the_model_is_as_exported(adapter_dir: str, model_dir: str) -> None:
    lm = move(loaded(adapter_dir), seed=2)
    live = logits_of(lm.model)
    with lm.as_exported(torch.bfloat16):
        exported = logits_of(lm.model)
        with lm.reference():
            assert torch.equal(logits_of(lm.model), peft_logits(adapter_dir, model_dir))
        assert torch.equal(logits_of(lm.model), exported)
    assert torch.equal(logits_of(lm.model), live)
    assert not torch.equal(exported, live)
    assert all(parameter.requires_grad == ("default" in name) for name, parameter in lm.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_is_trained_in_float32_or_wider(dtype: torch.dtype, adapter_dir: str) -> None:
    lm = loaded(adapter_dir, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {parameter.dtype for parameter in lm.parameters() if parameter.requires_grad} == {wide}
    # Checkpoints know the base model's dtype, not the wider one of the copy.
    assert lm.base_checksum()["dtype"] == str(dtype).removeprefix("torch.")


def test_a_checkpoint_knows_the_adapter_that_was_started_from(adapter_dir: str, model_dir: str, tmp_path: Path) -> None:
    lm, same = loaded(adapter_dir), loaded(adapter_dir)
    assert same.has_base(lm.base_checksum())
    other = make_adapter(tmp_path / "other", model_dir, {"r": 4, "lora_alpha": 16})
    weights = load_file(Path(other) / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, Path(other) / "adapter_model.safetensors")
    assert not loaded(other).has_base(lm.base_checksum())
    assert loaded(other).fingerprint() != lm.fingerprint() == same.fingerprint()


# In a process that cannot import this package.
PLAIN = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lit_unlearn", "lightning"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, ids, *exports = sys.argv[1:]
for export in exports:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{export}/adapter").eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(ids), use_cache=False).logits, f"{export}.pt")
"""


@pytest.mark.slow  # starts an interpreter that imports everything
def test_peft_and_transformers_alone_load_an_exported_adapter(model_dir: str, tmp_path: Path) -> None:
    base = logits_of(AutoModelForCausalLM.from_pretrained(model_dir))
    wanted = {}
    for kind, fields in KINDS.items():
        lm = LanguageModel(model_dir, adapter=fields)
        lm.load(torch.float32)
        export = move(lm).save(tmp_path / kind)
        wanted[str(export)] = logits_of(lm.model)
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", PLAIN, model_dir, str(tmp_path / "ids.pt"), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for export, logits in wanted.items():
        assert torch.equal(torch.load(f"{export}.pt"), logits), export
        assert not torch.equal(logits, base)


# Merging it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_an_ordinary_model(kind: str, model_dir: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", model_dir, KINDS[kind])
    wanted = peft_logits(folder, model_dir)
    lm = loaded(folder, merge_adapter=True)
    assert not lm.has_adapter
    assert lm.linear_head
    assert all(parameter.requires_grad for parameter in lm.parameters())
    torch.testing.assert_close(logits_of(lm.model), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    path = lm.save(tmp_path / "out")
    assert not (path / "adapter").exists()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(path)), logits_of(lm.model))


def test_a_new_adapter_on_the_merged_model(adapter_dir: str, model_dir: str, tmp_path: Path) -> None:
    lm = loaded(adapter_dir, merge_adapter=True, adapter={"r": 2})
    merged = logits_of(lm.model)
    wanted = peft_logits(adapter_dir, model_dir)
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    move(lm, seed=2)
    with lm.reference():
        assert torch.equal(logits_of(lm.model), merged)
    assert lm.origin()["adapter"]["r"] == 2
    assert (lm.save(tmp_path / "out") / "adapter").is_dir()


# Where it came from --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_the_origin_names_base_and_adapter_with_their_digests(merge: bool, adapter_dir: str, model_dir: str) -> None:
    lm = loaded(adapter_dir, merge_adapter=merge)
    origin = lm.origin()
    assert origin["name"] == adapter_dir
    assert origin["architecture"] == "LlamaForCausalLM"
    weights = Path(adapter_dir) / "adapter_model.safetensors"
    assert origin["weights"] == {"adapter_model.safetensors": file_digest(weights)}
    assert origin["base"] == {
        "name": model_dir,
        "revision": None,
        "commit": None,
        "weights": {"model.safetensors": file_digest(Path(model_dir) / "model.safetensors")},
        "merged": merge,
    }
    assert (origin["adapter"] is None) == merge
    assert loaded(model_dir).origin()["base"] is None


def test_the_identity_of_a_run_has_both(adapter_dir: str, model_dir: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    folder = str(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    edit_config(folder, base_model_name_or_path=str(base))

    def sample() -> str:
        files = LanguageModel(folder).files
        assert files is not None
        return files.sample()

    samples = {sample()}
    for file in (base / "model.safetensors", Path(folder) / "adapter_model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        samples.add(sample())
    assert len(samples) == 3


def test_the_tokenizer_is_the_adapters_or_the_bases(adapter_dir: str, model_dir: str, tmp_path: Path) -> None:
    assert LanguageModel(adapter_dir).tokenizer_name == model_dir
    folder = shutil.copytree(adapter_dir, tmp_path / "adapter")
    shutil.copy(Path(model_dir) / "tokenizer.json", folder)
    assert LanguageModel(str(folder)).tokenizer_name == str(folder)
    assert set(LanguageModel(str(folder)).inputs) == {str(folder), model_dir}


def test_the_base_models_folder_is_not_written(adapter_dir: str, model_dir: str) -> None:
    with pytest.raises(LitUnlearnError, match="is the folder of the model"):
        loaded(adapter_dir).save(model_dir)


def test_a_base_model_beside_the_adapter(adapter_dir: str, model_dir: str, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "moved" / "base")
    folder = str(shutil.copytree(adapter_dir, tmp_path / "moved" / "adapter"))
    edit_config(folder, base_model_name_or_path="../base")
    assert torch.equal(logits_of(loaded(folder).model), peft_logits(adapter_dir, model_dir))


# What cannot be used -------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(adapter_dir: str, tmp_path: Path) -> str:
    return str(shutil.copytree(adapter_dir, tmp_path / "copy"))


@pytest.mark.parametrize("base", ["/nowhere/base", "../nowhere", "nobody/no-such-model", "base"])
def test_a_base_model_that_is_not_there_is_named(base: str, copied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    edit_config(copied, base_model_name_or_path=base)
    with pytest.raises(
        MissingFileError, match=f"the base model '{base}' of the adapter '{copied}' is not there"
    ) as error:
        loaded(copied)
    assert error.value.argument == "model"
    assert "`base_model_name_or_path`" in str(error.value)


def damage(folder: str, how: str) -> None:
    weights = Path(folder) / "adapter_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "pointer":
        weights.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 3608064\n")
    elif how == "incomplete":
        tensors = load_file(weights)
        tensors.pop(min(tensors))
        save_file(tensors, weights)
    elif how == "other base":
        edit_config(folder, target_modules=["c_attn"])
    elif how == "no base":
        edit_config(folder, base_model_name_or_path=None)
    elif how == "config":
        (Path(folder) / "adapter_config.json").write_text('{"peft_type": "LORA",')
    else:
        weights.unlink()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "incomplete metadata|deserializ"),
        ("pointer", "git-lfs pointer"),
        ("incomplete", "missing adapter keys"),
        ("other base", "c_attn"),
        ("no base", "names no base model"),
        ("config", "adapter's config"),
        ("no weights", r"expected adapter_config\.json and \*\.safetensors"),
    ],
)
def test_a_damaged_adapter_is_one_sentence(merge: bool, how: str, message: str, copied: str) -> None:
    damage(copied, how)
    with pytest.raises(LitUnlearnError, match=message) as error:
        loaded(copied, merge_adapter=merge)
    assert copied in str(error.value)
    assert (error.value.exit_code, error.value.argument) == (2, "model")
    assert len(str(error.value)) < 1000


def test_an_adapter_of_an_adapter(adapter_dir: str, copied: str) -> None:
    edit_config(copied, base_model_name_or_path=adapter_dir)
    with pytest.raises(ModelError, match="is an adapter itself"):
        LanguageModel(copied)


def test_settings_that_exclude_each_other(adapter_dir: str, model_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"goes on being trained.*`merge_adapter`"):
        LanguageModel(adapter_dir, adapter={"r": 2})
    with pytest.raises(ConfigError, match="`merge_adapter` needs the folder of a peft adapter"):
        LanguageModel(model_dir, merge_adapter=True)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ConfigError, match="cannot be merged into quantised weights"):
        LanguageModel(adapter_dir, merge_adapter=True, adapter={"r": 2}, quantization=quantization)


def test_an_adapter_that_works_outside_of_the_layers(model_dir: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(LitUnlearnError, match="virtual tokens") as error:
        loaded(str(tmp_path / "prompt"))
    assert error.value.argument == "model"
