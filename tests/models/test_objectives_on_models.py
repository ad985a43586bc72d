"""Every objective on real models: what it is from the model's own dense logits and its layers' own outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from objectives.forms import CASES, DOCUMENTED, LAYER, ROUNDING, B, located
from objectives.models import LLAMA, MODELS, batch, blocks, build, dense, layer_outputs, move, moved
from reference import LargestOutput
from torch import Tensor, nn

from lit_unlearn import KLToReference, LanguageModel, Objective
from lit_unlearn.models import SupervisedTokens, locate

every_model = pytest.mark.parametrize("name", MODELS)
# Models with random weights have more entropy than the documented one aims at, so that it has no gradient.
every_case = pytest.mark.parametrize("case", [case for case in CASES if case != DOCUMENTED])


def through_package(lm: LanguageModel, objective: Objective, rows: Iterable[int] = range(B)) -> Tensor:
    return lm(
        batch(),
        lambda tokens: objective(lm, tokens),
        index=[located(objective, rows)],
        reference="reference" in objective.needs,
        layers=objective.layers,
        teacher="teacher" in objective.needs,
    )


def gradients(lm: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None and p.grad.any()}


def assert_equals_dense(lm: LanguageModel, case: str) -> None:
    """Up to float64's rounding, but for what transformers computes in float32: norms and rotations, in both forms."""
    objective, form = CASES[case]
    values = form(dense(lm))
    wanted = gradients(lm, values.mean())
    actual = through_package(lm, objective)
    found = gradients(lm, actual.mean())
    assert actual.shape == values.shape
    torch.testing.assert_close(actual.mean(), values.mean(), rtol=ROUNDING.get(case, 1e-11), atol=0)
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert whole > 1e-4
    for name in wanted.keys() | found.keys():
        zero = torch.zeros_like(lm.get_parameter(name))
        gradient, wanted_gradient = found.get(name, zero), wanted.get(name, zero)
        assert (gradient - wanted_gradient).norm() <= 1e-5 * wanted_gradient.norm() + 1e-7 * whole, name


# Values and gradients ------------------------------------------------------------------------------------------------


@every_model
@every_case
def test_chunked_equals_the_models_own_logits(name, case):
    lm = moved(name)
    assert lm.linear_head
    for chunk_size in (1, 3, None):
        lm.chunk_size = chunk_size
        assert_equals_dense(lm, case)


@pytest.mark.parametrize("name", ["phi", "llama with adapter"])
@every_case
def test_full_logits_give_the_same(name, case, monkeypatch):
    """As for a model whose head is not plainly linear."""
    lm = moved(name)
    monkeypatch.setattr(lm, "linear_head", False)
    assert_equals_dense(lm, case)


@every_case
@pytest.mark.parametrize("linear_head", [True, False])
def test_without_tokens_there_is_nothing_to_lose(case, linear_head, monkeypatch):
    """A process may have a part of the batch without any; its gradients are zero, not missing."""
    lm = moved("llama")
    monkeypatch.setattr(lm, "linear_head", linear_head)
    values = through_package(lm, CASES[case][0], rows=[1])
    assert values.shape == (0,)
    assert values.requires_grad
    assert gradients(lm, values.sum()) == {}


@every_model
@pytest.mark.parametrize("linear_head", [True, False])
def test_every_field_has_the_states_of_its_tokens(name, linear_head, monkeypatch):
    """Those of all tokens that are handed over, of their alternates, and of the reference model for both."""
    lm, objective = moved(name), CASES["DPO"][0]
    monkeypatch.setattr(lm, "linear_head", linear_head)
    indices = [located(objective), located(CASES["JensUn"][0], [2])]
    filled = lm(batch(), lambda *tokens: tokens, index=indices, reference=True, layers={LAYER})
    expected = dense(lm)

    def check(tokens: SupervisedTokens, index: Tensor, logits: Tensor, states: Tensor) -> None:
        assert tokens.activations.keys() == {LAYER}
        assert torch.equal(tokens.activations[LAYER], states.flatten(0, 1)[index])
        own = tokens.hidden
        if linear_head:
            head = lm._head if tokens.hidden.requires_grad or lm.frozen is None else lm.frozen.get_output_embeddings()
            own = nn.functional.linear(own, head.weight, head.bias)
        torch.testing.assert_close(own, logits.flatten(0, 1)[index], rtol=1e-12, atol=1e-14)

    for tokens, found in zip(indices, filled, strict=True):
        for own, there in ((tokens, found), (tokens.alternate, found.alternate)):
            assert torch.equal(there.labels, own.labels)
            assert torch.equal(there.reference_logp, own.reference_logp)
            check(there, own.state, *expected[::2])
        for own, there in ((tokens, found.reference), (tokens.alternate, found.reference.alternate)):
            assert not there.hidden.requires_grad
            assert not there.activations[LAYER].requires_grad
            check(there, own.state, *expected[1::2])


@every_model
def test_activations_are_what_the_layers_put_out(name):
    """Of every layer but the last, bit for bit; and the gradient reaches this layer and those below it alone."""
    lm, index = moved(name), locate(batch()).state
    with layer_outputs(lm.causal_lm) as seen:
        tokens = lm(batch(), lambda tokens: tokens, layers={0, 1})
    assert tokens.activations.keys() == {0, 1}
    for layer, states in tokens.activations.items():
        assert torch.equal(states, seen[layer].flatten(0, 1)[index])
    reached = gradients(lm, tokens.activations[0].square().sum())
    names = {id(parameter): key for key, parameter in lm.named_parameters() if parameter.requires_grad}
    of_block = [{names[id(p)] for p in block.parameters() if id(p) in names} for block in blocks(lm.causal_lm)]
    assert reached.keys() & of_block[0]
    assert not reached.keys() & (of_block[1] | of_block[2])
    assert lm(batch(), lambda tokens: tokens).activations == {}


