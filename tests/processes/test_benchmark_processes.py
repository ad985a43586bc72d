"""A benchmark on two real processes: every row is measured once, and the results are those of one process.

``torchrun --nproc_per_node=2 test_benchmark_processes.py FOLDER`` runs every scenario of ``FOLDER/scenarios.json`` and writes
what each process did to ``<name>-rank<r>.json``. Tests judge by these files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evaluation import rows as questions

from lit_unlearn import (
    NLL,
    Benchmark,
    Constraint,
    FixedMultiplier,
    ForgetRetain,
    LanguageModel,
    LitEvaluate,
    LitUnlearn,
    LogitMargin,
    QABenchmark,
    StressBenchmark,
)
from lit_unlearn.evaluation import partial_files, results
from lit_unlearn.evaluation.attacks.relearning import Relearn
from lit_unlearn.training import FSDP2Strategy
from lit_unlearn.utils.distributed import rank_and_world_size
from lit_unlearn.utils.io import read_json

pytestmark = pytest.mark.slow

Done = dict[str, Any]
ROWS = {"forget": questions.FORGET, "retain": questions.RETAIN, "holdout": questions.HOLDOUT[:1]}  # 5, 3 and 1
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small batches": {"token_budget": 40},
    "one row each": {"token_budget": 1},
    "judged": {"fluency_model": None},  # a directory, known later
    "interrupted": {"stop": "retain"},
    "fit": {"epochs": 2},
    "sharded fit": {"epochs": 2, "sharded": True},
    "sharded test": {"sharded": True},
    "sharded stress": {"sharded": True, "stress": True},
}
TOLERANCE = {"judged": 1e-6, "sharded test": 1e-5, "sharded stress": 1e-3}  # of float32, and of steps that relearn


class Cut(Exception):
    """Like a power cut, on all processes."""


def run(settings: dict[str, Any], folder: Path, **where: Any) -> Done:
    """One evaluation or fit; returns what this process did."""
    warnings.filterwarnings("ignore")
    rank = int(os.environ.get("RANK", 0))
    done: Done = {"measured": [], "written": [], "cut": False}
    own, stop = QABenchmark.measure, settings.get("stop")

    def measure(suite: QABenchmark, stream: str, example: Any, *others: Any) -> Any:
        if stream == stop:
            raise Cut
        done["measured"].append([stream, example.texts["question"]])
        return own(suite, stream, example, *others)

    given = {key: settings[key] for key in ("token_budget", "fluency_model") if key in settings}
    suite: Benchmark = QABenchmark(**settings["files"], max_new_tokens=6, **given)
    if "stress" in settings:
        suite = StressBenchmark(suite, bits=[4], relearn=Relearn(rows=2, steps=2, lr=1e-3))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=settings.get("epochs"),
        precision="32-true" if "sharded" in settings else "64-true",  # Lightning shards no wider weights
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **quiet,
        **where,
    )
    L.seed_everything(7, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QABenchmark, "measure", measure)
        for module in (partial_files, results):
            patch.setattr(module, "write_json", partial(_note, done["written"], module.write_json))
        try:
            if "epochs" in settings:
                trainer.fit(_unlearner(settings["model"], suite), datamodule=_data(settings["files"]))
            else:  # each process with a folder of its own, as on machines of their own
                module = LitEvaluate(LanguageModel(settings["model"]), suite, str(folder / f"rank{rank}" / "qa.json"))
                trainer.test(module, verbose=False)
        except Cut:
            done["cut"] = True
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if f"/{suite.name}/" in name}
    return {**done, "logged": logged, "rank": rank_and_world_size()[0], "world_size": trainer.world_size}


def _note(written: list[str], write: Any, path: Path, content: Any) -> None:
    written.append(f"{path.parent.name}/{path.name}")
    write(path, content)


def _unlearner(model: str, suite: Benchmark) -> LitUnlearn:
    constraints = {"nll": Constraint(NLL(), 0.5, FixedMultiplier(1.0))}
    optimizer = partial(torch.optim.SGD, lr=0.05)
    return LitUnlearn(
        LanguageModel(model), LogitMargin(), constraints, optimizer, benchmark=suite, benchmark_every_n_epochs=1
    )


def _data(files: dict[str, str]) -> ForgetRetain:
    return ForgetRetain(files["forget"], files["retain"], batch_size=3)


def main(folder: Path) -> None:
    for name, settings in json.loads((folder / "scenarios.json").read_text(encoding="utf-8")).items():
        again = [{**settings, "stop": None}] if "stop" in settings else []
        strategy = FSDP2Strategy() if "sharded" in settings else "ddp"
        runs = [run(one, folder / name, strategy=strategy, devices=2) for one in (settings, *again)]
        (folder / f"{name}-rank{rank_and_world_size()[0]}.json").write_text(json.dumps(runs), encoding="utf-8")
    torch.distributed.destroy_process_group()


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenarios(tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("questions")
    files = {name: questions.write(folder / f"{name}.jsonl", rows) for name, rows in ROWS.items()}
    model = questions.taught(tokenizer_dir, 30)
    plans = {name: {**one, "files": files, "model": model} for name, one in SCENARIOS.items()}
    plans["judged"]["fluency_model"] = questions.taught(tokenizer_dir, 20)
    return plans


@pytest.fixture(scope="module")
def together(scenarios: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of two processes, and what both did in every scenario."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "scenarios.json").write_text(json.dumps(scenarios), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(folder),
    ]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = {}
    for name in scenarios:
        files = [folder / f"{name}-rank{rank}.json" for rank in (0, 1)]
        if not all(file.is_file() for file in files):
            pytest.fail(f"'{name}' left no result; the processes said: {done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        found[name] = [read_json(file) for file in files]
        for rank, runs in enumerate(found[name]):
            assert [(one["rank"], one["world_size"]) for one in runs] == [(rank, 2)] * len(runs)  # never in one process
    return folder, found


@pytest.fixture(scope="module")
def alone(scenarios: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs one scenario in this process: its folder, and what it did."""
    folder = tmp_path_factory.mktemp("alone")

    def get(name: str) -> tuple[Path, Done]:
        done = run({**scenarios[name], "stop": None}, folder / name, devices=1)
        assert done["world_size"] == 1
        return folder / name, done

    return get


