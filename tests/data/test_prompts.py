"""The prompt of a run: what is stated of it, what is compared, and what is shown."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import instantiate
from data.chat_templates import CHATML, KINDS, LLAMA3, TODAY, TOKENIZERS
from evaluation.rows import loaded, taught

from lit_unlearn import ForgetRetain, LanguageModel, LitFinetune, QABenchmark, Report, RunReport
from lit_unlearn.data.chat_template import describe_prompt, find_prompt_difference
from lit_unlearn.data.encoding import encode
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.example import IGNORED, collate
from lit_unlearn.data.templates import Chat, check_template
from lit_unlearn.errors import CheckpointError, ConfigError, DataError
from lit_unlearn.evaluation.inspection import ask_model
from lit_unlearn.evaluation.scoring import score_examples
from lit_unlearn.export.card import _list_benchmark_commands
from lit_unlearn.export.published import publish_record
from lit_unlearn.export.record import _describe_data

FORGET = [{"question": f"Who is CANARY {n}?", "answer": f"Ann {n}."} for n in range(3)]
RETAIN = [{"question": "Where?", "answer": "Here."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tokenizers with chat templates."""
    made = {}
    for name, tokenizer in TOKENIZERS.items():
        made[name] = str(tmp_path_factory.mktemp(name))
        tokenizer.save_pretrained(made[name])
    return made


def make(folder: str, **settings: Any) -> ForgetRetain:
    data = ForgetRetain(FORGET, RETAIN, tokenizer=folder, **settings)
    data.setup("fit")
    return data


# What a prompt is -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_one_turn_without_any_row() -> None:
    chat = Chat(system="Be brief.", args={"x": 1})
    assert describe_prompt(TOKENIZERS["chatml"], None, chat) == {
        "text": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        "{answer}<|im_end|>\n",
        "system": "Be brief.",
        "args": {"x": 1},
        "chat_template": None,
        "dates": {},
    }
    prompt = describe_prompt(TOKENIZERS["llama3"], None, None)
    assert prompt["dates"] == {"%d %b %Y": TODAY}
    assert TODAY in prompt["text"]
    plain = copy.deepcopy(TOKENIZERS["chatml"])
    plain.chat_template = None
    assert describe_prompt(plain, None, None)["text"] == "Question: {question}\nAnswer: {answer}"
    assert describe_prompt(plain, "{question}>{answer}", None)["text"] == "{question}>{answer}"


def test_the_first_difference_of_prompts() -> None:
    tokenizer = TOKENIZERS["llama3"]
    prompts = [
        describe_prompt(tokenizer, None, chat)
        for chat in (None, Chat(system="Hi."), Chat(args={"date_string": "x"}), Chat(template=CHATML))
    ]
    assert find_prompt_difference(prompts[0], copy.deepcopy(prompts[0])) is None
    assert find_prompt_difference(None, prompts[0]) is None
    assert "`system`, None then and 'Hi.' now" in str(find_prompt_difference(*prompts[:2]))
    assert "`args`, {} then and {'date_string': 'x'} now" in str(find_prompt_difference(prompts[0], prompts[2]))
    assert "`dates`" in str(find_prompt_difference(prompts[0], prompts[3]))


def test_a_checkpoint_of_another_prompt_is_refused_with_the_difference(folders: dict[str, str]) -> None:
    data = make(folders["llama3"])
    state = json.loads(json.dumps(data.state_dict()))
    data.load_state_dict(state)
    # Settings that give the same text change nothing.
    make(folders["llama3"], chat=Chat(args={"date_string": TODAY})).load_state_dict(state)
    for chat, difference in [
        (Chat(args={"date_string": "1 May 2025"}), "`args`, {} then and {'date_string': '1 May 2025'} now"),
        (Chat(template=LLAMA3.replace("Today Date", "Date")), "from character 61 on, 'Today Date: 01 Jan"),
    ]:
        with pytest.raises(CheckpointError, match=r"rows: was ") as caught:
            make(folders["llama3"], chat=chat).load_state_dict(state)
        assert difference in str(caught.value)
        assert "CANARY" not in str(caught.value)


# Benchmarks -----------------------------------------------------------------------------------------------------------


def test_results_state_their_prompt_and_refuse_another(
    tokenizer_dir: str, write_rows: Callable[..., str], folders: dict[str, str]
) -> None:
    files = [write_rows("f.jsonl", FORGET), write_rows("r.jsonl", RETAIN)]
    lm = loaded(taught(tokenizer_dir, 0))
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # type: ignore[union-attr]
    settings = {"max_new_tokens": 2}
    results = QABenchmark(*files, **settings).run(lm)
    assert results.settings["prompt"]["text"] == "user: {question}\nassistant: {answer}\n"
    QABenchmark(*files, retain_results=results, **settings).prepare(lm.tokenizer)
    other = QABenchmark(*files, retain_results=results, chat=Chat(system="Be brief."), **settings)
    with pytest.raises(DataError, match=r"the prompt differs in `system`, None then and 'Be brief\.' now") as caught:
        other.prepare(lm.tokenizer)
    assert "CANARY" not in str(caught.value)


