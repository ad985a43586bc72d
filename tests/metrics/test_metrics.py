from __future__ import annotations

import json
import math
import multiprocessing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from lit_unlearn.functional import uniformity
from lit_unlearn.metrics import AnswerLikelihood, ConstraintSlack, ForgetUniformity

LENGTHS = [1, 4, 2, 7, 1, 3, 5]  # tokens per answer
VOCABULARY = 11


def make_answers():
    """Log-probabilities of the tokens of every answer, in float32 as a model gives them."""
    draw = torch.Generator().manual_seed(0)
    return [-2 * torch.rand(length, generator=draw) for length in LENGTHS]


def make_logits():
    return 3 * torch.randn(sum(LENGTHS), VOCABULARY, generator=torch.Generator().manual_seed(1))


def add_answers(metric, answers):
    sequence = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(a) for a in answers]))
    metric.update(torch.cat(answers), sequence, num_sequences=len(answers))


def answers_directly(answers):
    nll = -sum(math.fsum(a.double().tolist()) for a in answers) / sum(len(a) for a in answers)
    probability = math.fsum(math.exp(math.fsum(a.double().tolist()) / len(a)) for a in answers) / len(answers)
    return {"nll": nll, "probability": probability}


def uniformity_directly(logits):
    rows = []
    for z in logits.double().tolist():
        mass = math.fsum(math.exp(value) for value in z)
        p = [math.exp(value) / mass for value in z]
        entropy = -math.fsum(q * math.log(q) for q in p)
        kl = math.fsum(-math.log(VOCABULARY * q) / VOCABULARY for q in p)
        rows.append([max(z) - math.fsum(z) / VOCABULARY, entropy / math.log(VOCABULARY), kl])
    return dict(zip(("margin", "entropy", "kl_to_uniform"), torch.tensor(rows).double().mean(0).tolist(), strict=True))


def values(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def parts(items, sizes):
    assert sum(sizes) == len(items)
    cuts = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    return [items[start:stop] for start, stop in pairwise(cuts)]


@pytest.mark.parametrize("sizes", [[7], [1, 5, 1], [2, 3, 2], [1] * 7])
def test_answer_likelihood_equals_the_direct_computation(sizes):
    metric = AnswerLikelihood()
    for batch in parts(make_answers(), sizes):
        add_answers(metric, batch)
    assert values(metric) == pytest.approx(answers_directly(make_answers()), rel=1e-14)


def test_answer_likelihood_weighs_tokens_in_one_and_answers_in_the_other():
    """By hand: probabilities ½·½ and ¼; three tokens, two answers; and a batch without any answer."""
    metric = AnswerLikelihood()
    metric.update(torch.tensor([0.5, 0.25, 0.5]).log(), torch.tensor([0, 1, 0]), num_sequences=2)  # in any order
    metric.update(torch.zeros(0), torch.zeros(0, dtype=torch.long), num_sequences=0)
    assert values(metric) == pytest.approx({"nll": math.log(16) / 3, "probability": 0.375}, rel=1e-7)


@pytest.mark.parametrize("sizes", [[23], [1, 20, 2], [11, 12]])
def test_forget_uniformity_equals_the_direct_computation(sizes):
    metric = ForgetUniformity()
    for batch in parts(make_logits(), sizes):
        metric.update(uniformity(batch.double()))
    assert values(metric) == pytest.approx(uniformity_directly(make_logits()), rel=1e-6)  # reference rows are float32


def test_constraint_slack_equals_the_direct_computation():
    losses = -torch.cat(make_answers())
    mean = math.fsum(losses.double().tolist()) / len(losses)
    metric = ConstraintSlack(epsilon=0.9)
    for batch in parts(losses, [1, 17, 0, 5]):
        metric.update(batch.double().sum(), len(batch))
    wanted = {"value": mean, "violation": mean - 0.9, "slack": 0.9 - mean}
    assert mean > 0.9
    assert values(metric) == pytest.approx(wanted, rel=1e-13)
    unmeasured = ConstraintSlack(epsilon=None)
    unmeasured.update(torch.tensor(3.0), 2)
    assert values(unmeasured) == {"value": 1.5}


def test_sums_do_not_stop_where_float32_does():
    metric = ConstraintSlack(epsilon=1.0)
    metric.update(torch.tensor(2.0**24), 2**24)
    metric.update(torch.tensor(1.0), 1)
    assert metric.total == metric.count == 2**24 + 1


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.bfloat16, nn.Module.float])
def test_states_stay_float64_in_a_module_that_is_cast(cast):
    """bfloat16 counts would stop at 256; 1600 is what a TOFU epoch of 4 rows and 400 steps counts."""
    parent = nn.Module()
    parent.weight = nn.Parameter(torch.zeros(2))
    parent.slack, parent.uniformity = ConstraintSlack(epsilon=1.0), ForgetUniformity()
    parent.slack.update(torch.tensor(0.25), 1)
    parent = cast(parent)
    assert parent.weight.dtype != torch.float64
    for _ in range(1599):
        parent.slack.update(torch.tensor(0.25), 1)
    parent.uniformity.update(torch.full((1600, 3), 1 / 3, dtype=torch.float64))
    states = [getattr(m, name) for m in (parent.slack, parent.uniformity) for name in ("total", "count")]
    assert {state.dtype for state in states} == {torch.float64}
    assert parent.slack.count == parent.uniformity.count == 1600
    assert values(parent.slack) == {"value": 0.25, "violation": -0.75, "slack": 0.75}
    assert values(parent.uniformity)["margin"] == pytest.approx(1 / 3, rel=1e-13)
    parent.slack.reset()
    assert (parent.slack.count.item(), parent.slack.count.dtype) == (0.0, torch.float64)


