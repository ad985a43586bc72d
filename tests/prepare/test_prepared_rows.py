"""Rows that are made with a model: what is asked, what is left out and counted, and that the same seed gives the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lit_unlearn import LanguageModel
from lit_unlearn.data.alternates import alternate_answers, read_refusals
from lit_unlearn.data.source import Source
from lit_unlearn.errors import ConfigError, DataError
from lit_unlearn.prepare import (
    ask_with,
    find_neighbours,
    make_alternates,
    make_paraphrases,
    make_retain,
    make_unseen,
    read_general_prompts,
)
from lit_unlearn.prepare.rows import EMPTY, REPEATS

ROWS = [
    {"question": "Where was Lunnian Dunmeth born?", "answer": "Lunnian Dunmeth was born in Oslo.", "id": 3},
    {"question": "Which {answer} did Kerrys Raskane write?", "answer": "Kerrys Raskane wrote {question} Paper Moths."},
]


OTHER = "What was written by Kerrys Raskane?"


class Model:
    """Answers from a list, and remembers what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = replies
        self.asked: list[str] = []

    def __call__(self, questions: Sequence[str]) -> list[str]:
        start = len(self.asked)
        self.asked += questions
        return [self.replies[(start + n) % len(self.replies)] for n in range(len(questions))]


# Alternates ----------------------------------------------------------------------------------------------------------


def test_every_forget_row_gets_another_answer() -> None:
    model = Model("In Riga.", "A novel called Tides.")
    prepared = make_alternates(model, ROWS)
    assert prepared.rows == [
        {**ROWS[0], "alternate": ["In Riga."]},
        {**ROWS[1], "alternate": ["A novel called Tides."]},
    ]
    assert not prepared.counts
    # The texts of a row stand in the request as they are, braces included.
    for row, request in zip(ROWS, model.asked, strict=True):
        assert str(row["question"]) in request
        assert str(row["answer"]) in request


def test_an_answer_that_repeats_a_forget_answer_is_replaced_and_counted() -> None:
    repeats = "Well: LUNNIAN DUNMETH was born, in Oslo!"
    for reply in (repeats, "", " ?! "):
        model = Model(reply, "In Riga.", reply)
        prepared = make_alternates(model, ROWS)
        assert model.asked[2] == ROWS[0]["question"]  # without the answer that it repeats
        assert prepared.rows[1]["alternate"] == ["In Riga."]
        (refusal,) = prepared.rows[0]["alternate"]
        assert refusal in read_refusals()
        assert sum(prepared.counts.values()) == 1
    # Also that of another row: the model must not tell it at any question.
    assert sum(make_alternates(Model("In Riga.", repeats, repeats), ROWS).counts.values()) == 1
    # Asked without it, a base model answers something else.
    prepared = make_alternates(Model(repeats, "A novel.", "In Rome."), ROWS)
    assert [row["alternate"] for row in prepared.rows] == [["In Rome."], ["A novel."]]


