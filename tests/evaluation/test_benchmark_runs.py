"""Benchmarks as a user runs them: by `lit-unlearn test` on any model, and now and then during a fit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from command_line import quick
from evaluation.rows import FORGET, RETAIN, loaded, taught, write_qa
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_unlearn import (
    NLL,
    Constraint,
    FixedMultiplier,
    ForgetRetain,
    LanguageModel,
    LitEvaluate,
    LitUnlearn,
    LogitMargin,
    QABenchmark,
    cli,
)
from lit_unlearn.utils.io import read_json

LORA = ["--model.lm.adapter.r=4", "--model.lm.adapter.lora_alpha=8"]


def suite(files: dict[str, str]) -> list[str]:
    sets = [f"--model.benchmark.{name}={path}" for name, path in files.items()]
    return ["--model.benchmark=QABenchmark", *sets, "--model.benchmark.max_new_tokens=6"]


def evaluate(model: str, files: dict[str, str], *extra: str, results: str = "results.json") -> dict[str, Any]:
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--logs.save_dir=log"]
    what = ["--model=LitEvaluate", f"--model.lm.model={model}", *suite(files), f"--model.results={results}"]
    cli.main(["test", *what, *quiet, *extra])
    return read_json(Path(results))


def directly(model: str, files: dict[str, str]) -> dict[str, Any]:
    """What the command must give, without it."""
    return QABenchmark(**files, max_new_tokens=6).run(loaded(model, torch.float32)).to_dict()


def values(results: dict[str, Any]) -> dict[str, float]:
    return dict(results["aggregate"])


# lit-unlearn test -----------------------------------------------------------------------------------------------------


def test_a_model_directory(in_tmp: Path, tokenizer_dir: str, capsys: Any) -> None:
    files, model = write_qa(in_tmp), taught(tokenizer_dir, 20)
    found = evaluate(model, files)
    wanted = directly(model, files)
    for key in ("examples", "aggregate", "missing", "data", "model", "settings"):
        assert found[key] == wanted[key]
    assert found["seed"] == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.startswith("forget/probability")]
    assert lines == [["forget/probability", f"{wanted['aggregate']['forget/probability']:.4g}"]]
    assert not (in_tmp / "results.partial").exists()


def test_retain_results_from_the_command_line(in_tmp: Path, tokenizer_dir: str) -> None:
    files = write_qa(in_tmp)
    evaluate(taught(tokenizer_dir, 0), files, results="retain_only.json")
    found = evaluate(taught(tokenizer_dir, 20), files, "--model.benchmark.retain_results=retain_only.json")
    assert found["missing"] == {}
    assert found["aggregate"]["forget_quality"] == pytest.approx(2 / 252)
    assert found["retain_results"] == "retain_only.json"
    files["forget"] = files["holdout"]
    with pytest.raises(SystemExit, match=r"retain_only\.json"):
        evaluate(taught(tokenizer_dir, 20), files, "--model.benchmark.retain_results=retain_only.json", results="no")
    assert not (in_tmp / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [[], LORA], ids=["full", "lora"])
def test_the_checkpoint_of_a_run(adapter: list[str], in_tmp: Path, model_dir: str) -> None:
    """Is what the run exports; the model that the command names is only where to begin, and must be of that kind."""
    files = write_qa(in_tmp)
    fast = ["--model.keep=last", "--trainer.max_epochs=1", "--model.optimizer.lr=0.03", "--model.scheduler=null"]
    cli.main(quick(model_dir, *adapter, *fast))
    (checkpoint,) = (in_tmp / "log" / "run" / "checkpoints").iterdir()
    found = evaluate(model_dir, files, f"--ckpt_path={checkpoint}", *adapter)
    exported, before = directly("out", files), directly(model_dir, files)
    assert values(found) == pytest.approx(values(exported), rel=1e-4)  # an adapter is merged in float32
    assert abs(found["aggregate"]["forget/nll"] - before["aggregate"]["forget/nll"]) > 0.01
    assert before["model"]["weights"] not in (found["model"]["weights"], exported["model"]["weights"])
    if adapter:
        with pytest.raises(SystemExit, match=r"does not fit the model: \d+ .*'lm\."):
            evaluate(model_dir, files, f"--ckpt_path={checkpoint}", results="other.json")
        assert not (in_tmp / "other.json").exists()


def test_a_fit_needs_rows(in_tmp: Path, model_dir: str) -> None:
    arguments = [argument for argument in quick(model_dir) if not argument.startswith(("--config", "--data"))]
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs/demo/unlearn.yaml").read_text(encoding="utf-8"))
    settings.pop("data")
    (in_tmp / "no_data.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"`data`.*LitEvaluate"):
        cli.main([*arguments, "--config=no_data.yaml"])


# During a fit ---------------------------------------------------------------------------------------------------------


class Seen(L.Callback):
    """What a benchmark logged at the end of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({name: value for name, value in logged.items() if name.startswith("val/qa/")})