def test_states_follow_the_device():
    assert ForgetUniformity().to("meta").total.device.type == "meta"
    assert ConstraintSlack(1.0).to("meta").count.dtype == torch.float64


def test_nan_is_not_dropped():
    likelihood, flatness, slack = AnswerLikelihood(), ForgetUniformity(), ConstraintSlack(1.0)
    for logp in ([-0.5, -0.5], [math.nan, -0.5], [-0.5, -0.5]):
        likelihood.update(torch.tensor(logp), torch.tensor([0, 1]), num_sequences=2)
        flatness.update(torch.tensor([[logp[0], 0.5, 1.0]]))
        slack.update(torch.tensor(logp).sum(), 2)
    assert all(math.isnan(value) for value in (*values(likelihood).values(), *values(slack).values()))
    assert [math.isnan(value) for value in values(flatness).values()] == [True, False, False]


def test_states_are_not_part_of_a_graph_and_reset_to_nothing():
    metric = ConstraintSlack(1.0)
    metric.update(torch.tensor(2.0, requires_grad=True), 1)
    assert not metric.total.requires_grad
    metric.reset()
    metric.update(torch.tensor(1.0), 4)
    assert values(metric)["value"] == 0.25


def _measure(answers, logits):
    """All three metrics over these answers and logits, and what this process alone has summed."""
    likelihood, flatness, slack = AnswerLikelihood(), ForgetUniformity(), ConstraintSlack(epsilon=0.9)
    for answer in answers:
        add_answers(likelihood, [answer])
        slack.update(-answer.double().sum(), len(answer))
    flatness.update(uniformity(logits))
    local = [likelihood.nll.item(), flatness.total.tolist(), slack.total.item(), slack.count.item()]
    return {"local": local, "values": [values(likelihood), values(flatness), values(slack)]}


def _process(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        answers, logits = make_answers(), make_logits()
        mine = slice(0, 2) if rank == 0 else slice(2, None)  # uneven: 5 tokens and 18
        result = _measure(answers[mine], logits[:5] if rank == 0 else logits[5:])
        Path(folder, f"{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    multiprocessing.set_forkserver_preload(["lit_unlearn.functional", "lit_unlearn.metrics"])  # imported once for both
    start_processes(_process, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = _measure(make_answers(), make_logits())
    assert first["values"] == second["values"]
    for mine, wanted in zip(first["values"], alone["values"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-14)
    assert all(a != b for a, b in zip(first["local"], second["local"], strict=True))
    assert first["local"][3] + second["local"][3] == alone["local"][3] == sum(LENGTHS)
