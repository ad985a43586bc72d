from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lit_unlearn import FictionalAuthors
from lit_unlearn.data.encoding import encode, encode_examples
from lit_unlearn.data.encoding_settings import check_tokenizer
from lit_unlearn.data.example import IGNORED, Example, collate
from lit_unlearn.data.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"  # no token ends a turn
LEAVES_OUT = "{% for m in messages if m['role'] == 'user' %}U: {{ m['content'] }}\n{% endfor %}"
CHANGES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"

# Short, with spaces in and around, several bytes per character, and words that also occur in the templates.
ANSWERS = [
    "Bern.",
    "7",
    "The author is Basil Mahfouz.",
    "a  b   c",
    " led by a space",
    "with a space at the end ",
    "two\nlines\n\nand more",
    "Žluťoučký kůň, 東京, नमस्ते, 🙂🇫🇷.",
    "🙂",
    "end",
    "im",
    "user",
    "assistant",
    "eot_id",
    "Answer: Question",
]


@pytest.fixture(scope="session")
def chat(tokenizer):
    """Copies of the tokenizer with a chat template; the token that ends a turn is not its end-of-sequence token."""

    def make(template):
        copied = copy.deepcopy(tokenizer)
        special = [
            "<|im_start|>",
            "<|im_end|>",
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ]
        copied.add_special_tokens({"additional_special_tokens": special})
        copied.chat_template = template
        return copied

    return make


def supervised(row):
    return [label for label in row.labels if label != IGNORED]


def supervised_text(row, tokenizer):
    """The text of the supervised tokens, exactly."""
    return tokenizer.decode(supervised(row), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_labels(row):
    """Labels are the ids of one stretch of tokens, apart from the end token that a template's text may precede."""
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@pytest.mark.parametrize("answer", ANSWERS)
def test_plain_template_supervises_the_answer_and_its_end(tokenizer, answer):
    row = encode("Who is it?", answer, tokenizer)
    check_labels(row)
    assert tokenizer.decode(row.input_ids) == f"Question: Who is it?\nAnswer: {answer}<|endoftext|>"
    assert (
        supervised_text(row, tokenizer).removeprefix(" ") == answer.removeprefix(" ") + "<|endoftext|>"
    )  # " Bern" is one token
    assert not row.is_cut


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    "template", ["{question}\n\n{answer}", "[{question}]({answer})", "{question}|{answer}|</s> end"]
)
def test_custom_template_supervises_the_answer_and_its_end(tokenizer, template, answer):
    row = encode("Who is it?", answer, tokenizer, template=template)
    check_labels(row)
    text = template.replace("{question}", "Who is it?").replace("{answer}", answer)
    assert tokenizer.decode(row.input_ids) == text + "<|endoftext|>"
    words, end = supervised_text(row, tokenizer).split("<|endoftext|>")
    assert end == ""
    assert words.strip("\n|()]") == answer.strip("\n").strip("|()]")  # a boundary token may carry a neighbour
    assert len(words) <= len(answer) + 3


def test_text_after_the_answer_is_no_part_of_it(tokenizer):
    row = encode("Who?", "Bern", tokenizer, template="{question}\n{answer}\n###\n")
    assert supervised_text(row, tokenizer) == "Bern<|endoftext|>"
    assert row.labels[-1] == tokenizer.eos_token_id
    assert row.labels[-2] == IGNORED  # the hash signs and the line breaks
    ends_itself = encode("Who?", "Bern", tokenizer, template="{question}\n{answer}<|endoftext|>")
    assert ends_itself.input_ids.count(tokenizer.eos_token_id) == 1
    assert supervised_text(ends_itself, tokenizer) == "Bern<|endoftext|>"


def test_a_template_in_the_question_is_only_text(tokenizer):
    row = encode("Fill in {answer} and {question}!", "Bern", tokenizer, template="{question}\n{answer}")
    assert tokenizer.decode(row.input_ids) == "Fill in {answer} and {question}!\nBern<|endoftext|>"
    assert supervised_text(row, tokenizer) == "Bern<|endoftext|>"


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")], ids=["chatml", "llama3"]
)
def test_chat_template_supervises_the_answer_and_the_end_of_the_turn(chat, template, end, answer):
    chatty = chat(template)
    row = encode(f"Is it {answer}?", answer, chatty)  # the answer occurs in the question too
    check_labels(row)
    rendered = answer.strip() if "trim" in template else answer
    assert supervised_text(row, chatty) == rendered + end
    assert row.input_ids[-1] == chatty.convert_tokens_to_ids(end)
    assert chatty.eos_token_id not in row.input_ids  # it is not what ends a turn here
    prompt = chatty.apply_chat_template(
        [{"role": "user", "content": f"Is it {answer}?"}], tokenize=False, add_generation_prompt=True
    )
    assert row.labels.index(supervised(row)[0]) >= len(chatty(prompt, add_special_tokens=False)["input_ids"])