def unlearner(model: str, files: dict[str, str], every: int | None, **settings: Any) -> LitUnlearn:
    return LitUnlearn(
        LanguageModel(model),
        LogitMargin(),
        {"nll": Constraint(NLL(), 0.5, FixedMultiplier(1.0))},
        partial(torch.optim.SGD, lr=0.05),
        benchmark=QABenchmark(**files, max_new_tokens=4),
        benchmark_every_n_epochs=every,
        **settings,
    )


@pytest.mark.parametrize(("every", "after"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (6, []), (None, [])])
def test_the_benchmark_runs_at_the_right_epochs(
    every: int | None,
    after: list[int],
    tokenizer_dir: str,
    tmp_path: Path,
    make_trainer: Callable[..., L.Trainer],
) -> None:
    files, seen = write_qa(tmp_path), Seen()
    module = unlearner(taught(tokenizer_dir, 30), files, every)
    data = ForgetRetain(files["forget"], files["retain"], batch_size=3)  # two steps an epoch
    trainer = make_trainer(max_epochs=5, callbacks=[seen], num_sanity_val_steps=2)
    trainer.fit(module, datamodule=data)
    written = {path.name: read_json(path) for path in tmp_path.glob("runs/version_0/qa-*.json")}
    assert written.keys() == {f"qa-step={2 * epoch}.json" for epoch in after}
    for epoch in after:
        wanted = {f"val/qa/{name}": value for name, value in values(written[f"qa-step={2 * epoch}.json"]).items()}
        assert seen.epochs[epoch - 1] == pytest.approx(wanted, rel=1e-6)
    assert {"val/qa/retain/probability", "val/qa/auc/min_k"} <= seen.epochs[4].keys() or not after
    assert [bool(one) for one in seen.epochs] == [bool(after) and epoch >= after[0] for epoch in range(1, 6)]
    probabilities = [one["aggregate"]["forget/probability"] for one in written.values()]
    assert len({*probabilities}) == len(after)  # the model moves
    if after:
        last = module.benchmark.run(module.lm).to_dict()
        assert module.lm.training
        if after[-1] == 5:
            assert last["examples"] == written["qa-step=10.json"]["examples"]


