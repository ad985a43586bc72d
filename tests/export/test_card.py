"""The model card, from records written out here."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lit_unlearn.export.card import card

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
    found = ModelCard(card(RECORD)).data.to_dict()
    assert found == {
        "base_model": "some/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "lit-unlearn"],
    }
    assert "base_model" not in ModelCard(card(changed("model.commit", None))).data.to_dict()  # a local path
    adapter = {"adapter/adapter_model.safetensors": "ab" * 32}
    assert ModelCard(card(changed("files", adapter))).data.library_name == "peft"


@pytest.mark.parametrize(
    "said",
    [
        "5 rows were unlearned from `some/model`. The probability of their answers went from 0.9 to 0.01. Every bound",
        "| commit on the hub | c0ffee |",
        f"| forget (deleted) | `a\\|b.jsonl`, first 5 rows | 5 | 50 | `{'cd' * 32}` | `{'ef' * 32}` |",
        f"| retain (kept) | `org/set`, big, train | 70 | 700 |  | `{'01' * 32}` |",
        "2 × `NPO(beta=0.1)`, f(x). A. 2024.",
        "`AdamW(lr=0.001)`, 32-true, DDPStrategy on 2 processes; seed 0.",
        "100 steps were taken; this is the model after step 40.",
        "- **nll**: `NLL()`, token mean of −log p on the `retain` rows ≤ 0.3 = 1.5 × 0.2, the value of the model before; "
        "λ by `DualAscent(lr=5.0, init=100.0)`, now 90.5.",
        "constraint nll: 0.25 ≤ epsilon 0.3 (feasible), slack 0.05; λ 100 → 90.5",
        "It is no proof that nothing can be\nrecovered",
        "StressBenchmark",
        f"| `model.safetensors` | `{'45' * 32}` |",
        "lit-unlearn validate --config run.yaml --model.lm.model=DIR \\\n  --model.constraints.nll.epsilon=0.3\n",
        "| python | 3.11.7 |",
    ],
)
def test_a_card_says(said: str) -> None:
    assert said in card(RECORD)


def test_the_configuration_is_yaml_without_what_is_not_set() -> None:
    text = card(RECORD).rpartition("```yaml\n")[2].removesuffix("```\n")
    assert yaml.safe_load(text) == {"model": {"init_args": {"lm": {"model": "some/model"}}}, "seed_everything": 0}


def test_a_broken_bound_is_said_at_the_top_and_in_the_table() -> None:
    text = card(changed("constraints.nll.slack", -0.05))
    assert "**A bound on what that may cost IS VIOLATED: nll.**" in text.partition("## ")[0]
    assert "(violated)" in text
    assert "holds" not in text


def test_a_model_that_was_not_measured_claims_nothing() -> None:
    record = {**changed("constraints.nll", {**RECORD["constraints"]["nll"], "value": None, "slack": None}), "after": {}}
    text = card({**record, "step": 100})
    assert "**This is the model of step 100, from a checkpoint. The run keeps that of step 40" in text
    assert "holds" not in text
    assert "0.01" not in text.partition("## ")[0]
    assert "StressBenchmark" in text


def test_an_adapter_alone_is_called_so() -> None:
    record = {**changed("model.adapter", {"peft_type": "LORA", "r": 4}), "files": {"adapter/a.safetensors": "67" * 32}}
    text = card(record)
    assert "This directory holds only the adapter, in `adapter`." in text
    assert "| adapter | `peft_type=LORA, r=4` |" in text


def test_a_record_of_a_checkpoint_that_knows_little() -> None:
    known = ("kind", "created", "model", "step", "kept_step", "steps", "before", "after", "constraints", "files")
    text = card({key: RECORD[key] for key in known})
    assert "This record does not know the rows" in text
    assert "(feasible)" in text
    for title in ("Under which bound", "Benchmarks", "Versions", "Configuration"):
        assert f"## {title}" in card({**RECORD, "benchmarks": [BENCHMARK]})
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
    text = card({**RECORD, "benchmarks": [BENCHMARK]})
    assert "stress (forget: 40 rows), measured on `runs/out`:" in text
    assert "| relearned/forget/probability | 0.5 |" in text
    assert "forget_quality is missing: there are no retain-only results" in text
    assert "89" * 32 in text
