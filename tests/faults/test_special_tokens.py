"""Special tokens in rows are text; those of templates are control tokens; exact on the kinds of fast tokenizers in use."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_unlearn import MUSE, FictionalAuthors, ForgetRetain, LanguageModel, QABenchmark
from lit_unlearn.data.documents import encode_chunks
from lit_unlearn.data.encoding import encode
from lit_unlearn.data.example import IGNORED
from lit_unlearn.data.special_tokens import RowText
from lit_unlearn.errors import ModelError
from lit_unlearn.evaluation.inspection import ask_model

TEXTS = [*FictionalAuthors(4, 1).texts(), "< | > / s im _end start unk system user assistant"]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in SmolLM2 and Qwen; a special token is also an entry of the vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_tokens(["<tool>"])  # added, but not special: rows may use it
    made.chat_template = CHATML
    return made


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a start token, special tokens outside of the vocabulary, and whole words taken from it."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pre_tokenizers.ByteLevel.alphabet()[0], "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False))
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    begin = bpe.token_to_id(names[0])
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[(names[0], begin)]),
        ]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=names[0], eos_token=names[4])
    made.chat_template = LLAMA3
    return made


def _sentencepiece(model: Tokenizer) -> PreTrainedTokenizerFast:
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert made.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    made.chat_template = LLAMA2
    return made


def llama2() -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback; the space before a text is written by a normalizer, and `</s>` normalised."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [AddedToken(name, normalized=True, special=True) for name in ("<unk>", "<s>", "</s>")]
    special += [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    content = json.loads(bpe.to_str())
    # The trainer makes special tokens of the bytes, which in SentencePiece are plain entries.
    content["added_tokens"] = content["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _sentencepiece(made)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece Unigram, whose vocabulary contains `</s>` as a piece like all others."""
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    return _sentencepiece(model)


KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str, str]] = {
    "chatml": (chatml, "<|im_end|>", "<|im_start|>"),
    "llama3": (llama3, "<|eot_id|>", "<|begin_of_text|>"),
    "llama2": (llama2, "</s>", "<s>"),
    "unigram": (unigram, "</s>", "<s>"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: Any) -> tuple[Any, str, str]:
    make, end, start = KINDS[request.param]
    return make(), end, start


def special_ids(tokenizer: Any) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def count_control_tokens(example: Any, tokenizer: Any) -> int:
    return sum(token in special_ids(tokenizer) for token in example.input_ids)


@pytest.mark.parametrize("template", [None, "Q: {question}\nA: {answer}"], ids=["chat", "plain"])
def test_special_tokens_in_rows_are_text(kind: Any, template: str | None) -> None:
    tokenizer, end, start = kind
    question, answer = f"Say {end}\n{start}system", f"Ann{end}Lee{start} {end}"
    row = encode(question, answer, tokenizer, template=template)
    honest = encode("Say it\nto the system", "Ann and Lee", tokenizer, template=template)
    # The control tokens are those of the template.
    assert count_control_tokens(row, tokenizer) == count_control_tokens(honest, tokenizer) > 0
    supervised = [label for label in row.labels if label != IGNORED]
    assert supervised[-1] == tokenizer.convert_tokens_to_ids(end)
    assert not special_ids(tokenizer) & set(supervised[:-1])
    text = tokenizer.decode(supervised[:-1], clean_up_tokenization_spaces=False)
    assert text.strip(" ▁").replace("▁", " ") == answer
    # The switch gives what tokenizers do of themselves.
    allowed = encode(question, answer, tokenizer, template=template, allow_special_tokens=True)
    assert count_control_tokens(allowed, tokenizer) > count_control_tokens(honest, tokenizer)


def test_everything_else_is_tokenised_as_ever(kind: Any) -> None:
    """Where the names change nothing, the copy under other names is the tokenizer, offset by offset."""
    tokenizer, _end, _start = kind
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who  is\tit?"}, {"role": "assistant", "content": " Žluť 🙂 <tool> <unk"}],
        tokenize=False,
    )
    for text in [*TEXTS[:5], chat, f"a {chat}  b", "", " "]:
        for add_special_tokens in (True, False):
            names = RowText(tokenizer)._names
            ids, offsets = names.encode(names.alias(text), tokenizer, add_special_tokens)
            plain = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
            assert ids == plain["input_ids"]
            assert [tokenizer.decode([token]) for token in ids] == [
                tokenizer.decode([token]) for token in plain["input_ids"]
            ]
            if names.alias(text) == text:
                assert offsets == plain["offset_mapping"]


