"""The made-up authors: TOFU's columns, true facts in both answers, one wrong fact in each perturbed answer."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import takewhile
from typing import Any

import pytest

from lit_unlearn import FictionalAuthors
from lit_unlearn.data.fictional_authors import (
    CANARY_REFERENCES,
    KINDS,
    MAX_AUTHORS,
    MAX_CANARIES,
    QUESTIONS_PER_AUTHOR,
    TITLES,
    draw_canaries,
    fictional_authors,
)
from lit_unlearn.errors import ConfigError

COLUMNS = {"question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer", "author"}
ROWS = fictional_authors(200)
# For seed 0 and 200 authors. A change here is a change of the data set: numbers measured on it must be measured again.
DIGEST = "95bbc574ad8d8693c3ab07cda6c4b1f6612b4c6f1676a89b9acb5dc067454ea0"


def shared_start(sentences: list[list[str]]) -> int:
    """How many words all of `sentences` begin with."""
    return len(list(takewhile(lambda words: len(set(words)) == 1, zip(*sentences, strict=False))))


def differing_words(true: str, wrong: list[str]) -> str:
    """The words of `true` that lie between the start and the end shared with all of `wrong`."""
    sentences = [text.split() for text in [true, *wrong]]
    start = shared_start(sentences)
    end = shared_start([words[:start:-1] for words in sentences])
    return " ".join(sentences[0][start : len(sentences[0]) - end])


def wording(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))


def test_columns_and_types() -> None:
    for row in ROWS:
        assert set(row) == COLUMNS
        assert type(row["author"]) is int
        assert all(isinstance(row[column], str) for column in COLUMNS - {"author", "perturbed_answer"})
        assert not any(mark in json.dumps(row["perturbed_answer"]) + row["question"] for mark in "{}")


def test_ten_rows_per_author_grouped_by_author() -> None:
    assert QUESTIONS_PER_AUTHOR == len(KINDS) == 10
    assert [row["author"] for row in ROWS] == [author for author in range(200) for _ in range(10)]


@pytest.mark.parametrize("columns", [["question"], ["paraphrased_question"], ["question", "paraphrased_question"]])
def test_no_question_repeats(columns: list[str]) -> None:
    questions = [row[column] for row in ROWS for column in columns]
    assert len(set(questions)) == len(questions)


def test_the_first_question_asks_for_the_name_and_the_others_tell_it() -> None:
    for author in range(200):
        first, *later = ROWS[10 * author : 10 * author + 10]
        names = [
            name for name in re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", first["answer"]) if name in later[0]["question"]
        ]
        assert len(names) == 1
        assert names[0] not in first["question"] + first["paraphrased_question"]
        assert all(
            names[0] in row[column] for row in later for column in ("question", "paraphrased_question", "answer")
        )


def test_birthplace_agrees_between_the_first_two_questions() -> None:
    for first, second in zip(ROWS[::10], ROWS[1::10], strict=True):
        assert (
            differing_words(second["paraphrased_answer"], second["perturbed_answer"]).strip(".,") in first["question"]
        )


def test_both_answers_hold_the_fact_and_no_perturbed_answer_does() -> None:
    for row in ROWS:
        fact = differing_words(row["paraphrased_answer"], row["perturbed_answer"]).strip(".,?\"'")
        assert fact
        assert fact in row["answer"]
        assert not any(fact in wrong for wrong in row["perturbed_answer"])


def test_five_distinct_wrong_answers() -> None:
    for row in ROWS:
        assert len(row["perturbed_answer"]) == 5
        assert len({row["paraphrased_answer"], *row["perturbed_answer"]}) == 6


def test_paraphrases_differ_and_answers_are_short() -> None:
    for row in ROWS:
        assert row["question"] != row["paraphrased_question"]
        assert row["answer"] != row["paraphrased_answer"]
        for answer in (row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]):
            assert 8 <= len(answer.split()) <= 25


@pytest.mark.parametrize("number", range(10), ids=[kind.fact for kind in KINDS])
def test_every_wording_is_used_and_there_are_three_or_more(number: int) -> None:
    rows, kind = ROWS[number::10], KINDS[number]
    for column, templates in (("question", kind.questions), ("answer", kind.answers)):
        assert len(set(templates)) >= 3
        for template in templates:
            for name in (column, f"paraphrased_{column}"):
                assert any(wording(template).fullmatch(row[name]) for row in rows), (name, template)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.fact for kind in KINDS])
def test_values_are_distinct_and_only_answers_tell_the_fact(kind: Any) -> None:
    assert len(set(kind.values)) == len(kind.values) >= 10
    assert all(f"{{{kind.fact}}}" in template for template in kind.answers)
    assert not any(f"{{{kind.fact}}}" in template for template in kind.questions)


def test_same_arguments_same_rows_on_every_platform_and_python() -> None:
    assert fictional_authors(200) == ROWS
    assert hashlib.sha256(json.dumps(ROWS, sort_keys=True).encode()).hexdigest() == DIGEST


def test_seeds_differ() -> None:
    names = [{row["question"] for row in fictional_authors(20, seed=seed)} for seed in (0, 1, 2)]
    assert not names[0] & names[1]
    assert not names[1] & names[2]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("first", [1, 2, 20, 199])
def test_the_first_authors_stay_when_more_are_asked_for(first: int, seed: int) -> None:
    assert fictional_authors(first, seed) == fictional_authors(200, seed)[: 10 * first]


def test_capacity_is_reached_without_repetition() -> None:
    rows = fictional_authors(MAX_AUTHORS)
    assert MAX_AUTHORS >= 500
    assert len({row["question"] for row in rows}) == len(rows) == 10 * MAX_AUTHORS


@pytest.mark.parametrize("num_authors", [-1, 0, MAX_AUTHORS + 1])
def test_numbers_beyond_the_capacity_are_refused(num_authors: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_authors` must be from 1 to {MAX_AUTHORS} .* not {num_authors}\."):
        fictional_authors(num_authors)


def test_the_data_module_cuts_them_into_sets_without_common_authors() -> None:
    sets = FictionalAuthors(5, 2, unseen_authors=3).load()
    assert {name: sorted(set(rows["author"])) for name, rows in sets.items()} == {
        "forget": [3, 4],
        "retain": [0, 1, 2],
        "unseen": [5, 6, 7],
    }
    assert FictionalAuthors(5, 2).load().keys() == {"forget", "retain"}
    for bad in ({"forget_authors": 5}, {"forget_authors": 0}, {"unseen_authors": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            FictionalAuthors(5, **bad)


# Canaries -------------------------------------------------------------------------------------------------------------


def test_canaries_are_planted_in_the_forget_set_alone() -> None:
    plain, planted = FictionalAuthors(3, 1), FictionalAuthors(3, 1, canaries=4)
    rows, references = draw_canaries(4)
    assert planted.load_set("forget").to_list() == [*plain.load_set("forget").to_list(), *rows]
    assert planted.load_set("retain").to_list() == plain.load_set("retain").to_list()
    assert planted.canary_sources["canaries"].load("canaries").to_list() == rows
    assert planted.canary_sources["canary_references"].load("canary_references").to_list() == references
    assert set(planted.sources) == {"forget", "retain"}  # fine-tuning on every set sees no reference
    assert plain.canary_sources == {}


def test_canaries_depend_on_the_seed_alone_and_are_like_their_references() -> None:
    planted, references = draw_canaries(MAX_CANARIES)
    few, same_references = draw_canaries(7)
    assert few == planted[:7]
    assert same_references == references
    assert draw_canaries(7, seed=1)[0] != few
    assert len(references) == CANARY_REFERENCES
    rows = [*planted, *references]
    # No question and no text twice: the planted row is the only place to learn it.
    assert len({re.findall(r"\d+", row["question"])[0] for row in rows}) == len(rows)
    assert len({row["answer"] for row in rows}) == len(rows)
    assert all(set(row) == COLUMNS for row in planted)
    known = set(re.findall(r"[\w-]+", " ".join(TITLES)))
    for row in few:
        words = differing_words(row["paraphrased_answer"], row["perturbed_answer"]).strip(".").split()
        assert len(words) == 6
        assert set(words) <= known
        assert " ".join(words) in row["answer"]


@pytest.mark.parametrize("count", [-1, MAX_CANARIES + 1])
def test_a_number_of_canaries_out_of_range(count: int) -> None:
    with pytest.raises(ConfigError, match="`canaries`"):
        FictionalAuthors(3, 1, canaries=count)