def same(found: Done, wanted: Done, rel: float, *left_out: str) -> None:
    """Two results files; batches are others on two processes, which changes rounding: float64's, of a judge float32's."""
    rest = found.keys() - {"aggregate", "examples", *left_out}
    assert {key: found[key] for key in rest} == {key: wanted[key] for key in rest}
    assert found["examples"].keys() == wanted["examples"].keys()
    questions.check(found["aggregate"], wanted["aggregate"], rel)
    for name, rows in wanted["examples"].items():
        for one, row in zip(found["examples"][name], rows, strict=True):
            questions.check(one, row, rel)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.endswith("fit")])
def test_the_results_are_those_of_one_process(name: str, together: Any, alone: Any) -> None:
    folder, found = together
    results = read_json(folder / name / "rank0" / "qa.json")
    same(results, read_json(alone(name)[0] / "rank0" / "qa.json"), TOLERANCE.get(name, 1e-10))
    logged_as = "stress" if name == "sharded stress" else "qa"
    logged = {f"test/{logged_as}/{key}": pytest.approx(value, rel=1e-6) for key, value in results["aggregate"].items()}
    assert [runs[-1]["logged"] for runs in found[name]] == [logged] * 2  # on both: a checkpoint may follow it


@pytest.mark.parametrize("name", ["plain", "small batches", "one row each", "judged"])
def test_every_row_is_measured_once_by_one_process(name: str, together: Any) -> None:
    """Of five rows three and two, of one row one and none."""
    parts = [runs[0]["measured"] for runs in together[1][name]]
    wanted = [[stream, row["question"]] for stream, rows in ROWS.items() for row in rows]
    assert sorted([*parts[0], *parts[1]]) == sorted(wanted)
    sizes = [[sum(stream == name for stream, _ in part) for name in ROWS] for part in parts]
    assert sizes == [[3, 2, 1], [2, 1, 0]]


@pytest.mark.parametrize("name", ["plain", "judged"])
def test_only_the_first_process_writes(name: str, together: Any) -> None:
    folder, found = together
    partial_files = [f"qa.partial/{stream}.json" for stream in ROWS]
    assert [runs[0]["written"] for runs in found[name]] == [[*partial_files, "rank0/qa.json"], []]
    assert sorted(path.name for path in (folder / name).rglob("*")) == ["qa.json", "rank0"]


def test_the_first_process_decides_what_an_interrupted_run_left(together: Any) -> None:
    """The second one sees no partial files, and yet measures nothing again."""
    folder, found = together
    for first, again in found["interrupted"]:
        assert first["cut"]
        assert {stream for stream, _ in first["measured"]} == {"forget"}
        assert {stream for stream, _ in again["measured"]} <= {"retain", "holdout"}
        assert not again["cut"]
    assert sum(len(runs[1]["measured"]) for runs in found["interrupted"]) == 4
    assert sorted(path.name for path in (folder / "interrupted").rglob("*")) == ["qa.json", "rank0"]


@pytest.mark.parametrize("name", ["fit", "sharded fit"])
def test_during_a_fit(name: str, together: Any, alone: Any) -> None:
    folder, found = together
    other, done = alone(name)
    names = ["qa-step=2.json", "qa-step=4.json"]  # two steps an epoch, in which the processes share the rows
    run = Path(name, "runs", "version_0")
    assert [path.name for path in sorted((folder / run).glob("*"))] == names
    for file in names:
        same(
            read_json(folder / run / file),
            read_json(other / "runs" / "version_0" / file),
            1e-6 if name == "fit" else 1e-3,
            "model",
        )  # trained up to rounding
    assert [runs[0]["written"] for runs in found[name]] == [[f"version_0/{file}" for file in names], []]
    for (one,) in found[name]:
        assert one["logged"] == {
            key: pytest.approx(value, rel=1e-6 if name == "fit" else 1e-3) for key, value in done["logged"].items()
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
