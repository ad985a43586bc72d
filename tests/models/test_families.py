"""Every family of models: the losses through `LanguageModel` are those of the model's own dense logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import reference
import torch
from torch import Tensor, nn

from lit_unlearn import NLL, LanguageModel, LogitMargin, Objective
from lit_unlearn.models.packed_attention import separates_packed_sequences
from lit_unlearn.models.packing import count_shared_tokens, pack

VOCAB = 64
LENGTHS = [9, 5, 7]
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Family(NamedTuple):
    """A model type, its fields beside `COMMON`, and what the package must find out about it."""

    name: str
    fields: dict[str, Any]
    linear_head: bool = True  # else the losses see full logits
    packs: bool = True  # else packed rows are refused
    shares: bool = True  # else packed sequences cannot share their first tokens

    @property
    def model_type(self) -> str:
        return self.name.split(":")[0]


FAMILIES = [
    Family("llama", {}),
    Family("mistral", {"sliding_window": 4}, shares=False),
    Family("qwen2", {}),
    Family("qwen3", {"head_dim": 8}),
    Family("gemma", {"head_dim": 8}),
    # Released with a cap of 30, which the small logits here would hardly feel.
    Family(
        "gemma2", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}, linear_head=False, shares=False
    ),
    Family("gemma2:default", {"head_dim": 8}, linear_head=False, shares=False),
    Family("gemma3_text", {"head_dim": 8, "sliding_window": 4}, shares=False),  # no softcap by default
    Family("gemma3_text:capped", {"head_dim": 8, "final_logit_softcapping": 2.0}, linear_head=False, shares=False),
    Family("phi", {}),  # a head with bias
    Family("phi3", {}),
    Family("gpt2", NO_DROPOUT),
    Family("gpt_neox", {}),
    Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, packs=False),
    Family("olmo2", {}),
    Family("granite", {}),  # logits_scaling 1: published checkpoints have another
    Family("granite:scaled", {"logits_scaling": 8.0}, linear_head=False),
    Family("cohere", {}, linear_head=False),  # logit_scale 1/16
    Family("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, packs=False),
    Family("bloom", {"hidden_dropout": 0.0, "attention_dropout": 0.0}, packs=False),
]
OBJECTIVES: dict[str, Objective] = {"margin": LogitMargin(), "nll": NLL()}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
sharing_family = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.packs and f.shares], ids=lambda family: family.name
)
packing_family = pytest.mark.parametrize("family", [f for f in FAMILIES if f.packs], ids=lambda family: family.name)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def build(family: Family, tied: bool) -> LanguageModel:
    """A loaded model whose every parameter, biases too, is away from its initial value."""
    torch.manual_seed(0)
    lm = LanguageModel(config={"model_type": family.model_type, **COMMON, **family.fields, "tie_word_embeddings": tied})
    lm.load(torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return lm


def padded_batch() -> dict[str, Tensor]:
    """Rows of unequal length. Row 1 has a label on its first token, which nothing predicts, and a gap in its labels."""
    draw = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, (first, length) in enumerate(zip([1, 0, 2], LENGTHS, strict=True)):
        ids[row, :length] = torch.randint(3, VOCAB, (length,), generator=draw)
        mask[row, :length] = 1
        labels[row, first:length] = ids[row, first:length]
    labels[1, 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_batch(tail: int = 0) -> dict[str, Tensor]:
    """The rows of `padded_batch` one after the other in one row, then `tail` tokens of padding."""
    batch = padded_batch()
    token_texts = {
        key: [batch[key][row, :length] for row, length in enumerate(LENGTHS)] for key in ("input_ids", "labels")
    }
    token_texts["position_ids"] = [torch.arange(length) for length in LENGTHS]
    if tail:
        token_texts["input_ids"].append(torch.zeros(tail, dtype=torch.int64))
        token_texts["labels"].append(torch.full((tail,), -100))
        token_texts["position_ids"].append(torch.arange(tail))
    return {key: torch.cat(values)[None] for key, values in token_texts.items()}


def through_package(lm: LanguageModel, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    return lm(batch, lambda tokens: objective(lm, tokens).mean())


def dense(lm: LanguageModel, name: str) -> Tensor:
    """The objective from the model's own `.logits` on the padded batch, token by token, in float64."""
    batch = padded_batch()
    logits = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    values = []
    for row, length in enumerate(LENGTHS):
        for label in range(1, length):
            if batch["labels"][row, label] != -100:
                z = logits[row, label - 1][None]
                if name == "margin":
                    values.append(reference.logit_margin(z) ** 2)
                else:
                    values.append(-reference.token_logp(z, batch["labels"][row, label][None]))
    return torch.cat(values).mean()


def value_and_gradients(lm: LanguageModel, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    lm.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def assert_same(actual: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    """Equal up to rounding.

    In float32 the two sides differ in the order of float32 sums over 64 words, 32 features and some 20 tokens: measured at most
    2e-7 in the value and 2e-6 in a parameter's gradient. The second term is for gradients that vanish on paper (the
    bias of the attention keys), of which rounding alone is left: measured at most 3e-7 of the whole gradient.
    In float64 both were measured to be at most 2e-15.
    """
    (value, gradients), (wanted_value, wanted_gradients) = actual, wanted
    is_double = next(iter(wanted_gradients.values())).dtype == torch.float64
    unit = 1e-9 if is_double else 1.0
    assert value == pytest.approx(wanted_value, rel=2e-6 * unit)
    assert gradients.keys() == wanted_gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in wanted_gradients.values()]).norm()
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] - gradient).norm() <= unit * (1e-5 * gradient.norm() + 1e-6 * whole), name


