"""Adapters: the same losses as peft and transformers alone, a reference model bit for bit, an export that is merged."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from test_families import (
    COMMON,
    FAMILIES,
    OBJECTIVES,
    assert_same,
    dense,
    packed_batch,
    padded_batch,
    through_package,
    value_and_gradients,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_unlearn import NLL, LanguageModel

ADAPTER = {"r": 4, "lora_alpha": 8}
SMALL = {**TINY, "vocab_size": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
MODELS = {"untied": SMALL, "tied": {**SMALL, "tie_word_embeddings": True}, "gpt2": GPT2}
IDS = torch.arange(24).view(2, 12)

every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def build(
    config: dict[str, Any],
    adapter: dict[str, Any] | None = ADAPTER,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LanguageModel:
    """The base weights depend on the seed alone, because they are drawn before the adapter's."""
    torch.manual_seed(0)
    lm = LanguageModel(config=config, adapter=adapter, **settings)
    lm.load(dtype)
    return lm


def move(lm: LanguageModel) -> LanguageModel:
    """Moves every trainable parameter, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter)
    return lm


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def state_of(lm: LanguageModel) -> dict[str, Any]:
    return {name: value.clone() for name, value in lm.state_dict().items()}


def assert_equal(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


# Training ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_adapter_changes_nothing_and_is_all_there_is_to_train(config, dtype):
    base, lm = build(config, None, dtype), build(config, dtype=dtype)
    assert lm.has_adapter
    assert not base.has_adapter
    assert lm.linear_head
    assert all(module.training for module in lm.modules())
    trainable = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in lm.state_dict() if "lora_" in name}
    assert len(trainable) == 2 * (14 if config is not GPT2 else 8)  # every linear layer but the head
    wide = torch.promote_types(dtype, torch.float32)
    assert {parameter.dtype for parameter in lm.parameters() if parameter.requires_grad} == {wide}
    assert {parameter.dtype for parameter in lm.parameters() if not parameter.requires_grad} == {dtype}
    assert torch.equal(logits_of(lm.model), logits_of(base.model))
    assert not torch.equal(logits_of(move(lm).model), logits_of(base.model))


def test_adapters_are_the_same_on_every_process():
    """The seed decides; and what the package finds out about the model draws no numbers."""
    one, other = build(SMALL), build(SMALL)
    assert_equal(one.state_dict(), other.state_dict())
    torch.manual_seed(0)
    config = {key: value for key, value in SMALL.items() if key != "model_type"}
    plain = AutoModelForCausalLM.from_config(type(one.model.config)(**config))
    peft.get_peft_model(plain, peft.LoraConfig(**ADAPTER, target_modules="all-linear"))
    expected = dict(plain.named_parameters())
    found = dict(one.causal_lm.named_parameters())
    assert_equal(found, expected)


# In float64 the padded rows of Gemma 2 are nan in transformers, and the experts of GPT-OSS have no kernel. Gemma 2's own attention takes
# its softmax in float32 whatever the weights are, which AVX-512 rounds by the place in a row: packed and padded rows differed by 8e-8.
FLOAT32_ONLY = {"gemma2", "gemma2:default", "gpt_oss"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_trains_its_adapter_and_merges(family, tmp_path):
    """Against the model's own dense logits; exported and read again, the logits are the live ones.

    In float64, because Gemma 3 magnifies the rounding of float32: there its gradients differed by 3e-5, here by 5e-16.
    """
    config = {"model_type": family.model_type, **COMMON, **family.fields}
    lm = move(build(config, ADAPTER, torch.float32 if family.name in FLOAT32_ONLY else torch.float64))
    assert lm.linear_head == family.linear_head
    names = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    for name, objective in OBJECTIVES.items():
        wanted = value_and_gradients(lm, dense(lm, name))
        assert wanted[1].keys() == names
        assert all(gradient.any() for gradient in wanted[1].values())
        assert_same(value_and_gradients(lm, through_package(lm, padded_batch(), objective)), wanted)
        if family.packs:
            assert_same(value_and_gradients(lm, through_package(lm, packed_batch(), objective)), wanted)
    merged = AutoModelForCausalLM.from_pretrained(lm.save(tmp_path / "out"))
    # W + BA in float32 against Wx + B(Ax): measured at most 2e-6 of the largest logit
    live = logits_of(lm.model)
    torch.testing.assert_close(logits_of(merged), live, rtol=0, atol=1e-5 * live.abs().max().item())


@every_model
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_those_of_peft_and_transformers_alone(config, name):
    """In float64, from full logits of a model that the package has not touched."""
    lm = move(build(config, dtype=torch.float64, chunk_size=3))
    plain = AutoModelForCausalLM.from_config(lm.model.config).double()
    plain = peft.get_peft_model(plain, peft.LoraConfig(**ADAPTER, target_modules="all-linear"))
    plain.load_state_dict(lm.model.state_dict())
    wanted = LanguageModel(config=config)  # only carries the model to `dense`
    wanted.model = plain.eval()
    lm.eval()
    value, gradients = value_and_gradients(lm, through_package(lm, padded_batch(), OBJECTIVES[name]))
    wanted_value, wanted_gradients = value_and_gradients(wanted, dense(wanted, name))
    assert value == pytest.approx(wanted_value, rel=1e-12)
    assert gradients.keys() == wanted_gradients.keys()
    for key, gradient in wanted_gradients.items():
        # transformers' norms and rotations work in float32, so that the trunk's backward rounds to 6e-8
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-7 * gradient.abs().max().item())


def test_label_alignment_is_the_models_own():
    lm = move(build(SMALL))
    rows = padded_batch()
    tokens = lm(rows, lambda tokens: tokens, "label")
    states = lm.model.get_base_model().model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    assert torch.equal(tokens.hidden, states.last_hidden_state[rows["labels"] != -100])


def test_other_modules_can_be_trained_beside_the_adapter(tmp_path):
    lm = move(
        build(SMALL, {**ADAPTER, "modules_to_save": ["model.norm"], "target_modules": ["q_proj", "embed_tokens"]})
    )
    trainable = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    (norm,) = [name for name in trainable if "lora_" not in name]
    assert norm == "model.base_model.model.model.norm.modules_to_save.default.weight"
    assert len(trainable) == 2 * 2 + 2 + 1
    assert_same(
        value_and_gradients(lm, through_package(lm, packed_batch(), OBJECTIVES["margin"])),
        value_and_gradients(lm, dense(lm, "margin")),
    )
    with lm.reference():
        assert torch.equal(logits_of(lm.model), logits_of(build(SMALL, None).model))
    merged = AutoModelForCausalLM.from_pretrained(lm.save(tmp_path / "out"))
    torch.testing.assert_close(logits_of(merged), logits_of(lm.model), rtol=0, atol=1e-6)


# The reference model -------------------------------------------------------------------------------------------------


@every_model
def test_reference_is_the_base_model_bit_for_bit(config):
    base, lm = build(config, None), move(build(config, {**ADAPTER, "lora_dropout": 0.5}))
    trained = logits_of(lm.model)
    with lm.reference():
        assert torch.equal(logits_of(lm.model), logits_of(base.model))
        for objective in OBJECTIVES.values():
            base.eval()
            with torch.no_grad():
                wanted = through_package(base, packed_batch(), objective)
            value = through_package(lm, packed_batch(), objective)
            assert torch.equal(value, wanted)
            assert not value.requires_grad
    assert torch.equal(logits_of(lm.model), trained)


@pytest.mark.parametrize("fails", [False, True])
def test_reference_leaves_everything_as_it_was(fails):
    lm = move(build({**SMALL, "attention_dropout": 0.5}, {**ADAPTER, "lora_dropout": 0.5}))
    next(p for name, p in lm.named_parameters() if "lora_A" in name).requires_grad_(False)
    before, trainable = state_of(lm), [p.requires_grad for p in lm.parameters()]
    random = torch.random.get_rng_state()
    try:
        with lm.reference():
            through_package(lm, padded_batch(), NLL())
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert torch.equal(torch.random.get_rng_state(), random)  # no dropout inside
    assert [p.requires_grad for p in lm.parameters()] == trainable
    assert all(module.training for module in lm.modules())
    assert_equal(state_of(lm), before)
    loss = through_package(lm, padded_batch(), NLL())
    loss.backward()  # the adapter is on again, with gradients
    assert sum(p.grad is not None for p in lm.parameters()) == sum(trainable)


def test_reference_needs_an_adapter():
    lm = build(SMALL, None)
    with pytest.raises(RuntimeError, match=r"`adapter`.*`keep_reference"), lm.reference():
        pass


# Export --------------------------------------------------------------------------------------------------------------


VERA = {"peft_type": "vera", "r": 4}  # its matrices are shared by all layers
LOHA = {"peft_type": "loha", "r": 4}


@pytest.mark.parametrize(
    ("config", "adapter"),
    [
        *[(config, adapter) for config in MODELS.values() for adapter in (ADAPTER, {**ADAPTER, "use_dora": True})],
        *[(SMALL, adapter) for adapter in (LOHA, VERA, {**ADAPTER, "trainable_token_indices": [3, 4]})],
    ],
)
def test_export_is_the_merged_model_and_the_adapter(config, adapter, tmp_path):
    lm = move(build(config, adapter))
    live = logits_of(lm.model)
    lm.train()
    before, trainable = state_of(lm), [p.requires_grad for p in lm.parameters()]
    path = lm.save(tmp_path / "out")
    assert_equal(state_of(lm), before)
    assert [p.requires_grad for p in lm.parameters()] == trainable
    assert all(module.training for module in lm.modules())
    assert torch.equal(logits_of(lm.model), live)
    merged = AutoModelForCausalLM.from_pretrained(path)
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits_of(merged), live, rtol=0, atol=1e-5 * live.abs().max().item())
    base = build(config, None).model
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base.named_parameters()}
    again = peft.PeftModel.from_pretrained(base, path / "adapter")
    assert torch.equal(logits_of(again), live)


def test_export_of_a_bfloat16_model_is_merged_up_to_rounding(tmp_path):
    lm = move(build(SMALL, dtype=torch.bfloat16))
    weights = load_file(lm.save(tmp_path / "out") / "model.safetensors")
    layer = lm.model.get_base_model().model.layers[0].mlp.up_proj
    a, b = (getattr(layer, key)["default"].weight.double() for key in ("lora_A", "lora_B"))
    wanted = layer.base_layer.weight.double() + 2 * b @ a
    merged = weights["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    error = (merged.double() - wanted).norm() / wanted.norm()
    # measured 2.3e-3: peft rounds BA, which here is as large as W, and then the sum; one rounding alone is 1.7e-3
    assert error < 3e-3


@every_model
def test_export_of_given_weights(config, tmp_path):
    """Sharded strategies gather the weights and hand them over; the live ones are not read."""
    lm = move(build(config))
    whole = state_of(lm)
    whole = {name.removeprefix("model."): value for name, value in whole.items()}
    live = logits_of(lm.model)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
    path = lm.save(tmp_path / "out", whole)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(path))
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-5 * live.abs().max().item())
    again = peft.PeftModel.from_pretrained(build(config, None).model, path / "adapter")
    assert torch.equal(logits_of(again), live)
    assert not any(parameter.any() for parameter in lm.parameters())


def test_an_export_is_a_model_to_start_from(model_dir, tmp_path):
    lm = LanguageModel(model_dir, adapter=ADAPTER)
    lm.load(torch.float32)
    live = logits_of(move(lm).model)
    path = lm.save(tmp_path / "out")
    # Exports are published, so that the folder of the base model is left out.
    base = json.loads((path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == Path(model_dir).name
    next_run = LanguageModel(str(path), adapter=ADAPTER)
    next_run.load(torch.float32)
    assert len(next_run.tokenizer) == len(lm.tokenizer)
    torch.testing.assert_close(logits_of(next_run.model), live, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [{"peft_type": "LILY"}, {**ADAPTER, "lora_bias": True}], ids=["kind", "bias"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_cannot_be_merged_is_exported_as_an_adapter(kind, tmp_path):
    lm = move(build(SMALL, kind))
    for _ in range(2):  # the second one replaces the first
        with pytest.warns(UserWarning, match="only the adapter is exported, to be put on the base model by"):
            path = lm.save(tmp_path / "out")
        assert sorted(file.name for file in path.iterdir()) == ["adapter", "files.sha256"]
    again = peft.PeftModel.from_pretrained(build(SMALL, None).model, path / "adapter")
    assert torch.equal(logits_of(again), logits_of(lm.model))


@pytest.mark.slow
def test_peft_is_imported_only_for_adapters():
    """By the command line least of all, whose parser executes what model.py imports for type checkers."""
    code = (
        "import sys, jsonargparse, lit_unlearn\n"
        "jsonargparse.ArgumentParser().add_class_arguments(lit_unlearn.LanguageModel)\n"
        f"lm = lit_unlearn.LanguageModel(config={SMALL})\n"
        "lm.load(__import__('torch').float32)\n"
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Refusals ------------------------------------------------------------------------------------------------------------

HEAD = "past an adapter on it, which would never be trained: remove the head"
TIED = "the embeddings are tied to the head"
MOVED = "the adapter changed the base model itself"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"peft_type": "LORAA"}, r"`peft_type`: there is no 'LORAA'; did you mean 'LORA'\?"),
        ({"lora_aplha": 8}, "of type LORA: there is no 'lora_aplha'; did you mean 'lora_alpha'"),
        ({"rank": 8, "zzz": 1}, "there is no 'rank'"),
        ({"peft_type": "loha", "lora_alpha": 8}, "of type LOHA: there is no 'lora_alpha'"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, r"outside of the model's layers \(virtual tokens"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, "PREFIX_TUNING.*which the losses here never see"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 3}, "as `peft_type: LORA`"),
        ({"peft_type": "ADALORA", "total_step": 9}, r"\(ADALORA\) are refused"),
        ({"alora_invocation_tokens": [3]}, "outside of the model's layers"),
        ({"bias": "all"}, "`bias: all` trains biases of the base model, which stay when the adapter is switched off"),
    ],
)
def test_refused_before_anything_is_loaded(adapter, message, model_dir):
    with pytest.raises(ValueError, match=message):
        LanguageModel(model_dir, adapter=adapter)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("config", "adapter", "message"),
    [
        (SMALL, {"target_modules": ["q_proj", "lm_head"]}, HEAD),
        (SMALL, {"modules_to_save": ["lm_head"]}, HEAD),
        (MODELS["tied"], {"modules_to_save": ["lm_head"]}, HEAD),
        (MODELS["tied"], {"modules_to_save": ["embed_tokens"]}, TIED),
        (MODELS["tied"], {"target_modules": ["q_proj", "embed_tokens"]}, TIED),
        (GPT2, {"target_modules": ["c_attn", "wte"]}, TIED),
        (SMALL, {"init_lora_weights": "pissa"}, MOVED),
        (SMALL, {"init_lora_weights": "olora"}, MOVED),
        (SMALL, {"layer_replication": [[0, 2], [1, 2]]}, MOVED),
        (SMALL, {"target_modules": ["query"]}, "Target modules {'query'} not found"),
    ],
)
def test_refused_when_loaded(config, adapter, message):
    with pytest.raises(ValueError, match=message):
        build(config, {**ADAPTER, **adapter})


# A user's own PeftModel ----------------------------------------------------------------------------------------------


def test_wrap_takes_a_peft_model(tmp_path):
    made = move(build(SMALL))
    lm = LanguageModel.wrap(made.model, chunk_size=3)
    assert lm.model is made.model
    assert lm.has_adapter
    assert lm.linear_head
    rows = packed_batch()
    assert_same(value_and_gradients(lm, through_package(lm, rows, NLL())), value_and_gradients(lm, dense(lm, "nll")))
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(lm.save(tmp_path / "out"))),
        logits_of(lm.model),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["lm_head"]}, HEAD),
        ({"target_modules": ["embed_tokens"]}, TIED),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "`bias: lora_only` trains biases"),
    ],
)
def test_wrap_refuses_what_load_refuses(settings, message):
    base = build(MODELS["tied"], None).model
    with pytest.raises(ValueError, match=message):
        LanguageModel.wrap(peft.get_peft_model(base, peft.LoraConfig(**settings)))


def test_wrap_refuses_a_merged_adapter():
    model = build(SMALL).model
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call `unmerge_adapter\(\)` first"):
        LanguageModel.wrap(model)


def test_wrap_refuses_an_adapter_that_transformers_put_in():
    model = build(SMALL, None).model
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"merge the adapter first, or wrap a `peft\.PeftModel`"):
        LanguageModel.wrap(model)


# Activation checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {**ADAPTER, "lora_dropout": 0.3}], ids=["full", "lora"])
@pytest.mark.parametrize("config", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_activation_checkpointing_changes_no_gradient(config, adapter):
    """Bit for bit, dropout included: the second forward pass draws what the first one drew."""
    config = {**config, "attention_dropout": 0.3} if config is SMALL else config  # GPT-2 has dropout by default
    results = []
    for checkpointing in (False, True):
        lm = move(build(config, adapter, activation_checkpointing=checkpointing))
        calls = count_calls(lm)
        torch.manual_seed(7)
        results.append(value_and_gradients(lm, through_package(lm, padded_batch(), OBJECTIVES["margin"])))
        assert calls[0] == (4 if checkpointing else 2)  # two layers
        with torch.no_grad():
            through_package(lm, padded_batch(), OBJECTIVES["margin"])
        if adapter is not None:
            with lm.reference():
                through_package(lm, padded_batch(), OBJECTIVES["margin"])
    (value, gradients), (checkpointed_value, checkpointed_gradients) = results
    assert value == checkpointed_value
    assert_equal(checkpointed_gradients, gradients)


def count_calls(lm: LanguageModel) -> list[int]:
    """Counts the forward passes through MLPs."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for name, module in lm.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(count)
    return calls


