"""Sampled answers: against draws written out, and the same beside any other prompts."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lit_unlearn import LanguageModel, Sampling
from lit_unlearn.models import generation
from lit_unlearn.models.generation import generate
from lit_unlearn.models.sampling import choose_tokens

LENGTHS = [5, 1, 9, 14, 5, 3]
NEW = 8
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"top_k": 1000},
]


@pytest.fixture
def lm(tiny_lm) -> LanguageModel:
    """A model whose every parameter is away from its initial value, so that its distributions are not flat."""
    lm = tiny_lm()
    lm.load(torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return lm


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, 400, (length,), generator=draw).tolist() for length in lengths]


# Tokens ---------------------------------------------------------------------------------------------------------------


def distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """The probabilities that tokens are drawn with, one token at a time."""
    allowed = {i for i, logit in enumerate(logits) if logit > -math.inf}
    if sampling.top_k is not None:
        ordered = sorted(logits, reverse=True)
        allowed &= {i for i, logit in enumerate(logits) if sum(x > logit for x in ordered) < sampling.top_k}
    weights = [math.exp(logit / sampling.temperature) if i in allowed else 0.0 for i, logit in enumerate(logits)]
    p = [weight / sum(weights) for weight in weights]
    if sampling.top_p < 1:
        before = 0.0
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            share, p[i] = p[i], p[i] if before < sampling.top_p else 0.0
            before += share
    return [share / sum(p) for share in p]


def draw(p: list[float], uniform: float) -> int:
    total = 0.0
    for i, share in enumerate(p):
        total += share
        if uniform < total:
            return i
    return max(i for i, share in enumerate(p) if share)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_those_of_the_slow_form(settings):
    torch.manual_seed(0)
    logits = 3 * torch.randn(400, 12)
    logits[::3, 4] = -torch.inf
    logits[::5, 2:4] = logits[::5, :1]  # equal ones
    uniforms = torch.rand(400, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    sampling = Sampling(**settings)
    expected = []
    for row, uniform in zip(logits.tolist(), uniforms.tolist(), strict=True):
        expected.append(draw(distribution(row, sampling), uniform))
    assert choose_tokens(logits, uniforms, sampling).tolist() == expected


def test_tokens_are_as_frequent_as_they_are_likely():
    sampling = Sampling(temperature=0.8, top_p=0.9)
    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf, 0.5, -1.0])
    count = 40_000
    numbers = [sampling.random_numbers(str(i), 0).random() for i in range(count)]
    chosen = choose_tokens(logits.expand(count, -1), torch.tensor(numbers, dtype=torch.float64), sampling)
    for token, p in enumerate(distribution(logits.tolist(), sampling)):
        share = (chosen == token).double().mean().item()
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / count)


def test_the_last_number_finds_a_token():
    """A sum of probabilities may end above or below one."""
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        logits = scale * torch.randn(200, 501)
        logits[:, -1] = -torch.inf
        chosen = choose_tokens(logits, torch.full((200,), 1 - 2**-53, dtype=torch.float64), Sampling())
        assert int(chosen.max()) < 500


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(ValueError, match="logits"):
        choose_tokens(logits, torch.zeros(2, dtype=torch.float64), Sampling())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": 0},
        {"samples": 0},
    ],
    ids=str,
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        Sampling(**wrong)


# Answers --------------------------------------------------------------------------------------------------------------


def written_out(lm: LanguageModel, prompt: list[int], prompt_id: str, sample: int, sampling: Sampling) -> str:
    """One answer, from the model's own logits without batch, padding and cache."""
    numbers = random.Random(f"{sampling.seed}/{prompt_id}/{sample}")
    ids = list(prompt)
    lm.model.eval()
    with torch.no_grad():
        for _ in range(NEW):
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()
            token = draw(distribution(logits, sampling), numbers.random())
            if token == lm.tokenizer.eos_token_id:
                break
            ids.append(token)
    return lm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 50}], ids=str)
