"""The leak benchmark: against samples scored one by one, interrupted, and on two processes.

``torchrun --nproc_per_node=2 test_leakage.py FOLDER`` is what the latter run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import instantiate
from evaluation.rows import FORGET, loaded, question, taught, write, write_qa, write_tofu
from rouge_score.rouge_scorer import RougeScorer

from lit_unlearn import (
    LanguageModel,
    LeakBenchmark,
    Prefix,
    QABenchmark,
    Relearn,
    Sampling,
    StressBenchmark,
    TOFUBenchmark,
)
from lit_unlearn.evaluation.leakage import double_up_to, starts_with_answer
from lit_unlearn.evaluation.results import Results
from lit_unlearn.metrics.leakage import (
    average_leak_bound,
    average_mean_bound,
    leak_upper_bound,
    worst_leak_bound,
    worst_mean_bound,
)
from lit_unlearn.models.generation import generate
from lit_unlearn.utils.distributed import rank_and_world_size
from lit_unlearn.utils.io import read_json, write_json

SAMPLING = Sampling(temperature=0.6, samples=5, seed=2)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "rows").mkdir()
    return write_qa(tmp_path / "rows")


@pytest.fixture
def lm(tokenizer_dir: str) -> LanguageModel:
    """Knows the rows, and says some of them at this temperature."""
    return loaded(taught(tokenizer_dir, 40), torch.float32)


def inner(files: dict[str, str], **settings: Any) -> QABenchmark:
    return QABenchmark(**files, **{"max_new_tokens": 8, **settings})


def draw(lm: LanguageModel, files: dict[str, str], sampling: Sampling = SAMPLING) -> list[list[str]]:
    """The samples of every forget question, one question after the other."""
    answers = []
    for number, example in enumerate(inner(files).prepare(lm.tokenizer)["forget"].examples):
        answers += generate(
            lm, [example.prompt], max_new_tokens=8, sampling=sampling, prompt_ids=[f"forget/{number}"], token_budget=1
        )
    return answers


# Values ---------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_samples_scored_one_by_one(lm, files):
    benchmark = LeakBenchmark(inner(files), SAMPLING, attempts=[1, 2, 5], confidence=0.9, texts=True)
    results = benchmark.run(lm)
    rows = results.examples["forget"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    samples = draw(lm, files)
    assert len({text for texts in samples for text in texts}) > 5
    for row, expected, texts in zip(rows, FORGET, samples, strict=True):
        answer = expected["answer"]
        assert (row["question"], row["answer"], row["samples"]) == (expected["question"], answer, texts)
        assert row["rougeL_recall"] == [scorer.score(answer, text)["rougeL"].recall for text in texts]
        assert row["exact"] == [int(starts_with_answer(text, answer)) for text in texts]
        assert row["exact_bound"] == leak_upper_bound(sum(row["exact"]), 5, 0.9)
    assert 0 < sum(map(sum, (row["exact"] for row in rows))) < 25
    for score in ("rougeL_recall", "exact"):
        scores = [row[score] for row in rows]
        for number in (1, 2, 5):
            best = [[max(chosen) for chosen in combinations(of_row, number)] for of_row in scores]
            expected = sum(sum(of_row) / len(of_row) for of_row in best) / len(best)
            assert results.aggregate.pop(f"leak@{number}/{score}") == pytest.approx(expected)
    hits, recalls = ([row[score] for row in rows] for score in ("exact", "rougeL_recall"))
    hits = [sum(of_row) for of_row in hits]
    assert results.aggregate == {
        "leak_bound/rougeL_recall": average_mean_bound(recalls, 0.9),
        "leak_bound/exact": average_leak_bound(hits, 5, 0.9),
        "leak_bound_worst/rougeL_recall": worst_mean_bound(recalls, 0.9),
        "leak_bound_worst/exact": worst_leak_bound(hits, 5, 0.9),
    }
    assert results.missing == {}


def test_results_have_no_text_unless_asked_for(lm, files):
    results = LeakBenchmark(inner(files), SAMPLING).run(lm)
    plain = inner(files).run(lm)
    written = json.dumps(results.to_dict())
    for row in FORGET:
        assert json.dumps(row["question"]) not in written
        assert f'"{row["answer"]}"' not in written
    assert results.benchmark == "leak"
    assert results.settings == {
        **plain.settings,
        "leak": {
            **{"temperature": 0.6, "top_p": 1.0, "top_k": None, "samples": 5, "seed": 2},
            **{"attempts": [1, 2, 4, 5], "confidence": 0.95, "texts": False},
        },
    }
    assert list(results.examples) == list(results.data) == ["forget"]
    assert results.data["forget"]["rows"] == len(FORGET)
    assert Results.from_dict(results.to_dict()) == results


def test_the_batch_size_does_not_matter(lm, files):
    wanted = LeakBenchmark(inner(files), SAMPLING, texts=True).run(lm).examples
    for token_budget in (1, 150):
        assert LeakBenchmark(inner(files, token_budget=token_budget), SAMPLING, texts=True).run(lm).examples == wanted


def test_a_model_that_knows_nothing_reveals_less(lm, files, tokenizer_dir):
    fresh = loaded(taught(tokenizer_dir, 0, 3), torch.float32)
    knowing, unknowing = (LeakBenchmark(inner(files), SAMPLING).run(model).aggregate for model in (lm, fresh))
    for name in ("leak@1/exact", "leak@4/exact", "leak@1/rougeL_recall", "leak_bound/exact"):
        assert unknowing[name] < knowing[name]
    assert unknowing["leak@4/exact"] == 0 < unknowing["leak_bound/exact"]


def test_tofu_and_an_attack_by_the_prompt(lm, tmp_path):
    benchmark = TOFUBenchmark("forget01", write_tofu(tmp_path), max_new_tokens=4)
    plain = LeakBenchmark(benchmark, Sampling(samples=2), texts=True).run(lm)
    attacked = LeakBenchmark(benchmark.with_attack(Prefix(1)), Sampling(samples=2), texts=True).run(lm)
    assert plain.examples["forget"][0]["answer"] == "Ada wrote it in May."
    assert attacked.examples["forget"][0]["answer"] == "wrote it in May."
    assert attacked.settings["attack"] == {"name": "prefix", "words": 1}
    assert plain.data != attacked.data


def test_a_score_that_cannot_find_an_answer_is_missing(lm, tmp_path):
    """ROUGE knows the letters a to z only: its zero would read as "reveals nothing"."""
    file = write(tmp_path / "rows.jsonl", [*FORGET, question("Where?", "在伯尔尼", "In Oslo.")])
    results = LeakBenchmark(QABenchmark(file, file, max_new_tokens=2), Sampling(samples=2)).run(lm)
    names = ("leak@1", "leak@2", "leak_bound", "leak_bound_worst")
    assert results.missing == {
        f"{name}/rougeL_recall": "1 of 6 answers have no word that it could find" for name in names
    }
    assert results.aggregate.keys() == {f"{name}/exact" for name in names}
    assert results.examples["forget"][-1]["rougeL_recall"] is None


@pytest.mark.parametrize(
    ("sample", "answer", "expected"),
    [
        ("In Bern.", "In Bern.", True),
        (" in  bern\nand then", "In Bern.", True),
        ("In Berne", "In Bern.", False),
        ("Not in Bern", "In Bern.", False),
        ("In", "In Bern.", False),
        ("", "In Bern.", False),
        ("", "", False),
        ("?!", "!?", False),
        ("Straße 5", "STRASSE 5", True),
        ("在伯尔尼", "在伯尔尼。", True),
    ],
)
def test_exact(sample, answer, expected):
    assert starts_with_answer(sample, answer) is expected


@pytest.mark.parametrize(("largest", "numbers"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])
def test_attempts_double(largest, numbers):
    assert double_up_to(largest) == numbers


# Interrupted ----------------------------------------------------------------------------------------------------------


class PowerCut(Exception):
    pass


def test_an_interrupted_evaluation_keeps_the_parts_it_has(lm, files, tmp_path, monkeypatch):
    monkeypatch.setattr(LeakBenchmark, "rows_per_part", 2)
    wanted = LeakBenchmark(inner(files), SAMPLING).run(lm).to_dict()
    left = [6 * 2 + 3]  # five samples and the answer itself of a row: within the second part
    own = LeakBenchmark.measure

    def measure(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise PowerCut
        return own(*arguments)

    monkeypatch.setattr(LeakBenchmark, "measure", measure)
    folder = tmp_path / "partial"
    with pytest.raises(PowerCut):
        LeakBenchmark(inner(files), SAMPLING).run(lm, folder)
    assert [file.name for file in folder.iterdir()] == ["forget-0.json"]
    left[0] = 6 * 3  # those of the other rows
    assert LeakBenchmark(inner(files), SAMPLING).run(lm, folder).to_dict() == wanted
    assert left == [0]
    assert sorted(file.name for file in folder.iterdir()) == ["forget-0.json", "forget-2.json", "forget-4.json"]
    left[0] = 10**9
    other = LeakBenchmark(inner(files), Sampling(temperature=0.6, samples=5, seed=3)).run(lm, folder).to_dict()
    assert other["examples"] != wanted["examples"]  # the parts are of another seed


def test_parts_of_any_size_give_the_same(lm, files, monkeypatch):
    wanted = LeakBenchmark(inner(files), SAMPLING).run(lm).to_dict()
    for rows in (1, 3, None):
        monkeypatch.setattr(LeakBenchmark, "rows_per_part", rows)
        assert LeakBenchmark(inner(files), SAMPLING).run(lm).to_dict() == wanted


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attempts": [0]}, "`attempts`"),
        ({"attempts": [6]}, r"`attempts` has 6, .* 5 samples"),
        ({"attempts": [1.5]}, "`attempts`"),
        ({"confidence": 0.5}, "`confidence`"),
        ({"confidence": 1.0}, "`confidence`"),
    ],
    ids=str,
)
def test_refused_at_once(settings, message, files):
    with pytest.raises(ValueError, match=message):
        LeakBenchmark(inner(files), SAMPLING, **settings)


def test_raw_text_without_a_context_has_nothing_to_answer(lm, tmp_path):
    file = write(tmp_path / "texts.jsonl", [{"text": "Ada wrote the letter."}] * 2)
    with pytest.raises(ValueError, match=r"QABenchmark .*`benchmark`"):
        LeakBenchmark(QABenchmark(file, file), SAMPLING).prepare(lm.tokenizer)


def test_a_prompt_that_is_too_long_is_refused_before_sampling(lm, files):
    with pytest.raises(ValueError, match="positions"):
        LeakBenchmark(inner(files, max_new_tokens=250), SAMPLING).run(lm)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_config(in_tmp, monkeypatch, model_dir, tmp_path):
    write_tofu(tmp_path)
    arguments = [f"--model.lm.model={model_dir}", f"--model.benchmark.benchmark.source={tmp_path}"]
    arguments += ["--model.benchmark.benchmark.forget_split=forget01", "--trainer.accelerator=cpu"]
    arguments += ["--model.benchmark.sampling.samples=8"]
    benchmark = instantiate(["test", "--config", "eval/leak.yaml", *arguments], monkeypatch).model.benchmark
    assert isinstance(benchmark, LeakBenchmark)
    assert isinstance(benchmark.benchmark, TOFUBenchmark)
    assert benchmark.sampling == Sampling(samples=8)
    assert benchmark.attempts == [1, 2, 4, 8]


def test_under_stress(lm, files):
    """Whoever relearns or rounds may sample, too."""
    with pytest.raises(ValueError, match="no answers to relearn"):
        StressBenchmark(LeakBenchmark(inner(files), SAMPLING), Relearn(1, 1, 1e-3)).prepare(lm.tokenizer)
    results = StressBenchmark(LeakBenchmark(inner(files), SAMPLING), bits=[2]).run(lm)
    assert "2bit/leak@4/exact" in results.aggregate


# Two processes --------------------------------------------------------------------------------------------------------


def measured(model: str, files: dict[str, str], folder: Path) -> Any:
    LeakBenchmark.rows_per_part = 3
    return LeakBenchmark(inner(files), SAMPLING, texts=True).run(loaded(model, torch.float32), folder).to_dict()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    settings = read_json(folder / "settings.json")
    found = measured(settings["model"], settings["files"], folder / "partial")
    rank, world_size = rank_and_world_size()
    write_json(folder / f"rank{rank}.json", {"results": found, "world_size": world_size})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_sample_what_one_samples(files, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(LeakBenchmark, "rows_per_part", LeakBenchmark.rows_per_part)
    model = taught(tokenizer_dir, 40)
    alone = measured(model, files, tmp_path / "alone")
    write_json(tmp_path / "settings.json", {"model": model, "files": files})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in (0, 1):
        found = read_json(tmp_path / f"rank{rank}.json")
        assert found["world_size"] == 2  # never silently in one process
        assert found["results"] == alone


def test_shares_of_processes_make_up_the_samples_of_one(lm, files):
    """Without starting processes: each measures every other row."""
    benchmark = LeakBenchmark(inner(files), SAMPLING, texts=True)
    wanted = benchmark.run(lm).examples["forget"]
    stream = benchmark.prepare(lm.tokenizer)["forget"]
    for rank in (0, 1, 2):
        share = benchmark._measure_share(lm, "forget", stream, range(len(wanted))[rank::3], lambda count: None)
        assert share == wanted[rank::3]


def test_samples_that_are_too_short_to_reveal_an_answer_are_warned_of(lm: LanguageModel) -> None:
    rows = [{"question": "Who?", "answer": "Ann wrote it in May."}]
    with pytest.warns(UserWarning, match="bounds are too low"):
        LeakBenchmark(QABenchmark(rows, rows, max_new_tokens=1), Sampling(samples=1)).prepare(lm.tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
