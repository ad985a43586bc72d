"""Special tokens in the text of rows: there they are text, in a template they are control tokens.

A tokenizer takes the characters ``<|im_end|>`` for the token that ends a turn, wherever they stand. In a row they are what
somebody wrote: as a token they would end the answer, and be unlearned.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from lit_unlearn.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Tokens of a text that was put together from pieces.

    Args:
        ids: Token ids, shape ``(T,)``.
        offsets: First and last character (exclusive) of every token.
        starts: First character of every piece, and the end of the last one.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    starts: list[int]


class RowText:
    """The text of rows for one tokenizer, in which special tokens are characters like all others.

    Args:
        tokenizer: A fast one.
        allow_special_tokens: Whether special tokens in the text of rows are what they are elsewhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allow_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._names = _Names.of(tokenizer)
        self._is_off = allow_special_tokens or self._names.pattern is None
        self._protected: list[str] = []

    def count(self, texts: Iterable[str]) -> int:
        """Return in how many texts there is a special token that is encoded as text."""
        if self._is_off:
            return 0
        return sum(1 for text in texts if self._names.find(text))

    def protect(self, text: str) -> str:
        """Return the text of a row with a placeholder for each special token, to be put into a template."""
        return text if self._is_off else str(self._names.sub(self._make_placeholder, text))

    def _make_placeholder(self, match: re.Match[str]) -> str:
        self._protected.append(match.group())
        return self._names.placeholder(len(self._protected) - 1)

    def find_end(self, after: str) -> str:
        """Return the special token that a template's text after the answer begins with, and the space before it, or nothing."""
        space = len(after) - len(after.lstrip())
        token = None if self._names.pattern is None else self._names.pattern.match(after, space)
        return after[: token.end()] if token else ""

    def cut_end(self, text: str) -> str:
        """Return a template's text without the space and the special tokens that it ends with."""
        text = text.rstrip()
        for token in reversed([*self._find_tokens(text)]):
            if token.end() < len(text):
                break
            text = text[: token.start()].rstrip()
        return text

    def cut_at_token(self, text: str) -> str:
        """Return a template's text up to the first special token in it."""
        token = next(iter(self._find_tokens(text)), None)
        return (text if token is None else text[: token.start()]).rstrip()

    def reveal(self, text: str) -> str:
        """Return a text of rows with its special tokens in place of what `protect` has put there."""
        return self._names.placeholders.sub(lambda match: self._protected[int(match[1])], text)

    def _find_tokens(self, text: str) -> Iterable[re.Match[str]]:
        return () if self._names.pattern is None else self._names.pattern.finditer(text)

    def encode(self, *pieces: str, add_special_tokens: bool = True) -> Encoded:
        """Tokenise pieces as one text: special tokens in them are control tokens, what `protect` has replaced is text.

        Args:
            pieces: Their order is that of the text.
            add_special_tokens: Whether the tokenizer may begin and end the text as it is used to.

        Raises:
            ModelError: If a template has changed a placeholder, so that its place is lost.
        """
        if not self._protected:
            # Not verbose: transformers would warn that a text is longer than the model.
            encoded = self._tokenizer(
                "".join(pieces), add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
            )
            return Encoded(list(encoded["input_ids"]), encoded["offset_mapping"], _starts(pieces))

        seen = set[int]()

        def reveal(match: re.Match[str]) -> str:
            seen.add(int(match[1]))
            return self._protected[int(match[1])]

        pieces = tuple(self._names.placeholders.sub(reveal, self._names.alias(piece)) for piece in pieces)
        text = "".join(pieces)
        if len(seen) < len(self._protected) or self._names.has_placeholder(text):
            raise ModelError(
                "the chat template changes the question, in which there is a special token: give `template`, a text with "
                "{question} and {answer}, or set `allow_special_tokens` to true.",
                argument="template",
            )
        ids, offsets = self._names.encode(text, self._tokenizer, add_special_tokens)
        return Encoded(ids, offsets, _starts(pieces))


def encode_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    add_special_tokens: bool = True,
    allow_special_tokens: bool = False,
) -> list[int]:
    """Tokenise a text of a row alone, without a template.

    Args:
        text: The text.
        tokenizer: A fast one.
        add_special_tokens: Whether the tokenizer may begin and end the text as it is used to.
        allow_special_tokens: Whether special tokens in the text are control tokens, and not text.
    """
    row_text = RowText(tokenizer, allow_special_tokens)
    return row_text.encode(row_text.protect(text), add_special_tokens=add_special_tokens).ids


