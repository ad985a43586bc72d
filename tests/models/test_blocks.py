"""Outputs of transformer blocks, in every family of models."""

from __future__ import annotations

import pytest
import torch
from test_families import build, every_family, family_named, padded_batch
from torch import Tensor, nn

from lit_unlearn import LanguageModel
from lit_unlearn.errors import ModelError
from lit_unlearn.models.blocks import find_blocks, record_outputs, replace_output


def logits_of(lm: LanguageModel) -> Tensor:
    """Logits of all positions of the batch, shape (B · T, V)."""
    batch = padded_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        logits = lm.causal_lm.eval()(**inputs, use_cache=False).logits
    # Padding beyond a sliding window sees no token, and what it computes is not meaningful.
    return logits.masked_fill(batch["attention_mask"][..., None] == 0, 0.0).flatten(0, 1)


@every_family
def test_recorded_outputs_are_those_that_a_block_hands_on(family):
    lm = build(family, tied=False)
    blocks = find_blocks(lm.causal_lm)
    assert len(blocks) == lm.num_layers == 2
    batch = padded_batch()
    positions = torch.tensor([3, 10, 19])
    with record_outputs(blocks, positions) as outputs:
        logits = logits_of(lm)
    with torch.no_grad():
        states = lm.causal_lm.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    # The last entry of `hidden_states` has gone through the final norm.
    assert torch.equal(outputs[0], states[1].flatten(0, 1)[positions])

    # Put back, they change nothing; and no hook is left behind. Some are those of transformers, which record hidden states.
    hooks = [dict(block._forward_hooks) for block in blocks]
    for block, output in zip(blocks, outputs, strict=True):
        with replace_output(block, positions, output):
            assert torch.equal(logits_of(lm), logits)
        with replace_output(block, positions, output.flip(-1)):
            assert not torch.equal(logits_of(lm), logits)
    assert torch.equal(logits_of(lm), logits)
    assert [dict(block._forward_hooks) for block in blocks] == hooks


@every_family
def test_what_follows_the_last_block_works_on_each_position_by_itself(family):
    """`UnlearningDepth` decodes states of any position in a batch of other tokens."""
    lm = build(family, tied=False)
    blocks = find_blocks(lm.causal_lm)
    source, target = torch.tensor([5, 20]), torch.tensor([0, 11])
    with record_outputs(blocks, source) as outputs:
        logits = logits_of(lm)
    with replace_output(blocks[-1], target, outputs[-1]):
        changed = logits_of(lm)
    torch.testing.assert_close(changed[target], logits[source], rtol=1e-5, atol=1e-5)


def test_a_model_without_a_list_of_blocks_is_refused():
    lm = build(family_named("llama"), tied=False)
    lm.causal_lm.base_model.layers = nn.Sequential(*lm.causal_lm.base_model.layers)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of its 2 transformer blocks"):
        find_blocks(lm.causal_lm)


def test_blocks_that_do_not_run_as_modules_are_refused():
    """A compiled trunk runs without them."""
    lm = build(family_named("llama"), tied=False)
    blocks = [*find_blocks(lm.causal_lm), nn.Identity()]
    expected = r"2 outputs of the model's 3 transformer blocks .*`compile`"
    with pytest.raises(ModelError, match=expected), record_outputs(blocks, torch.tensor([0])):
        logits_of(lm)
    assert not blocks[0]._forward_hooks