def test_a_special_token_changes_nothing_but_its_own_place(kind: Any) -> None:
    """Around it the tokens are those of the same text with any other characters there."""
    tokenizer, end, _start = kind
    prompt = encode("Where was the author born?", "Ann", tokenizer)
    with_token = encode("Where was the author born?", f"Ann {end}", tokenizer)
    shared = next(i for i, (a, b) in enumerate(zip(prompt.input_ids, with_token.input_ids, strict=False)) if a != b)
    assert shared >= sum(label == IGNORED for label in prompt.labels[:-1])


def test_rows_without_special_tokens_do_not_need_the_copy(kind: Any) -> None:
    tokenizer = copy.deepcopy(kind[0])
    row_text = RowText(tokenizer)
    encode("Who?", "Ann <|im_", tokenizer)
    assert row_text._names._copy is None


def test_offsets_are_those_of_the_pieces() -> None:
    tokenizer = chatml()
    row_text = RowText(tokenizer)
    pieces = ["<|im_start|>user\n", row_text.protect("a<|im_end|>b"), "<|im_end|>"]
    encoded = row_text.encode(*pieces)
    lengths = [stop - start for start, stop in pairwise(encoded.starts)]
    assert lengths[1] == len("a<|im_end|>b")
    inside = [
        token
        for token, (begin, stop) in zip(encoded.ids, encoded.offsets, strict=True)
        if begin >= encoded.starts[1] and stop <= encoded.starts[2]
    ]
    assert tokenizer.decode(inside) == "a<|im_end|>b"
    assert not special_ids(tokenizer) & set(inside)


def test_an_added_token_that_is_not_special_stays_one() -> None:
    tokenizer = chatml()
    row = encode("Who?", "<tool>Ann<|im_end|>", tokenizer)
    assert row.input_ids.count(tokenizer.convert_tokens_to_ids("<tool>")) == 1


def test_a_template_that_changes_the_question_is_refused_where_it_matters() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] | upper if loop.first else m['content'])")
    encode("Who?", "Ann", tokenizer)
    with pytest.raises(ModelError, match="allow_special_tokens"):
        encode("Who<|im_end|>?", "Ann", tokenizer)
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'][:3] if loop.first else m['content'])")
    with pytest.raises(ModelError, match="allow_special_tokens"):
        encode("Who<|im_end|>?", "Ann", tokenizer)


# Literal templates ---------------------------------------------------------------------------------------------------


def test_a_template_with_the_start_token_gets_no_second_one() -> None:
    for tokenizer, start in [(llama3(), "<|begin_of_text|>"), (llama2(), "<s>")]:
        begin = tokenizer.convert_tokens_to_ids(start)
        plain = encode("Who?", "Ann", tokenizer, template="{question}\n{answer}")
        spelled = encode("Who?", "Ann", tokenizer, template=start + "{question}\n{answer}")
        assert plain.input_ids.count(begin) == spelled.input_ids.count(begin) == 1
        # A question is no template.
        asked = encode(f"{start}Who?", "Ann", tokenizer, template="{question}\n{answer}")
        assert asked.input_ids.count(begin) == 1


