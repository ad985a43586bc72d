"""Answers judged by how likely another model finds them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.rows import FORGET, check, loaded, look, mean_of, taught, tokens, write_qa
from torch import nn

from lit_unlearn import LanguageModel, QABenchmark
from lit_unlearn.evaluation import benchmark
from lit_unlearn.evaluation.results import Results, results_table


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_qa(tmp_path)


def run(lm: LanguageModel, files: dict[str, str], judge: str | None, **settings: Any) -> dict[str, Any]:
    return QABenchmark(**files, fluency_model=judge, **{"max_new_tokens": 12, **settings}).run(lm).to_dict()


def check_losses(found: dict[str, Any], judge: LanguageModel) -> None:
    for row in found["examples"]["forget"]:
        ids, start, _ = tokens(judge.tokenizer, row["question"], row["generated"])
        assert row["fluency_nll"] == pytest.approx(
            look(judge.model, ids, start).nll, rel=1e-5
        )  # float32 beside float64


@pytest.mark.parametrize("token_budget", [1, 8192])
def test_the_loss_of_what_was_said_given_the_question(token_budget, files, tokenizer_dir):
    """With the end of the answer, as of every answer."""
    target = taught(tokenizer_dir, 100)
    found = run(loaded(taught(tokenizer_dir, 20)), files, target, token_budget=token_budget)
    check_losses(found, loaded(target))
    rows = found["examples"]["forget"]
    assert len({row["generated"] for row in rows}) == len(FORGET)
    assert found["aggregate"]["forget/fluency_nll"] == pytest.approx(mean_of(rows, "fluency_nll"))
    assert found["aggregate"]["forget/empty"] == 0.0
    assert found["settings"]["fluency_model"] == target
    for name in ("retain", "holdout"):
        assert not any("fluency_nll" in row for row in found["examples"][name])


def test_nothing_else_changes(files, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 20))
    plain, judged = (run(lm, files, judge) for judge in (None, taught(tokenizer_dir, 0)))
    judged["aggregate"] = {key: value for key, value in judged["aggregate"].items() if key in plain["aggregate"]}
    for row in judged["examples"]["forget"]:
        row.pop("fluency_nll")
    for key in ("aggregate", "examples", "missing", "data"):
        assert judged[key] == plain[key]
    assert not any("fluency" in key or "empty" in key for key in plain["aggregate"])


def test_what_a_judge_was_taught_is_fluent(files, tokenizer_dir):
    judge = taught(tokenizer_dir, 100)
    right, gibberish = (run(loaded(taught(tokenizer_dir, steps)), files, judge) for steps in (100, 0))
    assert gibberish["aggregate"]["forget/fluency_nll"] > 3 + right["aggregate"]["forget/fluency_nll"]


def test_judges_with_a_tokenizer_of_their_own(files, tokenizer_dir, tmp_path):
    from lit_unlearn.data.tokenizer import train_tokenizer

    train_tokenizer([row["answer"] for row in FORGET], vocab_size=290).save_pretrained(tmp_path / "tokenizer")
    judge = LanguageModel(
        config={"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer=str(tmp_path / "tokenizer"),
    )
    judge.load(torch.float32)
    judge.save(tmp_path / "judge")
    found = run(loaded(taught(tokenizer_dir, 20)), files, str(tmp_path / "judge"))
    check_losses(found, loaded(str(tmp_path / "judge")))


@pytest.mark.parametrize("empty", [[1], [0, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("nothing", ["", " \n"])
def test_empty_answers_are_counted_and_not_judged(empty, nothing, files, tokenizer_dir, monkeypatch):
    own = benchmark.generate

    def generate(lm: LanguageModel, prompts: Any, **settings: Any) -> list[str]:
        said = own(lm, prompts, **settings)
        return [nothing if i in empty else text for i, text in enumerate(said)] if len(said) == 5 else said

    judge, lm = taught(tokenizer_dir, 100), loaded(taught(tokenizer_dir, 20))
    whole = run(lm, files, judge)["examples"]["forget"]
    monkeypatch.setattr(benchmark, "generate", generate)
    found = run(lm, files, judge)
    rows = found["examples"]["forget"]
    assert [row["fluency_nll"] is None for row in rows] == [i in empty for i in range(5)]
    for i, row in enumerate(rows):
        if i in empty:
            assert (row["generated"], row["rougeL_recall"]) == (nothing, 0.0)
        else:
            check(row, whole[i], rel=1e-6)
    kept = [row for row in rows if row["fluency_nll"] is not None]
    expected = pytest.approx(mean_of(kept, "fluency_nll")) if kept else None
    assert found["aggregate"].get("forget/fluency_nll") == expected
    assert found["aggregate"]["forget/empty"] == pytest.approx(len(empty) / 5)


def test_a_model_that_says_nothing(files, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 20))
    head = nn.Linear(32, 400, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(lm.model.lm_head.weight)
        head.bias.zero_()[lm.tokenizer.eos_token_id] = 1e3
    lm.model.lm_head = head
    found = run(LanguageModel.wrap(lm.model, lm.tokenizer), files, taught(tokenizer_dir, 0))
    rows = found["examples"]["forget"]
    assert {row["generated"] for row in rows} == {""}
    assert {row["rougeL_recall"] for row in rows} == {0.0}
    assert {row["exact_memorization"] for row in rows} == {0.0}
    assert found["aggregate"]["forget/empty"] == 1.0
    assert "forget/fluency_nll" in found["missing"]
    assert all(math.isfinite(row["nll"]) for row in rows)
    line = next(
        line
        for line in results_table([Results.from_dict(found)], ["mute"]).splitlines()
        if line.startswith("forget/fluency_nll")
    )
    assert line.split() == ["forget/fluency_nll", "–"]


def test_a_judge_that_is_not_there(files, tokenizer_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model directory '.*nowhere'"):
        run(loaded(taught(tokenizer_dir, 0)), files, str(tmp_path / "nowhere"))
