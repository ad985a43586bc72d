"""Questions of one's own: every value of every row, against the row written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from evaluation.rows import (
    FORGET,
    HOLDOUT,
    RETAIN,
    Row,
    area,
    check,
    loaded,
    means,
    question,
    taught,
    tokens,
    write,
    write_qa,
    written_out,
)

from lit_unlearn import LanguageModel, QABenchmark
from lit_unlearn.data.encoding import encode
from lit_unlearn.data.example import prompt_of

NEW = 24
ATTACKS = {"min_k": 1, "min_k_plus_plus": 1, "loss": -1, "zlib": -1}  # what is higher for members


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_qa(tmp_path)


def run(lm: LanguageModel, files: dict[str, str], **settings: Any) -> dict[str, Any]:
    return QABenchmark(**files, **{"max_new_tokens": NEW, **settings}).run(lm).to_dict()


def slow_sets(lm: LanguageModel, **settings: Any) -> dict[str, list[Row]]:
    sets = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}
    return {
        name: [written_out(lm, row, new=None if name == "holdout" else NEW, **settings) for row in rows]
        for name, rows in sets.items()
    }


def slow_aggregate(examples: dict[str, list[Row]]) -> Row:
    values = {key: value for name, rows in examples.items() for key, value in means(name, rows).items()}
    for name, sign in ATTACKS.items():
        members, others = ([sign * row[name] for row in examples[stream]] for stream in ("forget", "holdout"))
        values[f"auc/{name}"] = area(members, others)
    return values


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (0, {}),
        (20, {}),
        (20, {"ratio": "arithmetic", "k": 0.2}),
        (30, {"token_budget": 1}),
        (30, {"token_budget": 60}),
    ],
)
def test_every_value_equals_the_row_written_out(steps, settings, tokenizer_dir, files):
    lm = loaded(taught(tokenizer_dir, steps))
    results = run(lm, files, **settings)
    wanted = slow_sets(lm, **settings)
    assert results["examples"].keys() == wanted.keys()
    for name, rows in wanted.items():
        for found, row in zip(results["examples"][name], rows, strict=True):
            check(found, row)
    check(results["aggregate"], slow_aggregate(wanted))
    assert results["missing"].keys() == {"forget_quality", "privleak", "privacy"}


def test_what_the_table_above_is_worth(tokenizer_dir):
    """The half-taught model knows some rows, parts of others, and nothing of the rest; the attacks are no sure thing."""
    rows = slow_sets(loaded(taught(tokenizer_dir, 20)))
    for key in ("exact_memorization", "extraction_strength", "rougeL_recall"):
        assert {0.0 < row[key] < 1.0 for row in rows["forget"]} == {True, False}
    assert rows["forget"][1]["extraction_strength"] == 1.0  # an answer of one token
    assert len({row["generated"] for row in rows["forget"]}) == len(FORGET)
    assert 0 < slow_aggregate(slow_sets(loaded(taught(tokenizer_dir, 0))))["auc/min_k"] < 1


def test_a_model_that_answers_everything_right(tokenizer_dir, files):
    results = run(loaded(taught(tokenizer_dir, 100)), files)
    for found, row in zip(results["examples"]["forget"], FORGET, strict=True):
        if len(row["answer"]) < 30:  # what 24 tokens can say
            assert found["generated"].strip() == row["answer"]
        for key in ("exact_memorization", "extraction_strength", "rouge1_recall", "rougeL_recall", "rougeL_f1"):
            assert found[key] == 1.0
    for key in ("exact_memorization", "extraction_strength", "rougeL_recall", "rougeL_f1"):
        assert results["aggregate"][f"forget/{key}"] == 1.0
    assert results["aggregate"]["forget/probability"] > 0.95
    assert results["aggregate"]["forget/truth_ratio"] < 0.2  # far from the indifference of 1
    assert {results["aggregate"][f"auc/{name}"] for name in ATTACKS} == {1.0}


@pytest.mark.parametrize("row", [FORGET[2], FORGET[3], RETAIN[1]], ids=lambda row: row["question"])
@pytest.mark.parametrize("left_out", [0, 1, 2, 8])
def test_the_end_is_left_out_only_where_it_is(row, left_out, tokenizer_dir, tmp_path):
    """Of a row that is cut, the last token is a part of the answer."""
    lm = loaded(taught(tokenizer_dir, 20))
    plain = {"question": row["question"], "answer": row["answer"]}
    whole = tokens(lm.tokenizer, row["question"], row["answer"])
    files = {name: write(tmp_path / f"{name}.jsonl", [plain]) for name in ("forget", "retain")}
    length = len(whole.ids) - left_out
    (found,) = run(lm, files, max_length=length)["examples"]["forget"]
    check(found, written_out(lm, plain, new=NEW, max_length=length))
    if left_out == 0:
        kept = len(whole.ids) - whole.start - 1
        assert found["exact_memorization"] * kept == pytest.approx(round(found["exact_memorization"] * kept))


@pytest.mark.parametrize("max_length", [512, "one token"])
def test_answers_of_one_token(max_length, tokenizer_dir, tmp_path):
    """With its end, or cut to a single supervised token."""
    lm = loaded(taught(tokenizer_dir, 20))
    rows = [FORGET[1], HOLDOUT[1]]
    lengths = [tokens(lm.tokenizer, row["question"], row["answer"]) for row in rows]
    assert {len(one.ids) - one.start for one in lengths} == {2}
    for number, (row, one) in enumerate(zip(rows, lengths, strict=True)):
        plain = {"question": row["question"], "answer": row["answer"]}
        files = {name: write(tmp_path / f"{name}{number}.jsonl", [plain]) for name in ("forget", "retain")}
        length = one.start + 1 if max_length == "one token" else max_length
        (found,) = run(lm, files, max_length=length)["examples"]["forget"]
        check(found, written_out(lm, plain, new=NEW, max_length=length))
        assert found["exact_memorization"] == found["extraction_strength"] == (1.0 if number == 0 else 0.0)


def test_one_wrong_answer_as_text_or_as_a_list(tokenizer_dir, tmp_path):
    lm = loaded(taught(tokenizer_dir, 20))
    results = []
    for wrong in (["In 1930."], "In 1930."):
        rows = [{**FORGET[4], "perturbed_answer": wrong}]
        results.append(run(lm, dict.fromkeys(("forget", "retain"), write(tmp_path / "rows.jsonl", rows)))["examples"])
    assert results[0] == results[1]
    (found,) = results[0]["forget"]
    for ratio in ("geometric", "arithmetic"):  # which are the same then
        wanted = written_out(lm, {**FORGET[4], "perturbed_answer": ["In 1930."]}, new=None, ratio=ratio)["truth_ratio"]
        assert found["truth_ratio"] == pytest.approx(wanted, rel=1e-9)


def test_a_set_without_wrong_answers(tokenizer_dir, tmp_path):
    """It has no truth ratio. Where only some rows lack them, the row is named; see tests/faults/test_row_files.py."""
    rows = [{**row, "perturbed_answer": empty} for row, empty in zip(FORGET[:3], (None, [], None), strict=True)]
    files = {
        "forget": write(tmp_path / "forget.jsonl", rows),
        "retain": write(tmp_path / "retain.jsonl", RETAIN),
    }
    results = run(loaded(taught(tokenizer_dir, 20)), files)
    assert ["truth_ratio" in row for row in results["examples"]["forget"]] == [False] * 3
    assert "forget/truth_ratio" not in results["aggregate"]
    assert "retain/truth_ratio" in results["aggregate"]
    assert results["missing"] == {"forget_quality": "the forget rows have no 'perturbed_answer'"}
    assert not any(name.startswith("auc/") for name in results["aggregate"])  # there is no holdout set


# Prompts --------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_comes_before_the_first_supervised_token(tokenizer):
    for row in (*FORGET, *RETAIN, *HOLDOUT):
        encoded = encode(row["question"], row["answer"], tokenizer)
        prompt = prompt_of(encoded)
        ids, start, _ = tokens(tokenizer, row["question"], row["answer"])
        assert prompt == ids[:start]
        assert [label for label in encoded.labels if label != -100] == ids[start:]
        assert tokenizer.decode(prompt).rstrip() == f"Question: {row['question']}\nAnswer:"


def test_a_prompt_of_a_chat(tokenizer, files):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Ask: {{ m.content }}\nSay: {% else %}{{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    for example, row in zip(QABenchmark(**files).load(chat)["forget"].examples, FORGET, strict=True):
        (own,) = example.sequences["answer"]
        assert chat.decode(example.prompt).rstrip() == f"Ask: {row['question']}\nSay:"
        assert own.input_ids[: len(example.prompt)] == example.prompt
        said = [label for label in own.labels if label != -100]
        assert own.input_ids[len(example.prompt) :] == said
        assert chat.decode(said).strip() == f"{row['answer']}{chat.eos_token}"


def test_a_template_decides_rows_and_prompts(tokenizer_dir, files):
    lm = loaded(taught(tokenizer_dir, 20))
    template = "Q {question} A {answer}"
    rows = QABenchmark(**files, template=template).load(lm.tokenizer)["forget"].examples
    assert lm.tokenizer.decode(rows[0].prompt).rstrip() == f"Q {FORGET[0]['question']} A"
    found, plain = (run(lm, files, template=given)["aggregate"] for given in (template, None))
    assert found["forget/probability"] < plain["forget/probability"]  # which it was taught


def test_equal_questions_and_long_answers_keep_their_places(tokenizer_dir, tmp_path):
    rows = [question("Same?", "No. " * n, "Yes.") for n in (9, 1, 30, 2)]
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name in ("forget", "retain")}
    lm = loaded(taught(tokenizer_dir, 20))
    for token_budget in (1, 100, 8192):
        examples = run(lm, files, token_budget=token_budget)["examples"]
        for found, row in zip(examples["retain"], rows, strict=True):
            check(found, written_out(lm, row, new=NEW))
