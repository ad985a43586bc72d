"""Ask models the same questions, and measure each token of their answers and of the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from lit_unlearn.data.encoding import encode_row
from lit_unlearn.data.encoding_settings import EncodingSettings, check_tokenizer, find_hidden_id
from lit_unlearn.data.example import IGNORED, Example, prompt_of
from lit_unlearn.data.formats import Conversation
from lit_unlearn.data.shown_tokens import token_texts
from lit_unlearn.errors import ModelError
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.generation import check_prompts, continue_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a right answer that is not known: a letter, which tokenizers join to a space before it like most answers.
_PLACEHOLDER = "A"


class Answer(NamedTuple):
    """An answer with a model's probabilities, token by token.

    Args:
        text: Without special tokens and the space around it.
        tokens: The text that each token adds, the end token's name included; empty for a token that is only the beginning
            of a character, which a later one completes.
        probabilities: Probability of each token, given all those before it; ``None`` where a server does not give it.
        probability: Their geometric mean, exp(−NLL): the answer probability of benchmarks and reports; ``None`` unless all are
            known.
        ended: Whether the last token is the end of the answer, and not just where it was cut.
    """

    text: str
    tokens: list[str]
    probabilities: list[float | None]
    probability: float | None
    ended: bool


class Reply(NamedTuple):
    """A model's reply to a question.

    Args:
        generated: The answer that it generates.
        expected: The right answer; ``None`` where that is not known.
    """

    generated: Answer
    expected: Answer | None

    @property
    def exact(self) -> bool:
        """True if the model generates the right answer, character by character."""
        return self.expected is not None and self.generated.text == self.expected.text


class Asked(NamedTuple):
    """A question, its right answer where that is known, and each model's reply, by name."""

    question: str
    answer: str | None
    replies: dict[str, Reply]


def ask_model(
    lm: LanguageModel,
    question: str | Conversation,
    right: str | None = None,
    *,
    encoding: EncodingSettings | None = None,
    max_new_tokens: int = 100,
    number: int = 0,
    **settings: Any,
) -> Reply:
    """Let a model answer a question with the likeliest token at every step, and score its answer and the right one.

    Args:
        lm: Loaded, with a tokenizer; it is left as it was.
        question: The question, to which the template of training is applied, or a conversation whose last turn is asked for.
        right: The right answer, if it is known.
        encoding: The prompt, and the longest question with the right answer, in tokens; the end of a longer answer is cut off.
        max_new_tokens: Longest answer, in tokens.
        number: Number of the question, for messages.
        **settings: Fields of ``encoding``, in their place.

    Raises:
        DataError: If the question is too long or the right answer empty.
        ModelError: If the tokenizer cannot end an answer, or probabilities are not numbers.
    """
    tokenizer = cast("PreTrainedTokenizerBase", lm.tokenizer)
    check_tokenizer(tokenizer)
    asked = Conversation.from_turn(question, "") if isinstance(question, str) else question
    row = asked.with_answer(_PLACEHOLDER if right is None else right)
    changed = replace(encoding or EncodingSettings(), **settings)
    (example,) = encode_row(row, tokenizer, changed, f"row {number} of the question set")
    prompt = prompt_of(example)
    check_prompts(lm, [prompt], max_new_tokens)
    ids, ended = continue_prompt(lm, prompt, max_new_tokens, find_hidden_id(tokenizer, changed))

    mask = None if example.attention_mask is None else [*example.attention_mask[: len(prompt)], *[1] * len(ids)]
    generated = Example([*prompt, *ids], [IGNORED] * len(prompt) + ids, attention_mask=mask)
    scored = score_examples(lm, [generated] if right is None else [generated, example])
    if not all(np.isfinite(scores.nll) for scores in scored):
        raise ModelError(
            f"the model '{lm.name}' gives probabilities that are not numbers: its weights are damaged, or its dtype has too "
            "small a range (float16: take bfloat16)."
        )
    reply = Reply(_build_answer(scored[0], tokenizer, ended), None)
    if right is None:
        return reply
    # The text is what was given: that of the tokens may lack an end that was cut.
    right_answer = _build_answer(scored[1], tokenizer, not example.is_cut)
    return reply._replace(expected=right_answer._replace(text=right.strip()))


def _build_answer(scored: Scored, tokenizer: PreTrainedTokenizerBase, ended: bool) -> Answer:
    ids = scored.labels.tolist()
    text = str(tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
    probabilities = np.exp(scored.logp).tolist()
    return Answer(text.strip(), token_texts(ids, tokenizer), probabilities, float(np.exp(-scored.nll)), ended)


def describe_replies(asked: Sequence[Asked]) -> dict[str, Any]:
    """Return questions and replies in plain types.

    Returns:
        ``questions``: by model ``said``, ``right`` (`Answer`s) and ``exact``; and by model the ``means`` of the right
        answers' ``probability`` (``None`` for a model behind a server) and of ``exact``, if there are right answers.
    """
    questions = []
    for question in asked:
        replies = {}
        for name, reply in question.replies.items():
            expected = None if reply.expected is None else reply.expected._asdict()
            replies[name] = {"said": reply.generated._asdict(), "right": expected, "exact": reply.exact}
        questions.append({"question": question.question, "answer": question.answer, "replies": replies})
    return {"questions": questions, "means": mean_scores(asked)}


def mean_scores(asked: Sequence[Asked]) -> dict[str, dict[str, float | None]]:
    """Return by model the means of the right answers' ``probability`` and of ``exact``, where there are right answers."""
    means: dict[str, dict[str, float | None]] = {}
    for name in asked[0].replies if asked else ():
        exact, probabilities, has_right = [], [], False
        for question in asked:
            reply = question.replies[name]
            exact.append(reply.exact)
            if reply.expected is not None:
                has_right = True
                if reply.expected.probability is not None:
                    probabilities.append(reply.expected.probability)
        if has_right:
            probability = float(np.mean(probabilities)) if probabilities else None
            means[name] = {"probability": probability, "exact": float(np.mean(exact))}
    return means
