"""LUME's benchmark: every value of every row written out, on a small folder with its layout and on rows of its own files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.test_lume import FOLDER, make_rows, needs_lume, write_lume
from evaluation.rows import area, look, say
from rouge_score.rouge_scorer import RougeScorer

from lit_unlearn import LUME, LanguageModel, LUMEBenchmark
from lit_unlearn.data.example import collate

NEW = 12
TASKS = ("Task1", "Task2", "Task3")
DOCUMENTS = {
    "members": [row["input"] + " and more" for row in make_rows("forget")[:5]],
    "nonmembers": [f"Nothing of it was seen before {n}." * (1 + n % 2) for n in range(4)],
}
Row = dict[str, Any]


def write_documents(folder: Path, texts: list[str], name: str) -> str:
    folder.mkdir(exist_ok=True)
    rows = [{"id": str(n), "document": text} for n, text in enumerate(texts)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lume")
    write_lume(path)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path, tokenizer_dir: str) -> LanguageModel:
    """A model that was fine-tuned on a part of the rows, so that it continues some and answers some."""
    from conftest import TINY

    torch.manual_seed(0)
    model = LanguageModel(config={**TINY, "max_position_embeddings": 2048}, tokenizer=tokenizer_dir)
    model.load(torch.float32)
    data = LUME(str(folder), tokenizer=tokenizer_dir, max_length=128)
    data.setup("fit")
    batch = collate([*data.examples["forget"][:7], *data.examples["retain"][4:]], pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model.model(**batch).loss.backward()  # type: ignore[misc]
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.float64)
    return model.eval()


def write_out(lm: LanguageModel, row: Row, new: int = NEW) -> Row:
    """The values of one row, from the model's own logits and its own greedy generation after the raw input."""
    tokenizer: Any = lm.tokenizer
    prompt = tokenizer(row["input"])["input_ids"]
    encoded = tokenizer(f"{row['input']} {row['output']}", return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    # The space may have a token of its own, which is not the answer's.
    start = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(row["input"]) + 1)
    generated = say(lm, prompt, new)
    rouge = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(row["output"], generated)
    nll = look(lm.model, ids, start).nll
    is_question = row["id"][:-1].endswith("qa")
    values = {
        "question": row["input"],
        "answer": row["output"],
        "task": row["task"],
        "kind": "question" if is_question else "completion",
        "nll": nll,
        "probability": math.exp(-nll),
        "generated": generated,
    }
    for kind, score in rouge.items():
        values |= {f"{kind}_recall": score.recall, f"{kind}_f1": score.fmeasure}
    if is_question:
        values["exact_match"] = float(generated.strip().lower() == row["output"].strip().lower())
    return values


def slow_means(rows: list[Row]) -> Row:
    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    return {
        "regurgitation": mean([row["rougeL_recall"] for row in rows if row["kind"] == "completion"]),
        "exact_match": mean([row["exact_match"] for row in rows if row["kind"] == "question"]),
        "answer_rougeL_recall": mean([row["rougeL_recall"] for row in rows if row["kind"] == "question"]),
        "probability": mean([row["probability"] for row in rows]),
    }


def slow_aggregate(examples: dict[str, list[Row]]) -> Row:
    values = {}
    parts = []
    for name in ("forget", "retain"):
        values |= {f"{name}/{key}": value for key, value in slow_means(examples[name]).items()}
        for task in TASKS:
            means = slow_means([row for row in examples[name] if row["task"] == task])
            values |= {f"{name}/{task}/{key}": value for key, value in means.items()}
            for key in ("regurgitation", "exact_match"):
                parts.append(1 - means[key] if name == "forget" else means[key])
    assert len(parts) == 12
    values["task_aggregate"] = 12 / math.fsum(1 / part for part in parts) if all(parts) else 0.0
    return values


def check(found: Row, wanted: Row) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def document_nll(lm: LanguageModel, text: str) -> float:
    """The loss of a whole text, as transformers computes it."""
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])  # type: ignore[misc]
    with torch.no_grad():
        return float(lm.model(input_ids=ids, labels=ids).loss)  # type: ignore[misc]


