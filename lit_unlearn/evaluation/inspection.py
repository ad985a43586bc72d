"""What models answer to the same questions, and how likely they find each token of that and of the right answer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import dropwhile, groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from lit_unlearn.data.encoding import IGNORED, Example, check_tokenizer, encode_examples, prompt_of, token_texts
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.generation import check_prompts, continue_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANY = "A"  # stands for an answer that is not known: a letter, which tokenizers join to a space before it like most answers

_BARS = "▁▂▃▄▅▆▇█"  # for a token's probability, in eighths
# Likewise, of 256: orange to blue, which no colour-blindness confuses.
_COLOURS = (166, 208, 215, 223, 195, 153, 75, 32)
_END, _EXACT = "∎", "✓"


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
    return {"questions": questions, "means": _means(asked)}


def _means(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    means = {}
    for name in asked[0].replies if asked else ():
        replies = [one.replies[name] for one in asked]
        found = [reply.right.probability for reply in replies if reply.right is not None]
        if found:
            means[name] = {"probability": float(np.mean(found)), "exact": float(np.mean([r.exact for r in replies]))}
    return means


class Page(NamedTuple):
    """What people see: every token above a bar as high as its probability or, on a terminal, on a colour for it.

    Args:
        width: Of a line, in characters.
        coloured: Whether it is for a terminal that shows 256 colours.
    """

    width: int
    coloured: bool

    def whole(self, asked: Sequence[Asked]) -> str:
        """All questions with their answers and, where there are right ones, the means over all."""
        parts = [self.legend(any(one.answer is not None for one in asked))]
        for one in asked:
            question = textwrap.fill(_visible(one.question), self.width)
            parts += [f"\x1b[1m{question}\x1b[0m" if self.coloured else question, self.answers(one)]
        if means := _means(asked):
            rows = [(f"questions: {len(asked)}", "answer probability", "exact answers")]
            rows += [(name, f"{mean['probability']:.3g}", f"{mean['exact']:.0%}") for name, mean in means.items()]
            first = max(len(name) for name, *_ in rows)
            parts.append("\n".join(f"{name:<{first}}  {p:>18}  {exact:>13}" for name, p, exact in rows))
        return "\n\n".join(parts)

    def legend(self, right: bool = False) -> str:
        """What the signs mean.

        Args:
            right: Whether right answers are shown.
        """
        scale = "".join(_paint(" ", level) for level in range(8)) if self.coloured else _BARS
        signs = f"probability of each token: 0 {scale} 1   {_END} end of the answer"
        return (
            f"{signs}   {_EXACT} the right one\nright: the right answer, and its answer probability" if right else signs
        )

    def answers(self, one: Asked) -> str:
        """What every model says to a question and, where that is not the right answer, how likely it finds that."""
        first = max(map(len, one.replies)) + 2
        lines: list[str] = []
        for name, reply in one.replies.items():
            label = f"{name:<{first}}"
            if not reply.exact:
                lines += self._answer(f"{label}{'says':<{6 if reply.right is None else 15}}", reply.said)
                label = " " * first
            if reply.right is not None:
                kind = f"says {_EXACT}" if reply.exact else "right"
                lines += self._answer(f"{label}{kind:<6} {reply.right.probability:<8.2g}", reply.right)
        return "\n".join(lines)

    def _answer(self, label: str, answer: Answer) -> Iterator[str]:
        indent = f"  {label}"
        for cells in _wrap(_cells(answer), max(self.width - len(indent), 20)):
            if self.coloured:
                runs = groupby(cells, key=lambda cell: cell[1])
                yield indent + "".join(_paint("".join(char for char, _ in run), level) for level, run in runs)
            else:
                yield indent + "".join(char for char, _ in cells)
                yield " " * len(indent) + "".join(_BARS[level] for _, level in cells)
            indent = " " * len(indent)


def _cells(answer: Answer) -> list[tuple[str, int]]:
    """The characters of an answer, and the eighth that the probability of their token is in."""
    tokens = [*answer.tokens[:-1], _END] if answer.ended else [*answer.tokens[:-1], f"{answer.tokens[-1]}…"]
    levels = [min(int(8 * probability), 7) for probability in answer.probabilities]
    cells = [(char, level) for token, level in zip(tokens, levels, strict=True) for char in _visible(token)]
    return list(dropwhile(lambda cell: cell[0] == " ", cells))


def _wrap(cells: list[tuple[str, int]], width: int) -> Iterator[list[tuple[str, int]]]:
    """Lines that end, where possible, at a space."""
    while len(cells) > width:
        space = next((i for i in range(width, 0, -1) if cells[i][0] == " "), None)
        yield cells[: space or width]
        cells = cells[space + 1 if space else width :]
    yield cells


def _paint(text: str, level: int) -> str:
    return f"\x1b[38;5;16;48;5;{_COLOURS[level]}m{text}\x1b[0m"


def _visible(text: str) -> str:
    """The text in one line; what a model says must not steer a terminal."""
    return "".join(char if char.isprintable() else "↵" if char == "\n" else "\ufffd" for char in text)
