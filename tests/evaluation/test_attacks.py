"""What stresses do to weights, against the same done the slow way."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import TINY
from evaluation.rows import FORGET, loaded, taught
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_unlearn import LanguageModel, Relearn
from lit_unlearn.data.encoding import encode
from lit_unlearn.evaluation.attacks.copies import copy_model
from lit_unlearn.evaluation.attacks.relearning import relearn
from lit_unlearn.evaluation.attacks.rounding import load_quantized, round_to_nearest, round_weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(24).view(2, 12)


def build(dtype: torch.dtype = torch.float32, adapter: Any = None, **config: Any) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(config={**TINY, "vocab_size": 64, **config}, adapter=adapter)
    lm.load(dtype)
    return lm


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_takes_the_nearest_of_all_values(bits, dtype):
    torch.manual_seed(bits)
    weight = torch.randn(5, 33, dtype=torch.float64)
    weight[1] *= 1e-4  # rows have scales of their own
    weight[2] = 0
    weight[3, 1:] = 0
    weight = weight.to(dtype)
    found = round_to_nearest(weight, bits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(found.dtype).eps
    for row, rounded in zip(weight.double().tolist(), found.double().tolist(), strict=True):
        largest, most = max(map(abs, row)), 2 ** (bits - 1) - 1
        grid = [largest * i / most for i in range(-most, most + 1)]
        for value, got in zip(row, rounded, strict=True):
            assert min(abs(got - point) for point in grid) <= 4 * eps * abs(got)
            # not "is the nearest point", of which there are two for a value in the middle
            assert abs(got - value) <= min(abs(value - point) for point in grid) + 4 * eps * largest
            assert abs(got - value) <= largest / most / 2 + 4 * eps * largest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_linear_layer_but_the_head_is_rounded(dtype, tied):
    lm = build(dtype, tie_word_embeddings=tied, attention_bias=True)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    round_weights(lm.model, 3)
    rounded = [name for name, value in lm.model.state_dict().items() if not torch.equal(value, before[name])]
    assert rounded == [name for name in before if name.endswith("proj.weight")]
    assert len(rounded) == 2 * 7
    for name in rounded:
        assert torch.equal(lm.model.state_dict()[name], round_to_nearest(before[name], 3).to(dtype))
        assert max(len(row.unique()) for row in lm.model.state_dict()[name]) <= 7


def test_a_model_without_linear_layers_is_refused():
    torch.manual_seed(0)
    lm = LanguageModel(config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64})
    lm.load(torch.float32)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*`bits`"):
        round_weights(lm.model, 4)


@pytest.fixture
def wide(tokenizer_dir: str) -> LanguageModel:
    """bitsandbytes rounds 64 weights together."""
    pytest.importorskip("bitsandbytes", reason="rounding as models are deployed needs bitsandbytes")
    torch.manual_seed(0)
    lm = LanguageModel(config={**TINY, "hidden_size": 64, "intermediate_size": 128}, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    return lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_gets_the_weights_in_memory(bits, dtype, wide, tmp_path):
    lm = LanguageModel(str(wide.save(tmp_path / "old")))
    lm.load(dtype)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter *= 1.5  # as training would: the weights are no longer those of `lm.name`
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if bits == 8 else four))
    path = lm.save(tmp_path / "new")
    wanted = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)
    found = load_quantized(lm, bits)
    layer = found.model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert type(found.model.get_output_embeddings()) is nn.Linear
    assert torch.equal(logits_of(found.model), logits_of(wanted))
    assert not torch.equal(logits_of(found.model), logits_of(lm.model))
    # nearer to the model than to nothing: measured 0.017 in 8 bits, 0.16 in 4
    distance = (logits_of(found.model) - logits_of(lm.model)).norm() / logits_of(lm.model).norm()
    assert distance < {8: 0.03, 4: 0.3}[bits]


def test_bitsandbytes_gets_the_adapter_merged(wide, tmp_path):
    lm = LanguageModel(str(wide.save(tmp_path / "base")), adapter={"r": 4})
    lm.load(torch.float32)
    move(lm)
    merged = loaded(str(lm.save(tmp_path / "merged")), torch.float32)
    found, wanted = (logits_of(load_quantized(one, 4).model) for one in (lm, merged))
    assert torch.equal(found, wanted)


# Copies ---------------------------------------------------------------------------------------------------------------


def move(lm: LanguageModel) -> None:
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("adapter", [None, {"r": 4}, {"peft_type": "loha", "r": 4}], ids=["none", "lora", "loha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copy_computes_the_same_and_shares_nothing(dtype, adapter, tmp_path):
    """With an adapter, it is the model that would be exported, bit for bit."""
    lm = build(dtype, adapter)
    move(lm)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    other = copy_model(lm)
    assert not other.has_adapter
    exported = AutoModelForCausalLM.from_pretrained(lm.save(tmp_path / "out"), dtype=dtype)
    assert torch.equal(logits_of(other.model), logits_of(exported))
    assert not {value.data_ptr() for value in other.state_dict().values()} & {
        value.data_ptr() for value in lm.state_dict().values()
    }
    move(other)
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


def test_an_adapter_that_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match=r"adapter cannot be merged "):
        copy_model(build(adapter={"peft_type": "LILY"}))


# Relearning -----------------------------------------------------------------------------------------------------------


def slow_relearn(model: Any, rows: Any, attack: Relearn) -> None:
    """The same steps from the model's own logits, one row at a time."""
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=attack.lr, weight_decay=0.0)
    for _ in range(attack.steps):
        losses = []
        for row in rows:
            logp = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            losses += [-logp[i - 1, label] for i, label in enumerate(row.labels) if label != -100]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()


