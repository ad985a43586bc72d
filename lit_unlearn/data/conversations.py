"""Rendering of conversations by a chat template, and where the assistant's turns stand in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_unlearn.data.chat_template import CharacterSpan, ChatTemplate
from lit_unlearn.data.formats import Message
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.data.templates import Chat, Piece, Rendering
from lit_unlearn.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What models that think write before their answer ends with it, and some templates leave that out of earlier turns.
_END_OF_THOUGHT = "</think>"


def render_conversation(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat | None,
    row_text: RowText,
) -> Rendering:
    """Render a conversation by a chat template, and find the texts of the assistant in it.

    Args:
        messages: Texts of rows are protected; see `RowText`.
        turns: Indices of the assistant's turns that are supervised; the last message is one of them.
        tokenizer: Of the model.
        chat: Settings of the template.
        row_text: Knows the special tokens.

    Raises:
        ModelError: If the template fails, leaves out or changes what a turn says, or leaves out the system message.
    """
    template = ChatTemplate(tokenizer, chat or Chat())
    # Everywhere below, indices count a system message of the settings as well.
    added = template.add_system(messages)
    shift = len(added) - len(messages)
    shifted = [turn + shift for turn in turns]

    full = template.render(added)
    _check_all_read(template, added, full, has_system_of_chat=shift > 0)
    generated = template.find_generated(added, full)
    places = _find_places(template, added, shifted, full, generated, row_text)
    if places is None:
        raise ModelError(
            "the tokenizer's chat template does not render the answer of a row as it is, so its place cannot be found: give "
            "`template`, a text with {question} and {answer}, or `chat` with another `template`.",
            argument="template",
        )
    if generated is not None:
        shifted, places = _keep_generated(shifted, places, generated)
    pieces = _cut_into_pieces(full, places, [turn - shift for turn in shifted], row_text)
    return Rendering(pieces, writes_start=True, has_end=pieces[-1].turn is None)


def _check_all_read(template: ChatTemplate, messages: Sequence[Message], full: str, has_system_of_chat: bool) -> None:
    """Raise ModelError if a template leaves out a message that has no turn of its own in many templates, without a word."""
    mark = _choose_mark(full)
    for index, message in enumerate(messages):
        if message.role in ("user", "assistant") or not message.content.strip():
            continue
        # By a mark, since a short text may also stand elsewhere, and results of tools may be written as JSON.
        marked = [*messages[:index], Message(message.role, mark), *messages[index + 1 :]]
        if mark in template.render(marked):
            continue
        if has_system_of_chat and index == 0:
            raise ModelError(
                "the chat template leaves out the system message of `chat`: it has no place for one. Leave out `system`, or give "
                "another `template` there.",
                argument="chat",
            )
        raise ModelError(
            f"the chat template leaves out a message of the role '{message.role}' that a row has: it has no place for one. Give "
            "`chat` with another `template`, or write the message into that of the user.",
            argument="chat",
        )


def _variants(content: str) -> list[str]:
    """Return the forms in which templates write what a turn says: many strip the space around it."""
    return list(
        dict.fromkeys(
            [content, content.strip(), content.lstrip("\n"), content.strip("\n"), content.lstrip(), content.rstrip()]
        )
    )


def _find_places(
    template: ChatTemplate,
    messages: Sequence[Message],
    turns: Sequence[int],
    full: str,
    generated: Sequence[CharacterSpan] | None,
    row_text: RowText,
) -> list[CharacterSpan] | None:
    """Return where each turn's text is; ``None`` if that of one is not to be found."""
    places = _find_by_marks(template, messages, turns, full)
    if places is not None:
        return places
    # Templates that rewrite a turn, such as those that move the thought in it, render a mark in another way.
    places = []
    for turn in turns:
        alone = _find_by_marks(template, messages, [turn], full)
        place = alone[0] if alone else _find_by_prefix(template, messages, turn, full, row_text)
        if place is None and generated is not None:
            place = _find_by_generation(messages, turn, full, generated, row_text)
        if place is None:
            return None
        places.append(place)
    return places


