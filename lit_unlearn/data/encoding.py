"""From text to token ids: one tokenisation per example, labelled by character offsets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.data.templates import PLAIN_TEMPLATE, _render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not supervised, as in transformers


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
    """Refuses a tokenizer that cannot end an answer or say which characters a token covers.

    A missing pad token is no problem: masks are made from lengths, so the end token pads.

    Raises:
        ValueError: If it has no end-of-sequence token or gives no character offsets.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token (and "
            f"{'no' if tokenizer.pad_token_id is None else 'a'} pad token), so answers cannot end: set `eos_token` in its "
            "tokenizer_config.json, or choose another tokenizer."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer '{tokenizer.name_or_path}' is a slow one, which gives no character offsets: convert it to a "
            "fast tokenizer (a tokenizer.json), or choose another."
        )


def encode(
    question: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    max_length: int = 512,
) -> Example:
    """Tokenises a row once and supervises exactly the tokens that carry the answer, and its end.

    Args:
        question: What the user says.
        answer: What the model is to say.
        tokenizer: A fast tokenizer with an end token.
        template: Text with ``{question}`` and ``{answer}``, the answer last; ``None`` for the tokenizer's chat
            template where it has one, else ``PLAIN_TEMPLATE``.
        max_length: Longest row, in tokens; the end of a longer one is cut off.

    Returns:
        The row; its labels are all −100 if nothing of the answer is left.

    Raises:
        ValueError: If the chat template leaves out the answer or changes it.
    """
    if not answer.strip():
        ids = list(tokenizer(question)["input_ids"])
        return Example(ids, [IGNORED] * len(ids))
    chat = template is None and tokenizer.chat_template is not None
    if chat:
        before, said, after = _render_chat(question, answer, tokenizer)
    else:
        before, after = (template or PLAIN_TEMPLATE).split("{answer}")
        before, said = before.replace("{question}", question), answer
    ends_itself = chat and after != ""  # what ends the assistant's turn is the answer's end
    start = len(before)
    stop = start + len(said + after if ends_itself else said)
    encoded = tokenizer(before + said + after, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    carry = [i for i, (b, e) in enumerate(encoded["offset_mapping"]) if b < e and e > start and b < stop]
    if not carry:
        return Example(ids, labels)  # the end token alone is no answer
    span = slice(carry[0], carry[-1] + 1)  # also a space in between to which a tokenizer gives no characters
    labels[span] = ids[span]
    if not ends_itself:
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
) -> list[Example]:
    """Tokenises all rows of a set.

    Args:
        rows: Pairs of question and answer.
        tokenizer: As for `encode`.
        name: Of the set, for messages.
        template: As for `encode`.
        max_length: As for `encode`.
        number: Of the row that all these belong to, for messages; ``None`` if they are rows 0, 1, ….

    Raises:
        ValueError: If a row is left without a supervised token; the message names the row.
    """
    encoded = []
    for place, (question, answer) in enumerate(rows):
        row = encode(question, answer, tokenizer, template=template, max_length=max_length)
        if not any(label != IGNORED for label in row.labels[1:]):  # nothing predicts a row's first token
            reason = (
                f"its prompt alone fills `max_length` ({max_length}); raise it"
                if row.is_cut
                else f"its answer {answer!r} tokenises to nothing; remove the row"
            )
            raise ValueError(
                f"row {place if number is None else number} of the {name} set has no supervised token: {reason}. Its question is {question[:80]!r}."
            )
        encoded.append(row)
    return encoded


def encode_chunks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, name: str, max_length: int = 2048
) -> list[Example]:
    """Joins raw texts and cuts them into rows of equal length, with every token supervised.

    As published baselines do it: texts are joined by empty lines and tokenised as one, and a row goes on over the end of
    a text. Every row begins with the start token, if the tokenizer begins rows with one; it is no part of the text, and
    not supervised. If it does not, nothing predicts a row's first token, which is then only read. The last row is what is
    left, however short: no token is left out or counts twice.

    Args:
        texts: Raw texts, in order.
        tokenizer: A fast tokenizer; its chat template is not used.
        name: Of the set, for messages.
        max_length: Tokens of a row, the start token among them; at least 2.

    Raises:
        ValueError: If there is no token that another one predicts.
    """
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    whole = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)  # no warning that it is long
    ids, step = list(whole["input_ids"]), max_length - len(start)
    chunks = [ids[i : i + step] for i in range(0, len(ids), step)]
    rows = [Example(start + chunk, [IGNORED] * len(start) + chunk) for chunk in chunks]
    if not rows or len(rows[0].input_ids) < 2:
        raise ValueError(f"the {name} set has no text to predict: it has {len(ids)} tokens in {len(texts)} texts.")
    return rows


def collate(rows: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Pads rows to a Hugging Face batch, with the mask made from the lengths.

    Args:
        rows: ``B`` rows.
        pad_id: Fills the tail; any id will do.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64, shape ``(B, T)``; and under ``alternate`` a batch of the
        rows with their other answers, if they have any.
    """
    width = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*value, *[fill] * (width - len(value))] for value in values])

    batch: dict[str, Any] = {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }
    alternates = [row.alternate for row in rows if row.alternate is not None]
    return batch if not alternates else {**batch, "alternate": collate(alternates, pad_id)}


def prompt_of(row: Example) -> list[int]:
    """The tokens of a row before its first supervised one: exactly what its answer is predicted from."""
    return row.input_ids[: next(i for i, label in enumerate(row.labels) if label != IGNORED)]


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds to those before it: joined, they are the text of all."""
    parts, before = [], ""
    for stop in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
        whole = text if stop == len(ids) else text.rstrip("\ufffd")  # what stands for a character's first bytes
        parts.append(whole[len(before) :])
        before = whole
    return parts
