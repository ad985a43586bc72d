"""Processes that have read other rows, or another configuration, end together before the first step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from forked import find_port, printed, start_command, wait

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    ForgetRetain,
    LanguageModel,
    LitEvaluate,
    LitUnlearn,
    LogitMargin,
    QABenchmark,
)
from lit_unlearn.errors import DataError
from lit_unlearn.training import agreement
from lit_unlearn.training.agreement import check_processes_agree


def rows(count: int, word: str = "It", what: str = "number") -> str:
    lines = [{"question": f"What is {what} {n}?", "answer": f"{word} is {n}."} for n in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines)


# Two processes, told by what one of them has -------------------------------------------------------------------------------


def test_what_differs_is_named_with_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"number of forget rows": "10", "objective 'forget'": "NPO"}
    for others, expected in (
        ([facts, facts], None),
        ([facts, {**facts, "number of forget rows": "20"}, facts], ["10 on ranks 0, 2", "20 on rank 1"]),
        ([facts, {"number of forget rows": "10"}], ["objective 'forget'", "NPO on rank 0", "none on rank 1"]),
    ):
        monkeypatch.setattr(agreement, "gather_objects", lambda value, others=others: others)
        if expected is None:
            check_processes_agree(facts)
            continue
        with pytest.raises(DataError) as caught:
            check_processes_agree(facts)
        assert all(text in str(caught.value) for text in expected)
        assert caught.value.exit_code == 2


def make(model: str, **settings: Any) -> LitUnlearn:
    epsilon, lr = settings.pop("epsilon", 5.0), settings.pop("lr", 0.01)
    bound = Constraint(NLL(), epsilon, DualAscent(lr=settings.pop("dual", 5.0), init=3.0))
    return LitUnlearn(
        LanguageModel(model), LogitMargin(), {"nll": bound}, lambda p: torch.optim.SGD(p, lr=lr), **settings
    )


@pytest.mark.parametrize(
    ("module", "data", "trainer", "named"),
    [
        ({}, {"forget": rows(7)}, {}, "number of forget rows: 5 on rank 0, 7 on rank 1"),
        ({}, {"forget": rows(5, "He")}, {}, "answers of the forget rows"),
        ({}, {"retain": rows(6, "He", "letter")}, {}, "answers of the retain rows"),
        ({}, {"template": "Q: {question} A: {answer}"}, {}, "prompts and answers of the forget rows"),
        ({}, {"batch_size": 3}, {}, "`batch_size`: 2 on rank 0, 3 on rank 1"),
        ({"seed": 1}, {}, {}, "model's `seed`"),
        ({"epsilon": 4.0}, {}, {}, "constraint 'nll'"),
        ({"dual": 4.0}, {}, {}, "constraint 'nll'"),
        ({"lr": 0.1}, {}, {}, "optimizer"),
        ({}, {}, {"max_epochs": 2}, "Trainer's `max_epochs`"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_every_setting_that_decides_a_step_is_compared(
    module: dict[str, Any],
    data: dict[str, Any],
    trainer: dict[str, Any],
    named: str,
    model_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first run plays the first process, and is recorded; the second one plays both."""
    of_first: list[dict[str, str]] = []

    def fit(module: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> None:
        data = {"forget": rows(5), "retain": rows(6, what="letter"), "batch_size": 2, **data}
        for name in ("forget", "retain"):
            (tmp_path / f"{name}.jsonl").write_text(data[name], encoding="utf-8")
            data[name] = str(tmp_path / f"{name}.jsonl")
        make_trainer(**{"max_epochs": 1, **trainer}).fit(make(model_dir, **module), datamodule=ForgetRetain(**data))

    monkeypatch.setattr(agreement, "gather_objects", lambda value: of_first.append(value) or [value])
    fit({}, {}, {})
    recorded = iter(of_first)
    monkeypatch.setattr(agreement, "gather_objects", lambda value: [next(recorded), value])
    with pytest.raises(DataError) as caught:
        fit(module, data, trainer)
    assert named in str(caught.value)
    assert "What is" not in str(caught.value)  # no row is shown
    assert "is 3." not in str(caught.value)


def test_a_benchmark_compares_its_rows_too(
    model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = QABenchmark(f"{rows_dir}/forget.jsonl", f"{rows_dir}/retain.jsonl")
    monkeypatch.setattr(agreement, "gather_objects", lambda facts: [facts, {**facts, "number of forget rows": "3"}])
    with pytest.raises(DataError, match="number of forget rows: 10 on rank 0, 3 on rank 1"):
        make_trainer().test(LitEvaluate(LanguageModel(model_dir), benchmark), verbose=False)


# Two real processes, as on two machines with folders of their own ----------------------------------------------------------


def start(folder: Path, node: int, port: int, model: str, *extra: str) -> BaseProcess:
    arguments = ["fit", "--config=own_data.yaml", f"--model.lm.model={model}", "--trainer.max_epochs=2"]
    arguments += ["--data.forget=forget.jsonl", "--data.retain=retain.jsonl", "--data.batch_size=4"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.num_nodes=2", "--trainer.devices=1"]
    rendezvous = {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start_command(folder, *arguments, *extra, **rendezvous)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stale", "extra", "named"),
    [
        ({"forget": rows(10)}, [], "number of forget rows"),
        ({"forget": '{"frage": "Who?", "answer": "He."}\n'}, [], "no column 'question'"),
        ({"forget": rows(20, "He")}, [], "answers of the forget rows"),
        ({}, ["--model.optimizer.lr=1e-3"], "optimizer"),
    ],
    ids=["other number", "no such column", "other text", "other rate"],
)
def test_processes_that_read_other_rows_end_together(
    stale: dict[str, str], extra: list[str], named: str, model_dir: str, tmp_path: Path
) -> None:
    port, processes = find_port(), []
    for node in (0, 1):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        content = {"forget": rows(20), "retain": rows(24, what="letter"), **(stale if node else {})}
        for name, text in content.items():
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        processes.append(start(folder, node, port, model_dir, *(extra if node else [])))
    first_end = 0.0
    for node, process in enumerate(processes):
        code = wait(process, timeout=300)
        text = printed(tmp_path / f"node{node}")
        first_end = first_end or time.monotonic()
        assert code == 2, text[-3000:]
        assert named in text
        # The process with the wrong file says what is wrong with it, the other one whose file that is.
        assert "rank 1" in text or "no column" in named
        assert "Traceback" not in text
        assert "step 1 of" not in text
        assert "He is" not in text
    assert time.monotonic() - first_end < 30  # the other does not wait for long


@pytest.mark.slow
def test_processes_that_agree_run(model_dir: str, tmp_path: Path) -> None:
    port, processes = find_port(), []
    for node in (0, 1):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        for name, text in {"forget": rows(20), "retain": rows(24, what="letter")}.items():
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        lenient = ["--report.require_feasible=false", "--report.require_forgotten=false"]
        processes.append(start(folder, node, port, model_dir, *lenient))
    for node, process in enumerate(processes):
        assert wait(process, timeout=300) == 0, printed(tmp_path / f"node{node}")[-3000:]
    assert (tmp_path / "node0/runs/own_data/unlearned/unlearning.json").is_file()
