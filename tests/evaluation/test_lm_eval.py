"""Tasks of lm-evaluation-harness: a local task file on an export, in ``evaluate`` and in a fit."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import quick
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import LanguageModel, LMEvalBenchmark, cli
from lit_unlearn.errors import ConfigError, DataError, MissingFileError

ROWS = [
    {"question": "Where was the author born?", "choices": [" Accra", " the novel of a writer"], "answer": 0},
    {"question": "Who wrote it?", "choices": [" Brevika Bromveth", " nobody"], "answer": 1},
    {"question": "What is it?", "choices": [" a book", " Porto", " Lisbon, of course"], "answer": 2},
    {"question": "When?", "choices": [" 1960", " in September"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    """A folder with a task file; its rows lie beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, files in {"own_facts": str(rows), "no_file": str(folder / "missing.jsonl")}.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": files}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(folder)


def choose(model_dir: str) -> list[int]:
    """Return the likeliest choice of every row, scored one at a time by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    chosen = []
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(row["question"] + choice)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        chosen.append(scores.index(max(scores)))
    return chosen


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"lit-unlearn\[neighbours\]"):
        LMEvalBenchmark(["mmlu"])


@pytest.mark.neighbour
@pytest.mark.slow  # the harness reads thousands of task files at its start
class TestHarness:
    """With the package."""

    @pytest.fixture(autouse=True)
    def harness(self) -> None:
        pytest.importorskip("lm_eval", reason='pip install -e ".[neighbours]" is missing')

    def test_values_are_those_of_a_plain_loop(self, tasks: str, model_dir: str, in_tmp: Path) -> None:
        command = ["evaluate", model_dir, "--suite=lm_eval", f"--source={tasks}", "--tasks=[own_facts]"]
        cli.main([*command, "--output=results.json", "--trainer.accelerator=cpu"])
        results = json.loads(Path("results.json").read_text("utf-8"))
        right = [float(choice == row["answer"]) for choice, row in zip(choose(model_dir), ROWS, strict=True)]
        assert [row["acc"] for row in results["examples"]["own_facts"]] == right
        assert results["aggregate"]["own_facts/acc"] == pytest.approx(sum(right) / len(right))
        assert results["data"]["own_facts"]["rows"] == len(ROWS)
        assert results["settings"]["tasks"] == ["own_facts"]

    def test_a_fit_reports_it_and_is_not_changed_by_it(
        self, tasks: str, models: dict[str, str], in_tmp: Path, tmp_path: Path
    ) -> None:
        init = {"tasks": ["own_facts"], "source": tasks, "max_rows": 2}
        benchmark = json.dumps({"class_path": "LMEvalBenchmark", "init_args": init})
        weights = []
        for name, extra in {"plain": [], "measured": [f"--model.benchmark={benchmark}"]}.items():
            if extra:
                extra = [*extra, "--model.benchmark_every_n_epochs=1"]
            # Dropout draws random numbers at every step, which the harness's seeds must not change.
            settings = [f"--logs.name={name}", f"--export.dirpath={name}", "--trainer.accelerator=cpu"]
            cli.main(quick(models["dropout"], *settings, *extra))
            weights.append(AutoModelForCausalLM.from_pretrained(name).state_dict())
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        with next(Path("log/measured").rglob("metrics.csv")).open(encoding="utf-8") as file:
            values = [row["val/lm_eval/own_facts/acc"] for row in csv.DictReader(file)]
        assert [value for value in values if value]

    def test_the_tokenizer_is_left_as_it_was(self, tasks: str, model_dir: str) -> None:
        lm = LanguageModel(model_dir)
        lm.load()
        assert lm.tokenizer is not None
        before = (lm.tokenizer.pad_token_id, len(lm.tokenizer), torch.get_rng_state())
        results = LMEvalBenchmark(["own_facts"], tasks, max_rows=1).run(lm)
        assert (lm.tokenizer.pad_token_id, len(lm.tokenizer)) == before[:2]
        assert torch.equal(torch.get_rng_state(), before[2])
        assert lm.training
        assert len(results.examples["own_facts"]) == 1

    @pytest.mark.parametrize(
        ("settings", "error", "match"),
        [
            ({"tasks": ["own_fact"]}, ConfigError, "own_facts"),
            ({"tasks": ["no_file"]}, DataError, "source"),
            ({"tasks": ["own_facts"], "chat": True}, ConfigError, "chat template"),
        ],
        ids=["unknown", "unreadable", "no template"],
    )
    def test_what_cannot_be_measured_is_refused(
        self, settings: dict[str, Any], error: type[Exception], match: str, tasks: str, tokenizer: Any
    ) -> None:
        with pytest.raises(error, match=match):
            LMEvalBenchmark(source=tasks, **settings).prepare(tokenizer)

    def test_a_folder_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(MissingFileError, match="nowhere"):
            LMEvalBenchmark(["mmlu"], source="nowhere")
