"""Attacks by the prompt: what they ask, and that the benchmark measures just that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from evaluation.rows import FORGET, loaded, say, taught, write_qa

from lit_unlearn import FewShot, LanguageModel, Prefix, QABenchmark, SeveralTurns
from lit_unlearn.data.encoding import encode_conversation
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.example import IGNORED, prompt_of
from lit_unlearn.data.formats import Conversation, Message
from lit_unlearn.data.templates import PLAIN_TEMPLATE

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
ROWS = [Conversation.from_turn(row["question"], row["answer"]) for row in FORGET]
ANSWERS = [f"Guess {number}." for number in range(len(ROWS))]
SYSTEM = Message("system", "Be brief.")
ATTACKS = [FewShot(2), Prefix(2), SeveralTurns(), SeveralTurns(0), SeveralTurns(1, None)]


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    """Questions and answers of a conversation without other messages."""
    texts = conversation.texts
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * (len(texts) // 2)
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_what_every_attack_leaves(attack):
    changed = attack.change_questions(ROWS, ANSWERS)
    assert changed == attack.change_questions(ROWS, ANSWERS)
    assert changed != ROWS
    for row, asked in zip(ROWS, changed, strict=True):
        assert asked.answer == row.answer
        assert asked.supervised == (len(asked.messages) - 1,)


# Other examples -------------------------------------------------------------------------------------------------------


def test_shots_are_other_rows_with_their_answers():
    pairs = [(row.question, row.answer) for row in ROWS]
    drawn = set()
    for seed in range(20):
        for row, asked in zip(ROWS, FewShot(2, seed=seed).change_questions(ROWS), strict=True):
            *shown, last = turns(asked)
            assert last == (row.question, row.answer)
            assert len(set(shown)) == 2
            assert set(shown) <= set(pairs) - {last}
            drawn.add(tuple(shown))
    assert len(drawn) == 5 * 4  # every ordered pair


def test_shots_do_not_give_the_answer_away():
    rows = [Conversation.from_turn(*pair) for pair in [("A?", "x"), ("B?", "x "), ("A?", "y"), ("C?", "z")]]
    for seed in range(9):
        first = FewShot(1, seed=seed).change_questions([*rows, Conversation.from_turn("D?", "w")])[0]
        assert turns(first)[0] in [("C?", "z"), ("D?", "w")]
    with pytest.raises(ValueError, match=r"`shots` is 2, but row 0 .* 1 "):
        FewShot(2).change_questions(rows)


def test_a_conversation_stays_together():
    """Shots stand after the system message and before its own earlier turns."""
    earlier = (SYSTEM, Message("user", "Hello"), Message("assistant", "Hi."))
    row = Conversation((*earlier, *ROWS[0].messages), (2, 4))
    asked = FewShot(1).change_questions([row, *ROWS[1:]])[0]
    assert [message.role for message in asked.messages] == ["system", *["user", "assistant"] * 3]
    assert asked.messages[0] == SYSTEM
    assert asked.messages[3:] == row.messages[1:]
    assert asked.supervised == (6,)


# As text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, "{question} {answer}", "<q>{question}</q><a>{answer}</a>"])
@pytest.mark.parametrize("attack", [FewShot, SeveralTurns])
def test_turns_as_text_are_the_rows_one_after_the_other(attack, template):
    def fill(question: str, answer: str) -> str:
        return template.replace("{answer}", answer).replace("{question}", question)

    as_turns = attack().change_questions(ROWS, ANSWERS)
    as_text = attack(template=template).change_questions(ROWS, ANSWERS)
    for with_turns, with_text in zip(as_turns, as_text, strict=True):
        assert with_text.is_single_turn
        expected = "\n\n".join(fill(question, answer) for question, answer in turns(with_turns))
        assert fill(with_text.question, with_text.answer) == expected


def test_braces_in_rows_are_text():
    rows = [Conversation.from_turn(f"{{answer}} {n}?", f"{{question}} {n}") for n in range(3)]
    asked = FewShot(2, template="Q: {question}\nA: {answer}").change_questions(rows)[2]
    assert asked.question.count("{question}") == 2
    assert asked.question.endswith("Q: {answer} 2?")


@pytest.mark.parametrize(
    "attack", [FewShot(1, template=PLAIN_TEMPLATE), SeveralTurns(template=PLAIN_TEMPLATE)], ids=str
)
def test_a_template_has_no_place_for_a_system_message(attack):
    rows = [Conversation((SYSTEM, *row.messages), (2,)) for row in ROWS]
    with pytest.raises(ValueError, match="`template`"):
        attack.change_questions(rows, ANSWERS)


# Several turns --------------------------------------------------------------------------------------------------------


def test_several_turns_have_the_models_own_answers():
    questions = ["Is Ada a poet?", "Who sold the house?", "Is Ada a judge?", "Where?", "Who bought the house?"]
    rows = [Conversation.from_turn(question, f"Truth {n}.") for n, question in enumerate(questions)]
    changed = SeveralTurns(related=1, follow_up="Sure?").change_questions(rows, ANSWERS)
    assert turns(changed[0]) == [(questions[2], "Guess 2."), (questions[0], "Guess 0."), ("Sure?", "Truth 0.")]
    assert turns(changed[4]) == [(questions[1], "Guess 1."), (questions[4], "Guess 4."), ("Sure?", "Truth 4.")]
    # related to none: the nearest
    assert turns(changed[3])[0] in [(questions[2], "Guess 2."), (questions[4], "Guess 4.")]
    most = SeveralTurns(related=4, follow_up=None).change_questions(rows, ANSWERS)
    assert turns(most[0])[-2:] == [(questions[2], "Guess 2."), (questions[0], "Truth 0.")]
    assert sorted(turns(most[0])[:-1]) == sorted(zip(questions[1:], ANSWERS[1:], strict=True))
    alone = SeveralTurns(related=0, follow_up="Sure?").change_questions(rows, ANSWERS)
    assert turns(alone[1]) == [(questions[1], "Guess 1."), ("Sure?", "Truth 1.")]


def test_refused_settings():
    for settings, argument in [
        ({"related": -1}, "related"),
        ({"related": 0, "follow_up": None}, "related"),
        ({"follow_up": " "}, "follow_up"),
        ({"template": "Q: {question}"}, "template"),
    ]:
        with pytest.raises(ValueError, match=f"`{argument}`"):
            SeveralTurns(**settings)
    for wrong in (lambda: FewShot(0), lambda: Prefix(0), lambda: FewShot(template="{answer}")):
        with pytest.raises(ValueError, match=r"`(shots|words|template)`"):
            wrong()
    with pytest.raises(ValueError, match=r"`answers` .* 5 .* 4"):
        SeveralTurns().change_questions(ROWS, ANSWERS[1:])
    with pytest.raises(ValueError, match=r"`related` is 5, but row 0 .* 4 "):
        SeveralTurns(related=5).change_questions(ROWS, ANSWERS)


# First words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words", "given", "expected"),
    [
        ("Ada wrote it.", 1, "Ada", "wrote it."),
        ("Ada wrote it.", 2, "Ada wrote", "it."),
        ("Ada wrote it.", 9, "Ada wrote", "it."),
        (" Ada\n wrote it. ", 2, " Ada\n wrote", "it. "),
        ("Ada", 3, "", "Ada"),
        (" Ada", 3, "", " Ada"),
    ],
)
def test_first_words_are_given(answer, words, given, expected):
    (asked,) = Prefix(words).change_questions([Conversation.from_turn("Who?", answer)])
    assert (asked.answer[: asked.given_length], asked.expected) == (given, expected)
    assert asked.answer == answer


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("special", [False, True], ids=["plain text", "special tokens in the text"])
@pytest.mark.parametrize("words", [1, 2, 5, 30])
def test_first_words_belong_to_the_prompt(words, special, chat, tokenizer):
    """The same tokens, of which those that carry a character of the rest are supervised, and the end."""
    tokenizer = copy.deepcopy(tokenizer)
    if chat:
        tokenizer.chat_template = CHAT
    for row in ROWS:
        end = f" {tokenizer.eos_token} and Ada." if special else ""
        conversation = row.with_answer(row.answer + end)
        (asked,) = Prefix(words).change_questions([conversation])
        full, found = (encode_conversation(each, tokenizer, EncodingSettings()) for each in (conversation, asked))
        assert found.input_ids == full.input_ids
        first, last = ([label != IGNORED for label in example.labels].index(True) for example in (full, found))
        assert found.labels[last:] == full.labels[last:]
        assert set(found.labels[:last]) == {IGNORED}
        given = tokenizer.decode(full.input_ids[first:last], skip_special_tokens=False)
        assert "".join(given.split()) == "".join(asked.answer[: asked.given_length].split())


# In a benchmark -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lm(tokenizer_dir: str) -> LanguageModel:
    return loaded(taught(tokenizer_dir, 20))


def with_chat(lm: LanguageModel) -> LanguageModel:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = CHAT
    return LanguageModel.wrap(lm.model, tokenizer)


def test_a_benchmark_asks_what_the_attack_asks(lm, tmp_path):
    lm = with_chat(lm)
    plain = QABenchmark(**write_qa(tmp_path), max_new_tokens=4)
    unchanged = plain.run(lm).to_dict()
    for attack in ATTACKS:
        results = plain.with_attack(attack, ANSWERS).run(lm).to_dict()
        assert results["settings"].pop("attack")["name"] == attack.name
        assert results["settings"] == unchanged["settings"]
        for name in ("retain", "holdout"):
            assert results["examples"][name] == unchanged["examples"][name]
        for row, asked in zip(results["examples"]["forget"], attack.change_questions(ROWS, ANSWERS), strict=True):
            example = encode_conversation(asked, lm.tokenizer, EncodingSettings())
            assert row["question"] == asked.question
            assert row["answer"] == asked.expected
            assert row["generated"] == say(lm, prompt_of(example), 4)
            assert row["nll"] == pytest.approx(nll_of(lm, example), rel=1e-9)
    assert plain.run(lm).to_dict() == unchanged


def nll_of(lm: LanguageModel, example: Any) -> float:
    with torch.no_grad():
        logp = lm.model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
    losses = [-logp[i - 1, label].item() for i, label in enumerate(example.labels) if label != IGNORED]
    return sum(losses) / len(losses)


def test_as_text_for_a_model_without_chat_template(lm, tmp_path):
    plain = QABenchmark(**write_qa(tmp_path), max_new_tokens=4)
    with pytest.raises(ValueError, match="chat template"):
        plain.with_attack(FewShot(1)).run(lm)
    results = plain.with_attack(FewShot(1, template=PLAIN_TEMPLATE)).run(lm)
    assert results.settings["attack"] == {"name": "few_shot", "shots": 1, "template": PLAIN_TEMPLATE, "seed": 0}
    assert "\n\nQuestion: " in results.examples["forget"][0]["question"]


def test_raw_text_has_no_questions(lm, write_rows):
    rows = write_rows("rows.jsonl", [{"text": "Ada wrote the letter in May."}] * 2)
    with pytest.raises(ValueError, match=r"'prefix'.*raw text"):
        QABenchmark(rows, rows).with_attack(Prefix()).prepare(lm.tokenizer)