def test_every_value_is_the_one_written_out(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    files = {name: write_documents(tmp_path, texts, f"{name}.jsonl") for name, texts in DOCUMENTS.items()}
    results = LUMEBenchmark(str(folder), max_new_tokens=NEW, mmlu=0.3, **files).run(lm).to_dict()
    wanted = {name: [write_out(lm, row) for row in make_rows(name)] for name in ("forget", "retain")}
    for name, rows in wanted.items():
        for found, row in zip(results["examples"][name], rows, strict=True):
            check(found, row)
    losses = {name: [document_nll(lm, text) for text in texts] for name, texts in DOCUMENTS.items()}
    for name, values in losses.items():
        assert [row["nll"] for row in results["examples"][name]] == pytest.approx(values, rel=1e-6)

    aggregate = slow_aggregate(wanted)
    attack = area([-nll for nll in losses["members"]], [-nll for nll in losses["nonmembers"]])
    aggregate |= {"auc/loss": attack, "mia_score": 1 - 2 * abs(attack - 0.5)}
    aggregate["final_score"] = (aggregate["task_aggregate"] + aggregate["mia_score"] + 0.3) / 3
    check(results["aggregate"], aggregate)
    assert results["missing"] == {}


def test_what_the_test_above_is_worth(folder: Path, lm: LanguageModel) -> None:
    """The model knows the rows that it was fine-tuned on, and not all others."""
    values = LUMEBenchmark(str(folder), max_new_tokens=NEW).run(lm).to_dict()["aggregate"]
    for name in ("forget", "retain"):
        assert 0.2 < values[f"{name}/regurgitation"] < 1
        assert 0.2 < values[f"{name}/exact_match"] < 1
    assert values["forget/Task1/exact_match"] == 1
    assert values["forget/Task3/exact_match"] < 1


@needs_lume
def test_rows_of_its_own_files(lm: LanguageModel) -> None:
    benchmark = LUMEBenchmark(str(FOLDER), max_rows=1, max_new_tokens=NEW)
    results = benchmark.run(lm).to_dict()
    for name in ("forget", "retain"):
        rows = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        firsts: dict[tuple[str, str], Row] = {}
        for row in rows:
            firsts.setdefault((row["task"], row["id"][:-1][-2:]), row)
        assert len(firsts) == 6
        chosen = [row for row in rows if any(row is first for first in firsts.values())]
        for found, row in zip(results["examples"][name], chosen, strict=True):
            check(found, write_out(lm, row))
    assert len([key for key in results["aggregate"] if key.count("/") == 2]) == 2 * 3 * 4


def test_members_are_the_forget_texts_where_none_are_given(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    file = write_documents(tmp_path, DOCUMENTS["nonmembers"], "other.jsonl")
    results = LUMEBenchmark(str(folder), max_new_tokens=1, max_rows=1, nonmembers=file).run(lm).to_dict()
    texts = [f"{row['input']} {row['output']}" for row in make_rows("forget")[::4]]
    assert [row["nll"] for row in results["examples"]["members"]] == pytest.approx(
        [document_nll(lm, text) for text in texts], rel=1e-6
    )
    with pytest.raises(ValueError, match=r"`members` are given, but no `nonmembers`"):
        LUMEBenchmark(str(folder), members=file)


def test_the_organisers_documents_are_found(tmp_path: Path) -> None:
    source = write_lume(tmp_path)
    assert LUMEBenchmark(source).documents == {}
    for name, file in {"members": "member.jsonl", "nonmembers": "nonmember.jsonl"}.items():
        write_documents(tmp_path / "mia_data", DOCUMENTS[name], file)
    assert {name: Path(source.path).name for name, source in LUMEBenchmark(source).documents.items()} == {
        "members": "member.jsonl",
        "nonmembers": "nonmember.jsonl",
    }


def test_what_is_missing_has_a_reason(folder: Path, lm: LanguageModel) -> None:
    results = LUMEBenchmark(str(folder), tasks=["Task2"], max_new_tokens=2).run(lm).to_dict()
    assert {row["task"] for row in results["examples"]["forget"]} == {"Task2"}
    assert results["missing"].keys() == {"task_aggregate", "auc/loss", "mia_score", "final_score"}
    assert "forget/Task1/exact_match" in results["missing"]["task_aggregate"]
    assert "nonmembers" in results["missing"]["mia_score"]
    assert results["missing"]["final_score"] == "it needs task_aggregate, mia_score, mmlu"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "1sc1", "input": "a", "output": None, "task": "Task1"}],
            r"row 0 of LUME's forget set has no text in 'output': got null",
        ),
        (
            [{"id": "17", "input": "a", "output": "CANARY", "task": "Task1"}],
            r"row 0 of LUME's forget set has an id without 'sc' or 'qa'",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    rows: list[Row], message: str, tmp_path: Path, tokenizer: Any, write_rows: Callable[..., str]
) -> None:
    write_lume(tmp_path)
    write_rows("forget.jsonl", rows)
    with pytest.raises(ValueError, match=message) as caught:
        LUMEBenchmark(str(tmp_path)).load(tokenizer)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"mmlu": 30.0}, "mmlu"),
        ({"tasks": ["Task9"]}, "tasks"),
        ({"max_rows": 0}, "max_rows"),
        ({"template": "{answer}"}, "template"),
    ],
)
def test_settings_out_of_range_are_refused(folder: Path, settings: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}`"):
        LUMEBenchmark(str(folder), **settings)


def test_numbers_are_plain(folder: Path, lm: LanguageModel) -> None:
    results = LUMEBenchmark(str(folder), max_new_tokens=1, max_rows=1).run(lm).to_dict()
    assert not any(isinstance(value, np.generic) for value in results["aggregate"].values())
    json.dumps(results)
