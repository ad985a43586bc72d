"""The model card, from records written out here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lit_unlearn.export.card import render_card

RECORD: dict[str, Any] = {
    "kind": "unlearned",
    "created": "2026-01-02T03:04:05+00:00",
    "versions": {"lit_unlearn": "0.1.0", "python": "3.11.7"},
    "model": {
        "name": "some/model",
        "architecture": "LlamaForCausalLM",
        "revision": "main",
        "commit": "c0ffee",
        "weights": {"model.safetensors": "ab" * 32},
        "adapter": None,
        "teacher": {
            "name": "org/base",
            "revision": "v1",
            "commit": "beefed",
            "weights": {"model.safetensors": "67" * 32},
        },
    },
    "data": {
        "train_on": "pairs",
        "sets": {
            "forget": {
                "source": {"path": "a|b.jsonl", "max_rows": 5, "sha256": "cd" * 32},
                "rows": 5,
                "supervised_tokens": 50,
                "sha256": "ef" * 32,
            },
            "retain": {
                "source": {"path": "org/set", "name": "big", "split": "train", "max_rows": None},
                "rows": 70,
                "supervised_tokens": 700,
                "sha256": "01" * 32,
            },
        },
    },
    "method": {"objective": "NPO", "settings": {"beta": 0.1}, "formula": "f(x)", "paper": "A. 2024", "weight": 2.0},
    "bounds": {
        "nll": {
            "objective": "NLL",
            "settings": {},
            "formula": "token mean of −log p",
            "stream": "retain",
            "relative": 0.5,
            "multiplier": {"class": "DualAscent", "lr": 5.0, "init": 100.0},
        }
    },
    "training": {
        "optimizer": "AdamW",
        "settings": {"lr": 0.001},
        "precision": "32-true",
        "strategy": "DDPStrategy",
        "processes": 2,
        "seed": 0,
    },
    "step": 40,
    "kept_step": 40,
    "steps": 100,
    "before": {"forget/probability": 0.9, "constraint/nll/value": 0.2},
    "after": {"forget/probability": 0.01, "constraint/nll/value": 0.25},
    "constraints": {
        "nll": {
            "value": 0.25,
            "slack": 0.05,
            "epsilon": 0.3,
            "reference": 0.2,
            "multiplier_before": 100.0,
            "multiplier_after": 90.5,
        }
    },
    "benchmarks": [],
    "config": {"model": {"init_args": {"lm": {"model": "some/model", "revision": None}}}, "seed_everything": 0},
    "files": {"config.json": "23" * 32, "model.safetensors": "45" * 32},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The record with another value at a place, ``a.b.c``."""
    first, _, rest = path.partition(".")

    def put(part: dict[str, Any], key: str, rest: str) -> dict[str, Any]:
        inner, _, further = rest.partition(".")
        return {**part, key: put(part[key], inner, further) if rest else value}

    return put(RECORD, first, rest)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    found = ModelCard(render_card(RECORD)).data.to_dict()
    assert found == {
        "base_model": "some/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "lit-unlearn"],
    }
    assert "base_model" not in ModelCard(render_card(changed("model.commit", None))).data.to_dict()  # a local path
    adapter = {"adapter/adapter_model.safetensors": "ab" * 32}
    assert ModelCard(render_card(changed("files", adapter))).data.library_name == "peft"


@pytest.mark.parametrize(
    "facts",
    [
        ["5 examples", "`some/model`", "0.9 to 0.01"],
        ["commit on the hub", "c0ffee"],
        ["teacher's commit on the hub", "beefed"],
        ["teacher's `model.safetensors`", f"`{'67' * 32}`"],
        ["forget (deleted)", "`a\\|b.jsonl`, first 5 rows", "| 5 | 50 |", f"`{'cd' * 32}` | `{'ef' * 32}`"],
        ["retain (retained)", "`org/set`, big, train", "| 70 | 700 |", f"`{'01' * 32}`"],
        ["2 × `NPO(beta=0.1)`", "f(x)", "A. 2024"],
        ["`AdamW(lr=0.001)`", "32-true", "DDPStrategy", "2 processes", "seed 0"],
        ["100 steps", "step 40"],
        ["**nll**: `NLL()`", "`retain`", "≤ epsilon 0.3 = 1.5 × 0.2", "`DualAscent(lr=5.0, init=100.0)`", "90.5"],
        ["constraint nll: 0.25 ≤ epsilon 0.3 (feasible)", "λ 100 → 90.5"],
        [f"`model.safetensors` | `{'45' * 32}`"],
        ["python | 3.11.7"],
    ],
)
def test_a_line_of_the_card_has(facts: list[str]) -> None:
    assert any(all(fact in line for fact in facts) for line in render_card(RECORD).splitlines())


