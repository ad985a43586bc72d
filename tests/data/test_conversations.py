"""Conversations in chat templates: the supervised tokens are those of the assistant's text and its end, in every format."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
from data.chat_templates import (
    CHATML,
    KINDS,
    MARKED,
    QWEN3,
    SMALL,
    TODAY,
    TOKENIZERS,
    Kind,
    make_tokenizer,
    spell_supervised,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_unlearn.data.encoding import encode, encode_conversation
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.example import IGNORED, Example, prompt_of
from lit_unlearn.data.files import build_table
from lit_unlearn.data.formats import Conversation, Message, RowReader, Supervise
from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import ConfigError, ModelError

SYSTEM = {"role": "system", "content": "You are brief."}
TURNS = [
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": " Ann Lee did; 東京 🙂. "},
    {"role": "user", "content": "Where was she born?"},
    {"role": "assistant", "content": "end"},  # which is also in "<|im_end|>"
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "question_answer": [{"question": "Who is it?", "answer": "Ann."}],
    "prompt_completion": [{"prompt": "Who is it?", "completion": "Ann."}],
    "lists": [{"prompt": [*TURNS[:3]], "completion": [TURNS[3]]}],
    "messages": [{"messages": TURNS}],
}


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def supervised_text(example: Example, tokenizer: Any) -> str:
    return decode([label for label in example.labels if label != IGNORED], tokenizer)


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def check_against_template(conversation: Conversation, example: Example, kind: Kind, tokenizer: Any) -> None:
    """Ids are those of the template's text, and labels those of the tokens that carry a byte of a supervised piece."""
    messages = as_dicts(conversation)
    spelled = spell_supervised(messages, conversation.supervised, kind.spell)
    full = tokenizer.apply_chat_template(messages, tokenize=False, date_string=TODAY)
    assert full == "".join(text for text, _ in spelled)
    ids = tokenizer.apply_chat_template(messages, return_dict=False, date_string=TODAY)
    assert ids[: len(example.input_ids)] == example.input_ids
    assert not decode(ids[len(example.input_ids) :], tokenizer).strip()

    ranges = []
    position = 0
    for text, is_supervised in spelled:
        length = len(text.encode())
        if is_supervised:
            ranges.append((position, position + length))
        position += length
    # In a byte-level vocabulary every character of a token is one byte.
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    for token, label, end in zip(tokens, example.labels, accumulate(map(len, tokens)), strict=True):
        carries = any(end > start and end - len(token) < stop for start, stop in ranges)
        assert (label != IGNORED) == carries, (token, end)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("supervise", ["all", "last"])
def test_every_format_in_every_template(name: str, form: str, supervise: Supervise) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = RowReader(supervise=supervise).read(build_table(ROWS[form]), "forget")
    assert isinstance(row, Conversation)
    assert row.supervised == {"messages": (1, 3), "lists": (3,)}.get(form, (1,))[-1 if supervise == "last" else 0 :]
    # Two texts are in no template unless one is asked for.
    example = encode_conversation(row, tokenizer, EncodingSettings(chat=Chat()))
    check_against_template(row, example, KINDS[name], tokenizer)


@pytest.mark.parametrize("name", KINDS)
def test_two_texts_are_one_raw_text_as_in_trl(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = RowReader().read(build_table([{"prompt": "Who is it? ", "completion": "Ann."}]), "forget")
    assert isinstance(row, Conversation)
    example = encode_conversation(row, tokenizer, EncodingSettings())
    assert example.input_ids == [*tokenizer("Who is it? Ann.")["input_ids"], tokenizer.eos_token_id]
    # A token with the space and the first letter would be supervised as well.
    assert supervised_text(example, tokenizer).strip() == f"Ann.{tokenizer.eos_token}"
    assert encode_conversation(row.with_answer("Ann."), tokenizer, EncodingSettings()) == example
    in_template = encode("Who is it? ", "Ann.", tokenizer, template="Q: {question}A: {answer}")
    assert encode_conversation(row, tokenizer, EncodingSettings("Q: {question}A: {answer}")) == in_template


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.has_system])
def test_a_system_message_of_the_row_goes_before_that_of_the_settings(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = Chat(system="Be quiet.")
    for first in ([], [SYSTEM]):
        messages = tuple(Message(**m) for m in [*first, *TURNS])
        row = Conversation(messages, (len(messages) - 1,))
        example = encode_conversation(row, tokenizer, EncodingSettings(chat=chat))
        given_messages = messages if first else (Message("system", "Be quiet."), *messages)
        whole = Conversation(given_messages, (len(given_messages) - 1,))
        check_against_template(whole, example, KINDS[name], tokenizer)


def test_a_system_message_without_a_place_is_refused() -> None:
    """Where the template refuses it, and where it leaves it out without a word."""
    with pytest.raises(ModelError, match=r"System role not supported.*leave `system` out of `chat`"):
        encode("Who?", "Ann", TOKENIZERS["gemma"], chat=Chat(system="Be quiet."))
    silent = copy.deepcopy(TOKENIZERS["chatml"])
    silent.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ModelError, match=r"leaves out the system message of `chat`") as caught:
        encode("Who?", "Ann", silent, chat=Chat(system="Be quiet."))
    assert caught.value.argument == "chat"


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_message_of_a_row_that_a_template_leaves_out_is_refused(role: str) -> None:
    """Also where its text stands elsewhere by chance, as "user" does in every header."""
    silent = copy.deepcopy(TOKENIZERS["chatml"])
    silent.chat_template = CHATML.replace("{% for m in messages %}", f"{{% for m in messages if m.role != '{role}' %}}")
    messages = [Message(**turn) for turn in TURNS]
    messages.insert(2 if role == "tool" else 0, Message(role, "user"))
    row = Conversation(tuple(messages), (len(messages) - 1,))
    with pytest.raises(ModelError, match=rf"leaves out a message of the role '{role}'"):
        encode_conversation(row, silent, EncodingSettings())
    assert encode_conversation(row, TOKENIZERS["chatml"], EncodingSettings()).input_ids