def _find_by_marks(
    template: ChatTemplate, messages: Sequence[Message], turns: Sequence[int], full: str
) -> list[CharacterSpan] | None:
    """Find what turns say by rendering a mark in the place of each; ``None`` if that is not what the template then renders."""
    # What a turn says may occur elsewhere, such as "end" in "<|im_end|>"; the mark occurs in no text.
    mark = _choose_mark(full)
    marked = [*messages]
    for turn in turns:
        marked[turn] = Message(marked[turn].role, mark)
    parts = template.render(marked).split(mark)
    if len(parts) != len(turns) + 1 or not full.startswith(parts[0]):
        return None

    places = []
    position = len(parts[0])
    for turn, following in zip(turns, parts[1:], strict=True):
        is_last = turn == turns[-1]
        for variant in _variants(messages[turn].content):
            stop = position + len(variant)
            if full.startswith(variant + following, position) and (not is_last or stop + len(following) == len(full)):
                places.append((position, stop))
                position = stop + len(following)
                break
        else:
            return None
    return places


def _choose_mark(text: str) -> str:
    """Return a private character that does not occur in a text."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _find_by_prefix(
    template: ChatTemplate, messages: Sequence[Message], turn: int, full: str, row_text: RowText
) -> CharacterSpan | None:
    """Find what a turn says by rendering the conversation up to it; ``None`` if the whole does not begin like that."""
    before = template.render(messages[:turn], add_generation_prompt=True) if turn else ""
    until = template.render(messages[: turn + 1]).rstrip()
    if not full.startswith(before):
        return None
    if full.startswith(until) and len(until) > len(before):
        content = row_text.cut_end(until[len(before) :])
    else:
        # A later turn changes how this one is rendered, but not that a special token ends it.
        content = row_text.cut_at_token(full[len(before) :])
    if not _contains_answer(messages[turn].content, content):
        return None
    return len(before), len(before) + len(content)


def _find_by_generation(
    messages: Sequence[Message], turn: int, full: str, generated: Sequence[CharacterSpan], row_text: RowText
) -> CharacterSpan | None:
    """Find what a turn says by the template's own marks, if there are as many of them as turns of the assistant's."""
    of_assistant = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(of_assistant) != len(generated):
        return None
    start, stop = generated[of_assistant.index(turn)]
    content = row_text.cut_end(full[start:stop])
    return (start, start + len(content)) if _contains_answer(messages[turn].content, content) else None


def _contains_answer(content: str, rendered: str) -> bool:
    """Return whether what a turn says, or what it says after a thought, is in the text that was found for it."""
    answer = content.rpartition(_END_OF_THOUGHT)[2].strip()
    return bool(answer) and answer in rendered


def _keep_generated(
    turns: Sequence[int], places: Sequence[CharacterSpan], generated: Sequence[CharacterSpan]
) -> tuple[list[int], list[CharacterSpan]]:
    """Return the turns that the template marks as generated."""
    marked_turns, marked_places = [], []
    for turn, place in zip(turns, places, strict=True):
        if any(begin < place[1] and place[0] < stop for begin, stop in generated):
            marked_turns.append(turn)
            marked_places.append(place)
    if not marked_turns or marked_turns[-1] != turns[-1]:
        raise ModelError(
            "the chat template does not mark the last turn of the assistant's as generated (`{% generation %}`), so nothing of it "
            "may be supervised: give `chat` another `template`.",
            argument="chat",
        )
    return marked_turns, marked_places


def _cut_into_pieces(
    full: str, places: Sequence[CharacterSpan], turns: Sequence[int], row_text: RowText
) -> list[Piece]:
    """Return the text in pieces, up to the end of the last turn; a turn's end is supervised like what it says."""
    last_end = full[places[-1][1] :].rstrip()
    pieces = []
    position = 0
    for turn, (start, stop) in zip(turns, places, strict=True):
        end = last_end
        if not full.startswith(last_end, stop):
            # Some templates write more at the end of a conversation than at that of a turn.
            end = row_text.find_end(full[stop:])
            end = end if last_end.startswith(end) else ""
        pieces += [Piece(full[position:start]), Piece(full[start:stop], True, turn)]
        position = stop + len(end)
        if end:
            pieces.append(Piece(end, True))
    return pieces
