"""Stand-ins for the comparisons on real models: their tiers, TOFU's files with few rows, and what the commands of a sweep write.

Test modules make fixtures of `write_tofu` and `make_runner`: a second ``conftest.py`` would hide the one that tests import from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as runner
from benchmarks.quality import smollm2, tier_tables, tofu_1b, tofu_rows
from benchmarks.quality.results_files import write_json_lines
from benchmarks.quality.smollm2_sweeps import SmolLM2
from benchmarks.quality.tofu_1b import TOFU1B
from lit_unlearn.cli import sweep
from lit_unlearn.utils.io import write_json

Tier = SmolLM2 | TOFU1B

AUTHORS = 14


def make_smollm2(size: str = "10", methods: Sequence[str] = tuple(smollm2.METHODS)) -> SmolLM2:
    grid = smollm2.GRIDS[size]
    return SmolLM2(
        size,
        Path("work"),
        Path("results"),
        grid.seeds,
        grid.selection.sizes,
        tuple(methods),
        "32-true",
        measures_depth=True,
    )


def make_tofu_1b() -> TOFU1B:
    return TOFU1B(Path("work"), Path("results"), (0,), tuple(tofu_1b.METHODS), None, measures_depth=True)


TIERS: dict[str, Callable[[], Tier]] = {
    **{f"smollm2-{size}": lambda size=size: make_smollm2(size) for size in smollm2.GRIDS},  # type: ignore[misc]
    "tofu-1b": make_tofu_1b,
}


class FakeCommands:
    """Stands for the processes of a sweep, and writes what they would have measured.

    Args:
        fails: Part of the commands that fail.
    """

    def __init__(self, fails: str = "nothing fails") -> None:
        self.fails = fails
        self.ran: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path, held: int) -> int:
        self.ran.append(" ".join(arguments))
        if self.fails in self.ran[-1]:
            log.write_text("lit-unlearn: error: no memory\n", encoding="utf-8")
            return 1
        options = dict(word.partition("=")[::2] for word in arguments)
        folder = log.parent
        if arguments[0] == "fit":
            damage = {"measure": "kl", "stream": "general", "rows": 8, "limit": 0.01, "value": 0.01, "reached": True}
            is_matched = "--config=method/matched/kl.yaml" in arguments
            report = make_report(damage={**damage, "step": 3} if is_matched else None)
            write_json(folder / "report.json", report)
            (folder / "model").mkdir(exist_ok=True)
        elif arguments[0] == "evaluate":
            # The higher learning rate forgets better.
            quality = 0.5 if "lr=0.0002" in str(folder) else 0.01
            write_json(Path(options["--output"]), make_tofu_results(forget_quality=quality))
        elif arguments[0] == "attack":
            point = {"effort": 20, "rows": 10, "probability": 0.2, "rougeL_recall": 0.3}
            attacks: dict[str, Any] = {"4 bits": {"model": {"not_tested": "no memory"}}}
            for label in (*tier_tables.RELEARNING, "sampled"):
                attacks[label] = {"model": {"points": [{}, point]}}
            write_json(Path(options["--output"], "attack.json"), {"attacks": attacks})
        elif arguments[0] == "depth":
            write_json(Path(options["--output"]), {"aggregate": {"unlearning_depth": 0.9}, "missing": {}})
        return 0

    def stop(self) -> None:
        pass


def make_report(nll: float = 0.1, **values: Any) -> dict[str, Any]:
    constraints = {"nll": {"value": nll, "epsilon": 0.2}}
    report = {"verdict": None, "constraints": constraints, "after": {}, "seconds": 60.0, "peak_memory_mib": 900.0}
    return {**report, "example": {"tokens": ["text"]}, **values}


def make_tofu_results(**values: float) -> dict[str, Any]:
    aggregate = {
        "memorization": 0.6,
        "model_utility": 0.5,
        "forget/fluency_nll": 1.0,
        "forget/repetition": 0.0,
        "forget/empty": 0.0,
    }
    aggregate |= {f"attack_score/{name}": 0.8 for name in ("min_k", "min_k_plus_plus", "loss", "zlib")}
    aggregate |= {name.replace("__", "/"): value for name, value in values.items()}
    row = {"truth_ratio": 0.7, "fluency_nll": 1.0, "repetition": 0.0, "generated": "In Rome.", "question": "Where?"}
    return {"aggregate": aggregate, "missing": {}, "examples": {"forget": [row] * 4}}


def write_tofu(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> str:
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


def make_runner(tofu: str, monkeypatch: pytest.MonkeyPatch, model_dir: str) -> Callable[..., FakeCommands]:
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
