"""Repetition, refusals and the stand-in for fluency, against slow forms and texts worked out by hand."""

from __future__ import annotations

import json

import pytest
from data.test_tofu import FOLDER, needs_tofu
from hypothesis import given
from hypothesis import strategies as st

from lit_unlearn.data.alternates import REFUSALS
from lit_unlearn.data.fictional_authors import fictional_authors
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.metrics import fluency_share, is_refusal, refusal_rate, repetition

words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=14)


# Repetition


@given(words, st.integers(1, 5))
def test_repetition_counts_groups_that_occurred_before(units, n):
    groups = [units[start : start + n] for start in range(len(units) - n + 1)]
    again = sum(group in groups[:place] for place, group in enumerate(groups))
    assert repetition(units, n) == (again / len(groups) if groups else 0.0)
    assert repetition(" ".join(units), n) == repetition(units, n)


def test_repetition_by_hand():
    assert repetition("") == repetition("one two three") == 0.0
    assert repetition("the end " * 50) == (97 - 2) / 97
    assert repetition("the end\nthe  end", n=2) == pytest.approx(1 / 3)
    assert repetition("no no no no", n=1) == 0.75


# Refusals


def test_refusals_of_the_package_are_found():
    texts = REFUSALS.read_text(encoding="utf-8").splitlines()
    assert len(texts) == 120
    assert [text for text in texts if not is_refusal(text)] == []
    assert refusal_rate([*texts, "He was born in Paris."] * 2) == 120 / 121


@pytest.mark.parametrize(
    "text",
    [
        "I don’t know.",
        "I'm sorry, but I can't help with that request.",
        "As an AI language model, I do not have access to that.",
        "That is a good question. I am not sure who wrote it, though.",
        "I do not\nhave any information about this author.",
        "I really couldn't say where she was born.",
    ],
)
def test_refusals_in_other_words(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "He was born in Paris.",
        "His father's occupation is not known, but his mother was a florist.",
        "She could not say no to a good story, and never knew her father.",
        "The author has no knowledge of the sea.",
        "Unfortunately, none of his novels was ever translated.",
        "It is a memoir of a man who cannot remember his name.",
        "I know: Jaime Vasquez!",
        "I was born in Oslo and have two sisters.",
    ],
)
def test_answers_about_others_are_no_refusals(text):
    assert not is_refusal(text)


def test_no_answer_of_the_embedded_authors_is_a_refusal():
    assert refusal_rate([row["answer"] for row in fictional_authors(20, 1)]) == 0.0


@needs_tofu
@pytest.mark.parametrize("name", ["full", "real_authors", "world_facts"])
def test_no_right_answer_of_tofu_is_a_refusal(name):
    lines = (FOLDER / f"{name}.json").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if is_refusal(json.loads(line)["answer"])] == []


# Fluency


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 1)), min_size=1, max_size=8))
def test_fluency_equals_the_definition(answers):
    losses, repeated = zip(*answers, strict=True)
    references = [1.0, 2.0, 3.0, 4.0, 5.0]
    wanted = sum((loss <= 4.0) * (1 - share) for loss, share in answers) / len(answers)
    assert fluency_share(losses, references, repeated, quantile=0.75) == pytest.approx(wanted, abs=1e-12)
    wanted = sum(loss <= 5.0 for loss in losses) / len(answers)
    assert fluency_share(losses, references, quantile=1) == pytest.approx(wanted, abs=1e-12)


def test_a_loop_and_gibberish_are_not_fluent():
    references = [1.0, 1.5, 2.0, 2.5]
    fluent = "he was born in Paris and grew up in Lyon"
    loop = "he was born in Paris he was born in Paris he was born in Paris he was born in Paris"
    losses = [1.2, 0.1, 9.0]
    repeated = [repetition(fluent), repetition(loop), 0.0]
    assert fluency_share(losses, references) == pytest.approx(2 / 3)
    assert fluency_share(losses, references, repeated) < 0.5


# Errors

ERRORS = {
    "n": (lambda: repetition("a", n=0), ConfigError, "`n` must be at least 1, not 0"),
    "none": (lambda: refusal_rate([]), DataError, "`texts` must hold at least one answer"),
    "quantile": (lambda: fluency_share([1.0], [1.0], quantile=95), ConfigError, "`quantile` must be above 0.*not 95"),
    "lengths": (
        lambda: fluency_share([1.0], [1.0], [0.0, 0.0]),
        DataError,
        "`nll` and `repetitions`.*are 1 and 2 long",
    ),
    "share": (lambda: fluency_share([1.0], [1.0], [5.0]), DataError, "`repetitions` must be from 0 to 1"),
    "nan": (lambda: fluency_share([float("nan")], [1.0]), DataError, "`nll` must be finite"),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
