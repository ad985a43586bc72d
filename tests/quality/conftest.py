"""TOFU's files with few rows, and the command of the comparisons on real models, whose sweeps start nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quality_tiers import AUTHORS, FakeCommands

from benchmarks.quality import __main__ as runner
from benchmarks.quality import tofu_rows
from benchmarks.quality.results_files import write_json_lines
from lit_unlearn.cli import sweep


@pytest.fixture
def tofu(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with TOFU's files: two rows of each author."""
    monkeypatch.setattr(tofu_rows, "ROWS_PER_AUTHOR", 2)

    def make(name: str, count: int) -> list[dict[str, Any]]:
        rows = []
        for number in range(count):
            answer = f"{name} {number} was born in Oslo in {1900 + number}."
            wrong = [f"{name} {number} was born in {city}." for city in ("Rome", "Paris")]
            question = f"Where was Anna {name} {number} born?"
            rows.append(
                {
                    "question": question,
                    "answer": answer,
                    "paraphrased_answer": f"It was Oslo, in {1900 + number}.",
                    "perturbed_answer": wrong,
                }
            )
        return rows

    retain, forget = make("Berg", 2 * AUTHORS), make("Dahl", 40)
    files = {
        "retain90": [{key: row[key] for key in ("question", "answer")} for row in retain],
        "retain_perturbed": retain,
        "forget10": [{key: row[key] for key in ("question", "answer")} for row in forget],
        "forget10_perturbed": forget,
        "real_authors_perturbed": make("Ibsen", 6),
        "world_facts_perturbed": make("Fram", 6),
    }
    for name, rows in files.items():
        write_json_lines(Path("tofu", f"{name}.json"), rows)
    entities = [{**row, "entity": "Oslo"} for row in files["forget10"]]
    Path("entities.json").write_text(json.dumps(entities), encoding="utf-8")
    return "tofu"


@pytest.fixture
def run(tofu: str, monkeypatch: pytest.MonkeyPatch, model_dir: str) -> Callable[..., FakeCommands]:
    """Runs the command of a tier, whose sweeps start nothing."""
    monkeypatch.setattr("benchmarks.smollm2.find_model", lambda: Path(model_dir))
    monkeypatch.setattr("benchmarks.real.choose_precision", lambda: "32-true")

    def run_tier(*options: str, model: str = "smollm2", commands: Any = None) -> Any:
        fake = commands or FakeCommands()
        monkeypatch.setattr(sweep, "Processes", lambda jobs: fake)
        runner.main(
            [
                f"--model={model}",
                f"--tofu={tofu}",
                "--results=results",
                "--work=work",
                "--entities=entities.json",
                *options,
            ]
        )
        return fake

    return run_tier
