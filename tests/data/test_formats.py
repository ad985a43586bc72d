"""Formats of rows: recognised by their columns, and refused with the row's number and never with its text."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from lit_unlearn import ForgetRetain
from lit_unlearn.data.alternates import alternate_rows
from lit_unlearn.data.documents import encode_chunks, encode_document
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.example import IGNORED
from lit_unlearn.data.files import build_table
from lit_unlearn.data.formats import Conversation, Document, Message, RowReader
from lit_unlearn.errors import ConfigError, DataError

ASK, SAY = {"role": "user", "content": "CANARY?"}, {"role": "assistant", "content": "Ann."}
TURN = Conversation.from_turn("CANARY?", "Ann.")


def as_parts(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


def read(rows: list[dict[str, Any]], **settings: Any) -> list[Any]:
    return RowReader(**settings).read(build_table(rows), "forget", "forget")


@pytest.mark.parametrize(
    ("columns", "settings", "kind"),
    [
        (["question", "answer", "text", "messages"], {}, "question_answer"),
        (["q", "a"], {"question_column": "q", "answer_column": "a"}, "question_answer"),
        (["messages", "prompt", "answer"], {}, "messages"),
        (["prompt", "completion", "text"], {}, "prompt_completion"),
        (["text", "title"], {}, "text"),
        (["text", "answer"], {}, "question_answer"),  # whose missing column is then named
        (["body"], {"text_column": "body"}, "text"),
        (["question", "answer", "text"], {"format": "text"}, "text"),
    ],
)
def test_formats_are_recognised_by_their_columns(columns: list[str], settings: dict[str, Any], kind: str) -> None:
    assert RowReader(**settings).recognize(columns) == kind


def test_the_same_turn_in_every_format() -> None:
    rows = [
        {"question": "CANARY?", "answer": "Ann."},
        {"prompt": [ASK], "completion": [SAY]},
        {"messages": [ASK, SAY]},
        {"messages": [as_parts("user", "CANARY?"), as_parts("assistant", "An", "n.")]},
        {"messages": [ASK, {**SAY, "tool_calls": None}, {"role": "user", "content": "Thanks."}]},
    ]
    for row in rows:
        assert read([row]) == [TURN]
    assert read([{"prompt": "CANARY?", "completion": "Ann."}]) == [replace(TURN, is_raw=True)]
    assert read([{"text": "Ann.", "title": "T\n"}], context_column="title") == [Document("Ann.", "T\n")]


def test_supervised_turns() -> None:
    messages = [ASK, SAY, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "Then 42."}, ASK]
    (row,) = read([{"messages": messages}])
    assert (len(row.messages), row.supervised) == (4, (1, 3))
    (row,) = read([{"messages": messages}], supervise="last")
    assert row.supervised == (3,)
    # A prompt that is a list of messages is only read.
    (row,) = read([{"prompt": messages[:3], "completion": messages[3:]}])
    assert row.supervised == (3,)
    assert (row.question, row.answer) == ("CANARY?", "Then 42.")
    assert row.with_answer("No.").messages[3] == Message("assistant", "No.")
    assert row.with_question("Why?").messages[0] == Message("user", "Why?")


CANARY = "CANARY"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"messages": CANARY}, "a text in 'messages', where a list"),
    "empty": ({"messages": []}, "an empty list in 'messages'"),
    "texts": ({"messages": [CANARY]}, "a text as message 0"),
    "role": ({"messages": [{"role": CANARY, "content": "x"}]}, "no known role in message 0.*assistant"),
    "sharegpt": ({"messages": [{"from": "human", "value": CANARY}]}, "'from' and 'value'.*jq"),
    "tool calls": (
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"name": CANARY}]}]},
        "calls of tools in message 1",
    ),
    "thoughts": (
        {"messages": [ASK, {"role": "assistant", "content": "x", "reasoning_content": CANARY}]},
        r"thoughts in message 1 of 'messages' \('reasoning_content'\)",
    ),
    "tools": ({"messages": [ASK, SAY], "tools": [{"name": CANARY}]}, "descriptions of tools"),
    "null": ({"messages": [ASK, {"role": "assistant", "content": None}]}, "null in the 'content' of message 1"),
    "picture": (
        {"messages": [as_parts("user", "x"), {"role": "assistant", "content": [{"type": "image", "image": CANARY}]}]},
        "parts that are no text in the 'content' of message 1",
    ),
    "no assistant": ({"messages": [ASK]}, "no message of the assistant's"),
    "completion": ({"prompt": CANARY, "completion": None}, "null in 'completion'"),
    "text": ({"text": None}, "null in 'text', where a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_cannot_be_read_is_named_and_never_shown(case: str) -> None:
    row, message = REFUSED[case]
    good = {"messages": [ASK, SAY]} if "messages" in row else {}
    rows = [good, row] if case not in ("no list", "texts", "empty", "picture") and good else [row]
    with pytest.raises(DataError, match=f"row {len(rows) - 1} of the forget set has .*{message}") as caught:
        read(rows)
    assert CANARY not in str(caught.value)
    assert caught.value.argument == "forget"


@pytest.mark.parametrize(
    ("row", "settings", "message", "argument"),
    [
        ({"body": "x"}, {}, "no column 'question'.*'messages'", "question_column"),
        ({"conversations": [ASK, SAY]}, {}, "`messages_column`", "question_column"),
        ({"prompt": "x"}, {"format": "prompt_completion"}, "no column 'completion'", "format"),
        ({"body": "x"}, {"format": "text"}, "no column 'text'", "text_column"),
        ({"text": "x"}, {"context_column": "title"}, "no column 'title'", "context_column"),
    ],
)
def test_a_missing_column_names_its_argument(row: Any, settings: Any, message: str, argument: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read([row], **settings)
    assert caught.value.argument == argument


# In a data module ---------------------------------------------------------------------------------------------------

RETAIN = [{"question": "Where?", "answer": "Here."}]


def test_every_set_has_a_format_of_its_own(tokenizer_dir: str) -> None:
    documents = [{"text": "One. " * 40}, {"text": "Two."}]
    data = ForgetRetain(
        [{"prompt": "Who?", "completion": "Ann."}], RETAIN, {"docs": documents}, tokenizer=tokenizer_dir
    )
    data.max_length = 32
    data.setup("fit")
    assert data.formats == {"forget": "prompt_completion", "retain": "question_answer", "docs": "text"}
    ids = [example.id for example in data.examples["docs"]]
    assert len(ids) > 2
    assert ids[:2] + ids[-1:] == ["docs/0/0", "docs/0/1", "docs/1"]
    assert data.texts()[0] == "Question: Who?\nAnswer: Ann."
    assert data.texts()[-1] == "Two."


def test_raw_text_has_no_alternate_answers(tokenizer_dir: str) -> None:
    data = ForgetRetain([{"text": "One."}], RETAIN, tokenizer=tokenizer_dir)
    table = data.load_set("forget")
    rows = data._read_rows(table, "forget")
    with pytest.raises(ConfigError, match="no answers"):
        alternate_rows(table, rows, None, None, seed=0, kind=ForgetRetain)


def test_unknown_choices_are_refused() -> None:
    for setting in ("format", "supervise"):
        with pytest.raises(ConfigError, match=f"`{setting}` must be one of"):
            ForgetRetain(RETAIN, RETAIN, **{setting: "x"})  # type: ignore[arg-type]


# Documents ----------------------------------------------------------------------------------------------------------

LONG = Document("The author was born in Lisbon, 東京, and 🙂 wrote. " * 5)


@pytest.mark.parametrize("overlap", [0, 1, 7])
@pytest.mark.parametrize("max_length", [10, 33, 10_000])
def test_every_token_of_a_document_is_supervised_once(tokenizer: Any, overlap: int, max_length: int) -> None:
    ids = tokenizer(LONG.text)["input_ids"]
    assert tokenizer.bos_token_id not in ids
    examples = encode_document(LONG, tokenizer, EncodingSettings(max_length=max_length, chunk_overlap=overlap))
    supervised = []
    for number, example in enumerate(examples):
        assert len(example.input_ids) <= max_length
        # Without a start token, an example has to begin with a token that predicts the first one that is supervised.
        repeated = max(overlap, 1) if number else 0
        assert example.labels[:repeated] == [IGNORED] * repeated
        if number:
            assert (
                example.input_ids[:repeated]
                == examples[number - 1].input_ids[len(examples[number - 1].input_ids) - repeated :]
            )
        supervised += [label for label in example.labels if label != IGNORED]
    assert supervised == ids


def test_a_document_after_start_tokens_repeats_nothing(tokenizer: Any) -> None:
    with_start = copy.deepcopy(tokenizer)
    with_start.bos_token = "<|endoftext|>"
    with_start.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", with_start.bos_token_id)]
    )
    # It is what raw text has been cut to all along.
    examples = encode_document(LONG, with_start, EncodingSettings(max_length=10))
    assert examples == encode_chunks([LONG.text], with_start, name="forget", max_length=10)
    assert [label for example in examples for label in example.labels[1:]] == tokenizer(LONG.text)["input_ids"]


def test_a_token_of_a_span_at_the_beginning_of_an_example_is_supervised(tokenizer: Any) -> None:
    ids = tokenizer(LONG.text)["input_ids"]
    offsets = tokenizer(LONG.text, return_offsets_mapping=True)["offset_mapping"]
    for number in range(1, 30):
        spans = {0: [offsets[number]]}
        (*_, example) = encode_document(LONG, tokenizer, EncodingSettings(max_length=8), spans)
        assert ids[number] in example.labels[1:]


def test_raw_text_needs_room_for_two_tokens(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="at least 2") as caught:
        encode_document(LONG, tokenizer, EncodingSettings(max_length=1))
    assert caught.value.argument == "max_length"


def test_a_context_is_only_read(tokenizer: Any) -> None:
    document = Document(LONG.text, "A biography.\n\n")
    examples = encode_document(document, tokenizer, EncodingSettings(max_length=20))
    start = len(tokenizer(document.context)["input_ids"])
    assert examples[0].labels[:start] == [IGNORED] * start
    supervised = [label for example in examples for label in example.labels if label != IGNORED]
    assert tokenizer.decode(supervised) == document.text
    assert tokenizer.decode(examples[0].input_ids[:start]) == document.context
    # A context that fills examples of its own leaves none without a supervised token.
    longer = Document("Ann.", LONG.text)
    assert len(encode_document(longer, tokenizer, EncodingSettings(max_length=20))) == 1


def test_an_overlap_must_leave_room() -> None:
    with pytest.raises(ConfigError, match=r"`chunk_overlap`.* 31 with 32") as caught:
        ForgetRetain(RETAIN, RETAIN, max_length=32, chunk_overlap=31)
    assert caught.value.argument == "chunk_overlap"


def test_an_empty_document_is_refused(tokenizer_dir: str) -> None:
    data = ForgetRetain([{"text": ""}], RETAIN, tokenizer=tokenizer_dir)
    with pytest.raises(DataError, match="row 0 of the forget set has no supervised token: its text is empty"):
        data.setup("fit")


# Spans --------------------------------------------------------------------------------------------------------------


def supervised_text(tokenizer: Any, example: Any) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def make_spans(tokenizer_dir: str, row: dict[str, Any], **settings: Any) -> ForgetRetain:
    data = ForgetRetain([row], RETAIN, tokenizer=tokenizer_dir, span_column="spans", **settings)
    data.setup("fit")
    return data


ANSWER = "Ann Lee, born in Bern."


@pytest.mark.parametrize("spans", [["Ann Lee", "Bern"], [[0, 7], [17, 21]]], ids=["texts", "offsets"])
@pytest.mark.parametrize("template", [None, "{question}\n>{answer}"])
def test_only_tokens_of_spans_are_supervised(tokenizer_dir: str, tokenizer: Any, spans: Any, template: Any) -> None:
    row = {"question": "Ann Lee?", "answer": ANSWER, "spans": spans}
    data = make_spans(tokenizer_dir, row, template=template)
    (example,) = data.examples["forget"]
    text, end = tokenizer.decode(example.input_ids), ANSWER.index("Bern")
    start = text.index(ANSWER)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    carries = [
        (begin < start + 7 and stop > start) or (begin < start + end + 4 and stop > start + end)
        for begin, stop in offsets
    ]
    assert [label != IGNORED for label in example.labels] == carries
    assert supervised_text(tokenizer, data.examples["retain"][0]).endswith("Here.<|endoftext|>")


def test_spans_of_conversations_and_documents(tokenizer_dir: str, tokenizer: Any) -> None:
    data = make_spans(tokenizer_dir, {"text": LONG.text, "spans": ["Lisbon"]}, max_length=16)
    texts = [supervised_text(tokenizer, example) for example in data.examples["forget"]]
    assert "".join(texts).replace(" ", "").count("Lisbon") == 5
    from data.chat_templates import TOKENIZERS

    from lit_unlearn.data.encoding import encode_conversation
    from lit_unlearn.data.spans import find_spans

    messages = (Message("user", "Ann"), Message("assistant", "  Ann<|im_end|>\nLee "), *TURN.messages)
    row = Conversation(messages, (1, 3))
    # A special token in the text, space that the template strips, and offsets over two turns.
    spans = find_spans(row, [[1, 3], "Lee", [20, 25]], "spans", "row 0")
    for name in ("chatml", "llama3"):
        example = encode_conversation(row, TOKENIZERS[name], EncodingSettings(), spans)
        assert len(supervised_text(TOKENIZERS[name], example)) < 16
        assert "Lee" in supervised_text(TOKENIZERS[name], example)
        assert "An" in supervised_text(TOKENIZERS[name], example)


def test_a_span_in_a_turn_that_is_not_marked_as_generated_is_refused() -> None:
    from data.chat_templates import TOKENIZERS

    from lit_unlearn.data.encoding import encode_row
    from lit_unlearn.data.templates import Chat

    # Only the last answer is marked; without marks, the template would give both.
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    marked = turn.replace("{{ m.content }}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}")
    template = f"{{% for m in messages %}}{{% if loop.last %}}{marked}{{% else %}}{turn}{{% endif %}}{{% endfor %}}"
    row = Conversation((*TURN.messages, *TURN.messages), (1, 3))
    settings = EncodingSettings(chat=Chat(template=template))
    (example,) = encode_row(row, TOKENIZERS["chatml"], settings, "row 7 of the forget set", {3: [(0, 3)]})
    assert supervised_text(TOKENIZERS["chatml"], example)
    with pytest.raises(DataError, match="row 7 of the forget set has a span in a turn") as refused:
        encode_row(row, TOKENIZERS["chatml"], settings, "row 7 of the forget set", {1: [(0, 3)], 3: [(0, 3)]})
    assert refused.value.argument == "span_column"
    assert TURN.messages[1].content not in str(refused.value)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (["CANARY"], r"row 0 of the forget set has a span \(0 in 'spans'\) that does not occur"),
        ([[0, 99]], "does not occur"),
        ([[3, 3]], "does not occur"),
        ([[-4, 3]], "does not occur"),
        ([], "an empty list in 'spans'"),
        (None, "null in 'spans'"),
        ([1.5], "a number as span 0"),
        ([""], "an empty text as span 0"),
        ([[1, 2, 3]], "a list as span 0"),
    ],
)
def test_a_span_that_is_not_there_is_refused_with_its_row(tokenizer_dir: str, spans: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        make_spans(tokenizer_dir, {"question": "Who?", "answer": ANSWER, "spans": spans})
    assert caught.value.argument == "span_column"
    assert "CANARY" not in str(caught.value)


def test_a_missing_column_of_spans(tokenizer_dir: str) -> None:
    with pytest.raises(DataError, match="no column 'spans' with spans"):
        make_spans(tokenizer_dir, {"question": "Who?", "answer": ANSWER})


def test_a_span_that_is_cut_off_is_refused(tokenizer_dir: str) -> None:
    row = {"question": "Who?", "answer": "word " * 40 + "Bern", "spans": ["Bern"]}
    with pytest.raises(DataError, match=r"what stands before its spans fills `max_length` \(30\)"):
        make_spans(tokenizer_dir, row, max_length=30)


def test_rows_of_all_formats_survive_a_file(tmp_path: Any, tokenizer_dir: str) -> None:
    """A list of messages with different keys, as JSON lines and as Parquet."""
    rows = [
        {"messages": [ASK, {**SAY, "weight": 1}], "spans": ["Ann"]},
        {"messages": [ASK, SAY, ASK], "spans": ["nn."]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    build_table(rows).to_parquet(tmp_path / "rows.parquet")
    for file in (path, tmp_path / "rows.parquet"):
        data = ForgetRetain(str(file), RETAIN, tokenizer=tokenizer_dir, span_column="spans")
        data.setup("fit")
        assert len(data.examples["forget"]) == 2
