"""Values of the question benchmarks that settings or columns switch on: paraphrases, the floor, further attacks; and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.rows import (
    FORGET,
    HOLDOUT,
    RETAIN,
    Row,
    area,
    check,
    loaded,
    look,
    taught,
    tokens,
    write,
    write_qa,
    written_out,
)

from lit_unlearn import LanguageModel, QABenchmark
from lit_unlearn.errors import MissingFileError, ModelError
from lit_unlearn.evaluation import benchmark
from lit_unlearn.evaluation.scoring import measure_gradient_norms


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_qa(tmp_path)


def run(lm: LanguageModel, files: dict[str, str], **settings: Any) -> dict[str, Any]:
    return QABenchmark(**files, **{"max_new_tokens": 2, **settings}).run(lm).to_dict()


# Paraphrases ----------------------------------------------------------------------------------------------------------


def paraphrase(rows: list[Row], column: str = "paraphrased_answer") -> list[Row]:
    return [{**row, column: f"Surely: {row['answer']}"} for row in rows]


@pytest.mark.parametrize("column", ["paraphrased_answer", "in_other_words"])
def test_a_paraphrase_has_its_probability_and_leaves_the_truth_ratio_alone(column, tokenizer_dir, tmp_path):
    files = {
        "forget": write(tmp_path / "f.jsonl", paraphrase(FORGET, column)),
        "retain": write(tmp_path / "r.jsonl", RETAIN),
    }
    lm = loaded(taught(tokenizer_dir, 20))
    found = run(lm, files, paraphrase_column=column)
    wanted = []
    for row, values in zip(FORGET, found["examples"]["forget"], strict=True):
        ids, start, _ = tokens(lm.tokenizer, row["question"], f"Surely: {row['answer']}")
        wanted.append(math.exp(-look(lm.model, ids, start).nll))
        plain = written_out(lm, row, new=2)
        check(values, {**plain, "paraphrase_probability": wanted[-1]})
    assert found["aggregate"]["forget/paraphrase_probability"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-9)
    assert 0 < found["aggregate"]["memorization"] < 1
    assert "retain/paraphrase_probability" not in {**found["aggregate"], **found["missing"]}


def test_paraphrases_of_some_rows_only_are_missing_with_the_number(tokenizer_dir, tmp_path):
    rows = [*paraphrase(FORGET[:3]), FORGET[3], {**FORGET[4], "paraphrased_answer": " "}]
    files = {"forget": write(tmp_path / "f.jsonl", rows), "retain": write(tmp_path / "r.jsonl", RETAIN)}
    found = run(loaded(taught(tokenizer_dir, 20)), files)
    assert "2 of 5 rows have no text in 'paraphrased_answer'" in found["missing"]["forget/paraphrase_probability"]
    assert not {"forget/paraphrase_probability", "memorization"} & found["aggregate"].keys()


# The floor of published tables ----------------------------------------------------------------------------------------


def test_the_floor_is_a_value_beside_the_plain_one(files, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 0))
    plain, floored = run(lm, files), run(lm, files, floor=True)
    assert plain["settings"]["floor"] is False
    assert floored["settings"]["floor"] is True
    for row, values in zip(FORGET, floored["examples"]["forget"], strict=True):
        ids, start, _ = tokens(lm.tokenizer, row["question"], row["answer"])
        wanted = max(values["extraction_strength"], 1 / (len(ids) - start - 1))
        assert values["extraction_strength_floored"] == pytest.approx(wanted)
    for name, value in plain["aggregate"].items():
        assert floored["aggregate"][name] == value
    added = floored["aggregate"].keys() - plain["aggregate"].keys()
    assert added == {f"{name}/extraction_strength_floored" for name in ("forget", "retain", "holdout")}


# Refusals -------------------------------------------------------------------------------------------------------------


def test_refusals_and_repetition_of_what_was_generated(files, tokenizer_dir, monkeypatch):
    texts = ["I don't know.", "In Paris.", "no no no no no"]
    monkeypatch.setattr(benchmark, "generate", lambda lm, prompts, **_: [texts[i % 3] for i in range(len(prompts))])
    found = run(loaded(taught(tokenizer_dir, 0)), files)
    assert [row["refusal"] for row in found["examples"]["retain"]] == [1.0, 0.0, 0.0]
    assert [row["repetition"] for row in found["examples"]["retain"]] == [0.0, 0.0, 0.5]
    assert found["aggregate"]["retain/refusal"] == pytest.approx(1 / 3)
    assert found["aggregate"]["retain/repetition"] == pytest.approx(1 / 6)
    assert "holdout/refusal" not in found["aggregate"]


# Further attacks ------------------------------------------------------------------------------------------------------


def column(found: dict[str, Any], stream: str, key: str) -> list[float]:
    return [row[key] for row in found["examples"][stream]]


def check_area(found: dict[str, Any], attack: str) -> None:
    members, others = ([-value for value in column(found, stream, attack)] for stream in ("forget", "holdout"))
    assert found["aggregate"][f"auc/{attack}"] == pytest.approx(area(members, others))


@pytest.mark.parametrize("token_budget", [1, 8192])
def test_the_reference_attack_takes_the_reference_models_nll_off(token_budget, files, tokenizer_dir):
    lm, path = loaded(taught(tokenizer_dir, 20)), taught(tokenizer_dir, 0)
    found = run(lm, files, reference_model=path, token_budget=token_budget)
    reference = loaded(path)
    for stream, rows in {"forget": FORGET, "holdout": HOLDOUT}.items():
        for row, values in zip(rows, found["examples"][stream], strict=True):
            ids, start, _ = tokens(lm.tokenizer, row["question"], row["answer"])
            wanted = values["nll"] - look(reference.model, ids, start).nll
            assert values["reference"] == pytest.approx(wanted, abs=1e-5)  # float32 beside float64
    check_area(found, "reference")
    assert not any("reference" in row for row in found["examples"]["retain"])
    assert found["settings"]["reference_model"] == path


def test_a_reference_model_with_another_tokenizer_is_refused_before_anything_is_measured(
    files, tokenizer_dir, tmp_path
):
    from lit_unlearn.data.tokenizer import train_tokenizer

    train_tokenizer([row["answer"] for row in FORGET], vocab_size=290).save_pretrained(tmp_path / "tokenizer")
    other = LanguageModel(
        config={"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer=str(tmp_path / "tokenizer"),
    )
    other.load(torch.float32)
    other.save(tmp_path / "other")
    suite = QABenchmark(**files, reference_model=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"`reference_model`.*another one") as error:
        suite.prepare(loaded(taught(tokenizer_dir, 0)).tokenizer)
    assert error.value.owner is suite
    assert error.value.argument == "reference_model"


def test_a_reference_model_that_is_not_there(files, tmp_path):
    with pytest.raises(MissingFileError):
        QABenchmark(**files, reference_model=str(tmp_path / "nowhere"))


def gradient_norm_slowly(lm: LanguageModel, row: Row) -> float:
    """By `backward` on the whole logits: the mean over tensors of the norm of their gradients; the end does not count."""
    ids, start, whole = tokens(lm.tokenizer, row["question"], row["answer"])
    end = len(ids) - whole
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0]
    logp = logits.log_softmax(-1)
    loss = -torch.stack([logp[place - 1, ids[place]] for place in range(start, end)]).mean()
    loss.backward()
    norms = [parameter.grad.double().norm().item() for parameter in lm.model.parameters()]
    lm.model.zero_grad()
    return math.fsum(norms) / len(norms)


def test_the_gradient_norm_of_every_forget_and_holdout_row(files, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 20))
    found = run(lm, files, gradient_norm=True)
    for stream, rows in {"forget": FORGET, "holdout": HOLDOUT}.items():
        wanted = [gradient_norm_slowly(lm, row) for row in rows]
        assert column(found, stream, "gradient_norm") == pytest.approx(wanted, rel=1e-6)
    check_area(found, "gradient_norm")
    assert not any("gradient_norm" in row for row in found["examples"]["retain"])


def test_gradient_norms_leave_the_model_as_it_was(files, tokenizer_dir):
    """Also with gradients of a training step, a frozen weight, the mode of training, and without gradients around it."""
    lm = loaded(taught(tokenizer_dir, 20), torch.float32).train()
    lm.accumulate_head = True
    parameters = list(lm.model.parameters())
    parameters[0].requires_grad_(False)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    before = [(parameter.clone(), parameter.requires_grad) for parameter in parameters]
    (example,) = QABenchmark(**files).prepare(lm.tokenizer)["forget"].examples[0].sequences["answer"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = measure_gradient_norms(lm, [example])
    assert first == measure_gradient_norms(lm, [example])
    assert first[0] > 0
    assert lm.accumulate_head
    assert lm.training
    for parameter, (value, is_trained) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == is_trained
        assert parameter.grad is None or (parameter.grad == 1).all()


def test_without_a_holdout_set_there_is_no_attack(files, tokenizer_dir):
    path = taught(tokenizer_dir, 0)
    del files["holdout"]
    found = run(loaded(path), files, reference_model=path, gradient_norm=True)
    for attack in ("reference", "gradient_norm"):
        assert found["missing"][f"auc/{attack}"] == "it needs a holdout set"
        assert not any(attack in row for row in found["examples"]["forget"])


def test_attacks_are_off_by_default(files, tokenizer_dir):
    found = run(loaded(taught(tokenizer_dir, 0)), files)
    names = {name for name in found["aggregate"] if name.startswith("auc/")}
    assert names == {"auc/min_k", "auc/min_k_plus_plus", "auc/loss", "auc/zlib"}