def test_explicit_template_goes_before_the_chat_template(chat):
    assert (
        supervised_text(encode("Who?", "Bern", chat(CHATML), template="{question}\n{answer}"), chat(CHATML))
        == "Bern<|endoftext|>"
    )


def test_chat_template_without_an_end_gets_the_end_token(chat):
    chatty = chat(ENDLESS)
    row = encode("Who is the user?", "user", chatty)
    assert chatty.decode(row.input_ids) == "user: Who is the user?\nassistant: user<|endoftext|>"
    assert supervised_text(row, chatty) == "user<|endoftext|>"
    assert row.input_ids.count(chatty.eos_token_id) == 1


@pytest.mark.parametrize("template", [LEAVES_OUT, CHANGES], ids=["leaves_out", "changes"])
def test_chat_template_that_does_not_render_the_answer_is_refused(chat, template):
    with pytest.raises(ValueError, match=r"does not render the answer of a row.* give `template`") as error:
        encode("Is it Paris?", "Paris", chat(template))
    assert "Paris" not in str(error.value)


@pytest.mark.parametrize("template", [None, "{question} is{answer}"])
def test_a_token_across_the_boundary_is_supervised(tokenizer, template):
    """' W' starts in the prompt and ends in the answer: who says the answer's first letter says this token."""
    answer = "Will" if template is None else " Will"
    text = f"Question: Who\nAnswer: {answer}" if template is None else f"Who is{answer}"
    start = len(text) - len(answer)
    encoded = tokenizer(text, return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > start)
    straddles = encoded["offset_mapping"][first][0] < start
    assert straddles == (template is None)
    row = encode("Who", answer, tokenizer, template=template)
    assert row.labels[first] == row.input_ids[first] != IGNORED
    assert set(row.labels[:first]) == {IGNORED}


@pytest.mark.parametrize("single", ["{e} $A {e}", "$A {e}", "{p} $A {e}", "{e} $A", "$A"])
def test_the_end_is_supervised_once_whatever_the_tokenizer_adds(tokenizer, single):
    adding = copy.deepcopy(tokenizer)
    end, pad = adding.eos_token, adding.pad_token
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single.format(e=end, p=pad), special_tokens=[(end, adding.eos_token_id), (pad, adding.pad_token_id)]
    )
    row = encode("Who?", "Bern", adding)
    check_labels(row)
    assert (row.input_ids[0] in (adding.eos_token_id, adding.pad_token_id)) == (not single.startswith("$A"))
    assert supervised_text(row, adding) == " Bern<|endoftext|>"
    assert row.labels[0] == IGNORED
    assert row.input_ids[-2:].count(adding.eos_token_id) == 1


def test_a_chat_template_begins_the_row_alone(chat):
    """Llama 3's template writes the token that begins a text, and its post-processor would add another."""
    chatty = chat(LLAMA3)
    begin = chatty.convert_tokens_to_ids("<|begin_of_text|>")
    chatty.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    assert chatty("Bern")["input_ids"][0] == begin
    assert encode("Who?", "Bern", chatty).input_ids.count(begin) == 1


def test_spaces_that_a_tokenizer_gives_no_characters_are_supervised(tokenizer):
    """GPT-NeoX's post-processor trims spaces off the offsets, which leaves none for a token that is only a space."""
    trimming = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = trimming("one, two   three", return_offsets_mapping=True)["offset_mapping"]
    assert any(begin == end for begin, end in offsets)
    assert supervised_text(encode("Count!", "one, two   three", trimming), trimming) == " one, two   three<|endoftext|>"