@pytest.mark.parametrize("token_budget", [1, 60, 8192])
def test_samples_are_those_written_out_in_batches_of_any_size(settings, token_budget, lm):
    sampling = Sampling(samples=3, seed=5, **settings)
    answers = generate(lm, prompts(), max_new_tokens=NEW, token_budget=token_budget, sampling=sampling)
    for number, prompt in enumerate(prompts()):
        assert answers[number] == [written_out(lm, prompt, str(number), sample, sampling) for sample in range(3)]
        assert len(set(answers[number])) == 3


def test_samples_belong_to_the_id_of_a_prompt(lm):
    """Whatever stands beside it, in whatever order: so processes that share prompts out sample what one does."""
    sampling = Sampling(samples=2)
    ids = [f"forget/{number}" for number in range(len(LENGTHS))]
    together = generate(lm, prompts(), max_new_tokens=NEW, sampling=sampling, prompt_ids=ids)
    for shares in ([[0, 2, 4], [1, 3, 5]], [[5, 0], [4, 3, 2, 1]]):
        for share in shares:
            given = [prompts()[i] for i in share]
            found = generate(lm, given, max_new_tokens=NEW, sampling=sampling, prompt_ids=[ids[i] for i in share])
            assert found == [together[i] for i in share]


def test_a_seed_a_sample_and_an_id_of_its_own(lm):
    given = prompts([4, 4])
    given[1] = given[0]
    found = set()
    for seed in range(3):
        for answers in generate(lm, given, max_new_tokens=NEW, sampling=Sampling(samples=3, seed=seed)):
            found |= set(answers)
    assert len(found) == 3 * 2 * 3


def test_more_samples_begin_with_the_same_ones(lm):
    few, many = (generate(lm, prompts(), max_new_tokens=NEW, sampling=Sampling(samples=n)) for n in (2, 5))
    assert [answers[:2] for answers in many] == few


def test_the_likeliest_token_alone_is_greedy(lm):
    greedy = generate(lm, prompts(), max_new_tokens=NEW)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        found = generate(lm, prompts(), max_new_tokens=NEW, sampling=Sampling(**settings))
        assert found == [[text] for text in greedy]


def test_answers_are_cut_as_greedy_ones_are(lm):
    sampling = Sampling(samples=2)
    complete = generate(lm, prompts(), max_new_tokens=NEW, sampling=sampling)
    stop = [complete[0][0][2:4], complete[3][1][1:3]]
    cut = generate(lm, prompts(), max_new_tokens=NEW, sampling=sampling, stop=stop)
    for texts, whole in zip(cut, complete, strict=True):
        assert texts == [min((text.split(string)[0] for string in stop), key=len) for text in whole]
    assert cut != complete


def test_nothing_is_changed(lm):
    settings, state = lm.model.generation_config, torch.random.get_rng_state()
    python_state = random.getstate()
    lm.train()
    generate(lm, prompts(), max_new_tokens=2, sampling=Sampling(samples=2))
    assert lm.model.generation_config is settings
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python_state
    assert {module.training for module in lm.modules()} == {True}


def test_a_damaged_model_is_an_error(lm):
    """Else it would reveal nothing, and pass."""
    with torch.no_grad():
        lm.model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits"):
        generate(lm, prompts(), max_new_tokens=2, sampling=Sampling())


def test_no_prompts(lm):
    assert generate(lm, [], max_new_tokens=2, sampling=Sampling(samples=3)) == []


def test_questions_are_sampled(lm, monkeypatch):
    given = []

    def watched(lm: LanguageModel, prompts: list[list[int]], **settings: object) -> object:
        given.append((prompts, settings))
        return generate(lm, prompts, **settings)

    monkeypatch.setattr(generation, "generate", watched)
    sampling = Sampling(samples=2, seed=3)
    answers = lm.generate(["Who?", "Where was author 1 born?"], max_new_tokens=NEW, sampling=sampling)
    ((given_prompts, settings),) = given
    assert settings["sampling"] is sampling
    assert answers == generate(lm, given_prompts, max_new_tokens=NEW, sampling=sampling)
    assert [len(samples) for samples in answers] == [2, 2]