def _starts(pieces: Iterable[str]) -> list[int]:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    return starts


class _Names:
    """A tokenizer's special tokens, and a copy of it in which they have other names.

    In the copy the characters of a special token are ordinary ones, and a name, which no row contains, is the control token.
    Nothing else differs, so the copy is exact wherever the tokenizer treats a token's neighbours in a way of its own.
    tokenizers' ``encode_special_tokens`` would make text of the template's tokens, too, and leaves them special in Unigram and
    WordLevel vocabularies, which contain them. Joining texts that were tokenised apart would give other tokens at the joints.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.num_added = len(tokenizer.added_tokens_decoder)
        # Drawn, so that no row can contain a name. Ids do not depend on it. Letters survive every normaliser.
        self.nonce = secrets.token_hex(12)
        self.placeholders = re.compile(f"p{self.nonce}x([0-9]+)q")
        self._aliases: dict[str, str] = {}
        alternatives = []
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and token.content:
                self._aliases[token.content] = f"t{self.nonce}x{len(self._aliases)}q"
                text = re.escape(token.content)
                # What is looked for in normalised text is found in any case.
                alternatives.append(f"(?i:{text})" if token.normalized else text)
        # The longest first, as tokenizers finds them.
        self.pattern = re.compile("|".join(sorted(alternatives, key=len, reverse=True))) if alternatives else None
        self._copy: Tokenizer | None = None
        self._ids: dict[int, int] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Names:
        """Return the names for a tokenizer, which are made once."""
        names = _KNOWN.get(tokenizer)
        # Not `len(tokenizer)`, which counts 100 000 entries every time.
        if names is None or names.num_added != len(tokenizer.added_tokens_decoder):
            names = _KNOWN[tokenizer] = cls(tokenizer)
        return names

    def find(self, text: str) -> re.Match[str] | None:
        """Return the first special token in a text."""
        return None if self.pattern is None else self.pattern.search(text)

    def sub(self, replace: Any, text: str) -> str:
        """Return a text with its special tokens replaced."""
        return text if self.pattern is None else self.pattern.sub(replace, text)

    def placeholder(self, number: int) -> str:
        """Return what stands for a special token of a row while a template is rendered."""
        return f"p{self.nonce}x{number}q"

    def has_placeholder(self, text: str) -> bool:
        """Return whether there is a placeholder left in a text, whatever became of it."""
        return f"p{self.nonce}" in text.lower()

    def alias(self, text: str) -> str:
        """Return a text with its special tokens under their other names."""
        return self.sub(lambda match: self._aliases.get(match.group(), match.group()), text)

    def encode(self, text: str, tokenizer: Any, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise a text in which special tokens have their other names."""
        if self._copy is None:
            self._copy = self._rename_tokens(tokenizer.backend_tokenizer)
        # It changes with `add_bos_token` and the like.
        self._copy.post_processor = tokenizer.backend_tokenizer.post_processor
        encoding = self._copy.encode(text, add_special_tokens=add_special_tokens)
        return [self._ids.get(token, token) for token in encoding.ids], encoding.offsets

    def _rename_tokens(self, backend: Tokenizer) -> Tokenizer:
        from tokenizers import Tokenizer

        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None
        original_ids = {}
        for token in content["added_tokens"]:
            if token["special"]:
                token["content"] = self._aliases[token["content"]]
            original_ids[token["content"]] = token["id"]

        model = content["model"]
        produced = {
            "".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model.get("merges", ())
        }
        if model.get("unk_token") in self._aliases and model["unk_token"] not in produced:
            model["unk_token"] = self._aliases[model["unk_token"]]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            # Merges need the entries that they make, and such an entry is no other than text.
            model["vocab"] = {
                name if name in produced else self._aliases.get(name, name): number
                for name, number in vocabulary.items()
            }
        elif vocabulary is not None:
            model["vocab"] = [[self._aliases.get(name, name), score] for name, score in vocabulary]

        copy = Tokenizer.from_str(json.dumps(content))
        # Of a vocabulary that was renamed in part, tokenizers may number the added tokens anew.
        for name, number in original_ids.items():
            self._ids[int(copy.token_to_id(name))] = number  # type: ignore[arg-type]  # it was added
        return copy


_KNOWN: WeakKeyDictionary[Any, _Names] = WeakKeyDictionary()  # by tokenizer: a copy of one takes a second