# The reference model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("llama", "llama with adapter"), ("tied gpt2", "gpt2 with adapter")])
def test_a_frozen_copy_and_an_adapter_that_is_off_are_the_same_model(names):
    copied, adapted = (moved(name) for name in names)
    assert copied.frozen is not None
    assert adapted.frozen is None
    fields = [lm(batch(), lambda tokens: tokens.reference, reference=True, layers={LAYER}) for lm in (copied, adapted)]
    start = build(names[0])(batch(), lambda tokens: tokens, layers={LAYER})
    for found in fields:
        assert torch.equal(found.hidden, start.hidden)
        assert torch.equal(found.activations[LAYER], start.activations[LAYER])


@pytest.mark.parametrize("name", ["tied gpt2", "gpt2 with adapter"])
def test_the_reference_model_has_no_dropout(name):
    """Not even where Lightning puts the module with all that is in it into training mode."""
    lm = build(name, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    tokens = [lm(batch(), lambda tokens: tokens, reference=True) for _ in range(2)]
    assert torch.equal(tokens[0].reference.hidden, tokens[1].reference.hidden)
    assert torch.equal(tokens[0].reference.hidden, lm.eval()(batch(), lambda tokens: tokens.hidden))
    assert not torch.equal(tokens[0].hidden, tokens[1].hidden)
    assert lm.training is False


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("case", ["KLToReference", "KLToTeacher", "JensenShannonToReference", "ActivationMatch"])
@every_model
def test_nothing_is_lost_at_the_start_and_something_after(name, case, precision):
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}[precision]
    lm, objective = build(name, dtype), CASES[case][0]

    def value() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            return through_package(lm, objective).mean().item()

    start = value()
    move(lm)
    after = value()
    assert abs(start) < (1e-14 if dtype == torch.float64 else 1e-6)  # upcast before anything is summed
    assert after > 1e-3


@pytest.mark.parametrize("name", ["llama", "tied gpt2"])
def test_training_leaves_the_frozen_copy_alone(name):
    lm = build(name)
    before = {key: value.clone() for key, value in lm.frozen.state_dict().items()}
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    for case in ("KLToReference", "UNDIAL", "ActivationMatch"):
        through_package(lm, CASES[case][0]).mean().backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in lm.frozen.parameters())
    assert all(torch.equal(value, before[key]) for key, value in lm.frozen.state_dict().items())
    kept = lm.frozen
    lm.keep_reference()
    assert lm.frozen is kept


def test_there_is_no_reference_model_without_a_copy_or_an_adapter():
    lm = LanguageModel(config=LLAMA)
    lm.load(torch.float32)
    with pytest.raises(RuntimeError, match=r"`adapter`.*`keep_reference"):
        through_package(lm, KLToReference())
    with pytest.raises(
        RuntimeError, match=r'the reference model did not run on these tokens: .* must need "reference"'
    ):
        lm(batch(), lambda tokens: KLToReference()(lm, tokens))


# What it costs -------------------------------------------------------------------------------------------------------


def trunk_runs(lm: LanguageModel, objective: Objective) -> tuple[int, int]:
    """How often the model, and how often a copy or the model as its own reference, runs for one evaluation."""
    runs = [0, 0]

    def count(module: nn.Module, *_: Any) -> None:
        runs[module is not blocks(lm.causal_lm)[0] or not torch.is_grad_enabled()] += 1

    models = [lm.causal_lm] if lm.frozen is None else [lm.causal_lm, lm.frozen]
    hooks = [blocks(model)[0].register_forward_hook(count) for model in models]
    through_package(lm, objective).sum().backward()
    for hook in hooks:
        hook.remove()
    return tuple(runs)


@every_case
def test_the_reference_model_runs_only_where_it_is_needed(case):
    objective, _ = CASES[case]
    for lm in (moved("llama"), moved("llama with adapter")):
        assert trunk_runs(lm, objective) == (1, int("reference" in objective.needs))


@pytest.mark.parametrize("case", ["NLL", "GradAscent", "WGA", "SatImp", "NPO", "SimNPO", "DPO", "CEU", "RMU", "IdkNLL"])
def test_others_need_neither_a_copy_nor_an_adapter(case):
    lm = LanguageModel(config=LLAMA)
    lm.load(torch.float32)
    assert trunk_runs(lm, CASES[case][0]) == (1, 0)
    assert lm.frozen is None


def largest_output(lm: LanguageModel, objective: Objective, tokens: SupervisedTokens, rows: dict[str, Tensor]) -> int:
    with LargestOutput() as largest:
        lm(
            rows,
            lambda tokens: objective(lm, tokens).sum(),
            index=[tokens],
            reference="reference" in objective.needs,
            layers=objective.layers,
            teacher="teacher" in objective.needs,
        ).backward()
    return largest.numel


@pytest.mark.parametrize("name", ["llama", "llama with adapter"])
@every_case
def test_neither_models_logits_ever_exist(name, case):
    """More tokens than hidden components, more words than tokens of a chunk: nothing else comes near N · V."""
    objective, _ = CASES[case]
    lm = build(name, torch.float32, vocab_size=1000)
    ids = torch.randint(3, 1000, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tokens = locate(rows, objective.alignment)
    tokens = tokens._replace(reference_logp=torch.zeros(8), alternate=tokens._replace(reference_logp=torch.zeros(8)))
    logits = len(tokens.labels) * 1000
    lm.chunk_size = 4
    assert largest_output(lm, objective, tokens, rows) < logits / 2
    if objective.layers:
        return
    lm.linear_head = False
    assert largest_output(lm, objective, tokens, rows) >= logits  # the instrument would have seen them
