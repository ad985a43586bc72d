"""Encode text as examples: each is tokenised once and labelled by character offsets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.data.templates import PLAIN_TEMPLATE, render_chat
from lit_unlearn.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The label of a token that is not supervised, as in transformers.
IGNORED = -100


class Example(NamedTuple):
    """One training item: the tokens of a row, unpadded.

    Args:
        input_ids: Token ids of prompt and answer, shape ``(T,)``.
        labels: The same ids where supervised (the answer and its end), −100 elsewhere, shape ``(T,)``.
        id: ``"<stream>/<row number>"``, which `ForgetRetain` gives; an alternate answer's ends with ``"/alternate"``.
        is_cut: Whether tokens beyond ``max_length`` were cut off.
        alternate: The same question with another answer, for objectives that read one.
    """

    input_ids: list[int]
    labels: list[int]
    id: str = ""
    is_cut: bool = False
    alternate: Example | None = None

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify tokens and labels.

        The id alone does not: under the same id, another tokenizer or template makes another example.
        """
        return hashlib.sha256(repr((self.input_ids, self.labels)).encode()).hexdigest()[:32]

    def without_labels(self) -> Example:
        """Return the example with nothing supervised and no id, to fill up a batch without weighing anything."""
        alternate = None if self.alternate is None else self.alternate.without_labels()
        return Example(self.input_ids, [IGNORED] * len(self.labels), alternate=alternate)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if a tokenizer cannot end an answer, or cannot say which characters a token covers.

    A missing pad token is no problem: masks are made from lengths, so the end token pads.
    """
    name = tokenizer.name_or_path
    if tokenizer.eos_token_id is None:
        pad = "no" if tokenizer.pad_token_id is None else "a"
        raise ModelError(
            f"the tokenizer '{name}' has no end-of-sequence token (and {pad} pad token), so answers cannot end: set "
            "`eos_token` in its tokenizer_config.json, or choose another tokenizer.",
            argument="tokenizer",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer '{name}' is a slow one, which gives no character offsets: convert it to a fast tokenizer (a "
            "tokenizer.json), or choose another.",
            argument="tokenizer",
        )


def encode(
    question: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    max_length: int = 512,
    allow_special_tokens: bool = False,
) -> Example:
    """Tokenise question and answer together, and supervise exactly the tokens that carry the answer and its end.

    Tokenising them apart would give other tokens at the boundary than the model sees in any text.

    Args:
        question: What the user says.
        answer: What the model is to say.
        tokenizer: A fast tokenizer with an end token.
        template: Text with ``{question}`` and ``{answer}``, the answer last; ``None`` for the tokenizer's chat
            template where it has one, else ``PLAIN_TEMPLATE``.
        max_length: Largest number of tokens; what is beyond is cut off.
        allow_special_tokens: Whether special tokens in question and answer, such as ``<|im_end|>``, are control tokens, and
            not text like any other.

    Returns:
        The example; its labels are all −100 if nothing of the answer is left.

    Raises:
        ModelError: If the chat template leaves out the answer or changes it.
    """
    text = RowText(tokenizer, allow_special_tokens)
    question, answer = text.protect(question), text.protect(answer)
    if not answer.strip():
        ids = text.encode(question).ids
        return Example(ids, [IGNORED] * len(ids))

    uses_chat_template = template is None and tokenizer.chat_template is not None
    if uses_chat_template:
        before, answer, after = render_chat(question, answer, tokenizer)
        end = after
    else:
        template = template or PLAIN_TEMPLATE
        before, after = template.split("{answer}")
        # The question last: it may itself contain "{answer}".
        before = before.replace("{question}", question)
        # A template that spells a chat format out ends the turn as well.
        end = text.find_end(after)
        after = end or after
    # The model has to learn to say what ends the assistant's turn.
    template_ends_answer = end != ""
    # A template that writes the start token itself, as chat templates do, gets no second one: the model was not trained on it.
    writes_start = uses_chat_template or bool(
        template and tokenizer.bos_token and template.startswith(str(tokenizer.bos_token))
    )
    encoded = text.encode(before, answer, after, add_special_tokens=not writes_start)
    _, start, answer_stop, end_stop = encoded.starts
    stop = end_stop if template_ends_answer else answer_stop

    ids = encoded.ids
    labels = [IGNORED] * len(ids)
    carriers = []
    for i, (begin, token_stop) in enumerate(encoded.offsets):
        # A token across the boundary counts: saying the answer's first letter is saying this token.
        if begin < token_stop and token_stop > start and begin < stop:
            carriers.append(i)
    if not carriers:
        # The end token alone is no answer.
        return Example(ids, labels)

    # From the first to the last, because some tokenizers give no characters to a space in between.
    span = slice(carriers[0], carriers[-1] + 1)
    labels[span] = ids[span]
    if not template_ends_answer:
        # Some tokenizers add the end token themselves.
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            labels.append(IGNORED)
        labels[-1] = tokenizer.eos_token_id
    return Example(ids[:max_length], labels[:max_length], is_cut=len(ids) > max_length)


def encode_examples(
    rows: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    template: str | None = None,
    max_length: int = 512,
    number: int | None = None,
    allow_special_tokens: bool = False,
) -> list[Example]:
    """Tokenise all rows of a set.

    Args:
        rows: Pairs of question and answer.
        tokenizer: As for `encode`.
        name: Name of the set, for messages.
        template: As for `encode`.
        max_length: As for `encode`.
        number: Number of the row that all these belong to, for messages; ``None`` if they are rows 0, 1, ….
        allow_special_tokens: As for `encode`.

    Raises:
        DataError: If a row is left without a supervised token; the message names the row.
    """
    examples = []
    settings: Any = {
        "template": template,
        "max_length": max_length,
        "allow_special_tokens": allow_special_tokens,
    }
    for position, (question, answer) in enumerate(rows):
        example = encode(question, answer, tokenizer, **settings)
        # Nothing predicts the first token, so a label there supervises nothing.
        if all(label == IGNORED for label in example.labels[1:]):
            # Never the text itself: messages end up in logs, and a forget row is what no one should read again.
            if example.is_cut:
                reason = f"its prompt alone fills `max_length` ({max_length}); raise it"
            else:
                reason = "its answer is empty or tokenises to nothing; remove the row"
            raise DataError(
                f"row {position if number is None else number} of the {name} set has no supervised token: {reason}.",
                argument="max_length" if example.is_cut else None,
            )
        examples.append(example)
    return examples


def encode_chunks(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_length: int = 2048,
    allow_special_tokens: bool = False,
) -> list[Example]:
    """Join raw texts and cut them into examples of equal length, with every token supervised.

    As published baselines do it: texts are joined by empty lines and tokenised as one, so an example may continue over
    the end of a text. Every example begins with the start token, if the tokenizer begins texts with one; that token is not
    supervised. If it does not, nothing predicts an example's first token, which is then only read. The last example is the
    remainder, however short: no token is left out or counts twice.

    Args:
        texts: Raw texts, in order.
        tokenizer: A fast tokenizer; its chat template is not used.
        name: Name of the set, for messages.
        max_length: Tokens of an example, the start token among them; at least 2.
        allow_special_tokens: As for `encode`.

    Raises:
        DataError: If there is no token that another one predicts.
    """
    adds_start = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = [tokenizer.bos_token_id] if adds_start else []
    row_text = RowText(tokenizer, allow_special_tokens)
    ids = row_text.encode(row_text.protect("\n\n".join(texts)), add_special_tokens=False).ids
    examples = []
    step = max_length - len(start)
    for begin in range(0, len(ids), step):
        chunk = ids[begin : begin + step]
        examples.append(Example(start + chunk, [IGNORED] * len(start) + chunk))
    if not examples or len(examples[0].input_ids) < 2:
        raise DataError(f"the {name} set has no text to predict: it has {len(ids)} tokens in {len(texts)} texts.")
    return examples


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Pad examples to a Hugging Face batch, with the mask made from the lengths.

    Args:
        examples: ``B`` examples.
        pad_id: Fills the tail; any id will do. The mask does not depend on it: with the end token as padding,
            ``ids != pad_id`` would hide the end of every answer.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64, shape ``(B, T)``; and under ``alternate`` a batch of the
        alternate answers, if there are any.
    """
    width = max(len(example.input_ids) for example in examples)
    shape = (len(examples), width)
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        ids[i, :length] = torch.tensor(example.input_ids)
        mask[i, :length] = 1
        labels[i, :length] = torch.tensor(example.labels)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    alternates = [example.alternate for example in examples if example.alternate is not None]
    if alternates:
        batch["alternate"] = collate(alternates, pad_id)
    return batch


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the first supervised one: exactly what the answer is predicted from."""
    is_supervised = [label != IGNORED for label in example.labels]
    return example.input_ids[: is_supervised.index(True)]


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds to those before it: joined, they are the text of all."""
    texts, before = [], ""
    for stop in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
        if stop < len(ids):
            # A replacement character stands for the first bytes of a character that the next tokens complete.
            text = text.rstrip("\ufffd")
        texts.append(text[len(before) :])
        before = text
    return texts