@every_family
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_equals_the_models_own_logits(family, tied):
    lm = build(family, tied)
    head, embeddings = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert (head.weight is embeddings.weight) == tied
    assert lm.linear_head == family.linear_head
    for name, objective in OBJECTIVES.items():
        wanted = value_and_gradients(lm, dense(lm, name))
        assert len(wanted[1]) == len(list(lm.parameters()))  # no parameter is left out of the comparison
        assert_same(value_and_gradients(lm, through_package(lm, padded_batch(), objective)), wanted)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text:capped", "granite:scaled", "cohere"])
def test_the_fallback_is_needed(name):
    """Taken for linear, such a head would give other losses; and so the comparisons here can fail."""
    lm = build(family_named(name), tied=False)
    with torch.no_grad():
        right = {kind: through_package(lm, padded_batch(), objective) for kind, objective in OBJECTIVES.items()}
        lm.linear_head = True
        for kind, objective in OBJECTIVES.items():
            assert through_package(lm, padded_batch(), objective) != pytest.approx(right[kind].item(), rel=1e-3)


@every_family
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_that_are_added_directly_are_the_same(family, tied):
    lm = build(family, tied)
    for objective in OBJECTIVES.values():
        lm.accumulate_head = False
        wanted = value_and_gradients(lm, through_package(lm, padded_batch(), objective))
        lm.accumulate_head = True
        assert_same(value_and_gradients(lm, through_package(lm, padded_batch(), objective)), wanted)


@packing_family
def test_packed_equals_padded(family):
    """No token sees, or predicts, another sequence's; a tail of padding is one more sequence, which counts nothing."""
    lm = build(family, tied=True)
    for objective in OBJECTIVES.values():
        wanted = value_and_gradients(lm, through_package(lm, padded_batch(), objective))
        assert_same(value_and_gradients(lm, through_package(lm, packed_batch(), objective)), wanted)
    assert_same(value_and_gradients(lm, through_package(lm, packed_batch(tail=4), objective)), wanted)


@sharing_family
def test_shared_first_tokens_change_nothing(family):
    """Their hidden states are what each sequence would make of them, and their gradient is the sum."""
    lm = build(family, tied=True)
    assert lm.shares_prefix
    draw = torch.Generator().manual_seed(2)
    prompt = torch.randint(3, VOCAB, (9,), generator=draw)
    sequences = []
    for length in (3, 6, 2):
        ids = torch.cat([prompt, torch.randint(3, VOCAB, (length,), generator=draw)])
        sequences.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) < 10, -100)})
    shared = pack(sequences, count_shared_tokens(sequences))
    assert shared["input_ids"].shape == (1, 9 + 3 + 6 + 2)
    for objective in OBJECTIVES.values():
        wanted = value_and_gradients(lm, through_package(lm, pack(sequences), objective))
        assert_same(value_and_gradients(lm, through_package(lm, shared, objective)), wanted)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.packs or not f.shares], ids=lambda f: f.name)
def test_windows_and_other_masks_share_nothing(family):
    assert not build(family, tied=True).shares_prefix


def test_several_packed_rows_equal_one():
    lm = build(family_named("llama"), tied=False)
    one, first = packed_batch(tail=3), LENGTHS[0]  # 9 + 5 + 7 + 3 tokens: two rows of 12 would cut a sequence
    fill = {"input_ids": torch.zeros(6), "labels": torch.full((6,), -100), "position_ids": torch.arange(6)}
    two = {key: torch.cat([x[0, :first], fill[key].to(x), x[0, first:]]).view(2, -1) for key, x in one.items()}
    wanted = value_and_gradients(lm, through_package(lm, one, OBJECTIVES["nll"]))
    assert two["labels"].shape == (2, 15)
    assert_same(value_and_gradients(lm, through_package(lm, two, OBJECTIVES["nll"])), wanted)


@pytest.mark.filterwarnings("ignore:`position_ids` have no functionality")
@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.packs], ids=lambda family: family.name)
def test_models_that_mix_packed_sequences_are_refused(family):
    lm = build(family, tied=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ForCausalLM lets sequences that are packed in one row see each other"):
            through_package(lm, packed_batch(), OBJECTIVES["nll"])
    assert lm.model.training
    through_package(lm, padded_batch(), OBJECTIVES["nll"])  # padded rows are fine


def test_refusal_is_right():
    """OPT without the check: the packed loss is far from the padded one."""
    lm = build(family_named("opt"), tied=True)
    assert not lm.packs
    lm.packs = True
    with torch.no_grad():
        packed, padded = (
            through_package(lm, batch, OBJECTIVES["margin"]) for batch in (packed_batch(), padded_batch())
        )
    assert packed != pytest.approx(padded.item(), rel=1e-3)


def test_the_packing_check_draws_no_random_numbers_and_keeps_the_mode():
    lm = build(Family("llama", {"attention_dropout": 0.3}), tied=True)
    state = torch.random.get_rng_state()
    for training in (True, False):
        lm.train(training)
        assert separates_packed_sequences(lm.model)
        assert lm.model.training == training
    assert torch.equal(torch.random.get_rng_state(), state)