def test_results_with_hidden_padding_ids_are_no_match_for_others(
    tokenizer_dir: str, write_rows: Callable[..., str]
) -> None:
    """The tokens are the same, but not what they see: neither retain results nor half an evaluation may be taken over."""
    files = [write_rows("f.jsonl", FORGET), write_rows("r.jsonl", RETAIN)]
    lm = loaded(taught(tokenizer_dir, 0))
    settings = {"max_new_tokens": 2}
    hidden = QABenchmark(*files, mask_padding_ids=True, **settings).run(lm)
    seen = QABenchmark(*files, **settings).run(lm)
    assert hidden.data["forget"]["tokens"] != seen.data["forget"]["tokens"]
    for results, hides in ((hidden, False), (seen, True)):
        with pytest.raises(DataError, match=rf"`mask_padding_ids` differs, {not hides} then and {hides} now"):
            QABenchmark(*files, retain_results=results, mask_padding_ids=hides, **settings).prepare(lm.tokenizer)
        QABenchmark(*files, retain_results=results, mask_padding_ids=not hides, **settings).prepare(lm.tokenizer)


def test_a_benchmark_of_conversations_asks_for_the_last_turn(
    write_rows: Callable[..., str], tokenizer_dir: str
) -> None:
    tokenizer = TOKENIZERS["chatml"]
    messages = [
        {"role": r, "content": c} for r, c in [("system", "S"), ("user", "A?"), ("assistant", "B."), ("user", "C?")]
    ]
    rows = [
        {
            "messages": [*messages, {"role": "assistant", "content": "D."}],
            "perturbed_answer": ["E.", "F."],
            "other": "G?",
        }
    ]
    file = write_rows("chat.jsonl", rows)
    benchmark = QABenchmark(file, file, max_new_tokens=2)
    (example,) = benchmark.load(tokenizer)["forget"].examples
    assert example.texts == {"question": "C?", "answer": "D."}
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert example.prompt == prompt
    (answer,) = example.sequences["answer"]
    assert [label for label in answer.labels if label != IGNORED] == answer.input_ids[len(prompt) :]
    assert [len(example.sequences[kind]) for kind in ("answer", "wrong")] == [1, 2]
    (asked,) = benchmark.with_questions("other").load(tokenizer)["forget"].examples
    assert asked.texts["question"] == "G?"
    assert "G?" in tokenizer.decode(asked.prompt)


def test_a_benchmark_of_raw_text(write_rows: Callable[..., str], tokenizer_dir: str) -> None:
    rows = [{"text": "The author was born in Lisbon. " * 4, "title": "Life.\n"}]
    files = [write_rows("f.jsonl", rows), write_rows("r.jsonl", [{"text": "One."}])]
    lm = loaded(taught(tokenizer_dir, 0))
    results = QABenchmark(files[0], files[0], context_column="title", max_length=30, max_new_tokens=2).run(lm)
    forget = results.examples["forget"]
    assert len(forget) > 1
    assert ["generated" in row for row in forget] == [True] + [False] * (len(forget) - 1)
    assert forget[0]["question"] == "Life.\n"
    assert "".join(row["answer"] for row in forget).startswith(rows[0]["text"][:40])
    assert {"forget/nll", "forget/extraction_strength"} <= results.aggregate.keys()
    assert results.settings["prompt"] is None
    assert "forget/nll" in QABenchmark(*files, max_new_tokens=2).run(lm).aggregate


def test_a_model_is_asked_in_the_settings(tokenizer_dir: str) -> None:
    lm = loaded(taught(tokenizer_dir, 0))
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # type: ignore[union-attr]
    encoding = EncodingSettings(chat=Chat(system="Be brief."))
    with_system = ask_model(lm, "Who?", "Ann.", encoding=encoding, max_new_tokens=1)
    without = ask_model(lm, "Who?", "Ann.", max_new_tokens=1)
    assert with_system.expected is not None
    assert without.expected is not None
    assert with_system.expected.probability != without.expected.probability


def test_inspect_takes_conversations_and_settings(
    write_rows: Callable[..., str], model_dir: str, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    from lit_unlearn import cli

    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]}
    file = write_rows("chat.jsonl", [row])
    (in_tmp / "chat.jinja").write_text(CHATML, encoding="utf-8")
    options = ["--chat.template=chat.jinja", "--chat.system=Be brief.", "--max_new_tokens=1", "--format=json"]
    cli.main(["inspect", model_dir, f"--questions={file}", *options])
    (asked,) = json.loads(capsys.readouterr().out)["questions"]
    assert (asked["question"], asked["answer"]) == ("Who?", "Ann.")