@pytest.mark.parametrize("after", ["<|eot_id|>", "<|eot_id|>\n", " <|eot_id|>\nand more"])
def test_a_special_token_after_the_answer_is_its_end(after: str) -> None:
    tokenizer = llama3()
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    other_end = copy.deepcopy(tokenizer)
    other_end.eos_token = "<|end_of_text|>"
    row = encode("Who?", "Ann", other_end, template="<|begin_of_text|>{question}\n{answer}" + after)
    assert row.labels[-1] == row.input_ids[-1] == end
    assert other_end.eos_token_id not in row.input_ids


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"Q: {question}\nA: {answer}", "Q: {question}\nA: {answer}"), (r"{question}\t{answer}", "{question}\t{answer}")],
)
def test_a_line_break_may_be_typed_in_a_shell(typed: str, meant: str) -> None:
    data = ForgetRetain([{"question": "Who?", "answer": "Ann."}], [{"question": "x", "answer": "y"}], template=typed)
    assert data.template == meant
    assert QABenchmark("f.jsonl", "r.jsonl", template=typed).questions.encoding.template == meant


# Everywhere that text of rows is read --------------------------------------------------------------------------------

ROWS = [{"question": f"Who<|endoftext|> {n}?", "answer": f"Ann<|endoftext|> {n}"} for n in range(3)]


def test_the_warning_counts_rows(tokenizer_dir: str) -> None:
    rows = [*ROWS, {"question": "Where?", "answer": "There"}]
    data = ForgetRetain(rows, [{"question": "a", "answer": "b"}], tokenizer=tokenizer_dir)
    with pytest.warns(UserWarning, match=r"3 of 4 forget rows.*`allow_special_tokens`"):
        data.setup("fit")
    end = data._load_tokenizer().eos_token_id
    assert [example.input_ids.count(end) for example in data.examples["forget"]] == [1] * 4
    allowed = ForgetRetain(rows, [{"question": "a", "answer": "b"}], tokenizer=tokenizer_dir, allow_special_tokens=True)
    allowed.setup("fit")
    assert [example.input_ids.count(end) for example in allowed.examples["forget"]] == [3, 3, 3, 1]


def test_raw_text_likewise(tokenizer_dir: str, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("forget", "retain1"):
        (tmp_path / f"{name}.txt").write_text(f"{name}<|endoftext|> of a long story", encoding="utf-8")
    for allowed in (False, True):
        data = MUSE(source=str(tmp_path), tokenizer=tokenizer_dir, max_length=8, allow_special_tokens=allowed)
        data.setup("fit")
        labels = [label for example in data.examples["forget"] for label in example.labels]
        assert (tokenizer.eos_token_id in labels) == allowed
    examples = encode_chunks(["One.<|endoftext|>Two."], tokenizer, name="forget")
    assert tokenizer.eos_token_id not in examples[0].labels
    assert tokenizer.decode(examples[0].input_ids) == "One.<|endoftext|>Two."
    allowed = encode_chunks(["One.<|endoftext|>Two."], tokenizer, name="forget", allow_special_tokens=True)
    assert tokenizer.eos_token_id in allowed[0].labels


def test_benchmarks_and_questions_to_a_model_likewise(
    tiny_lm: Callable[..., LanguageModel], write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm()
    lm.load()
    end = lm.tokenizer.eos_token_id  # type: ignore[union-attr]
    file = write_rows("rows.jsonl", ROWS)
    for allowed, count in ((False, 1), (True, 3)):
        streams = QABenchmark(file, file, allow_special_tokens=allowed).load(lm.tokenizer)  # type: ignore[arg-type]
        (example,) = streams["forget"].examples[0].sequences["answer"]
        assert example.input_ids.count(end) == count
    asked: list[list[int]] = []
    monkeypatch.setattr(
        "lit_unlearn.models.generation.generate", lambda lm, prompts, **_: asked.extend(prompts) or [""] * len(prompts)
    )
    lm.generate(["Who<|endoftext|>?"])
    lm.generate(["Who<|endoftext|>?"], allow_special_tokens=True)
    assert [prompt.count(end) for prompt in asked] == [0, 1]
    reply = ask_model(lm, "Who?", "Ann<|endoftext|>x", max_new_tokens=1)
    assert reply.expected is not None
    assert len(reply.expected.tokens) > 4


def test_the_inspect_command_has_the_switch(capsys: Any, model_dir: str) -> None:
    from lit_unlearn.cli.inspect import build_parser

    options = build_parser().parse_args([model_dir, "-q", "Who?", "--allow_special_tokens"])
    assert options.allow_special_tokens
    assert Path(model_dir).is_dir()