def test_the_card_says_how_to_measure_again_and_what_it_does_not_prove() -> None:
    text = render_card(RECORD)
    assert "--config run.yaml --model.lm.model=DIR \\\n  --model.constraints.nll.epsilon=0.3\n" in text
    assert "StressBenchmark" in text


def test_the_configuration_is_yaml_without_what_is_not_set() -> None:
    text = render_card(RECORD).rpartition("```yaml\n")[2].removesuffix("```\n")
    assert yaml.safe_load(text) == {"model": {"init_args": {"lm": {"model": "some/model"}}}, "seed_everything": 0}


@pytest.mark.parametrize("slack", [-0.05, float("nan")])
def test_a_violation_is_at_the_top_and_in_the_table(slack: float) -> None:
    violated = {**RECORD["constraints"]["nll"], "value": 0.35, "slack": slack}
    summary, _, rest = render_card(changed("constraints.nll", violated)).partition("## ")
    assert "violated (nll: 0.35 > epsilon 0.3)" in summary
    assert "(violated)" in rest
    assert "feasible" not in rest


def test_a_model_that_was_not_measured_claims_nothing() -> None:
    record = {**changed("constraints.nll", {**RECORD["constraints"]["nll"], "value": None, "slack": None}), "after": {}}
    text = render_card({**record, "step": 100})
    summary = text.partition("## ")[0]
    assert re.search(r"\*\*.* step 100.* step 40\.\*\*", summary)
    assert not re.search("satisfied|violated|0.01", summary)
    assert "feasible" not in text
    assert "StressBenchmark" in text


def test_an_adapter_alone_is_called_so() -> None:
    record = {**changed("model.adapter", {"peft_type": "LORA", "r": 4}), "files": {"adapter/a.safetensors": "67" * 32}}
    text = render_card(record)
    assert "only the adapter" in text
    assert "| adapter | `peft_type=LORA, r=4` |" in text


@pytest.mark.parametrize("kind", ["fine-tuned", "taught"])  # as records of earlier versions call it
def test_a_fine_tuned_model_was_trained_and_nothing_deleted(kind: str) -> None:
    text = render_card({**RECORD, "kind": kind, "method": None, "bounds": {}, "constraints": {}})
    assert "fine-tuned" in text
    assert "forget (held out)" in text
    assert not re.search("deleted|unlearned(?!.json)|taught|StressBenchmark", text)


def test_a_record_of_a_checkpoint_that_knows_little() -> None:
    known = ("kind", "created", "model", "step", "kept_step", "steps", "before", "after", "constraints", "files")
    text = render_card({key: RECORD[key] for key in known})
    assert "The data is unknown" in text
    assert "(feasible)" in text
    for title in ("Constraints", "Benchmarks", "Versions", "Configuration"):
        assert f"## {title}" in render_card({**RECORD, "benchmarks": [BENCHMARK]})
        assert f"## {title}" not in text


BENCHMARK: dict[str, Any] = {
    "suite": "stress",
    "model": {"name": "runs/out"},
    "data": {"forget": {"rows": 40}},
    "aggregate": {"forget/probability": 0.25, "relearned/forget/probability": 0.5},
    "missing": {"forget_quality": "there are no retain-only results"},
    "sha256": "89" * 32,
}


def test_a_benchmark_is_a_table_with_what_is_missing() -> None:
    text = render_card({**RECORD, "benchmarks": [BENCHMARK]})
    assert "stress (forget: 40 rows)" in text
    assert "`runs/out`" in text
    assert "| relearned/forget/probability | 0.5 |" in text
    assert "forget_quality is missing: there are no retain-only results" in text
    assert "89" * 32 in text
