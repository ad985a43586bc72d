"""Greedy generation: batched or not, every prompt gets the text that the model itself gives it alone and unpadded."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_unlearn import LanguageModel, QABenchmark
from lit_unlearn.data.encoding import encode
from lit_unlearn.data.example import prompt_of
from lit_unlearn.data.templates import Chat
from lit_unlearn.models import generation
from lit_unlearn.models.generation import generate

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SHARING = {  # prompts of different lengths share a batch
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},  # no linear head
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # does not pack
    "bloom": {},  # does not pack, positions from the mask
    "falcon": {},
    "mamba": {"state_size": 4},  # recurrent, but blanks the padding
}
APART = {  # their state runs over the padding; in transformers, RWKV's rows even add up
    "rwkv": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
}
LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
LENGTHS = [5, 1, 9, 14, 5, 3]
NEW = 12


@pytest.fixture
def build(tokenizer_dir: str) -> Callable[..., LanguageModel]:
    """Makes a loaded model, in training mode, whose every parameter is away from its initial value."""

    def make(
        model_type: str = "llama",
        dtype: torch.dtype = torch.float32,
        adapter: dict[str, Any] | None = None,
        **config: Any,
    ) -> LanguageModel:
        torch.manual_seed(0)
        config = {
            "model_type": model_type,
            **COMMON,
            **SHARING.get(model_type, {}),
            **APART.get(model_type, {}),
            **config,
        }
        lm = LanguageModel(config=config, tokenizer=tokenizer_dir, adapter=adapter)
        lm.load(dtype)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return lm

    return make


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, 400, (length,), generator=draw).tolist() for length in lengths]


def alone(lm: LanguageModel, prompt: list[int], new: int = NEW) -> list[int]:
    """The model's own greedy tokens after one prompt, without padding.

    Of two nearly equal logits, rounding would choose. The weights here are spread so far that the likeliest token leads
    by more than 1e-4, and a batch was measured to change float32 logits by at most 2e-6.
    """
    training = lm.model.training
    lm.model.eval()
    ids = torch.tensor([prompt])
    output = lm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=lm.tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    lm.model.train(training)
    for logits in output.logits:
        first, second = logits[0].topk(2).values
        assert first - second > 1e-4
    return output.sequences[0, len(prompt) :].tolist()


def texts(lm: LanguageModel, given: list[list[int]], new: int = NEW) -> list[str]:
    return [lm.tokenizer.decode(alone(lm, prompt, new), skip_special_tokens=True) for prompt in given]


def watch(monkeypatch: pytest.MonkeyPatch, lm: LanguageModel) -> list[tuple[Tensor, Tensor]]:
    """The mask and the output of every batch that is generated from now on; the trial of the padding is left out."""
    seen: list[tuple[Tensor, Tensor]] = []
    own = lm.model.generate

    def watched(**inputs: Any) -> Any:
        output = own(**inputs)
        if "output_logits" not in inputs:
            seen.append((inputs["attention_mask"], output))
        return output

    monkeypatch.setattr(lm.model, "generate", watched)
    return seen


@pytest.mark.parametrize("model_type", SHARING)
def test_a_padded_batch_equals_the_models_own_text(build, model_type, monkeypatch):
    lm = build(model_type)
    wanted = texts(lm, prompts())
    batches = watch(monkeypatch, lm)
    assert generate(lm, prompts(), max_new_tokens=NEW) == wanted
    assert [tuple(mask.shape) for mask, _ in batches] == [(len(LENGTHS), max(LENGTHS))]
    assert len({*wanted}) >= 4  # else a wrong order would not show


@pytest.mark.parametrize("model_type", APART)
def test_a_state_that_runs_over_padding_is_never_padded(build, model_type, monkeypatch):
    lm = build(model_type)
    wanted = texts(lm, prompts())
    batches = watch(monkeypatch, lm)
    assert generate(lm, prompts(), max_new_tokens=NEW) == wanted
    fives = [(2, 5)] if model_type == "recurrent_gemma" else [(1, 5)] * 2
    assert [tuple(mask.shape) for mask, _ in batches] == [(1, 14), (1, 9), *fives, (1, 3), (1, 1)]
    monkeypatch.setattr(generation, "_keeps_apart", lambda model, padding: True)
    assert generate(lm, prompts(), max_new_tokens=NEW) != wanted  # the trial is needed


def test_positions_that_count_the_padding_are_found_out(build, monkeypatch):
    lm = build("gpt2")
    wanted = texts(lm, prompts())
    count = lambda inputs, _: torch.arange(inputs.shape[1]).expand_as(inputs)  # noqa: E731
    monkeypatch.setattr(lm.model, "_prepare_position_ids_for_generation", count)
    assert texts(lm, prompts()) == wanted
    assert generate(lm, prompts(), max_new_tokens=NEW) == wanted
    monkeypatch.setattr(generation, "_keeps_apart", lambda model, padding: True)
    assert generate(lm, prompts(), max_new_tokens=NEW) != wanted


@pytest.mark.parametrize(("longest", "sharing"), [(4, True), (5, False)])
def test_longrope_shares_batches_only_below_its_switch(build, longest, sharing, monkeypatch):
    """Past 16 positions the longest row would change the rotation of all: no short trial shows that."""
    lm = build("phi3", **LONGROPE)
    given = prompts([2, longest, 3])
    wanted = texts(lm, given)
    batches = watch(monkeypatch, lm)
    assert generate(lm, given, max_new_tokens=NEW) == wanted
    assert len(batches) == (1 if sharing else 3)


def test_longrope_needs_the_rule(build, monkeypatch):
    lm = build("phi3", **LONGROPE)
    wanted = texts(lm, prompts())
    assert generate(lm, prompts(), max_new_tokens=NEW) == wanted
    monkeypatch.setattr(generation, "_rotates_by_longest", lambda model, longest: False)
    assert generate(lm, prompts(), max_new_tokens=NEW) != wanted


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "bloom"])
def test_float64(build, model_type, monkeypatch):
    """Padded rows of Gemma 2 and BLOOM are nan in float64, whose smallest number their float32 softmax cannot hold."""
    lm = build(model_type, dtype=torch.float64)
    wanted = texts(lm, prompts())
    batches = watch(monkeypatch, lm)
    assert generate(lm, prompts(), max_new_tokens=NEW) == wanted
    # With the lowest versions that are allowed, Gemma 2's padded rows are numbers, and stay in one batch.
    assert len(batches) in {"llama": {1}, "gemma2": {1, 5}, "bloom": {5}}[model_type]


@pytest.mark.parametrize("as_list", [False, True])
def test_one_row_ends_early(build, as_list):
    lm = build()
    given = prompts()
    tokens = [alone(lm, prompt) for prompt in given]
    end = next(token for token in tokens[0][2:] if sum(token in row for row in tokens) < len(tokens))
    assert end not in lm.tokenizer.all_special_ids  # so that only the cut can leave it out
    lm.model.generation_config.eos_token_id = [end, lm.tokenizer.eos_token_id] if as_list else end
    cut = [row[: row.index(end)] if end in row else row for row in tokens]
    assert {len(row) == NEW for row in cut} == {True, False}
    assert generate(lm, given, max_new_tokens=NEW) == [lm.tokenizer.decode(row) for row in cut]


def test_the_tokenizers_end_counts_where_the_model_names_none(build):
    lm = build()
    given = prompts([4, 4])
    tokens = [alone(lm, prompt) for prompt in given]
    lm.model.generation_config.eos_token_id = None
    end = next(token for token in tokens[0] if token not in tokens[1])
    wanted = [lm.tokenizer.decode(row) for row in (tokens[0][: tokens[0].index(end)], tokens[1])]
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(end)
    assert generate(lm, given, max_new_tokens=NEW) == wanted


def test_a_batch_ends_when_every_row_has(build, monkeypatch):
    lm = build()
    given = prompts()
    whole = texts(lm, given)
    stop = [text[:2] for text in whole]  # first position
    batches = watch(monkeypatch, lm)
    assert generate(lm, given, max_new_tokens=NEW, stop=stop) == [""] * len(given)
    ((mask, output),) = batches
    assert output.shape[1] - mask.shape[1] < NEW


@pytest.mark.parametrize("ends", [True, False], ids=["end token", "no end token"])
def test_text_is_cut_at_the_first_stop_string(build, ends):
    """At its start, in the middle, at its last character, or nowhere; in some rows and not in others."""
    lm = build()
    if not ends:  # transformers then goes on with rows that have stopped
        lm.model.generation_config.eos_token_id = None
        lm.tokenizer.eos_token = None
    given = prompts()
    whole = texts(lm, given)
    first = whole[0]
    for stop in ([first[-1]], [first[:3]], [first[4:7], first[1:3]], [whole[2][4:7], whole[3][1:3]], ["nowhere"]):
        wanted = [min((text.split(string)[0] for string in stop), key=len) for text in whole]
        assert generate(lm, given, max_new_tokens=NEW, stop=stop) == wanted
        assert (wanted != whole) == (stop != ["nowhere"])


def test_a_stop_string_does_not_begin_in_the_prompt(build):
    lm = build()
    (given,) = prompts([6])
    (text,) = texts(lm, [given])
    stop = lm.tokenizer.decode(given)[-1] + text[0]
    assert stop not in text
    assert generate(lm, [given], max_new_tokens=NEW, stop=[stop]) == [text]


@pytest.mark.parametrize("token_budget", [1, 20, 30, 52, 8192])
def test_batches_keep_to_the_budget(build, token_budget, monkeypatch):
    lm = build()
    wanted = texts(lm, prompts())
    batches = watch(monkeypatch, lm)
    assert generate(lm, prompts(), max_new_tokens=NEW, token_budget=token_budget) == wanted
    sizes = [mask.shape for mask, _ in batches]
    assert sum(rows for rows, _ in sizes) == len(LENGTHS)
    assert all(rows == 1 or rows * (width + NEW) <= token_budget for rows, width in sizes)
    assert len(sizes) == {1: 6, 20: 6, 30: 5, 52: 3, 8192: 1}[token_budget]


def test_an_adapter_speaks(build):
    adapted = build(adapter={"r": 4, "lora_alpha": 8})
    settings = adapted.model.get_base_model().generation_config
    wanted = texts(adapted, prompts())
    assert generate(adapted, prompts(), max_new_tokens=NEW) == wanted
    with adapted.model.disable_adapter():
        off = texts(adapted, prompts())
        assert generate(adapted, prompts(), max_new_tokens=NEW) == off != wanted
    assert adapted.model.get_base_model().generation_config is settings  # peft's own `generate` puts another there
    assert {module.training for module in adapted.modules()} == {True}


def test_prompts_may_hold_the_padding(tokenizer, build):
    """Also where the end token pads, as with a tokenizer that has no padding token."""
    model, tokenizer = build().model, copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    lm = LanguageModel.wrap(model, tokenizer)
    end = tokenizer.eos_token_id
    given = [[end, *prompt, end] for prompt in prompts()]
    assert generate(lm, given, max_new_tokens=NEW) == texts(lm, given)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(build, training, monkeypatch):
    """Nor does dropout count, nor a sampling setting or a penalty; and there are no warnings."""
    lm = build(attention_dropout=0.5)
    wanted = texts(lm, prompts())
    settings = lm.model.generation_config
    settings.update(do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=9.0, max_length=3)
    before, state = settings.to_dict(), torch.random.get_rng_state()
    lm.train(training)
    messages: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", messages.append)
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(lm, prompts(), max_new_tokens=NEW) == wanted
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert messages == []
    assert lm.model.generation_config is settings
    assert settings.to_dict() == before
    assert {module.training for module in lm.modules()} == {training}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_settings_come_back_after_an_error(build, monkeypatch):
    lm = build()
    settings = lm.model.generation_config
    monkeypatch.setattr(generation, "_answer_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(lm, prompts(), max_new_tokens=NEW)
    assert lm.model.generation_config is settings
    assert lm.model.training


def test_errors(build):
    lm = build()
    longest = COMMON["max_position_embeddings"] - NEW
    assert generate(lm, [], max_new_tokens=NEW) == []
    assert len(generate(lm, prompts([longest]), max_new_tokens=NEW)) == 1
    with pytest.raises(
        ValueError, match=r"prompt 1 has 53 tokens, which with `max_new_tokens` 12 exceed the model's 64"
    ):
        generate(lm, prompts([3, longest + 1]), max_new_tokens=NEW)
    with pytest.raises(ValueError, match=r"prompt 1 is empty, but an answer follows at least one token"):
        generate(lm, [[1], []], max_new_tokens=NEW)
    with pytest.raises(ValueError, match=r"`max_new_tokens` is 0: give at least 1"):
        generate(lm, prompts(), max_new_tokens=0)
    for stop in ("Question:", ["x", ""]):
        with pytest.raises(ValueError, match=r"`stop` must be a list of strings that are not empty"):
            generate(lm, prompts(), max_new_tokens=NEW, stop=stop)
    with pytest.raises(ValueError, match=r"no tokenizer.*`tokenizer`"):
        generate(LanguageModel.wrap(lm.model), prompts(), max_new_tokens=NEW)


@pytest.mark.parametrize("template", [None, "{question} => {answer}"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_questions_are_put_as_the_benchmark_puts_them(build, tmp_path, template, chat):
    lm = build()
    if chat:
        lm._tokenizer = copy.deepcopy(lm.tokenizer)
        lm.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    rows = [{"question": f"Where was author {i} born?", "answer": f"The place {i}."} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    benchmark = QABenchmark(str(path), str(path), template=template, max_new_tokens=NEW)
    prompts_there = [example.prompt for example in benchmark.load(lm.tokenizer)["forget"].examples]
    answers = lm.generate([row["question"] for row in rows], template=template, max_new_tokens=NEW)
    assert answers == generate(lm, prompts_there, max_new_tokens=NEW)
    assert len(set(answers)) > 1


def test_chat_settings_are_part_of_the_prompt(build):
    lm = build()
    lm._tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    chat = Chat(system="Be brief.")
    row = encode("Where was author 1 born?", "The place 1.", lm.tokenizer, chat=chat)
    assert lm.generate(["Where was author 1 born?"], chat=chat, max_new_tokens=NEW) == texts(lm, [prompt_of(row)])


def test_a_typed_line_break_in_a_template_is_one(build):
    lm = build()
    typed, meant = (
        lm.generate(["Who?"], template=text, max_new_tokens=NEW)
        for text in (r"{question}\nA: {answer}", "{question}\nA: {answer}")
    )
    assert typed == meant


def test_hidden_tokens_are_masked_as_public_code_masks_them(build):
    lm = build()
    hidden_id = 7
    given = [[3, hidden_id, 5, 6, 9], [4, 8, hidden_id, hidden_id, 5, 6, 11, 12]]
    answers = generate(lm, given, max_new_tokens=NEW, hidden_id=hidden_id)
    expected = []
    lm.model.eval()
    for prompt in given:
        ids = torch.tensor([prompt])
        output = lm.model.generate(
            input_ids=ids, attention_mask=ids.ne(hidden_id).long(), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        expected.append(lm.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    assert answers == expected
    assert answers != generate(lm, given, max_new_tokens=NEW)


def test_questions_are_refused_where_prompts_would_be(build):
    lm = build()
    assert lm.generate([]) == []
    with pytest.raises(ValueError, match="`max_new_tokens` is 0"):
        lm.generate(["Who?"], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"\{question\}"):
        lm.generate(["Who?"], template="Who?")
    with pytest.raises(ValueError, match="`tokenizer`"):
        LanguageModel.wrap(lm.model).generate(["Who?"])