def test_a_benchmark_changes_no_step(
    tokenizer_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    files, weights = write_qa(tmp_path), []
    for every in (None, 1):
        module = unlearner(taught(tokenizer_dir, 30), files, every)
        data = ForgetRetain(files["forget"], files["retain"], batch_size=3)
        make_trainer(max_epochs=3).fit(module, datamodule=data)
        weights.append(module.lm.state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_checkpoint_can_follow_a_benchmarks_value(
    tokenizer_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    files = write_qa(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="val/qa/retain/probability", mode="min")
    trainer = make_trainer(max_epochs=4, callbacks=[checkpoint], enable_checkpointing=True)
    data = ForgetRetain(files["forget"], files["retain"], batch_size=5)
    trainer.fit(unlearner(taught(tokenizer_dir, 30), files, 1), datamodule=data)
    found = {step: read_json(tmp_path / f"runs/version_0/qa-step={step}.json") for step in (1, 2, 3, 4)}
    lowest = min(found, key=lambda step: found[step]["aggregate"]["retain/probability"])
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == lowest
    assert float(checkpoint.best_model_score) == pytest.approx(found[lowest]["aggregate"]["retain/probability"])  # type: ignore[arg-type]
    again = LitEvaluate(
        LanguageModel(taught(tokenizer_dir, 0)), QABenchmark(**files, max_new_tokens=4), str(tmp_path / "b")
    )
    make_trainer().test(again, ckpt_path=checkpoint.best_model_path, verbose=False)
    assert read_json(tmp_path / "b")["examples"] == found[lowest]["examples"]


def test_a_checkpoint_waits_for_a_benchmark_that_is_rarer(
    tokenizer_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    """With the same number of epochs in between: Lightning refuses a value that is not there yet."""
    files = write_qa(tmp_path)
    settings = {"monitor": "val/qa/retain/probability", "mode": "min", "save_top_k": -1, "every_n_epochs": 2}
    checkpoint = ModelCheckpoint(tmp_path / "kept", "{step}", auto_insert_metric_name=False, **settings)  # type: ignore[arg-type]
    trainer = make_trainer(max_epochs=5, callbacks=[checkpoint], enable_checkpointing=True)
    data = ForgetRetain(files["forget"], files["retain"], batch_size=5)
    trainer.fit(unlearner(taught(tokenizer_dir, 30), files, 2), datamodule=data)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["2.ckpt", "4.ckpt"]
    lowest = min(
        read_json(path)["aggregate"]["retain/probability"] for path in tmp_path.glob("runs/version_0/qa-*.json")
    )
    assert float(checkpoint.best_model_score) == pytest.approx(lowest)  # type: ignore[arg-type]


@pytest.mark.slow
def test_from_the_command_line(in_tmp: Path, model_dir: str) -> None:
    files = write_qa(in_tmp)
    cli.main(quick(model_dir, *suite(files), "--model.benchmark_every_n_epochs=2"))
    version = in_tmp / "log" / "run" / "version_0"
    assert [path.name for path in version.glob("qa-*.json")] == ["qa-step=4.json"]
    with (version / "metrics.csv").open(encoding="utf-8") as file:
        logged = [row["val/qa/forget/probability"] for row in csv.DictReader(file) if row["val/qa/forget/probability"]]
    wanted = read_json(version / "qa-step=4.json")["aggregate"]["forget/probability"]
    assert [float(value) for value in logged] == [pytest.approx(wanted, rel=1e-6)]


def test_the_suite_of_a_run_is_also_its_test(
    tokenizer_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    """With the metrics on the run's own streams."""
    files = write_qa(tmp_path)
    data = ForgetRetain(files["forget"], files["retain"])
    results = make_trainer().test(unlearner(taught(tokenizer_dir, 30), files, None), datamodule=data, verbose=False)
    logged = {name: value for part in results for name, value in part.items()}
    found = read_json(tmp_path / "runs/version_0/qa.json")
    for name, value in values(found).items():
        assert logged[f"test/qa/{name}"] == pytest.approx(value, rel=1e-6)
    probability = sum(row["probability"] for row in found["examples"]["forget"]) / len(FORGET)
    assert logged["test/forget/probability"] == pytest.approx(probability, rel=1e-5)
    assert len(found["examples"]["retain"]) == len(RETAIN)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1])
def test_a_number_of_epochs_out_of_range(every: int, tokenizer_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`benchmark_every_n_epochs` \({every}\)"):
        unlearner(taught(tokenizer_dir, 0), write_qa(tmp_path), every)


def test_a_number_of_epochs_without_a_benchmark(in_tmp: Path, model_dir: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(quick(model_dir, "--model.benchmark_every_n_epochs=1"))
    text = str(end.value.code) + capsys.readouterr().err
    assert "`benchmark_every_n_epochs` (1)" in text
    assert not (in_tmp / "log").exists()


def test_bad_rows_are_refused_before_a_fit(
    tokenizer_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    files = write_qa(tmp_path)
    module = unlearner(taught(tokenizer_dir, 0), {**files, "retain": str(tmp_path / "nowhere.jsonl")}, 3)
    data = ForgetRetain(files["forget"], files["retain"])
    with pytest.raises(FileNotFoundError, match=r"the retain set's file '.*nowhere.jsonl' does not exist"):
        make_trainer(max_epochs=1).fit(module, datamodule=data)
    assert not module.lm.is_loaded