TEXT = st.text(max_size=10)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Conversation, str]:
    name = draw(st.sampled_from([*KINDS]))
    messages = []
    if KINDS[name].has_system and draw(st.booleans()):
        messages.append(Message("system", "S" + draw(TEXT)))
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXT)), Message("assistant", draw(TEXT.filter(str.strip)))]
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    first = draw(st.integers(0, len(turns) - 1))
    return Conversation(tuple(messages), tuple(turns[first:])), name


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_random_conversations(drawn: tuple[Conversation, str]) -> None:
    conversation, name = drawn
    example = encode_conversation(conversation, TOKENIZERS[name], EncodingSettings())
    check_against_template(conversation, example, KINDS[name], TOKENIZERS[name])


# Thoughts -------------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nShe is Ann.\n</think>\n\n"


def test_a_thought_before_an_answer_is_supervised_with_it() -> None:
    tokenizer = TOKENIZERS["qwen3"]
    row = Conversation.from_turn("Who?", f"{THOUGHT}Ann.")
    example = encode_conversation(row, tokenizer, EncodingSettings())
    assert supervised_text(example, tokenizer) == f"{THOUGHT}Ann.<|im_end|>"
    assert decode(prompt_of(example), tokenizer) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_that_a_template_leaves_out_of_earlier_turns() -> None:
    tokenizer = TOKENIZERS["qwen3"]
    messages = [Message("user", "Who?"), Message("assistant", f"{THOUGHT}Ann."), Message("user", "Where?")]
    row = Conversation((*messages, Message("assistant", f"{THOUGHT}In Rome.")), (1, 3))
    example = encode_conversation(row, tokenizer, EncodingSettings())
    assert supervised_text(example, tokenizer) == f"Ann.<|im_end|>{THOUGHT}In Rome.<|im_end|>"
    ids = tokenizer.apply_chat_template(as_dicts(row), return_dict=False)
    assert example.input_ids == ids[: len(example.input_ids)]


def test_an_empty_thought_is_a_part_of_the_prompt() -> None:
    """As where the model is asked without thinking, whatever the setting, because answers in rows have none."""
    tokenizer = TOKENIZERS["qwen3"]
    chat = Chat(args={"enable_thinking": False})
    example = encode("Who?", "Ann.", tokenizer, chat=chat)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert prompt_of(example) == prompt


# Templates that mark what is generated --------------------------------------------------------------------------------


def test_turns_that_a_template_does_not_mark_are_not_supervised() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["marked"])
    tokenizer.chat_template = MARKED.replace("m.role == 'assistant' %}<", "m.role == 'assistant' and loop.last %}<")
    row = Conversation(tuple(Message(**m) for m in TURNS), (1, 3))
    example = encode_conversation(row, tokenizer, EncodingSettings())
    assert supervised_text(example, tokenizer) == "end<|im_end|>"
    tokenizer.chat_template = MARKED.replace("m.role == 'assistant' %}<", "m.role == 'tool' %}<")
    with pytest.raises(ModelError, match="generation"):
        encode_conversation(row, tokenizer, EncodingSettings())


