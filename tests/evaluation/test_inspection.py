"""Answers and probabilities against a plain forward pass, and the record of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_unlearn import LanguageModel
from lit_unlearn.evaluation.inspection import Answer, Asked, Reply, ask_model, describe_replies
from lit_unlearn.metrics import AnswerLikelihood
from lit_unlearn.models.generation import generate

CHAT = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
FORMS = {  # how a question and an answer are put together
    "plain": (None, None, "Question: {question}\nAnswer: {answer}"),
    "own": ("{question} => {answer}", None, "{question} => {answer}"),
    "chat": (None, CHAT, "[user] {question}[assistant] {answer}"),
}


@pytest.fixture
def lm(tiny_lm: Callable[..., LanguageModel]) -> LanguageModel:
    made = tiny_lm(attention_dropout=0.5)  # which must not count
    made.load(torch.float32)
    return made


def reference(lm: Any, ids: list[int], count: int) -> tuple[list[float], list[int]]:
    """Probabilities of the last ``count`` tokens, one forward pass each, and the likeliest in their places."""
    probabilities, likeliest = [], []
    for place in range(len(ids) - count, len(ids)):
        logits = lm.model(torch.tensor([ids[:place]])).logits[0, -1].double()
        probabilities.append(logits.softmax(-1)[ids[place]].item())
        likeliest.append(int(logits.argmax()))
    return probabilities, likeliest


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_both_answers(lm: Any, form: str) -> None:
    template, chat, text = FORMS[form]
    lm.tokenizer.chat_template = chat
    question, right = "Who wrote it?", "The poet Zoë Ø."
    reply = ask_model(lm, question, right, template=template, max_new_tokens=12)

    assert lm.model.training  # left as it was
    lm.model.eval()
    prompt, _, _ = text.partition(" {answer}")
    prompt_ids = lm.tokenizer(prompt.format(question=question))["input_ids"]
    said_ids = lm.model.generate(torch.tensor([prompt_ids]), max_new_tokens=12, do_sample=False)[0].tolist()
    said = said_ids[len(prompt_ids) :]
    assert len(said) == len(reply.generated.tokens)
    assert reply.generated.text == generate(lm, [prompt_ids], max_new_tokens=12)[0].strip()
    assert "".join(reply.generated.tokens) == lm.tokenizer.decode(said)
    probabilities, likeliest = reference(lm, said_ids, len(said))
    assert (reply.generated.probabilities, said) == (pytest.approx(probabilities), likeliest)

    assert reply.expected is not None
    right_ids = [
        *lm.tokenizer(text.format(question=question, answer=right))["input_ids"],
        lm.tokenizer.eos_token_id,
    ]
    probabilities, _ = reference(lm, right_ids, len(right_ids) - len(prompt_ids))
    assert reply.expected.probabilities == pytest.approx(probabilities)
    metric = AnswerLikelihood()
    metric.update(torch.tensor(probabilities).log(), torch.zeros(len(probabilities), dtype=torch.long), 1)
    assert reply.expected.probability == pytest.approx(metric.compute()["probability"].item())
    assert "".join(reply.expected.tokens) == f" {right}{lm.tokenizer.eos_token}"
    assert "" in reply.expected.tokens  # the first byte of ë
    assert reply.expected.ended
    assert not reply.exact


def test_without_a_right_answer_the_prompt_is_the_same(lm: LanguageModel) -> None:
    known, unknown = ask_model(lm, "Who?", "The poet.", max_new_tokens=5), ask_model(lm, "Who?", max_new_tokens=5)
    assert unknown.expected is None
    assert (unknown.generated.tokens, known.generated.text) == (known.generated.tokens, unknown.generated.text)


def test_exact_and_ended(lm: Any) -> None:
    first = ask_model(lm, "Who?", max_new_tokens=4)
    assert first.generated.text
    assert not first.generated.ended
    assert ask_model(lm, "Who?", f"{first.generated.text}\n", max_new_tokens=4).exact

    lm.model.eval()
    prompt = lm.tokenizer("Question: Who?\nAnswer:")["input_ids"]
    said = lm.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
    lm.model.generation_config.eos_token_id = [said[0]]
    ended = ask_model(lm, "Who?", max_new_tokens=4).generated
    assert (ended.text, len(ended.tokens), ended.ended) == ("", 1, True)


def test_refusals(lm: Any) -> None:
    with pytest.raises(ValueError, match=r"row 7 of the question set has no supervised token: its answer is empty"):
        ask_model(lm, "Who?", " ", number=7)
    with pytest.raises(ValueError, match=r"256 positions .* lower `max_new_tokens`"):
        ask_model(lm, "Who?", max_new_tokens=250)
    torch.nn.init.constant_(lm.model.get_output_embeddings().weight, torch.nan)
    with pytest.raises(ValueError, match="probabilities that are not numbers"):
        ask_model(lm, "Who?")


# The record -----------------------------------------------------------------------------------------------------------

RIGHT = Answer("In Rome.", [" In", " Rome", ".", "</s>"], [0.999, 0.6, 1.0, 0.9], 0.86, True)
LOST = Answer("In Rome.", [" In", " Rome", ".", "</s>"], [0.2, 1e-9, 0.0, 0.13], 0.00034, True)
NOISE = Answer("a\x1b[2J", [" a", "\x1b[2J", "\n"], [0.3, 0.1, 0.2], 0.18, False)
ASKED = Asked("Where?", "In Rome.", {"old": Reply(RIGHT, RIGHT), "unlearned": Reply(NOISE, LOST)})


def test_a_record_has_means_where_there_are_right_answers() -> None:
    other = ASKED._replace(replies={"old": Reply(NOISE, LOST), "unlearned": Reply(NOISE, LOST)})
    found = describe_replies([ASKED, other])
    assert found["means"] == {
        "old": {"probability": pytest.approx((0.86 + 0.00034) / 2), "exact": 0.5},
        "unlearned": {"probability": pytest.approx(0.00034), "exact": 0.0},
    }
    replies = found["questions"][0]["replies"]
    assert replies["old"] == {"said": RIGHT._asdict(), "right": RIGHT._asdict(), "exact": True}
    unknown = describe_replies([Asked("Who?", None, {"m": Reply(NOISE, None)})])
    assert unknown["means"] == {}
    assert unknown["questions"][0]["replies"]["m"] == {"said": NOISE._asdict(), "right": None, "exact": False}
