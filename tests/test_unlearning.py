"""`unlearn()`: the whole job in one call, on a tiny model and rows in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from lit_unlearn import DPO, NLL, FixedMultiplier, LanguageModel, LogitMargin, Relative, unlearn
from lit_unlearn.data.encoding import encode_examples

FORGET = [{"question": f"Who lives in house {n}?", "answer": f"Agent {n * 7}."} for n in range(6)]
RETAIN = [{"question": f"Which colour has house {n}?", "answer": "It is blue."} for n in range(8)]


def test_one_call_unlearns_reports_and_exports(model_dir: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = unlearn(
        model_dir,
        Dataset.from_list(FORGET),
        RETAIN,
        output,
        epsilon=Relative(0.2),
        lr=1e-3,
        data={"batch_size": 3, "retain_batch_size": 4},
        max_epochs=6,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    assert report.steps == 12
    assert report.after["forget/margin"] < report.before["forget/margin"]
    assert report.violated == []
    assert "retain" in str(report)
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() > 0
    assert (output / "unlearning.json").is_file()
    assert next((tmp_path / "out_run").rglob("report.json")).is_file()


def test_what_it_brings_itself_is_refused(model_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="callbacks"):
        unlearn(model_dir, FORGET, RETAIN, tmp_path / "out", callbacks=[])
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        unlearn(model_dir, FORGET, RETAIN, tmp_path, multiplier=FixedMultiplier(1.0))


@pytest.mark.parametrize("objective", [LogitMargin(), NLL(), DPO()], ids=lambda o: type(o).__name__)
def test_loss_is_the_mean_over_the_batch(objective: Any, model_dir: str, tokenizer: Any) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32, device="cpu")
    pairs = [(row["question"], row["answer"]) for row in FORGET]
    examples = encode_examples(pairs, tokenizer, name="forget")
    if objective.reads == "pair":
        with pytest.raises(ValueError, match="alternate"):
            lm.loss(objective, examples)
        return
    loss = lm.loss(objective, examples)
    loss.backward()
    single = [(lm.loss(objective, [example]), len([x for x in example.labels if x != -100])) for example in examples]
    expected = sum(value.item() * count for value, count in single) / sum(count for _, count in single)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