def encoded(lm: LanguageModel) -> Any:
    return [encode(row["question"], row["answer"], lm.tokenizer) for row in FORGET]


@pytest.mark.parametrize("token_budget", [8192, 60, 1])
def test_relearning_takes_the_steps_of_the_slow_form(token_budget, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 20), torch.float64)
    plain, attack = copy.deepcopy(lm.model), Relearn(rows=5, steps=4, lr=1e-3)
    before = copy.deepcopy(lm.model)
    list(relearn(lm, encoded(lm), attack, token_budget))
    slow_relearn(plain, encoded(lm), attack)
    for found, wanted, old in zip(lm.parameters(), plain.parameters(), before.parameters(), strict=True):
        moved = (wanted - old).norm()
        assert moved > 0
        # measured 1e-14; but norms and rotations are computed in float32, whose rounding may show on other machines
        assert (found - wanted).norm() < 1e-6 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_trained_in_float32(dtype, tokenizer_dir):
    """Steps that half precision would swallow add up."""
    lm = loaded(taught(tokenizer_dir, 20), dtype)
    wide, before = copy.deepcopy(lm.model).float(), copy.deepcopy(lm.model)
    attack = Relearn(rows=5, steps=20, lr=1e-5)
    list(relearn(lm, encoded(lm), attack, 8192))
    other = LanguageModel.wrap(wide, lm.tokenizer)
    list(relearn(other, encoded(lm), attack, 8192))
    moved = 0
    for found, wanted, old in zip(lm.parameters(), other.parameters(), before.parameters(), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, wanted.to(dtype))
        moved += int((found != old).sum())
    assert moved > 0


def test_dropout_and_random_numbers_are_left_alone(tokenizer_dir):
    states = []
    for dropout in (0.0, 0.5):
        lm = LanguageModel(config={**TINY, "attention_dropout": dropout}, tokenizer=tokenizer_dir)
        torch.manual_seed(0)
        lm.load(torch.float32)
        random = torch.random.get_rng_state()
        list(relearn(lm, encoded(lm), Relearn(5, 2, 1e-3), 8192))
        assert torch.equal(torch.random.get_rng_state(), random)
        states.append(lm.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_divergence_is_an_error(tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 0), torch.float32)
    with pytest.raises(ValueError, match=r"NLL is nan at step \d+; lower `lr` \(1e\+30"):
        list(relearn(lm, encoded(lm), Relearn(5, 5, 1e30), 8192))


def test_rows_are_drawn_by_the_seed():
    draws = [Relearn(3, 1, 1.0, seed).choose(40) for seed in range(9)]
    assert all(draw == sorted(set(draw)) and len(draw) == 3 and draw[0] >= 0 and draw[2] < 40 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 9
    assert draws[4] == Relearn(3, 9, 2.0, 4).choose(40)
    assert Relearn(4, 1, 1.0).choose(4) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"steps": 0}, {"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}], ids=str)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        Relearn(**{"rows": 1, "steps": 1, "lr": 1.0, **wrong})
