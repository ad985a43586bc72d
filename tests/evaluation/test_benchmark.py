"""What every benchmark shares: the results, going on after an interruption, and which rows go where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from evaluation.rows import FORGET, HOLDOUT, RETAIN, loaded, look, say, taught, tokens, write, write_qa

from lit_unlearn import Benchmark, LanguageModel, LitEvaluate, QABenchmark
from lit_unlearn.data.encoding import encode
from lit_unlearn.data.example import prompt_of
from lit_unlearn.evaluation.benchmark import Aggregate
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.partial_files import remove_partials, write_partial
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.io import read_json

ROWS = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_qa(tmp_path)


@pytest.fixture
def evaluate(make_trainer: Callable[..., L.Trainer], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs `LitEvaluate` with a results file, and reads it."""

    def run(model: str, files: dict[str, str], **settings: Any) -> dict[str, Any]:
        suite = QABenchmark(**files, **{"max_new_tokens": 4, **settings})
        module = LitEvaluate(LanguageModel(model), suite, str(tmp_path / "out" / "results.json"))
        make_trainer(precision="64-true").test(module, verbose=False)
        return read_json(tmp_path / "out" / "results.json")

    return run


class PowerCut(Exception):
    pass


class Measured:
    """Notes which rows are measured; the power fails after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[str] = []
        self.stop_after: int | None = None
        own = QABenchmark.measure

        def measure(suite: QABenchmark, stream: str, *others: Any) -> Any:
            if self.stop_after == len(self.rows):
                raise PowerCut
            self.rows.append(stream)
            return own(suite, stream, *others)

        monkeypatch.setattr(QABenchmark, "measure", measure)

    def start(self, stop_after: int | None = None) -> None:
        self.rows, self.stop_after = [], stop_after


# Results --------------------------------------------------------------------------------------------------------------


def test_the_results_file(files, tokenizer_dir, evaluate, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    model = taught(tokenizer_dir, 20)
    found = evaluate(model, files, ratio="arithmetic", k=0.3, token_budget=500)
    assert found.keys() == {
        "suite",
        "settings",
        "model",
        "data",
        "versions",
        "seed",
        "retain_results",
        "aggregate",
        "missing",
        "examples",
    }
    assert (found["suite"], found["seed"], found["retain_results"]) == ("qa", 42, None)
    own = {"token_budget": 500, "max_new_tokens": 4, "ratio": "arithmetic", "k": 0.3, "fluency_model": None}
    assert own.items() <= found["settings"].items()
    assert found["model"] == {"name": model, "weights": fingerprint(loaded(model).model)[:16]}
    assert {"lit_unlearn", "torch", "transformers", "rouge_score"} <= found["versions"].keys()
    for name, rows in ROWS.items():
        data = found["data"][name]
        assert (data["source"], data["rows"]) == (files[name], len(rows))
        assert all(re.fullmatch(r"[0-9a-f]{16}", data[key]) for key in ("texts", "tokens"))
        assert [row["question"] for row in found["examples"][name]] == [row["question"] for row in rows]
    assert {type(value) for value in found["aggregate"].values()} == {float}
    assert {type(value) for value in found["missing"].values()} == {str}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]  # and no partial files
    printed = capsys.readouterr().out
    assert f"{found['aggregate']['forget/probability']:.4g}" in printed
    assert model in printed


def test_results_are_plain_and_the_file_holds_just_them(files, tokenizer_dir, evaluate):
    model = taught(tokenizer_dir, 20)
    lm = loaded(model)
    found = QABenchmark(**files, max_new_tokens=4).run(lm).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert {**evaluate(model, files), "seed": found["seed"]} == found
    monkey = loaded(model)
    with torch.no_grad():
        monkey.model.lm_head.weight[0, 0] += 1e-3
    assert QABenchmark(**files, max_new_tokens=4).run(monkey).to_dict()["model"]["weights"] != found["model"]["weights"]


def test_values_are_logged_by_name(files, tokenizer_dir, make_trainer, tmp_path):
    suite = QABenchmark(**files, max_new_tokens=4)
    (logged,) = make_trainer().test(LitEvaluate(LanguageModel(taught(tokenizer_dir, 20)), suite), verbose=False)
    found = read_json(tmp_path / "runs/version_0/qa.json")  # where there is no logger and no `results`
    assert logged == pytest.approx({f"test/qa/{name}": value for name, value in found["aggregate"].items()}, rel=1e-6)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(files, tokenizer_dir, evaluate, monkeypatch, tmp_path):
    first = evaluate(taught(tokenizer_dir, 20), files)
    own = json.dump

    def cut(content: Any, file: Any, **settings: Any) -> None:
        if "aggregate" in content:
            file.write('{"suite": "qa", "aggr')
            raise PowerCut
        own(content, file, **settings)

    monkeypatch.setattr(json, "dump", cut)
    with pytest.raises(PowerCut):
        evaluate(taught(tokenizer_dir, 30), files)
    assert read_json(tmp_path / "out" / "results.json") == first
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.partial"}
    measured = Measured(monkeypatch)
    monkeypatch.setattr(json, "dump", own)
    assert evaluate(taught(tokenizer_dir, 30), files) != first
    assert measured.rows == []  # everything had been kept


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "kept"), [(3, []), (5, ["forget"]), (6, ["forget"]), (8, ["forget", "retain"])], ids=str
)
def test_an_interrupted_run_goes_on(after, kept, files, tokenizer_dir, evaluate, monkeypatch, tmp_path):
    model, measured = taught(tokenizer_dir, 20), Measured(monkeypatch)
    whole = evaluate(model, files)
    assert len(measured.rows) == sum(map(len, ROWS.values()))
    (tmp_path / "out" / "results.json").unlink()
    measured.start(stop_after=after)
    with pytest.raises(PowerCut):
        evaluate(model, files)
    assert not (tmp_path / "out" / "results.json").exists()
    partial = tmp_path / "out" / "results.partial"
    assert sorted(path.name for path in partial.glob("*")) == [f"{name}.json" for name in kept]
    measured.start()
    assert evaluate(model, files) == whole
    assert measured.rows == [name for name, rows in ROWS.items() if name not in kept for _ in rows]
    assert not partial.exists()


def interrupt(model: str, files: dict[str, str], evaluate: Any, measured: Measured, **settings: Any) -> None:
    measured.start(stop_after=6)
    with pytest.raises(PowerCut):
        evaluate(model, files, **settings)
    measured.start()


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0.2},
        {"ratio": "arithmetic"},
        {"max_new_tokens": 5},
        {"max_length": 50},
        {"template": "{question} {answer}"},
    ],
)
def test_partial_files_of_other_settings_do_not_count(settings, files, tokenizer_dir, evaluate, monkeypatch):
    model, measured = taught(tokenizer_dir, 20), Measured(monkeypatch)
    whole = evaluate(model, files, **settings)
    interrupt(model, files, evaluate, measured)
    assert evaluate(model, files, **settings) == whole
    assert len(measured.rows) == sum(map(len, ROWS.values()))


@pytest.mark.parametrize("what", ["weights", "forget", "holdout", "versions", "half a file", "empty", "a list"])
def test_partial_files_of_other_weights_or_rows_do_not_count(
    what, files, tokenizer_dir, evaluate, monkeypatch, tmp_path
):
    model, measured = taught(tokenizer_dir, 20), Measured(monkeypatch)
    interrupt(model, files, evaluate, measured)
    partial = tmp_path / "out" / "results.partial" / "forget.json"
    if what == "weights":
        model = taught(tokenizer_dir, 30)
    elif what == "versions":
        monkeypatch.setattr("lit_unlearn.evaluation.benchmark.package_versions", lambda: {"torch": "0.0"})
    elif what == "half a file":
        partial.write_text(partial.read_text(encoding="utf-8")[:100], encoding="utf-8")
    elif what in ("empty", "a list"):
        partial.write_text("{}" if what == "empty" else "[]", encoding="utf-8")
    else:
        changed = [{**ROWS[what][0], "answer": "Nobody."}, *ROWS[what][1:]]
        files[what] = write(tmp_path / "changed.jsonl", changed)
    found = evaluate(model, files)
    assert len(measured.rows) == sum(map(len, ROWS.values()))
    assert found["examples"] == QABenchmark(**files, max_new_tokens=4).run(loaded(model)).to_dict()["examples"]


# Rows of a suite of one's own -----------------------------------------------------------------------------------------


class Mixed(Benchmark):
    """Rows of several kinds, some without anything to score, some without anything to say."""

    name: ClassVar[str] = "mixed"

    def load(self, tokenizer: Any) -> dict[str, BenchmarkStream]:
        first, second = (encode(row["question"], row["answer"], tokenizer) for row in FORGET[:2])
        examples = [
            BenchmarkExample({"n": "0"}, {"short": [second], "long": [first, second, second]}, prompt_of(first)),
            BenchmarkExample({"n": "1"}, {}, prompt_of(second)),
            BenchmarkExample({"n": "2"}, {"short": [first], "none": []}),
            BenchmarkExample({"n": "3"}, {"long": [second]}, prompt_of(first)),
        ]
        silent = [BenchmarkExample({"n": "4"}, {"short": [first]})]
        return {
            "forget": BenchmarkStream(examples, "here", max_new_tokens=6, stop=("is",)),
            "silent": BenchmarkStream(silent, "there"),
        }

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Any:
        return {
            **example.texts,
            "scored": {kind: [one.nll for one in ones] for kind, ones in scored.items()},
            "said": generated,
        }

    def aggregate(self, examples: Mapping[str, Sequence[Any]], retain: Any) -> Any:
        return Aggregate({"rows": sum(map(len, examples.values()))}, {"lost": "it was never there"})


@pytest.mark.parametrize("token_budget", [1, 70, 8192])
def test_every_row_gets_its_own_scores_and_answer(token_budget, tokenizer_dir):
    lm = loaded(taught(tokenizer_dir, 20))
    parts = [tokens(lm.tokenizer, row["question"], row["answer"]) for row in FORGET[:2]]
    a, b = (look(lm.model, part.ids, part.start).nll for part in parts)
    first, second = (say(lm, part.ids[: part.start], 6).split("is")[0] for part in parts)
    found = Mixed(token_budget=token_budget).run(lm).to_dict()
    wanted = [
        ({"short": [b], "long": [a, b, b]}, first),
        ({}, second),
        ({"short": [a]}, None),
        ({"long": [b]}, first),
    ]
    for number, (row, (scored, said)) in enumerate(zip(found["examples"]["forget"], wanted, strict=True)):
        assert (row["n"], row["said"]) == (str(number), said)
        assert {kind: pytest.approx(ones) for kind, ones in scored.items()} == row["scored"]
    assert found["examples"]["silent"] == [{"n": "4", "scored": {"short": [pytest.approx(a)]}, "said": None}]
    assert first != second
    assert found["aggregate"] == {"rows": 5}
    assert found["missing"] == {"lost": "it was never there"}
    assert found["settings"] == {"token_budget": token_budget}
    assert lm.training is False


def test_only_partial_files_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "audit.partial"
    write_partial(folder / "model" / "forget.json", "key", [{"generated": "text of a row"}])
    (folder / "model" / "retain.json").write_text('{"key": "k", "exam', encoding="utf-8")  # a crash
    remove_partials(folder)
    assert not folder.exists()
    remove_partials(folder)

    write_partial(folder / "model" / "forget.json", "key", [])
    own = {
        folder / "notes.txt": "mine",
        folder / "forget.json": '{"mine": 1}',
        folder / "lines.json": '{"mine": 1}\n{}',
    }
    for file, text in own.items():
        file.write_text(text, encoding="utf-8")
    remove_partials(folder)
    assert {path: path.read_text("utf-8") for path in folder.iterdir()} == own
