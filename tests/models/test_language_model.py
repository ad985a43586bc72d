"""Where the supervised tokens are, and how a model gets in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import NLL, LanguageModel, LogitMargin
from lit_unlearn.errors import BatchError, ModelError
from lit_unlearn.models import TokenIndex, locate

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def model_copy(model_dir: str, tmp_path: Path) -> Path:
    """The model directory, to be spoilt."""
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def loaded(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> LanguageModel:
    lm = LanguageModel(*args, **kwargs)
    lm.load(dtype)
    return lm


def batch(labels: list[list[int]], **more: list[list[int]]) -> dict[str, Tensor]:
    """A batch whose input ids are 10, 11, 12, … so that a label names its place."""
    target = torch.tensor(labels)
    ids = torch.arange(10, 10 + target.numel()).view_as(target)
    return {"input_ids": ids, "labels": target} | {key: torch.tensor(value) for key, value in more.items()}


def logits_of(model: nn.Module) -> Tensor:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def losses(lm: LanguageModel) -> Tensor:
    rows = batch([[-100, 3, 4, 5], [-100, -100, 7, -100]], attention_mask=[[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        return torch.stack([lm(rows, lambda tokens: f(lm, tokens).mean()) for f in (LogitMargin(), NLL())])  # noqa: B023


# Supervised tokens ---------------------------------------------------------------------------------------------------


def as_lists(tokens: TokenIndex) -> list[Any]:
    return [tokens.state.tolist(), tokens.labels.tolist(), tokens.sequence.tolist()]


def test_next_token_shift_by_hand():
    """State t predicts token t + 1: labels 3, 4 in row 0, 8 in row 2. Row 1 has none and gets no number."""
    rows = batch([[-100, 3, 4, -100], [-100, -100, -100, -100], [-100, -100, -100, 8]])
    tokens = locate(rows)
    assert as_lists(tokens) == [[0, 1, 10], [3, 4, 8], [0, 0, 1]]
    assert tokens.num_sequences == 2


def test_label_alignment_reads_the_labels_own_state():
    rows = batch([[-100, 3, 4, -100], [-100, -100, -100, -100], [7, -100, -100, 8]])
    tokens = locate(rows, "label")
    assert as_lists(tokens) == [[1, 2, 8, 11], [3, 4, 7, 8], [0, 0, 1, 1]]
    assert tokens.num_sequences == 2


def test_nothing_predicts_the_first_token_of_a_row():
    rows = batch([[5, 6, 7], [8, -100, -100]])
    tokens = locate(rows)
    assert as_lists(tokens) == [[0, 1], [6, 7], [0, 0]]
    assert tokens.num_sequences == 1


def test_nothing_predicts_the_first_token_of_a_packed_sequence():
    """Three sequences, the second without labels, and a tail of padding; every position of the others has a label."""
    rows = batch([[1, 2, 3, -100, -100, 6, 7, -100]], position_ids=[[0, 1, 2, 0, 1, 0, 1, 0]])
    tokens = locate(rows)
    assert as_lists(tokens) == [[0, 1, 5], [2, 3, 7], [0, 0, 1]]
    assert tokens.num_sequences == 2
    assert as_lists(locate(rows, "label")) == [[0, 1, 2, 5, 6], [1, 2, 3, 6, 7], [0, 0, 0, 1, 1]]


def test_sequences_are_numbered_across_packed_rows():
    rows = batch([[-100, 2, -100, 4], [-100, 6, 7, 8]], position_ids=[[0, 1, 0, 1], [0, 1, 2, 3]])
    tokens = locate(rows)
    assert as_lists(tokens) == [[0, 2, 4, 5, 6], [2, 4, 6, 7, 8], [0, 1, 2, 2, 2]]
    assert tokens.num_sequences == 3


def test_positions_beside_a_mask_are_only_positions():
    """transformers, too, takes a row with a mask for one sequence, whatever its positions."""
    rows = batch([[-100, 2, 3, 4]], position_ids=[[0, 1, 0, 1]], attention_mask=[[1, 1, 1, 1]])
    tokens = locate(rows)
    assert as_lists(tokens) == [[0, 1, 2], [2, 3, 4], [0, 0, 0]]


def test_no_supervised_tokens():
    tokens = locate(batch([[4, -100], [-100, -100]]))
    assert as_lists(tokens) == [[], [], []]
    assert tokens.num_sequences == 0


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_incomplete_batch_is_refused(missing, model_dir):
    rows = batch([[-100, 2]])
    rows["mask"] = rows.pop(missing)
    left = sorted(rows)
    with pytest.raises(BatchError) as error:
        loaded(model_dir)(rows, lambda tokens: tokens)
    assert "needs 'input_ids' and 'labels' (-100 where not supervised)" in str(error.value)
    assert str(left) in str(error.value)


def test_compute_sees_the_states_that_predict(model_dir):
    """Hidden states are picked by the indices of `locate`, and the result of `compute` comes back."""
    lm = loaded(model_dir)
    rows = batch([[-100, 3, 4, -100], [-100, -100, 7, 8]])
    with torch.no_grad():
        states = lm.model.base_model(input_ids=rows["input_ids"]).last_hidden_state
        tokens, word = lm(rows, lambda tokens: (tokens, "done"))
        shifted = lm(rows, lambda tokens: tokens, "label")
    assert word == "done"
    assert torch.equal(tokens.hidden, states[[0, 0, 1, 1], [0, 1, 1, 2]])
    assert torch.equal(shifted.hidden, states[[0, 0, 1, 1], [1, 2, 2, 3]])
    assert torch.equal(tokens.labels, shifted.labels)


def test_mask_reaches_the_model(model_dir):
    """Left padding is seen without it. Rotary positions differ by the shift, whose rounding (1e-6) is all that is left."""
    lm = loaded(model_dir)
    ids, labels = torch.tensor([[11, 12, 13, 14]]), torch.tensor([[-100, -100, 13, 14]])
    pad = torch.ones(1, 3, dtype=torch.int64)
    left = {
        "input_ids": torch.cat([9 * pad, ids], dim=1),
        "labels": torch.cat([-100 * pad, labels], dim=1),
        "attention_mask": torch.cat([0 * pad, torch.ones_like(ids)], dim=1),
    }
    with torch.no_grad():
        padded, plain, unmasked = (
            lm(rows, lambda tokens: LogitMargin()(lm, tokens).mean())
            for rows in (left, {"input_ids": ids, "labels": labels}, {**left, "attention_mask": torch.ones(1, 7)})
        )
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=0)
    assert unmasked != pytest.approx(plain.item(), rel=1e-3)


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["directory", "config"])
def test_load_in_the_asked_dtype_and_in_training_mode(source, dtype, model_dir, tokenizer_dir):
    lm = LanguageModel(model_dir) if source == "directory" else LanguageModel(config=TINY, tokenizer=tokenizer_dir)
    assert not lm.is_loaded
    assert list(lm.parameters()) == []
    lm.load(dtype)
    assert lm.is_loaded
    assert {parameter.dtype for parameter in lm.parameters()} == {dtype}
    assert all(module.training for module in lm.modules())
    assert lm.linear_head
    assert not any(parameter.grad is not None for parameter in lm.parameters())


def test_directory_gives_its_own_weights(model_dir):
    lm = loaded(model_dir)
    saved = load_file(Path(model_dir) / "model.safetensors")
    assert all(torch.equal(lm.model.state_dict()[name], weight) for name, weight in saved.items())
    assert len(lm.tokenizer) == lm.model.config.vocab_size


def test_config_takes_size_and_special_tokens_from_the_tokenizer(tokenizer, tokenizer_dir):
    config = loaded(config=TINY, tokenizer=tokenizer_dir).model.config
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert config.pad_token_id == tokenizer.pad_token_id
    larger = loaded(config={**TINY, "vocab_size": 512, "eos_token_id": 3}, tokenizer=tokenizer_dir).model.config
    assert (larger.vocab_size, larger.eos_token_id) == (512, 3)


def test_config_without_tokenizer(tokenizer):
    lm = loaded(config={**TINY, "vocab_size": 40})
    assert lm.tokenizer is None
    assert lm.model.get_input_embeddings().num_embeddings == 40


def test_random_weights_come_from_the_seed(tokenizer_dir):
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(loaded(config=TINY, tokenizer=tokenizer_dir).parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_second_load_does_nothing(model_dir):
    lm = loaded(model_dir)
    model = lm.model
    next(lm.parameters()).data.zero_()
    lm.load(torch.bfloat16)
    assert lm.model is model
    assert lm.model.dtype == torch.float32
    assert not next(lm.parameters()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrap_keeps_the_users_model(dtype, model_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    lm = LanguageModel.wrap(model, tokenizer, chunk_size=3)
    lm.load(torch.float64)
    assert lm.model is model
    assert lm.tokenizer is tokenizer
    assert lm.chunk_size == 3
    assert lm.linear_head
    assert {parameter.dtype for parameter in lm.parameters()} == {dtype}
    assert all(module.training for module in model.modules())
    assert LanguageModel.wrap(model).tokenizer is None


def test_use_before_load_is_refused(model_dir):
    with pytest.raises(RuntimeError, match=r"not loaded"):
        LanguageModel(model_dir)(batch([[-100, 2]]), lambda tokens: tokens)


@pytest.mark.parametrize("given", [{}, {"model": "gpt2", "config": TINY}])
def test_exactly_one_of_model_and_config(given):
    with pytest.raises(ValueError, match=r"give either `model` .* or `config`"):
        LanguageModel(**given)


def test_config_without_model_type_is_refused():
    with pytest.raises(ValueError, match=r"`config` needs a `model_type` such as 'llama'; got \['hidden_size'\]"):
        LanguageModel(config={"hidden_size": 3})


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "runs/demo/model"])
def test_missing_directory_is_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"there is no model directory '{name}'"):
        LanguageModel(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_unreachable_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm = LanguageModel(name)  # nothing is looked up yet
    with pytest.raises(FileNotFoundError, match=name):
        lm.load(torch.float32)


def test_unreachable_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nobody/none.*`tokenizer`"):
        loaded(config=TINY, tokenizer="nobody/none")


@pytest.mark.parametrize("left_out", ["model.safetensors", "config.json"])
def test_incomplete_directory_is_refused_at_once(left_out, model_copy):
    (model_copy / left_out).unlink()
    with pytest.raises(FileNotFoundError, match=r"is no complete model directory: expected config\.json and") as error:
        LanguageModel(str(model_copy))
    assert f"found {sorted(path.name for path in model_copy.iterdir())}" in str(error.value)


def test_file_instead_of_directory_is_refused(model_copy):
    with pytest.raises(FileNotFoundError, match=r"is no complete model directory.*found a file"):
        LanguageModel(str(model_copy / "model.safetensors"))


def test_pickled_weights_only_when_allowed(model_copy, model_dir):
    weights = load_file(model_copy / "model.safetensors")
    torch.save(weights, model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="use_safetensors"):
        LanguageModel(str(model_copy))
    lm = loaded(str(model_copy), use_safetensors=False)
    assert torch.equal(logits_of(lm.model), logits_of(loaded(model_dir).model))


def test_safetensors_also_load_when_others_are_allowed(model_copy):
    torch.save({}, model_copy / "pytorch_model.bin")  # and are preferred
    assert torch.equal(losses(loaded(str(model_copy), use_safetensors=False)), losses(loaded(str(model_copy))))
    (model_copy / "pytorch_model.bin").unlink()
    assert torch.equal(losses(loaded(str(model_copy), use_safetensors=False)), losses(loaded(str(model_copy))))


def test_tokenizer_larger_than_the_embedding_is_refused(tokenizer, tokenizer_dir):
    with pytest.raises(ValueError, match=rf"tokenizer has {len(tokenizer)} entries but the model embeds only 30"):
        loaded(config={**TINY, "vocab_size": 30}, tokenizer=tokenizer_dir)
    model = loaded(config={**TINY, "vocab_size": 30}).model
    with pytest.raises(ValueError, match="they do not belong together"):
        LanguageModel.wrap(model, tokenizer)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 3608064\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_git_lfs_pointer_is_refused_at_once(name, model_copy):
    (model_copy / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name}' is a git-lfs pointer.*git lfs pull"):
        LanguageModel(str(model_copy))
    with pytest.raises(ModelError, match=r"git lfs pull"):
        loaded(config=TINY, tokenizer=str(model_copy)) if name == "tokenizer.json" else loaded(str(model_copy))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "config":
        (folder / "config.json").write_text('{"model_type": "llama",')
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif how == "shard":
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"a": "gone.safetensors"}})
        )
        weights.rename(folder / "model-1-of-2.safetensors")
    else:
        edit_config(folder, **{"model_type": how} if how != "vocabulary" else {"vocab_size": 800})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "incomplete metadata"),
        ("config", "not a valid JSON file"),
        ("tokenizer", "the tokenizer '.*line 1 column 2"),
        ("shard", r"gone\.safetensors"),
        ("llama9", "`llama9`"),
        ("t5", r"is an encoder-decoder \(model type 't5'\).*`model`"),
        ("vit", r"no causal language model \(model type 'vit'\).*`model`"),
        ("vocabulary", r"has shape \(\d+, 32\), the config asks for \(800, 32\)"),
    ],
)
def test_what_transformers_cannot_read_is_one_sentence(how, message, model_copy):
    damage(model_copy, how)
    with pytest.raises(ModelError, match=message) as error:
        loaded(str(model_copy))
    assert str(model_copy) in str(error.value)
    assert len(str(error.value)) < 700
    assert error.value.exit_code == 2
    assert error.value.argument == ("tokenizer" if how == "tokenizer" else "model")


def test_unknown_architecture_from_config():
    with pytest.raises(ModelError, match=r"llama9.*`config`"):
        loaded(config={"model_type": "llama9"})


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_load_chooses_float32_on_the_cpu(device, model_dir):
    lm = LanguageModel(model_dir)
    lm.load(device=device)
    assert {(p.dtype, p.device.type) for p in lm.parameters()} == {(torch.float32, "cpu")}


def test_load_takes_the_checkpoints_dtype_on_an_accelerator(model_dir, tmp_path):
    """The meta device stands in for one; probing a model there reads no values, so it is left out."""
    half = loaded(model_dir, dtype=torch.bfloat16).save(tmp_path / "half", dtype=torch.bfloat16)
    for folder, dtype in ((half, torch.bfloat16), (model_dir, torch.float32)):
        lm = LanguageModel(str(folder))
        seen = []
        lm._adopt = seen.append
        lm.load(device="meta")
        assert (seen[0].dtype, seen[0].device.type) == (dtype, "meta")


@pytest.mark.parametrize("model_type", ["llama", "homemade"])
def test_code_beside_the_weights_is_not_run(model_type, model_copy, tmp_path):
    """`auto_map` names a local file: ignored for a known model type, refused for an unknown one, never run."""
    ran = tmp_path / "ran"
    code = (
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    (model_copy / "homemade.py").write_text(code)
    config = json.loads((model_copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Model"}
    (model_copy / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    lm = LanguageModel(str(model_copy))
    if model_type == "llama":
        lm.load(torch.float32)
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            lm.load(torch.float32)
    assert not ran.exists()


# The head ------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Not an `nn.Linear`, though it has one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class HalvedHead(nn.Linear):
    """An `nn.Linear` by class, whose weight and bias alone do not give its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class PackedHead(nn.Linear):
    """As quantised layers are: an `nn.Linear` by class, whose weight has another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.shape = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.flatten())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view(self.shape))


@pytest.mark.parametrize("head", [Head, PackedHead])
def test_head_of_another_class_falls_back(head, model_dir):
    plain = loaded(model_dir)
    model = loaded(model_dir).model.eval()
    model.lm_head = head(model.lm_head)
    lm = LanguageModel.wrap(model)
    assert plain.linear_head
    assert not lm.linear_head
    assert model.training
    torch.testing.assert_close(losses(lm), losses(plain), rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["subclass", "before", "after"])
def test_head_that_does_more_falls_back(how, model_dir):
    wanted = loaded(model_dir)
    wanted.model.lm_head.weight.data.div_(2)
    model = loaded(model_dir).model
    if how == "subclass":
        weight = model.lm_head.weight
        model.lm_head = HalvedHead(*weight.T.shape, bias=False)
        model.lm_head.weight = weight
    elif how == "before":
        model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] / 2,))
    else:
        model.lm_head.register_forward_hook(lambda _module, _args, out: out / 2)
    lm = LanguageModel.wrap(model)
    assert not lm.linear_head
    torch.testing.assert_close(losses(lm), losses(wanted), rtol=1e-6, atol=0)  # halving is exact


def test_probing_the_head_leaves_nothing_behind(model_dir):
    model = loaded(model_dir).model
    hooks = [len(module._forward_hooks) for module in model.modules()]
    LanguageModel.wrap(model)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_chunk_size_changes_nothing(tiny_lm):
    """Each chunk rounds its own sums: 3 words or tokens at a time against all at once, in float64."""

    def run(chunk_size: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        lm = tiny_lm()
        lm.chunk_size = chunk_size
        lm.load(torch.float64)
        rows = batch([[-100, 3, 4, 5, 6], [-100, -100, 7, 8, -100]])
        total = sum(lm(rows, lambda tokens: f(lm, tokens).mean()) for f in (LogitMargin(), NLL()))  # noqa: B023
        total.backward()
        return [total.detach(), *(parameter.grad for parameter in lm.parameters())]

    whole = run(None)
    for chunk_size in (1, 3, 10_000):
        for value, wanted in zip(run(chunk_size), whole, strict=True):
            # transformers' norms and rotations work in float32, so that the trunk's backward rounds to 6e-8
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("linear", [True, False])
def test_map_logits_is_the_function_of_the_logits(linear, model_dir):
    lm = loaded(model_dir, chunk_size=2)
    lm.linear_head = linear
    rows = batch([[-100, 3, 4, 5, 6]])
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def top_two(logits: Tensor, factor: Tensor) -> Tensor:
        return logits.topk(2, dim=-1).values * factor[:, None]

    with torch.no_grad():
        values = lm(rows, lambda tokens: lm.map_logits(top_two, tokens, scale))
        logits = lm.model(input_ids=rows["input_ids"]).logits[0, :4]
    torch.testing.assert_close(values, top_two(logits, scale), rtol=1e-6, atol=1e-7)


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_loads_in_transformers_with_the_same_logits(tied, dtype, tiny_lm, tmp_path):
    lm = tiny_lm(tie_word_embeddings=tied)
    lm.load(dtype)
    path = lm.save(str(tmp_path / "made" / "on" / "demand"))
    assert path == tmp_path / "made" / "on" / "demand"
    assert any(path.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == dtype
    assert torch.equal(logits_of(model), logits_of(lm.model))
    text = "Where was the author born?"
    assert AutoTokenizer.from_pretrained(path)(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    again = loaded(str(path), dtype=dtype)
    assert torch.equal(logits_of(again.model), logits_of(lm.model))


def test_export_of_given_weights(model_dir, tmp_path):
    """Sharded strategies gather the weights and hand them over."""
    lm = loaded(model_dir)
    doubled = {name: 2 * weight for name, weight in lm.model.state_dict().items()}
    saved = load_file(lm.save(tmp_path / "out", doubled) / "model.safetensors")
    assert all(torch.equal(weight, doubled[name]) for name, weight in saved.items())


def test_export_without_tokenizer(tmp_path):
    lm = loaded(config={**TINY, "vocab_size": 40})
    path = lm.save(tmp_path / "out")
    assert not list(path.glob("tokenizer*"))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(path)), logits_of(lm.model))
    with pytest.raises(FileNotFoundError, match=r"`tokenizer`"):
        loaded(str(path))


def test_export_replaces_an_earlier_one(model_copy):
    """All of it, also files that the new one lacks."""
    lm = loaded(str(model_copy))
    out = lm.save(model_copy.parent / "out", finish=lambda folder: (folder / "stale.txt").write_text("from before"))
    for parameter in lm.parameters():
        parameter.data.mul_(1.5)
    lm.save(out)
    assert not (out / "stale.txt").exists()
    assert torch.equal(logits_of(loaded(str(out)).model), logits_of(lm.model))
    assert {path.name for path in model_copy.parent.iterdir()} == {model_copy.name, "out"}


def test_export_into_an_empty_directory(model_dir, tmp_path):
    assert (loaded(model_dir).save(tmp_path / "empty") / "config.json").is_file()
    (tmp_path / "made").mkdir()
    assert (loaded(model_dir).save(tmp_path / "made") / "config.json").is_file()


@pytest.mark.parametrize("when", ["weights", "tokenizer", "digests"])
@pytest.mark.parametrize("earlier", [False, True])
def test_failed_export_leaves_the_earlier_one_whole(when, earlier, model_dir, tmp_path, monkeypatch):
    lm = loaded(model_dir)
    target = tmp_path / "out"
    if earlier:
        lm.save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()} if earlier else {}

    def half(place: Path, *_: Any, **settings: Any) -> None:
        ((place / "config.json") if place.is_dir() else place).write_text("{")
        raise OSError("disk full")

    if when == "weights":
        monkeypatch.setattr(lm.model, "save_pretrained", half)
    elif when == "tokenizer":
        monkeypatch.setattr(lm.tokenizer, "save_pretrained", half)
    else:
        monkeypatch.setattr("lit_unlearn.utils.folders._write_digests", half)
    with pytest.raises(OSError, match="disk full"):
        lm.save(target)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])
    if earlier:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_export_does_not_replace_what_is_no_model(kind, model_dir, tmp_path):
    target = tmp_path / "thesis"
    note = target / "notes.txt" if kind == "directory" else target
    note.parent.mkdir(exist_ok=True)
    note.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"notes\.txt" if kind == "directory" else r"thesis' is no folder"):
        loaded(model_dir).save(target)
    assert note.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_missing_weights_are_refused(model_dir: str, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "holes")
    weights = load_file(tmp_path / "holes" / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is incomplete: it has no model\.layers\.0\.mlp\.up_proj\.weight"):
        LanguageModel(str(tmp_path / "holes")).load(torch.float32)
