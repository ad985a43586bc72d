"""MUSE's suite on a small folder with its layout: every value against a slow form, and what is missing drops out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from lit_unlearn import LanguageModel, MUSEBenchmark
from lit_unlearn.evaluation.muse import PUBLISHED_AUC, STOP

QUESTIONS = [{"question": f"Who is number {n}?", "answer": f"Number {n} is Ann."} for n in range(14)]
SETS = {
    "verbmem/forget": [{"prompt": f"Once upon {n}", "gt": f" a time there was {n} " * 40} for n in range(3)],
    "knowmem/forget_qa": QUESTIONS[:3],
    "knowmem/forget_qa_icl": QUESTIONS[3:],
    "knowmem/retain_qa": QUESTIONS[5:7],
    "knowmem/retain_qa_icl": QUESTIONS[:5],
    "privleak/forget": [{"text": f"the secret of {n} is {n * n} and more"} for n in range(4)],
    "privleak/holdout": [{"text": f"the secret of {n + 3} is {n * 7} and less"} for n in range(5)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in SETS.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def lm(tiny_lm: Callable[..., LanguageModel]) -> LanguageModel:
    made = tiny_lm(max_position_embeddings=1024)
    made.load(torch.float32)
    return made


def suite(folder: Path, **settings: Any) -> MUSEBenchmark:
    return MUSEBenchmark("Books", str(folder), max_length=32, **settings)


def continued(lm: LanguageModel, prompt: str, tokens: int) -> str:
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])  # type: ignore[misc]
    with torch.no_grad():
        output = lm.model.eval().generate(ids, max_new_tokens=tokens, do_sample=False)  # type: ignore[union-attr, operator]
    return str(lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))  # type: ignore[union-attr]


def smallest(lm: LanguageModel, text: str) -> float:
    ids = torch.tensor([lm.tokenizer(text)["input_ids"][:32]])  # type: ignore[misc]
    with torch.no_grad():
        logp = lm.model(ids).logits[0, :-1].log_softmax(-1)  # type: ignore[misc]
    values = sorted(logp[i, label].item() for i, label in enumerate(ids[0, 1:]))
    return float(np.mean(values[: int(len(values) * 0.4)]))


def test_every_value_is_the_published_one(folder: Path, lm: LanguageModel) -> None:
    results = suite(folder).run(lm).to_dict()
    scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def rouge(said: str, answer: str) -> float:
        return float(scorer.score(answer, said)["rougeL"].fmeasure)

    verbatim = []
    for row, found in zip(SETS["verbmem/forget"], results["examples"]["forget"], strict=True):
        answer = lm.tokenizer.decode(lm.tokenizer(row["gt"])["input_ids"][:128])  # type: ignore[union-attr, misc]
        assert found["answer"] == answer
        assert len(row["gt"]) > len(answer)
        assert found["generated"] == continued(lm, row["prompt"], 128)
        verbatim.append(rouge(found["generated"], answer))
    assert results["aggregate"]["verbmem_forget"] == pytest.approx(100 * np.mean(verbatim))

    for stream, key in (("knowledge_forget", "forget_qa"), ("knowledge_retain", "retain_qa")):
        shots = SETS[f"knowmem/{key}_icl"][:10]
        before = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
        known = []
        for row, found in zip(SETS[f"knowmem/{key}"], results["examples"][stream], strict=True):
            said = continued(lm, f"{before}Question: {row['question']}\nAnswer: ", 32)
            for stop in STOP:
                said = said.split(stop)[0]
            assert found["generated"] == said
            known.append(rouge(said, row["answer"]))
        value = results["aggregate"]["knowmem_" + stream.removeprefix("knowledge_")]
        assert value == pytest.approx(100 * np.mean(known))

    scores = {key: [smallest(lm, row["text"]) for row in SETS[f"privleak/{key}"]] for key in ("forget", "holdout")}
    assert [row["min_k"] for row in results["examples"]["members"]] == pytest.approx(scores["forget"], rel=1e-4)
    above = np.mean([[(h > f) + (h == f) / 2 for h in scores["holdout"]] for f in scores["forget"]])
    published = PUBLISHED_AUC["Books"]
    assert results["aggregate"]["privleak"] == pytest.approx(100 * (above - published) / published)
    assert results["missing"] == {}


def test_against_a_retain_only_model(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "retain.json").write_text(json.dumps(suite(folder).run(lm).to_dict()), encoding="utf-8")
    same = suite(folder, retain_results=str(tmp_path / "retain.json"))
    assert same.run(lm).to_dict()["aggregate"]["privleak"] == pytest.approx(0)
    other = suite(folder, max_rows=2, retain_results=str(tmp_path / "retain.json"))
    with pytest.raises(ValueError, match=r"'members'.*number of rows: 2 here, 4 there"):
        other.prepare(lm.tokenizer)


def test_what_is_missing_drops_out(folder: Path, lm: LanguageModel, recwarn: pytest.WarningsRecorder) -> None:
    (folder / "knowmem/retain_qa_icl.jsonl").unlink()
    (folder / "privleak/holdout.jsonl").unlink()
    results = suite(folder).run(lm).to_dict()
    assert results["aggregate"].keys() == {"verbmem_forget", "knowmem_forget"}
    assert "retain_qa_icl" in results["missing"]["knowmem_retain"]
    assert "holdout" in results["missing"]["privleak"]
    said = [str(warning.message) for warning in recwarn if "left out" in str(warning.message)]
    assert len(said) == 2
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        MUSEBenchmark("News", str(folder / "empty"))


def test_wrong_columns_are_named(folder: Path, lm: LanguageModel) -> None:
    (folder / "verbmem/forget.jsonl").write_text('{"prompt": "a", "text": "b"}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"row 0 of MUSE's forget set has no text in 'gt'.*columns are \['prompt', 'text'\]"
    ):
        suite(folder).run(lm).to_dict()
    with pytest.raises(ValueError, match=r"`corpus`.*Tales"):
        MUSEBenchmark("Tales", str(folder))  # type: ignore[arg-type]
