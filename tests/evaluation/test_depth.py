"""The Unlearning Depth Score of models, against patching one example at a time with the blocks run by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from evaluation.rows import FORGET, loaded, taught, tokens, write
from torch import Tensor

from lit_unlearn import LanguageModel, UnlearningDepth
from lit_unlearn.cli import main
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.formats import RowReader
from lit_unlearn.data.tokenizer import train_tokenizer
from lit_unlearn.errors import ConfigError, DataError, ModelError
from lit_unlearn.evaluation.depth import summarize_layers
from lit_unlearn.evaluation.results import Results

ENTITIES = ["in May", "a", "never a judge", "Paris", "1920"]  # "a" and "Paris" occur twice, the second time in vain
ROWS = [
    {"question": row["question"], "answer": row["answer"], "entity": entity}
    for row, entity in zip(FORGET, ENTITIES, strict=True)
]
ROLES = ("target", "retain_only", "unlearned")
LISTS = ("retain_drop", "unlearned_drop", "lens_retain_drop", "lens_unlearned_drop")

Models = dict[str, LanguageModel]


@pytest.fixture(scope="module")
def folders(tokenizer_dir: str) -> dict[str, str]:
    """A model that knows the rows, one that never saw them, and one in between."""
    return dict(zip(ROLES, (taught(tokenizer_dir, steps) for steps in (100, 0, 20)), strict=True))


@pytest.fixture(scope="module")
def models(folders: dict[str, str]) -> Models:
    return {role: loaded(folder) for role, folder in folders.items()}


def measure(models: Models, rows: Any = ROWS, **settings: Any) -> Results:
    return UnlearningDepth(**settings).run(*(models[role] for role in ROLES), rows)


# The slow form --------------------------------------------------------------------------------------------------------


def find_entity(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """The tokens of a row, and the places of those that carry the entity."""
    text = f"Question: {row['question']}\nAnswer: {row['answer']}"
    start = len(text) - len(row["answer"]) + row["answer"].index(row["entity"])
    stop = start + len(row["entity"])
    encoded = tokenizer(text, return_offsets_mapping=True)
    places = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if begin < stop and end > start]
    return tokens(tokenizer, row["question"], row["answer"]).ids, places


def run_blocks(
    lm: LanguageModel, ids: list[int], layer: int = -1, positions: Any = None, states: Any = None
) -> list[Tensor]:
    """Run a Llama block by block on one row, perhaps with other states after a layer; return all states, shape (T, D) each."""
    trunk: Any = lm.causal_lm.model
    count = len(ids)
    with torch.no_grad():
        hidden = trunk.embed_tokens(torch.tensor([ids]))
        position_ids = torch.arange(count)[None]
        rotation = trunk.rotary_emb(hidden, position_ids=position_ids)
        mask = torch.full((count, count), -math.inf, dtype=hidden.dtype).triu(1)[None, None]
        outputs = []
        for number, block in enumerate(trunk.layers):
            hidden = block(
                hidden, attention_mask=mask, position_embeddings=rotation, position_ids=position_ids, use_cache=False
            )
            if number == layer:
                hidden = hidden.clone()
                for position in positions:
                    hidden[0, position] = states[position]
            outputs.append(hidden[0])
    return outputs


def score_states(lm: LanguageModel, states: Tensor, ids: list[int], places: list[int]) -> float:
    """Mean log p of the tokens in some places, from the last states before them."""
    with torch.no_grad():
        logits = lm.causal_lm.lm_head(lm.causal_lm.model.norm(states))
    logp = [logits[place - 1].log_softmax(-1)[ids[place]].item() for place in places]
    return math.fsum(logp) / len(logp)


def measure_slowly(models: Models, row: dict[str, str]) -> dict[str, Any]:
    target = models["target"]
    ids, places = find_entity(target.tokenizer, row)
    positions = [place - 1 for place in places]
    of_target = run_blocks(target, ids)
    score = score_states(target, of_target[-1], ids, places)
    values: dict[str, Any] = {"tokens": len(places), "target_probability": math.exp(score)}
    for role, name in (("retain_only", "retain"), ("unlearned", "unlearned")):
        states = run_blocks(models[role], ids)
        values[f"{role}_probability"] = math.exp(score_states(models[role], states[-1], ids, places))
        patched, lens = [], []
        for layer in range(len(of_target)):
            changed = run_blocks(target, ids, layer, positions, states[layer])
            patched.append(score - score_states(target, changed[-1], ids, places))
            decoded = [score_states(target, of_model[layer], ids, places) for of_model in (of_target, states)]
            lens.append(decoded[0] - decoded[1])
        values[f"{name}_drop"], values[f"lens_{name}_drop"] = patched, lens
    return values


# Tests ----------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_patching_one_example_at_a_time(models: Models) -> None:
    results = measure(models)
    for number, (row, values) in enumerate(zip(ROWS, results.examples["forget"], strict=True)):
        assert values.pop("row") == number
        for name in ("unlearning_depth", "lens_depth"):
            assert 0 <= values.pop(name) <= 1
        expected = measure_slowly(models, row)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-7, abs=1e-9), (number, key)
        # After the last block nothing is left but norm and head: patching there is the lens.
        assert values["retain_drop"][-1] == pytest.approx(values["lens_retain_drop"][-1], rel=1e-9)


def test_aggregates(models: Models) -> None:
    results = measure(models)
    values = results.examples["forget"]
    assert results.missing == {}
    assert results.aggregate.keys() == {
        *("unlearning_depth", "lens_depth", "forget/with_knowledge"),
        *(f"forget/{role}_probability" for role in ROLES),
    }
    for name in ("unlearning_depth", "lens_depth"):
        assert results.aggregate[name] == pytest.approx(np.mean([row[name] for row in values]))
    assert results.aggregate["forget/with_knowledge"] == 1
    assert results.aggregate["forget/target_probability"] > 0.8
    assert results.aggregate["forget/retain_only_probability"] < 0.1
    assert results.settings["target"]["weights"] != results.settings["retain_only"]["weights"]
    assert results.data["forget"]["rows"] == len(ROWS)
    for lm in models.values():
        assert not any(module._forward_hooks for module in lm.modules())


def test_the_target_itself_has_erased_nothing(models: Models) -> None:
    results = measure({**models, "unlearned": models["target"]})
    assert results.aggregate["unlearning_depth"] == pytest.approx(0, abs=1e-12)
    assert results.aggregate["lens_depth"] == pytest.approx(0, abs=1e-12)
    for values in results.examples["forget"]:
        assert values["unlearned_drop"] == pytest.approx([0, 0], abs=1e-12)


def test_the_retain_only_model_has_nothing_left(models: Models) -> None:
    results = measure({**models, "unlearned": models["retain_only"]})
    assert results.aggregate["unlearning_depth"] == 1
    assert results.aggregate["lens_depth"] == 1


def test_a_target_that_knows_no_more_has_no_score(models: Models) -> None:
    results = measure({**models, "target": models["retain_only"]})
    assert results.missing.keys() == {"unlearning_depth", "lens_depth"}
    assert results.aggregate["forget/with_knowledge"] == 0
    assert [row["unlearning_depth"] for row in results.examples["forget"]] == [None] * len(ROWS)
    assert all(layer["erased"] is None for layer in summarize_layers(results))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("token_budget", [1, 70])
def test_neither_batches_nor_padding_matter(
    token_budget: int, packs: bool, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(models).examples["forget"]
    for lm in models.values():
        monkeypatch.setattr(lm, "packs", packs)
    for row, values in zip(expected, measure(models, token_budget=token_budget).examples["forget"], strict=True):
        for key, value in row.items():
            assert values[key] == pytest.approx(value, rel=1e-9, abs=1e-10), key


def test_layers_are_the_means_over_examples(models: Models) -> None:
    results = measure(models, threshold=0.5)
    values = results.examples["forget"]
    layers = summarize_layers(results)
    assert len(layers) == 2
    for number, layer in enumerate(layers):
        for prefix in ("", "lens_"):
            retain = [row[f"{prefix}retain_drop"][number] for row in values]
            unlearned = [row[f"{prefix}unlearned_drop"][number] for row in values]
            pairs = [(a, min(max(b, 0), a)) for a, b in zip(retain, unlearned, strict=True) if a > 0.5]
            assert layer[f"{prefix}retain_drop"] == pytest.approx(np.mean(retain))
            assert layer[f"{prefix}unlearned_drop"] == pytest.approx(np.mean(unlearned))
            assert layer[f"{prefix}with_knowledge"] == pytest.approx(len(pairs) / len(values))
            if pairs:
                erased = sum(b for _, b in pairs) / sum(a for a, _ in pairs)
                assert layer[f"{prefix}erased"] == pytest.approx(erased)


def test_spans_may_be_places_and_lists(models: Models) -> None:
    """Of a text the first occurrence counts; pairs of offsets say which place is meant."""
    answer = ROWS[3]["answer"]
    first = answer.index("Paris")
    last = answer.rindex("Paris")
    of_text, of_first, of_last, of_both = (
        measure(models, [{**ROWS[3], "spans": spans}], span_column="spans").examples["forget"][0]
        for spans in (["Paris"], [[first, first + 5]], [[last, last + 5]], [[first, first + 5], [last, last + 5]])
    )
    assert of_text == of_first
    assert of_last["target_probability"] != of_first["target_probability"]
    assert of_both["tokens"] == of_first["tokens"] + of_last["tokens"]


def test_conversations_and_documents(models: Models) -> None:
    """A document of several chunks is several examples of one row."""
    text = "We know that Ada wrote the letter in May, and that it was read in Paris."
    row = {"text": text, "spans": ["Ada", "Paris"]}
    settings = {"span_column": "spans", "encoding": EncodingSettings(max_length=16)}
    values = measure(models, [row, row], **settings).examples["forget"]
    numbers = [value["row"] for value in values]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1}
    assert len(numbers) > 2

    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada wrote it."}]
    chat = EncodingSettings(template="{question} => {answer}")
    (of_chat,) = measure(models, [{"messages": messages, "entity": "Ada"}], encoding=chat).examples["forget"]
    row = {"q": "Who?", "a": "Ada wrote it.", "entity": "Ada"}
    reader = RowReader(question_column="q", answer_column="a")
    assert measure(models, [row], encoding=chat, reader=reader).examples["forget"] == [of_chat]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
        {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2},
        {**TINY, "model_type": "gemma2", "head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 2.0},
    ],
    ids=lambda config: config["model_type"],
)
def test_other_families(config: dict[str, Any], tokenizer_dir: str) -> None:
    """Learned positions, no packing, a head that is not linear."""
    models = {}
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        models[role] = LanguageModel(config={**config, "initializer_range": 0.3}, tokenizer=tokenizer_dir)
        models[role].load(torch.float32)
    for values in measure(models).examples["forget"]:
        assert np.abs(values["retain_drop"]).min() > 0
        assert values["retain_drop"][-1] == pytest.approx(values["lens_retain_drop"][-1], abs=1e-5)
    for values in measure({**models, "unlearned": models["target"]}).examples["forget"]:
        for name in ("unlearned_drop", "lens_unlearned_drop"):
            assert values[name] == pytest.approx([0, 0], abs=1e-5)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "`{role}` is a LlamaForCausalLM of 3 blocks of width 32, but `"),
        ({"hidden_size": 64}, "`{role}` is a LlamaForCausalLM of 2 blocks of width 64, but `"),
        (
            {"model_type": "mistral", "num_key_value_heads": 2},
            "`{role}` is a MistralForCausalLM of 2 blocks of width 32, but `",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("role", ["target", "unlearned"])
def test_models_of_another_shape_are_refused(
    role: str, change: dict[str, Any], message: str, models: Models, tokenizer_dir: str
) -> None:
    odd = LanguageModel(config={**TINY, **change}, tokenizer=tokenizer_dir)
    odd.load(torch.float64)
    with pytest.raises(ModelError, match=re.escape(message.format(role=role))) as refusal:
        measure({**models, role: odd})
    assert refusal.value.argument == role
    assert str(refusal.value).count(".") == 1


def test_models_of_another_vocabulary_are_refused(models: Models, tokenizer_dir: str) -> None:
    tokenizer = train_tokenizer(["Some text that no other tokenizer was trained on."] * 20, vocab_size=300)
    odd = LanguageModel.wrap(models["unlearned"].causal_lm, tokenizer)
    with pytest.raises(ModelError, match="`unlearned` and `target` have different vocabularies"):
        measure({**models, "unlearned": odd})
    # A model in memory may have none; the target must.
    bare = LanguageModel.wrap(models["unlearned"].causal_lm)
    assert measure({**models, "unlearned": bare}).aggregate == measure(models).aggregate
    with pytest.raises(ModelError, match="`target` needs its tokenizer"):
        measure({**models, "target": bare})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Who?", "answer": "Secret."}], r"no column 'entity' with spans; .*`span_column`"),
        (
            [{**ROWS[0], "entity": "Secret"}],
            r"row 0 of the forget set has a span \(0 in 'entity'\) that does not occur",
        ),
        ([ROWS[1], {**ROWS[0], "entity": None}], "row 1 of the forget set has null in 'entity'"),
        ([{**ROWS[0], "entity": ""}], "row 0 of the forget set has an empty text as span 0"),
    ],
)
def test_rows_without_a_span_are_refused(rows: Any, message: str, models: Models) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        measure(models, rows)
    assert refusal.value.argument == "span_column"
    assert "Secret" not in str(refusal.value)


@pytest.mark.parametrize(("setting", "value"), [("threshold", -1), ("threshold", math.nan), ("token_budget", 0)])
def test_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"`{setting}`"):
        UnlearningDepth(**{setting: value})


# The command ----------------------------------------------------------------------------------------------------------


def run_command(folders: dict[str, str], *options: str) -> None:
    roles = ["--target", folders["target"], "--retain_only", folders["retain_only"]]
    main(["depth", folders["unlearned"], *roles, "--rows", "rows.jsonl", *options])


def test_the_command(folders: dict[str, str], models: Models, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(in_tmp / "rows.jsonl", ROWS)
    run_command(folders, "--output", "depth.json")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert re.search(r"^unlearning_depth +0\.\d+$", shown.out, re.MULTILINE)
    assert [line.split()[0] for line in shown.out.splitlines()[-2:]] == ["1", "2"]

    results = Results.read("depth.json")
    assert results.benchmark == "depth"
    expected = measure(models).aggregate
    assert results.aggregate == pytest.approx(expected, rel=1e-3)
    text = Path("depth.json").read_text("utf-8")
    for row in ROWS:
        assert json.dumps(row["question"]) not in text
        assert json.dumps(row["answer"]) not in text

    main(["compare", "depth.json", "depth.json"])
    assert "unlearning_depth" in capsys.readouterr().out


def test_the_command_says_why_there_is_no_score(
    folders: dict[str, str], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(in_tmp / "rows.jsonl", ROWS)
    run_command({**folders, "target": folders["retain_only"]}, "--max_rows", "2", "--format", "markdown")
    shown = capsys.readouterr()
    assert "unlearning_depth is missing: in no layer" in shown.err
    assert "| unlearning_depth | – |" in shown.out


def test_one_model_at_a_time_is_in_memory(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    models = {role: LanguageModel(folder) for role, folder in folders.items()}
    load, order = LanguageModel.load, list[str]()

    def counted(self: LanguageModel, *arguments: Any) -> None:
        assert not any(lm.is_loaded for lm in models.values())
        order.append(next(role for role, lm in models.items() if lm is self))
        load(self, *arguments)

    monkeypatch.setattr(LanguageModel, "load", counted)
    measure(models, ROWS[:2])
    assert order == ["retain_only", "unlearned", "target"]
    assert not any(lm.is_loaded for lm in models.values())