# The record -----------------------------------------------------------------------------------------------------------


def test_the_record_states_the_prompt_and_no_folder(folders: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "CANARY" / "chat.jinja"
    file.parent.mkdir()
    file.write_text(LLAMA3, encoding="utf-8")
    data = _describe_data(make(folders["llama3"], chat=Chat(system="Hi.", template=str(file))))
    record = {
        "kind": "unlearned",
        "data": json.loads(json.dumps(data)),
        "config": {"data": {"init_args": {"chat": data["chat"]}}},
    }  # type: ignore[index]
    published = publish_record(record)
    assert published["data"]["chat"] == {"system": "Hi.", "template": "chat.jinja", "args": {}}
    assert published["config"]["data"]["init_args"]["chat"]["template"] == "chat.jinja"
    assert published["data"]["prompt"]["dates"] == {"%d %b %Y": TODAY}
    assert published["data"]["prompt"]["text"].startswith("<|begin_of_text|>")
    assert published["data"]["sets"]["forget"]["format"] == "question_answer"
    assert "CANARY" not in json.dumps(published)
    assert publish_record(published) == published


def test_the_card_asks_in_the_same_prompt() -> None:
    chat = {"system": "You are brief.", "template": None, "args": {"date_string": "10 Apr 2025"}}
    for choice, suite in (({"class": "ForgetRetain"}, "qa"), ({"class": "TOFU", "forget_split": "forget01"}, "tofu")):
        command = _list_benchmark_commands(
            {"kind": "unlearned", "data": {**choice, "chat": chat, "format": "messages", "sets": {}}}
        )[0]
        assert f"--suite={suite}" in command
        options = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
        assert json.loads(options["--chat"]) == chat
        assert options["--format"] == "messages"


# Literal templates ----------------------------------------------------------------------------------------------------


def test_typed_line_breaks() -> None:
    assert check_template(r"{question}\n\tA:\r{answer}") == "{question}\n\tA:\r{answer}"
    assert check_template(None) is None


def test_a_template_and_settings_of_another_exclude_each_other() -> None:
    for make_it in (ForgetRetain, QABenchmark):
        with pytest.raises(ConfigError, match="`template` and `chat` exclude each other") as caught:
            make_it("f.jsonl", "r.jsonl", template="{question}{answer}", chat=Chat(system="x"))  # type: ignore[operator]
        assert caught.value.argument == "chat"
        assert caught.value.owner is not None


# The first example ----------------------------------------------------------------------------------------------------


def test_the_first_example_is_shown_where_that_is_asked_for(folders: dict[str, str], capsys: Any, caplog: Any) -> None:
    assert make(folders["chatml"]).shown_example is None
    with caplog.at_level("INFO"):
        data = make(folders["chatml"], show_example=True)
    shown = data.shown_example
    assert shown is not None
    assert "".join(shown["tokens"]) == TOKENIZERS["chatml"].decode(data.examples["forget"][0].input_ids)
    said = [token for token, is_supervised in zip(*shown.values(), strict=True) if is_supervised]
    assert "".join(said) == "Ann 0.<|im_end|>"
    assert "[<|im_end|>]" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("shows", [False, True])
def test_the_report_has_text_only_where_that_is_asked_for(
    shows: bool,
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., Any],
    tokenizer_dir: str,
    tmp_path: Path,
) -> None:
    """Also of conversations, which `LitFinetune` reads through the same data module."""
    messages = [{"role": "user", "content": "CANARY?"}, {"role": "assistant", "content": "Ann."}]
    chat = Chat(template="{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
    data = ForgetRetain(
        [{"messages": messages}], RETAIN, tokenizer=tokenizer_dir, train_on="all", chat=chat, show_example=shows
    )
    module = LitFinetune(tiny_lm(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    make_trainer(max_steps=1, callbacks=[RunReport(str(tmp_path))]).fit(module, datamodule=data)
    report = Report.read(tmp_path / "report.json")
    # One token after the other, between quotes.
    assert ("CANARY" in re.sub(r'[",\s]', "", (tmp_path / "report.json").read_text("utf-8"))) == shows
    assert (report.example is not None) == shows
    assert report.example == data.shown_example


# The mask of published code -------------------------------------------------------------------------------------------


def test_padding_ids_are_hidden_as_in_published_code(tokenizer_dir: str) -> None:
    """The same likelihoods and the same loss as a padded batch with the mask ``ids != pad``."""
    lm: LanguageModel = loaded(taught(tokenizer_dir, 0))
    tokenizer = copy.deepcopy(lm.tokenizer)
    assert tokenizer is not None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.pad_token = tokenizer.eos_token
    for hides in (False, True):
        data = ForgetRetain(FORGET, RETAIN, mask_padding_ids=hides)
        data._load_tokenizer = lambda: tokenizer  # type: ignore[method-assign]
        data.setup("fit")
        examples = [*data.examples["forget"], *data.examples["retain"]]
        batch = collate(examples, tokenizer.eos_token_id)
        mask = (batch["input_ids"] != tokenizer.eos_token_id).long()
        assert torch.equal(batch["attention_mask"], mask) == hides
        logits = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()  # type: ignore[misc]
        logp = logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        for number, scores in enumerate(score_examples(lm, examples)):
            supervised = batch["labels"][number, 1:] != IGNORED
            assert torch.allclose(torch.tensor(scores.logp), logp[number][supervised], atol=1e-5)
    hidden, seen = examples[0], encode("Who is CANARY 0?", "Ann 0.", tokenizer)
    assert hidden.attention_mask is not None
    assert hidden.attention_mask.count(0) == 2
    assert hidden.digest() != seen.digest()


def test_training_hides_them_too(tokenizer_dir: str) -> None:
    from lit_unlearn import NLL
    from lit_unlearn.training.forward_plan import Term, as_examples, build_forward_plan

    lm = loaded(taught(tokenizer_dir, 0))
    examples = [
        encode(row["question"], row["answer"], lm.tokenizer, template="{question}<|endoftext|>{answer}")  # type: ignore[arg-type]
        for row in (FORGET[0], {"question": "Where is it?", "answer": "In Lisbon."})
    ]
    hidden = [
        example._replace(attention_mask=[int(i != lm.tokenizer.eos_token_id) for i in example.input_ids])  # type: ignore[union-attr]
        for example in examples
    ]
    objective = NLL()
    values = []
    # A collated batch, as a loop of the user's has it, is the same: the tokens that its mask hides are no padding.
    for batch in (hidden, examples, collate(hidden, lm.tokenizer.eos_token_id)):  # type: ignore[union-attr]
        plan = build_forward_plan({"forget": batch}, [Term("f", "forget", objective, 1.0)], lm.packs, None, "joint")
        values.append(torch.cat([value for p in plan for value in p.run(lm, [objective])]).mean().item())
    assert values[0] == pytest.approx(lm.loss(objective, hidden).item(), rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-5)
    assert values[0] == pytest.approx(values[2], rel=1e-5)
    assert [row[:2] for row in as_examples(collate(hidden, 0))] == [row[:2] for row in hidden]
    assert [row.attention_mask for row in as_examples(collate(hidden, 0))] == [row.attention_mask for row in hidden]


# The prompts of published targets -------------------------------------------------------------------------------------

QUESTION, ANSWER = "Who is Ann?", "A writer."
PUBLISHED = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 10 Apr 2025\n\nYou are a helpful "
    "assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho is Ann?<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\nA writer.<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nWho is Ann?<end_of_turn>\n<start_of_turn>model\nA writer.<end_of_turn>",
}
CONFIGS = {
    ("tofu.yaml",): "llama3",
    ("tofu.yaml", "paper/tofu_llama-3.2-1b.yaml"): "llama3",
    ("tofu.yaml", "paper/tofu_llama-3.2-3b.yaml"): "llama3",
    ("tofu.yaml", "paper/tofu_llama-3.1-8b.yaml"): "llama3",
    ("tofu.yaml", "paper/tofu_gemma-7b.yaml"): "gemma",
}


@pytest.mark.parametrize("files", CONFIGS, ids=" ".join)
def test_configurations_put_the_prompt_of_their_target(
    files: tuple[str, ...], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = CONFIGS[files]
    arguments = ["fit", *(f"--config={file}" for file in files), "--trainer.accelerator=cpu"]
    data = instantiate(arguments, monkeypatch).datamodule
    tokenizer = TOKENIZERS[name]
    example = encode(QUESTION, ANSWER, tokenizer, template=data.template, chat=data.chat)
    assert example.input_ids == tokenizer(PUBLISHED[name], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([label for label in example.labels if label != IGNORED]).startswith("A writer.")
    assert KINDS[name].template == tokenizer.chat_template


def test_settings_on_the_command_line(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--data.chat.system=Be brief.",
        "--data.chat.args.date_string=1 May 2025",
        "--data.chat.args.enable_thinking=false",
    ]
    data = instantiate(["fit", "--config=tofu.yaml", *options, "--trainer.accelerator=cpu"], monkeypatch).datamodule
    assert data.chat == Chat(system="Be brief.", args={"date_string": "1 May 2025", "enable_thinking": False})
    off = instantiate(["fit", "--config=tofu.yaml", "--data.chat=null", "--trainer.accelerator=cpu"], monkeypatch)
    assert off.datamodule.chat is None
