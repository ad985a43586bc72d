"""What models answer to the same questions, and how likely they find each token of that and of the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from lit_unlearn.data.encoding import IGNORED, Example, check_tokenizer, encode_examples, prompt_of, token_texts
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.generation import check_prompts, continue_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANY = "A"  # stands for an answer that is not known: a letter, which tokenizers join to a space before it like most answers


class Answer(NamedTuple):
    """An answer as a model finds it, token by token.

    Args:
        text: Without special tokens and the space around it.
        tokens: The text that each token adds, the end token's name included; empty for one that is only a part of a
            character, which a later one completes.
        probabilities: Of the tokens, each given all those before it.
        probability: Their geometric mean, exp(−NLL): the answer probability of suites and reports.
        ended: Whether the last token is the end of the answer, and not just where it was cut.
    """

    text: str
    tokens: list[str]
    probabilities: list[float]
    probability: float
    ended: bool


class Reply(NamedTuple):
    """What a model makes of a question.

    Args:
        said: The answer that it gives.
        right: The right answer; ``None`` where that is not known.
    """

    said: Answer
    right: Answer | None

    @property
    def exact(self) -> bool:
        """Whether the model gives the right answer, word for word."""
        return self.right is not None and self.said.text == self.right.text


class Asked(NamedTuple):
    """A question, its right answer where that is known, and what each model makes of it, by name."""

    question: str
    answer: str | None
    replies: dict[str, Reply]


# Asking ---------------------------------------------------------------------------------------------------------------


def ask(
    lm: LanguageModel,
    question: str,
    right: str | None = None,
    *,
    template: str | None = None,
    max_length: int = 512,
    max_new_tokens: int = 100,
    number: int = 0,
) -> Reply:
    """Has a model answer a question with the likeliest token at every step, and scores its answer and the right one.

    Args:
        lm: Loaded, with a tokenizer; it is left as it was.
        question: What is asked, in the form that training gives it.
        right: The right answer, if it is known.
        template: As for `encode`.
        max_length: Longest question with the right answer, in tokens; the end of a longer answer is cut off.
        max_new_tokens: Longest answer, in tokens.
        number: Of the question, for messages.

    Raises:
        ValueError: If the tokenizer cannot end an answer, the question is too long or the right answer empty, or
            probabilities are no numbers.
    """
    tokenizer = cast("PreTrainedTokenizerBase", lm.tokenizer)
    check_tokenizer(tokenizer)
    pair = (question, _ANY if right is None else right)
    (row,) = encode_examples(
        [pair], tokenizer, name="question", template=template, max_length=max_length, number=number
    )
    prompt = prompt_of(row)
    check_prompts(lm, [prompt], max_new_tokens)
    ids, ended = continue_prompt(lm, prompt, max_new_tokens)
    said = Example([*prompt, *ids], [IGNORED] * len(prompt) + ids)
    scored = score_examples(lm, [said] if right is None else [said, row])
    if not np.isfinite([one.nll for one in scored]).all():
        raise ValueError(
            f"the model '{lm.name}' gives probabilities that are no numbers: its weights are damaged, or its dtype has too "
            "small a range (float16: take bfloat16)."
        )
    answers = [_answer(one, tokenizer, end) for one, end in zip(scored, (ended, not row.is_cut), strict=False)]
    return Reply(answers[0], None if right is None else answers[1]._replace(text=right.strip()))


def _answer(scored: Scored, tokenizer: PreTrainedTokenizerBase, ended: bool) -> Answer:
    ids = scored.labels.tolist()
    text = str(tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
    return Answer(
        text.strip(), token_texts(ids, tokenizer), np.exp(scored.logp).tolist(), float(np.exp(-scored.nll)), ended
    )


# Showing --------------------------------------------------------------------------------------------------------------


def record(asked: Sequence[Asked]) -> dict[str, Any]:
    """All that was found, in plain types.

    Returns:
        ``questions``: by model ``said``, ``right`` (`Answer`s) and ``exact``; and by model the ``means`` of the right
        answers' ``probability`` and of ``exact``, if there are right answers.
    """
    questions = [
        {
            "question": one.question,
            "answer": one.answer,
            "replies": {
                name: {
                    "said": reply.said._asdict(),
                    "right": reply.right and reply.right._asdict(),
                    "exact": reply.exact,
                }
                for name, reply in one.replies.items()
            },
        }
        for one in asked
    ]
    return {"questions": questions, "means": mean_scores(asked)}


def mean_scores(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Return by model the means of the right answers' ``probability`` and of ``exact``, where there are right answers."""
    means = {}
    for name in asked[0].replies if asked else ():
        replies = [one.replies[name] for one in asked]
        found = [reply.right.probability for reply in replies if reply.right is not None]
        if found:
            means[name] = {"probability": float(np.mean(found)), "exact": float(np.mean([r.exact for r in replies]))}
    return means