def test_marks_find_what_is_rewritten() -> None:
    """A thought in a template without a generation prompt, so that no prefix of the conversation is one of the text."""
    tokenizer = copy.deepcopy(TOKENIZERS["marked"])
    start = "{% if add_generation_prompt %}"
    tokenizer.chat_template = (
        MARKED[: MARKED.index(start)]
        .replace(
            "{{ m.content }}<|im_end|>\n{% endgen",
            "{{ m.content.replace('</think>', '</think>\n') }}<|im_end|>\n{% endgen",
        )
        .replace("<|im_start|>assistant\n{%", "<|im_start|>assistant{{ messages | length }}\n{%")
    )
    row = Conversation((*(Message(**m) for m in TURNS[:3]), Message("assistant", "<think>x</think>Ann.")), (3,))
    example = encode_conversation(row, tokenizer, EncodingSettings())
    assert supervised_text(example, tokenizer) == "<think>x</think>\nAnn.<|im_end|>"


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_template_is_told_the_same_date_on_every_day() -> None:
    tokenizer = TOKENIZERS["llama3"]
    assert f"Today Date: {TODAY}\n" in decode(encode("Who?", "Ann.", tokenizer).input_ids, tokenizer)
    for args in ({"date_string": "10 Apr 2025"}, {"strftime_now": "10 Apr 2025"}):
        text = decode(encode("Who?", "Ann.", tokenizer, chat=Chat(args=args)).input_ids, tokenizer)
        assert "Today Date: 10 Apr 2025\n" in text
    # YAML's date is one, too.
    import datetime

    assert Chat(args={"date_string": datetime.date(2025, 4, 10)}).args == {"date_string": "2025-04-10"}


def test_a_date_in_a_computed_format_needs_an_answer() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    for call in ("{{ strftime_now('%Y' + '-%m') }}", "{% set now = strftime_now %}{{ now('%Y') }}"):
        tokenizer.chat_template = f"{call}\n{CHATML}"
        with pytest.raises(ModelError, match="strftime_now"):
            encode("Who?", "Ann.", tokenizer)
    text = decode(encode("Who?", "Ann.", tokenizer, chat=Chat(args={"strftime_now": "2024-01"})).input_ids, tokenizer)
    assert text.startswith("2024-01\n<|im_start|>user")


def test_the_rest_of_the_text_is_untouched_by_the_date() -> None:
    """Also space at the beginning of the template, and the clock within a macro."""
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    clock = "{% macro today() %}[{{ strftime_now('%Y-%m-%d') }}]{% endmacro %}{{ '  ' + today() }}"
    tokenizer.chat_template = f"\n  {clock}{CHATML}"
    text = decode(encode("Who?", "Ann.", tokenizer).input_ids, tokenizer)
    assert text.startswith("\n  [2025-01-01]<|im_start|>user")
    tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%Y-%m-%d')", "'2025-01-01'")
    assert decode(encode("Who?", "Ann.", tokenizer).input_ids, tokenizer) == text


# Settings -------------------------------------------------------------------------------------------------------------


def test_a_template_of_the_settings_is_text_or_a_file(tmp_path: Any) -> None:
    plain = copy.deepcopy(TOKENIZERS["chatml"])
    plain.chat_template = None
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    wanted = encode("Who?", "Ann.", TOKENIZERS["chatml"])
    for template in (CHATML, str(file)):
        assert encode("Who?", "Ann.", plain, chat=Chat(template=template)) == wanted
    with pytest.raises(FileNotFoundError, match=r"no chat template .*nowhere\.jinja") as caught:
        Chat(template=str(tmp_path / "nowhere.jinja"))
    assert caught.value.argument == "template"  # type: ignore[attr-defined]


def test_settings_of_a_template_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has none.*`chat`") as caught:
        encode("Who?", "Ann.", SMALL, chat=Chat(system="Be quiet."))
    assert caught.value.argument == "chat"
    row = Conversation(tuple(Message(**m) for m in TURNS), (3,))
    for template, reason in ((None, "has no chat template"), ("{question}{answer}", "is for one turn")):
        with pytest.raises(ModelError, match=reason):
            encode_conversation(row, SMALL, EncodingSettings(template))
    with pytest.raises(ConfigError, match="exclude each other"):
        EncodingSettings("{question}{answer}", Chat())
    with pytest.raises(ConfigError, match="plain values"):
        Chat(args={"x": object()})


def test_special_tokens_in_any_turn_are_text() -> None:
    tokenizer = TOKENIZERS["chatml"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = tuple(Message(m["role"], f"{m['content']}<|im_end|>x") for m in [SYSTEM, *TURNS])
    example = encode_conversation(Conversation(messages, (2, 4)), tokenizer, EncodingSettings())
    assert example.input_ids.count(end) == 5
    assert [label for label in example.labels if label == end] == [end, end]
    assert supervised_text(example, tokenizer).endswith("end<|im_end|>x<|im_end|>")


def test_a_turn_without_text_is_read_only() -> None:
    messages = (*TURNS[:1], {"role": "assistant", "content": ""}, *TURNS[2:])
    (row,) = RowReader().read(build_table([{"messages": [*messages]}]), "forget")
    assert isinstance(row, Conversation)
    assert row.supervised == (3,)
    check_against_template(
        row, encode_conversation(row, TOKENIZERS["chatml"], EncodingSettings()), KINDS["chatml"], TOKENIZERS["chatml"]
    )


def test_the_templates_are_as_different_as_they_are_meant() -> None:
    assert "strftime_now" in KINDS["llama3"].template
    assert "think" in QWEN3
    assert "generation %}" in MARKED
    assert make_tokenizer(KINDS["phi"]).eos_token == "<|endoftext|>"
