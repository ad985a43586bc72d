"""The examples run as a user's own programs would: a process each, in a folder of its own, with the installed package."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_unlearn import FictionalAuthors, LanguageModel, LitFinetune

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def target(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, fine-tuned on the authors until there is something to forget and to retain."""
    module = LitFinetune(LanguageModel(model_dir), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=6, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **quiet)
    trainer.fit(module, datamodule=FictionalAuthors(20, 2, batch_size=20, train_on="all"))
    return module.lm.save(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture
def run(target: Path, tmp_path: Path) -> Run:
    """Run an example in an empty folder, with output in ``out`` there, and return what it printed."""

    def run(name: str, *arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "OMP_NUM_THREADS": "1"
        }
        command = [sys.executable, str(EXAMPLES / name), f"--model={target}", "--output=out", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left anywhere else
        return done.stdout

    return run


def table(printed: str, *names: str) -> list[list[float]]:
    """Return the numbers of the lines of a printed table that begin with these names."""
    numbers = []
    for name in names:
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
        numbers.append([float(word) for word in line[len(name) :].split()])
    return numbers


def weights(model: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(model).parameters()])


def test_your_own_module_learns_and_forgets(run: Run, target: Path, tmp_path: Path) -> None:
    forget, new = table(printed := run("own_trainer.py", "--epochs=3"), "forget", "new")
    assert forget[1] < forget[0]
    assert new[1] > new[0]
    assert "epsilon" in printed.splitlines()[-1]
    with (tmp_path / "out/logs/version_0/metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    series = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}
    assert len(series["lr-AdamW"]) == len(series["task"]) == 27
    assert series["val/forget/margin"][-1] == min(series["val/forget/margin"])
    assert series["multiplier"][:18] == [2.0] * 18  # two epochs of warm-up
    assert series["multiplier"][-1] != 2.0
    best = torch.load(tmp_path / "out/best.ckpt", weights_only=True)
    assert best["bound"]["reference"] == pytest.approx(series["val/retain/nll"][0])
    assert not torch.equal(weights(target), weights(tmp_path / "out/model"))


def test_every_constraint_has_its_own_stream_bound_and_multiplier(run: Run, tmp_path: Path) -> None:
    printed = run("several_constraints.py", "--epochs=2")
    lines = [line.split() for line in printed.splitlines()[-3:]]
    assert [line[:2] for line in lines] == [["retain", "retain"], ["core", "core"], ["drift", "general"]]
    values = {name: [float(word) for word in numbers] for name, _, *numbers in lines}
    for value, epsilon, slack, multiplier in values.values():
        assert slack == pytest.approx(epsilon - value, rel=1e-2)
        assert multiplier >= 0
    assert values["retain"][3] == 100  # still in its warm-up
    assert values["core"][3] != 50
    assert values["drift"][3] != 5
    assert 0 < values["drift"][0] < values["core"][0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    load_authors = runpy.run_path(str(EXAMPLES / "several_constraints.py"))["load_authors"]
    counts = {name: len(rows) for name, rows in load_authors().items()}
    assert counts == {"forget": 20, "retain": 140, "core": 40, "general": 50}
    assert weights(tmp_path / "out/model").isfinite().all()


def test_several_constraints_take_your_own_files(
    target: Path, rows_dir: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, source in {"forget": "forget", "retain": "retain", "core": "general", "general": "general"}.items():
        Path(f"{name}.jsonl").write_bytes(Path(rows_dir, f"{source}.jsonl").read_bytes())
    arguments = [f"--model={target}", "--output=out", "--epochs=1", "--data=."]
    monkeypatch.setattr(sys, "argv", ["several_constraints.py", *arguments])
    runpy.run_path(str(EXAMPLES / "several_constraints.py"), run_name="__main__")
    assert "step 2 of 2" in capsys.readouterr().out  # 10 forget examples, 5 per step
    assert [path.name for path in Path("out").iterdir()] == ["model"]


def test_later_requests_have_the_bounds_of_the_earlier_ones(run: Run, target: Path, tmp_path: Path) -> None:
    printed = run("sequential_requests.py", "--epochs=3")
    titles = ["after A", "after B, alone", "after C, alone", "after B, remembering", "after C, remembering"]
    after_a, b_alone, c_alone, _, c_bound = rows = table(printed, *titles)
    # Probability and margin of A, B and C, and the retain NLL. Only A was asked for: its margin fell more than the others'.
    assert after_a[1] < min(after_a[3], after_a[5])
    assert b_alone[3] < after_a[3]
    assert max(c_alone[5], c_bound[5]) < after_a[5]
    epsilon, *bounds = [float(number) for number in re.findall(r"≤ ([\d.]+)", printed.splitlines()[-1])]
    assert max(row[6] for row in rows) <= epsilon
    assert len(bounds) == 2
    assert bounds[0] >= 1.2 * after_a[1] ** 2 - 0.1  # the mean of squares is no less than the square of the mean
    models = [weights(target), *(weights(tmp_path / "out" / name) for name in ("A", "B_alone", "C_alone"))]
    assert all(not torch.equal(before, after) for before, after in pairwise(models))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"A", "B_alone", "C_alone", "B", "C"}


def test_each_point_of_a_sweep_starts_from_the_same_model(run: Run, tmp_path: Path) -> None:
    run("epsilon_sweep.py", "--epochs=5", "--relative", "0.1", "3")
    with (tmp_path / "out/sweep.csv").open(encoding="utf-8") as file:
        tight, loose = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert loose["epsilon"] / tight["epsilon"] == pytest.approx(4 / 1.1)
    shared = [key for key in tight if key not in ("relative", "epsilon")]
    assert {key: tight[key] for key in shared} == {
        key: loose[key] for key in shared
    }  # no dual step yet, and no trace of the first run
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out/sweep.svg").read_text("utf-8")


def test_one_command_takes_a_customer_out_of_a_chat_file(run: Run, target: Path, tmp_path: Path) -> None:
    # The test's model hardly learns the rows in two epochs, so the verdict needs a lower threshold than 0.2.
    settings = ["--report.max_forget_probability=0.1", "--model.optimizer.init_args.lr=1e-2"]
    printed = run("one_customer.py", "--finetune_epochs=2", "--epochs=5", *settings)
    forget, retain = [line.split() for line in printed.splitlines()[-3:-1]]
    assert forget[:6] == ["forget", "where", "customer", "10", "of", "200"]
    assert retain[:6] == ["retain", "where_not", "customer", "190", "of", "200"]
    before, after = map(float, forget[6:])
    assert after < 0.1 < before
    nll, epsilon = [float(number) for number in re.findall(r"(?:NLL|epsilon) ([\d.]+)", printed.splitlines()[-1])]
    assert nll <= epsilon
    assert "--data.forget.where='{customer: c-17}'" in printed

    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text("utf-8").splitlines()]
    assert Counter(row["customer"] for row in rows) == {f"c-{number}": 10 for number in range(20)}
    assert Counter(len(row["messages"]) for row in rows) == {3: 100, 5: 100}
    record = (tmp_path / "out/unlearned/unlearning.json").read_text("utf-8")
    assert "c-17" not in record  # the values of a rule stay out of what may be published
    assert not torch.equal(weights(tmp_path / "out/target"), weights(tmp_path / "out/unlearned"))


@pytest.mark.neighbour
def test_processes_share_a_search(target: Path, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason='pip install -e ".[neighbours]" is missing')
    storage = f"sqlite:///{tmp_path}/search.db"
    # The tables of the storage are made once, before two processes look for them.
    study = optuna.create_study(study_name="search", storage=storage)
    script = str(EXAMPLES / "optuna_search.py")
    command = [sys.executable, script, f"--model={target}", "--output=out", f"--storage={storage}", "--epochs=1"]
    with (tmp_path / "log.txt").open("w") as log:
        processes = [subprocess.Popen([*command, "--trials=1"], cwd=tmp_path, stdout=log, stderr=log) for _ in range(2)]
        assert [process.wait(300) for process in processes] == [0, 0], (tmp_path / "log.txt").read_text("utf-8")

    assert [trial.number for trial in study.trials] == [0, 1]
    assert study.trials[0].params != study.trials[1].params
    printed = (tmp_path / "log.txt").read_text("utf-8")
    for trial in study.trials:
        report = json.loads((tmp_path / f"out/trial_{trial.number}_run/version_0/report.json").read_text("utf-8"))
        assert trial.value == report["after"]["forget/probability"]
        assert trial.constraints == {"nll": -report["constraints"]["nll"]["slack"]}
        assert f"trial {trial.number}: probability {trial.value:.4f}" in printed
    assert len(Path(script).read_text("utf-8").splitlines()) < 40


@pytest.mark.neighbour
def test_ray_runs_two_trials_at_a_time(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason='needs pip install "ray[tune]"')
    printed = run("ray_search.py", "--epochs=1", "--trials=2")
    trials = [json.loads(file.read_text("utf-8")) for file in tmp_path.glob("out/ray/*/result.json")]
    assert len({trial["pid"] for trial in trials}) == len(trials) == 2
    assert trials[0]["config"] != trials[1]["config"]
    for trial in trials:
        (file,) = tmp_path.glob(f"out/{trial['trial_id']}_run/version_0/report.json")
        report = json.loads(file.read_text("utf-8"))
        assert trial["probability"] == report["after"]["forget/probability"]
        assert trial["violation"] == -report["constraints"]["nll"]["slack"]
        assert f"{trial['trial_id']}: probability {trial['probability']:.4f}" in printed
    # Seconds since 1970, as a whole number, and the length of the run: neither began when the other had ended.
    assert max(trial["timestamp"] - trial["time_total_s"] for trial in trials) < min(t["timestamp"] for t in trials)
    assert len((EXAMPLES / "ray_search.py").read_text("utf-8").splitlines()) < 40


def test_the_page_has_every_example() -> None:
    named = set(re.findall(r"python examples/(\w+\.py)", (EXAMPLES / "README.md").read_text("utf-8")))
    assert named == {path.name for path in EXAMPLES.glob("*.py")}