def test_activation_checkpointing_keeps_frozen_layers_out_of_the_graph():
    """transformers makes the embeddings ask for gradients, which only the reentrant kind needs."""
    lm = build(SMALL, {**ADAPTER, "target_modules": r".*\.layers\.1\..*_proj"}, activation_checkpointing=True)
    needed = []
    lm.causal_lm.model.layers[0].register_forward_hook(lambda _m, _i, out: needed.append(out.requires_grad))
    through_package(lm, padded_batch(), NLL()).backward()
    assert needed == [False]


# Quantised base models -----------------------------------------------------------------------------------------------

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install bitsandbytes")


@pytest.fixture
def wide_dir(tokenizer_dir: str, tmp_path: Path) -> str:
    """bitsandbytes rounds 64 weights together, and on some CPUs wants them in one row."""
    torch.manual_seed(0)
    lm = LanguageModel(config={**TINY, "hidden_size": 64, "intermediate_size": 128}, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    return str(lm.save(tmp_path / "wide"))


@pytest.fixture
def quantized(bitsandbytes: Any, wide_dir: str) -> Callable[..., LanguageModel]:
    def make(quantization: dict[str, Any], dtype: torch.dtype = torch.float32, **settings: Any) -> LanguageModel:
        torch.manual_seed(0)
        lm = LanguageModel(wide_dir, adapter=ADAPTER, quantization=quantization, **settings)
        lm.load(dtype)
        return lm

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_qlora_trains_the_adapter_alone(quantization, dtype, quantized):
    """After an evaluation, too: on some CPUs, that alone would take the backward pass from bitsandbytes' 4-bit layers."""
    lm = quantized(quantization, dtype, activation_checkpointing=True)
    assert lm.linear_head
    layer = lm.model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == (torch.uint8 if quantization is NF4 else torch.int8)
    trainable = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    before = logits_of(lm.model)
    lm.train()
    frozen = {name: p.clone() for name, p in lm.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = through_package(lm, packed_batch(), OBJECTIVES["margin"])
        loss.backward()
        assert all(parameter.grad.any() for name, parameter in lm.named_parameters() if "lora_B" in name)
        assert all(parameter.grad is None for parameter in lm.parameters() if not parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert_equal({name: p for name, p in lm.named_parameters() if not p.requires_grad}, frozen)
    with lm.reference():
        assert torch.equal(logits_of(lm.model), before)
    assert not torch.equal(logits_of(lm.model), before)


def test_qlora_gradients_are_those_of_the_dequantised_model(quantized):
    lm = move(quantized(NF4))
    plain = move(quantized(NF4)).model
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "base_layer"):
            weight = peft.utils.integrations.dequantize_module_weight(layer.base_layer)
            linear = nn.Linear(*weight.T.shape, bias=False)
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            plain.get_submodule(name).base_layer = linear
    wanted = LanguageModel(config=SMALL)
    wanted.model = plain
    assert_same(
        value_and_gradients(lm, through_package(lm, padded_batch(), OBJECTIVES["margin"])),
        value_and_gradients(wanted, dense(wanted, "margin")),
    )


def test_export_of_a_quantised_model_is_its_adapter(quantized, tmp_path):
    lm = move(quantized(NF4))
    before = state_of(lm)
    with pytest.warns(UserWarning, match="only the adapter is exported.*the base model is quantised"):
        path = lm.save(tmp_path / "out")
    assert_equal(state_of(lm), before)
    assert not list(path.glob("*.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = peft.PeftModel.from_pretrained(quantized(NF4).model.unload(), path / "adapter")
    assert torch.equal(logits_of(again), logits_of(lm.model))
    with pytest.warns(UserWarning, match="only the adapter is exported"):
        lm.save(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": NF4}, "quantization` without `adapter`: the weights of a quantised model are integers"),
        ({"quantization": {**NF4, "load_in_4bits": True}}, "there is no 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ({"quantization": {"quant_method": "bits"}}, "Unknown quantization type, got bits"),
        ({"quantization": {"load_in_4": True}}, "no `quant_method`"),
    ],
)
def test_bad_quantisation_is_refused_before_anything_is_loaded(settings, message, model_dir):
    adapter = None if settings["quantization"] is NF4 else ADAPTER
    with pytest.raises(ValueError, match=message):
        LanguageModel(model_dir, adapter=adapter, **settings)


def test_random_weights_are_not_quantised():
    with pytest.raises(ValueError, match="give `model`, not `config`"):
        LanguageModel(config=SMALL, adapter=ADAPTER, quantization=NF4)


def test_a_model_that_was_saved_quantised_needs_an_adapter(quantized, wide_dir, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(wide_dir, quantization_config=dict(NF4))
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small' is quantised, and the weights of a quantised model are integers"):
        LanguageModel(str(tmp_path / "small"), tokenizer=wide_dir).load(torch.float32)
    lm = LanguageModel(str(tmp_path / "small"), tokenizer=wide_dir, adapter=ADAPTER)
    lm.load(torch.float32)
    assert torch.equal(logits_of(lm.model), logits_of(quantized(NF4).model))