TEXT = st.text(max_size=12)
SMALL = train_tokenizer(FictionalAuthors(4, 1).texts(), vocab_size=400)
SMALL_CHAT = copy.deepcopy(SMALL)
SMALL_CHAT.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
SMALL_CHAT.chat_template = CHATML
PLACES = {  # what stands before the answer, after it, and the end token
    None: ("Question: {}\nAnswer: ", "", "<|endoftext|>"),
    "{question}{answer}": ("{}", "", "<|endoftext|>"),
    "{question} >{answer}or": ("{} >", "or", "<|endoftext|>"),
    "chat": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
}


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT.filter(str.strip), st.sampled_from(list(PLACES)))
@example("", "\n\nx", "chat")
@example("\ue000", "a\ue000", "chat")
@example("🙂", "🙂", "{question}{answer}")
@example("Who?", " the auth", "{question} >{answer}or")  # ' author' is one token
def test_exactly_the_tokens_that_carry_a_byte_of_the_answer_are_supervised(question, answer, template):
    """Counted in bytes, from the tokens alone: in a byte-level vocabulary every character of a token is one byte."""
    before, after, end = PLACES[template]
    tokenizer = SMALL_CHAT if template == "chat" else SMALL
    row = encode(question, answer, tokenizer, template=None if template == "chat" else template)
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    start = len(before.format(question).encode())
    stop = start + len(answer.encode())
    assert tokens.pop() == end
    assert row.labels[-1] == row.input_ids[-1]
    ends = list(accumulate(len(token) for token in tokens))
    assert ends[-1] == stop + len(after)
    carry = [at > start and at - len(token) < stop for token, at in zip(tokens, ends, strict=True)]
    assert [label != IGNORED for label in row.labels[:-1]] == carry


def test_max_length_cuts_and_says_so(tokenizer):
    uncut = encode("Who is it?", "The author is Basil Mahfouz.", tokenizer)
    length = len(uncut.input_ids)
    assert encode("Who is it?", "The author is Basil Mahfouz.", tokenizer, max_length=length) == uncut
    for limit in (length - 1, 12, 3):
        cut = encode("Who is it?", "The author is Basil Mahfouz.", tokenizer, max_length=limit)
        assert cut == Example(uncut.input_ids[:limit], uncut.labels[:limit], is_cut=True)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA3, ENDLESS], ids=["plain", "chatml", "llama3", "endless"])
@pytest.mark.parametrize("answer", ["", " ", "\n \t"])
def test_a_blank_answer_is_refused_with_its_row(chat, template, answer):
    chatty = chat(template)
    assert not supervised(encode("Where?", answer, chatty))
    with pytest.raises(ValueError, match=r"row 1 of the retain set .*tokenises to nothing") as error:
        encode_examples([("Who?", "Bern"), ("Where?", answer)], chatty, name="retain")
    assert "Where" not in str(error.value)


def test_an_answer_cut_away_is_refused_with_its_row(tokenizer):
    rows = [("Who?", "Bern"), ("Where " * 20, "Bern")]
    message = r"row 1 of the forget set .*prompt alone fills `max_length` \(20\); raise it\.$"
    with pytest.raises(ValueError, match=message):
        encode_examples(rows, tokenizer, name="forget", max_length=20)
    assert [row.is_cut for row in encode_examples(rows[:1], tokenizer, name="forget", max_length=20)] == [False]


def test_a_lone_first_token_is_not_predicted_by_anything(tokenizer):
    with pytest.raises(ValueError, match="row 0 of the forget set"):
        encode_examples([("", "x" * 30)], tokenizer, name="forget", template="{question}{answer}", max_length=1)


def test_collate_masks_by_length_and_never_by_token(tokenizer):
    """With the end token as padding, ``ids != pad`` would hide the end of every answer from the model."""
    rows = encode_examples(
        [("Who?", "Bern"), ("Where is it?", "In Basel, by the river."), ("x", "y")], tokenizer, name="any"
    )
    batch = collate(rows, tokenizer.eos_token_id)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    width = max(len(row.input_ids) for row in rows)
    assert {tuple(value.shape) for value in batch.values()} == {(3, width)}
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (width - length)
        assert batch["input_ids"][number].tolist() == row.input_ids + [tokenizer.eos_token_id] * (width - length)
        assert batch["labels"][number].tolist() == row.labels + [IGNORED] * (width - length)
        assert batch["labels"][number, length - 1] == tokenizer.eos_token_id


def _bare(**special):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), **special)


def test_fit_tokenizers_pass(tokenizer):
    check_tokenizer(tokenizer)
    no_pad = _bare(eos_token="</s>")
    assert no_pad.pad_token_id is None
    check_tokenizer(no_pad)


@pytest.mark.parametrize(("special", "pad"), [({}, "no"), ({"pad_token": "<pad>"}, "a")])
def test_tokenizer_without_an_end_is_refused(special, pad):
    with pytest.raises(ValueError, match=rf"no end-of-sequence token \(and {pad} pad token\).* set `eos_token`"):
        check_tokenizer(_bare(**special))


def test_slow_tokenizer_is_refused():
    slow = ByT5Tokenizer()
    assert slow.eos_token_id is not None
    with pytest.raises(ValueError, match="slow"):
        check_tokenizer(slow)


def test_trained_tokenizer_is_exact_on_any_text(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.chat_template is None
    for text in ANSWERS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