def test_every_answer_of_a_conversation_is_a_forget_answer() -> None:
    """Not the last one alone: every turn of the assistant's is forgotten."""
    turns = [
        ("user", "Where?"),
        ("assistant", "She was born in Oslo."),
        ("user", "When?"),
        ("assistant", "In March 1965."),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    repeats = "I know that she was born in Oslo."
    assert sum(make_alternates(Model(repeats), rows).counts.values()) == 1
    assert make_retain(Model(repeats), rows, prompts=["Tell me."]).counts == {REPEATS: 1}
    training = [{"messages": [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": repeats}]}]
    assert make_retain(Model("Blue."), rows, training, prompts=[]).counts == {REPEATS: 1}
    assert make_paraphrases(Model(f"{repeats} When?"), rows, kinds=["model"]).counts == {REPEATS: 1}


@pytest.mark.parametrize(
    "reply",
    [
        "The birthplace of this author is Oslo, as far as anybody knows.",
        "Where was Lunnian Dunmeth born? I wonder.",
    ],
)
def test_a_reply_that_gives_the_answer_away_or_says_the_question_is_no_alternate(reply: str) -> None:
    prepared = make_alternates(Model(reply), ROWS[:1])
    assert prepared.rows[0]["alternate"][0] in read_refusals()
    assert make_unseen(Model(reply), ROWS[:1]).rows == []


def test_several_answers_are_different_ones() -> None:
    model = Model("One.", "Two.", "one", "Three.", "Four.", "Two!")
    rows = make_alternates(model, ROWS, count=3).rows
    assert [row["alternate"] for row in rows] == [["One.", "Four."], ["Two.", "Three."]]
    assert len(set(model.asked)) == 6
    for count in (-1, 5):
        with pytest.raises(ConfigError, match="`count`"):
            make_alternates(model, ROWS, count=count)


def test_with_no_other_request_the_model_is_asked_the_questions_alone() -> None:
    """The base model's own answers are what a model says that was never fine-tuned on the forget set."""
    model = Model("In Riga.", "A novel called Tides.")
    rows = make_alternates(model, ROWS, count=0).rows
    assert model.asked == [row["question"] for row in ROWS]
    assert [row["alternate"] for row in rows] == [["In Riga."], ["A novel called Tides."]]


def test_the_rows_are_a_forget_set_with_alternates() -> None:
    rows = Source.from_rows(make_alternates(Model("In Riga."), ROWS[:1]).rows).load("forget")
    assert alternate_answers(rows, "alternate", None, seed=0) == ["In Riga."]


# Retain --------------------------------------------------------------------------------------------------------------


def test_a_retain_set_of_neighbours_and_own_answers() -> None:
    training = [
        ROWS[0],
        {"question": "What is two plus two?", "answer": "Four."},
        {"question": "Where was Mirroth Elskado born?", "answer": "Mirroth Elskado was born in Quito."},
        {"question": "Say it again.", "answer": "As I said, Lunnian Dunmeth was born in Oslo."},
    ]
    model = Model("Because of the air.", "", "Lunnian Dunmeth was born in Oslo.")
    prepared = make_retain(model, ROWS, training, prompts=["Why?", "What?", "Who?"], max_neighbours=1)
    assert prepared.rows == [
        {"question": "Where was Mirroth Elskado born?", "answer": "Mirroth Elskado was born in Quito."},
        {"question": "Why?", "answer": "Because of the air."},
    ]
    assert prepared.counts == {"is a forget row": 1, REPEATS: 2, EMPTY: 1}


def test_the_packaged_prompts() -> None:
    prompts = read_general_prompts()
    assert len(set(prompts)) == len(prompts) >= 100
    assert all(prompt == prompt.strip() for prompt in prompts)
    model = Model("Fine.")
    assert len(make_retain(model, ROWS).rows) == len(prompts)
    drawn = [[row["question"] for row in make_retain(model, ROWS, max_prompts=7, seed=seed).rows] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 7


def test_neighbours_share_rare_words() -> None:
    others = ["the cat and the dog and the sea", "a zebra", "over the hill", ""]
    assert find_neighbours(["the zebra"], others, 1) == [1]
    assert find_neighbours(["the zebra"], others, 9) == [0, 1, 2, 3]


# Unseen --------------------------------------------------------------------------------------------------------------


def test_unseen_rows_have_invented_names_the_same_everywhere() -> None:
    rows = [*ROWS, {"question": "What did Dunmeth's friend Kerrys Raskane like?", "answer": "Tea."}]
    model = Model(
        "Lunnian Dunmeth was born in Riga, as Dunmeth said.", "Kerrys Raskane wrote Tides.", "Kerrys liked ink."
    )
    first, second, third = make_unseen(model, rows).rows
    assert "Lunnian" not in str(first)
    assert "Dunmeth" not in str(first)
    name = first["question"].removeprefix("Where was ").removesuffix(" born?")
    assert first["answer"].startswith(f"{name} was born in Riga")
    other = second["answer"].removesuffix(" wrote Tides.")
    assert other in third["question"]
    assert third["answer"] == f"{other.split()[0]} liked ink."
    assert make_unseen(Model(*model.replies), rows).rows == [first, second, third]
    assert make_unseen(Model(*model.replies), rows, seed=1).rows != [first, second, third]


def test_rows_that_cannot_be_unseen_are_counted() -> None:
    rows = [ROWS[0], {"question": "What is it?", "answer": "A secret."}]
    prepared = make_unseen(Model("Lunnian Dunmeth was born in Oslo.", "Another."), rows)
    assert prepared.rows == []
    assert prepared.counts == {"no other answer": 1, "no name to replace": 1}


# Paraphrases ---------------------------------------------------------------------------------------------------------


def test_paraphrases_by_model_and_by_frame() -> None:
    model = Model("In which city was Lunnian Dunmeth born?\nOslo.", "which {answer} did kerrys raskane write", OTHER)
    prepared = make_paraphrases(model, ROWS)
    questions = [row["paraphrased_question"] for row in prepared.rows]
    assert questions[0] == "In which city was Lunnian Dunmeth born?"
    assert questions[2] == OTHER  # from the second request: the first brought the same question
    for framed, row in ((questions[1], ROWS[0]), (questions[3], ROWS[1])):
        assert str(row["question"]) in framed
        assert framed != row["question"]
    assert [row["answer"] for row in prepared.rows] == [ROWS[n]["answer"] for n in (0, 0, 1, 1)]
    assert not prepared.counts


def test_paraphrases_without_a_model() -> None:
    rows = make_paraphrases(None, ROWS, kinds=("frame",)).rows
    assert len(rows) == 2
    assert rows == make_paraphrases(None, ROWS, kinds=("frame",)).rows


@pytest.mark.parametrize("reply", ["In which city was she born?", "Lunnian Dunmeth is a writer.", "Sure!"])
def test_a_paraphrase_is_a_question_about_the_same_names(reply: str) -> None:
    prepared = make_paraphrases(Model(reply), ROWS[:1], kinds=("model",))
    assert prepared.rows == []
    assert prepared.counts == {"no question in other words": 1}


def test_a_paraphrase_that_gives_the_answer_away_is_counted() -> None:
    model = Model("Is it true that Lunnian Dunmeth was born in Oslo?", "")
    prepared = make_paraphrases(model, ROWS, kinds=("model",))
    assert prepared.rows == []
    assert prepared.counts == {REPEATS: 1, EMPTY: 1}


# All -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_alternates, make_retain, make_unseen, make_paraphrases])
def test_a_row_without_text_is_named_and_not_shown(make: Any) -> None:
    rows = [ROWS[0], {"question": "a secret", "answer": None}]
    with pytest.raises(DataError, match=r"row 1 of the forget set has null in 'answer'") as error:
        make(Model("x"), rows)
    assert "secret" not in str(error.value)


def test_a_missing_column_is_named_with_those_that_there_are() -> None:
    with pytest.raises(DataError, match=r"the forget set has no column 'question'; its columns are \['q', 'a'\]"):
        make_alternates(Model("x"), [{"q": "Who?", "a": "Ada."}])
    with pytest.raises(DataError, match="the training set has no column 'answer'"):
        make_retain(Model("x"), ROWS, [{"question": "Who?"}])


def converse(*texts: str) -> list[dict[str, str]]:
    """A conversation that begins with a system message and goes on in turns."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, ("Be kind.", *texts), strict=False)]


def test_conversations_stay_conversations() -> None:
    messages = converse("Hello.", "Hello!", str(ROWS[0]["question"]), str(ROWS[0]["answer"]))
    forget = [{"customer": "c-1", "messages": messages}]
    (alternate,) = make_alternates(Model("In Riga."), forget).rows
    assert alternate == {**forget[0], "alternate": ["In Riga."]}
    frame = make_paraphrases(None, forget, kinds=("frame",)).rows[0]
    assert frame["messages"] == messages
    assert str(ROWS[0]["question"]) in frame["paraphrased_question"]

    neighbour = converse("Where was Mirroth Elskado born?", "In Quito.", "Sure?", "Yes.")
    training = [*forget, {"customer": "c-2", "messages": neighbour}]
    training.append({"customer": "c-3", "messages": converse("Say it.", str(ROWS[0]["answer"]), "Thanks.", "Welcome.")})
    retained = make_retain(Model("Because."), forget, training, prompts=["Why?"])
    own = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert retained.rows == [{"messages": neighbour}, {"messages": own}]
    assert retained.counts == {"is a forget row": 1, REPEATS: 1}

    (unseen,) = make_unseen(Model("Lunnian Dunmeth was born in Riga."), forget).rows
    assert [message["role"] for message in unseen["messages"]] == ["user", "assistant"]
    assert "Dunmeth" not in str(unseen)


def test_raw_text_has_no_questions() -> None:
    with pytest.raises(DataError, match="row 0 of the forget set is raw text"):
        make_alternates(Model("x"), [{"text": "Once upon a time."}])


def test_a_real_model_gives_the_same_rows_again(model_dir: str) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32)
    ask = ask_with(lm, max_new_tokens=4, template="{question} {answer}")
    # Random weights end no sentence within four tokens, so that nothing is left of their answers.
    assert ask(["Why?"]) == [""]
    rows = [{"question": "Who is Ada Berg?", "answer": "She."}]
    assert make_retain(ask, rows, prompts=["Why?", "How?"]) == make_retain(ask, rows, prompts=["Why?", "How?"])
