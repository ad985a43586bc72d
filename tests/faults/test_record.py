"""The record is about the weights it lies beside: measured, exported and recorded are the same model."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import run_pair
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    FixedMultiplier,
    ForgetRetain,
    KLToReference,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    Relative,
)
from lit_unlearn.callbacks import ExportModel, ResumeCheckpoint, RunReport
from lit_unlearn.errors import CheckpointError, OutputError
from lit_unlearn.export.checkpoint import export_checkpoint
from lit_unlearn.models.weights import checksum

EMA = {"decay": 0.6}
LORA = {"r": 4, "lora_alpha": 16, "init_lora_weights": True}


def make(model: str, *, lr: float = 0.05, epsilon: Any = None, **settings: Any) -> LitUnlearn:
    lm = LanguageModel(model, adapter=settings.pop("adapter", None))
    constraints = {"nll": Constraint(NLL(), epsilon or Relative(0.5), DualAscent(lr=5.0, init=3.0))}
    constraints |= settings.pop("constraints", {})
    return LitUnlearn(lm, LogitMargin(), constraints, lambda p: torch.optim.SGD(p, lr=lr), **settings)


def rows(folder: str) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5)


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "unlearning.json").read_text("utf-8"))
    return record


def measure_again(folder: Path | str, data: str, make_trainer: Callable[..., L.Trainer], **settings: Any) -> Any:
    """What an export measures like, loaded from its folder."""
    module = make(str(folder), epsilon=1.0, **settings)
    (values,) = [make_trainer().validate(module, datamodule=rows(data), verbose=False)]
    return {name.removeprefix("val/"): value for part in values for name, value in part.items()}


def assert_same_values(record: dict[str, Any], measured: dict[str, float], rel: float = 1e-6) -> None:
    shared = {name: value for name, value in record["after"].items() if name in measured}
    assert {"forget/nll", "retain/nll", "forget/probability", "forget/loss"} <= shared.keys()
    assert shared == pytest.approx({name: measured[name] for name in shared}, rel=rel, abs=1e-6)


@pytest.fixture(scope="session")
def half_model_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model, in files of bfloat16."""
    lm = LanguageModel(model_dir)
    lm.load(torch.float32, device="cpu")
    return str(lm.save(tmp_path_factory.mktemp("half") / "model", dtype=torch.bfloat16))


# Weights that are exchanged for a validation ------------------------------------------------------------------------------


class SwapsByHand(L.Callback):
    """What users write: half the weights for a validation, in other hooks than Lightning's own callback."""

    def __init__(self) -> None:
        self.saved: list[torch.Tensor] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.saved = [parameter.data.clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for parameter, saved in zip(pl_module.parameters(), self.saved, strict=True):
            parameter.data.copy_(saved)


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(**EMA),
        WeightAveraging,
        SwapsByHand,
        lambda: EMAWeightAveraging(update_every_n_steps=3),
    ],
    ids=["ema", "mean", "by hand", "ema, every third step"],
)
def test_averaged_weights_are_measured_exported_and_recorded_alike(
    averaging: Callable[[], L.Callback],
    keep: str,
    model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    callbacks = [averaging(), RunReport(str(tmp_path)), ExportModel(str(out))]
    make_trainer(max_epochs=3, callbacks=callbacks).fit(make(model_dir, keep=keep), datamodule=rows(rows_dir))
    record, report = read(out), json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert record["after"] == report["after"]
    assert record["constraints"]["nll"]["value"] == report["constraints"]["nll"]["value"]
    assert_same_values(record, measure_again(out, rows_dir, make_trainer))


def test_the_best_averaged_model_is_kept_although_it_was_in_place_for_one_validation(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Ruin(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                for parameter in pl_module.parameters():
                    parameter.data.mul_(20)

    callbacks = [EMAWeightAveraging(**EMA), Ruin(), RunReport(str(tmp_path)), ExportModel(str(tmp_path / "out"))]
    module = make(model_dir, lr=1e-3)
    make_trainer(max_epochs=3, callbacks=callbacks).fit(module, datamodule=rows(rows_dir))
    record = read(tmp_path / "out")
    assert (record["step"], record["steps"]) == (2, 6)
    assert_same_values(record, measure_again(tmp_path / "out", rows_dir, make_trainer))


def test_a_run_with_averaged_weights_resumes_and_its_checkpoint_is_what_was_measured(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    for epochs in (2, 4):
        callbacks = [
            EMAWeightAveraging(**EMA),
            ResumeCheckpoint(dirpath=str(tmp_path)),
            ExportModel(str(tmp_path / "out")),
        ]
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        ckpt_path = None if epochs == 2 else "last"
        trainer.fit(make(model_dir, keep="last"), datamodule=rows(rows_dir), ckpt_path=ckpt_path)
    record = read(tmp_path / "out")
    assert record["step"] == 8
    assert_same_values(record, measure_again(tmp_path / "out", rows_dir, make_trainer))
    exported = export_checkpoint(tmp_path / "last-step=8.ckpt", tmp_path / "again", model_dir)
    assert exported["after"] == record["after"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_change_between_two_batches_are_of_no_model(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class ChangesThem(L.Callback):
        def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            next(pl_module.parameters()).data.mul_(1.01)

    callbacks = [ChangesThem(), RunReport(str(tmp_path)), ExportModel(str(tmp_path / "out"))]
    with pytest.warns(UserWarning, match="changed between two batches"):
        make_trainer(max_epochs=2, callbacks=callbacks).fit(make(model_dir), datamodule=rows(rows_dir))
    record = read(tmp_path / "out")
    assert record["step"] == 4  # the end: only there the weights held still
    assert_same_values(record, measure_again(tmp_path / "out", rows_dir, make_trainer))


def test_a_checksum_tells_whether_weights_changed() -> None:
    weights = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.arange(4), "d": torch.empty(0)}
    before = checksum(weights.items())
    assert checksum({name: tensor.clone() for name, tensor in weights.items()}.items()) == before
    for name, element in (("a", (3, 2)), ("b", (0,)), ("c", (1,))):
        changed = {**weights, name: weights[name].clone()}
        changed[name][element] += 1
        assert checksum(changed.items()) != before
    assert checksum({**weights, "a": weights["a"].T}.items()) != before  # the same bytes in another shape
    halves = {name: tensor.bfloat16() for name, tensor in weights.items() if tensor.is_floating_point()}
    wide = {name: tensor.float() for name, tensor in halves.items()}
    assert checksum(halves.items(), torch.bfloat16) == checksum(wide.items(), torch.bfloat16)


# The dtype of an export ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_an_export_has_the_dtype_of_its_base_and_measures_as_its_record_says(
    precision: Any,
    adapter: Any,
    half_model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    callbacks = [RunReport(str(tmp_path)), ExportModel(str(out))]
    module = make(half_model_dir, adapter=adapter)
    with caplog.at_level("INFO"):
        make_trainer(max_epochs=2, callbacks=callbacks, precision=precision).fit(module, datamodule=rows(rows_dir))
    is_rounded = precision != "bf16-true" or adapter is not None
    assert caplog.text.count("export: weights in bfloat16") == int(is_rounded)
    record = read(out)
    assert record["dtype"] == "bfloat16"
    assert json.loads((out / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    values = make_trainer(precision=precision).validate(make(str(out), epsilon=1.0), rows(rows_dir), verbose=False)
    measured = {name.removeprefix("val/"): value for part in values for name, value in part.items()}
    assert_same_values(record, measured)
    assert record["after"] != record["before"]
    # What is trained on keeps its digits.
    dtypes = {parameter.dtype for parameter in module.lm.parameters() if parameter.requires_grad}
    if precision != "bf16-true":
        assert dtypes == {torch.float32}
        (weight, *_) = (parameter for parameter in module.lm.parameters() if parameter.requires_grad)
        assert not torch.equal(weight, weight.bfloat16().float())


def test_rounding_does_not_change_the_steps(
    half_model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    weights = []
    for dtype in ("float32", "bfloat16"):
        module = make(half_model_dir, keep="last")
        export = ExportModel(str(tmp_path / dtype), dtype=dtype)  # type: ignore[arg-type]
        make_trainer(max_epochs=2, callbacks=[export]).fit(module, datamodule=rows(rows_dir))
        weights.append(module.lm.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    wide, half = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "bfloat16"))
    assert all(torch.equal(wide[name].bfloat16(), half[name]) for name in wide)
    assert (tmp_path / "float32" / "model.safetensors").stat().st_size > 1.9 * (
        tmp_path / "bfloat16" / "model.safetensors"
    ).stat().st_size - 10_000


def test_an_adapter_that_is_merged_for_a_measurement_leaves_the_reference_model_alone(
    half_model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """The KL to the reference model is that between the export and the base, both from their folders."""
    kl = Constraint(KLToReference(), 10.0, FixedMultiplier(0.0))
    module = make(half_model_dir, adapter=LORA, constraints={"kl": kl}, keep="last")
    make_trainer(max_epochs=2, callbacks=[ExportModel(str(tmp_path / "out"))]).fit(module, datamodule=rows(rows_dir))
    value = read(tmp_path / "out")["after"]["constraint/kl/value"]
    exported = make(str(tmp_path / "out"), constraints={"kl": Constraint(KLToReference(), 10.0, FixedMultiplier(0.0))})
    exported.lm.load(torch.float32, device="cpu")
    exported.lm.frozen = AutoModelForCausalLM.from_pretrained(half_model_dir, dtype=torch.float32).eval()
    exported.lm.frozen.requires_grad_(False)
    exported.constraints["nll"].level.set(1.0)  # type: ignore[union-attr]
    values = make_trainer().validate(exported, datamodule=rows(rows_dir), verbose=False)
    measured = {name: number for part in values for name, number in part.items()}
    assert value > 0.001
    assert measured["val/constraint/kl/value"] == pytest.approx(value, rel=1e-4)


def test_the_weights_come_back_if_a_validation_fails(
    half_model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer]
) -> None:
    class Fails(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.weights = [parameter.data.clone() for parameter in pl_module.parameters()]
            pl_module.suite.compute = lambda: 1 / 0

    fails, module = Fails(), make(half_model_dir)
    with pytest.raises(ZeroDivisionError):
        make_trainer(max_epochs=1, callbacks=[fails]).fit(module, datamodule=rows(rows_dir))
    weights = [parameter.data for parameter in module.lm.parameters()]
    assert all(torch.equal(weight, other) for weight, other in zip(weights, fails.weights, strict=True))
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in weights)


def test_a_model_in_memory_is_saved_in_the_dtype_of_its_files(half_model_dir: str, tmp_path: Path) -> None:
    lm = LanguageModel(half_model_dir)
    lm.load(torch.float32, device="cpu")
    for name, dtype, expected in (("own", None, torch.bfloat16), ("wide", torch.float32, torch.float32)):
        saved = load_file(lm.save(tmp_path / name, dtype=dtype) / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {expected}
        reloaded = LanguageModel(str(tmp_path / name))
        reloaded.load(torch.float32, device="cpu")
        assert reloaded.checksum() == lm.checksum()


def test_tied_weights_are_written_once(tiny_lm: Callable[..., LanguageModel], tmp_path: Path) -> None:
    lm = tiny_lm(tie_word_embeddings=True)
    lm.load(torch.float32)
    names = load_file(lm.save(tmp_path / "as it is") / "model.safetensors").keys()
    halves = load_file(lm.save(tmp_path / "half", dtype=torch.float16) / "model.safetensors")
    assert halves.keys() == names
    assert "lm_head.weight" not in names


def test_a_checkpoint_is_exported_in_the_dtype_of_its_run(
    half_model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callbacks = [ResumeCheckpoint(dirpath=str(tmp_path)), ExportModel(str(tmp_path / "out"))]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(make(half_model_dir, keep="last"), datamodule=rows(rows_dir))
    checkpoint = tmp_path / "last-step=2.ckpt"
    again = export_checkpoint(checkpoint, tmp_path / "again", half_model_dir)
    assert again["after"] == read(tmp_path / "out")["after"] != {}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # In another dtype it is a model that was not measured.
    wide = export_checkpoint(checkpoint, tmp_path / "wide", half_model_dir, dtype="float32")
    assert (wide["dtype"], wide["after"], wide["verdict"]) == ("float32", {}, "not decidable")
    assert "not measured" in (tmp_path / "wide" / "README.md").read_text("utf-8")


# Runs in several parts ----------------------------------------------------------------------------------------------------


def fit_part(
    model: str, folder: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path, epochs: int, **settings: Any
) -> LitUnlearn:
    """One part of a run, which resumes the one before by its path; checkpoints and export are in ``tmp_path``."""
    module = make(model, **settings)
    callbacks = [ResumeCheckpoint(dirpath=str(tmp_path)), RunReport(str(tmp_path)), ExportModel(str(tmp_path / "out"))]
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, datamodule=rows(folder), ckpt_path=None if epochs == 1 else str(tmp_path / "last-step=2.ckpt"))
    return module


def test_a_resumed_run_is_judged_by_its_own_epsilon(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    value = fit_part(model_dir, rows_dir, make_trainer, tmp_path, 1, epsilon=9.0).best.values["constraint/nll/value"]  # type: ignore[union-attr]
    fit_part(model_dir, rows_dir, make_trainer, tmp_path, 2, epsilon=value - 1)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    for outcome in (report["constraints"]["nll"], read(tmp_path / "out")["constraints"]["nll"]):
        assert outcome["epsilon"] == value - 1
        assert outcome["slack"] == outcome["epsilon"] - outcome["value"] < 0
    assert "violated" in (tmp_path / "out" / "README.md").read_text("utf-8").partition("## ")[0]


def test_a_resumed_run_needs_its_base(
    model_dir: str,
    rows_dir: str,
    tiny_lm: Callable[..., LanguageModel],
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    fit_part(model_dir, rows_dir, make_trainer, tmp_path, 1)
    other = tiny_lm(seed=7)
    other.load(torch.float32)
    with pytest.raises(CheckpointError, match="base model"):
        fit_part(str(other.save(tmp_path / "other")), rows_dir, make_trainer, tmp_path, 2)
    with pytest.raises(CheckpointError, match="base model"):
        export_checkpoint(tmp_path / "last-step=2.ckpt", tmp_path / "again", str(tmp_path / "other"))


def test_a_best_model_that_is_gone_is_not_kept(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit_part(model_dir, rows_dir, make_trainer, tmp_path, 1, lr=1e-9)
    shutil.rmtree(tmp_path / "out")
    with pytest.warns(UserWarning, match="step 2, is not at"):
        fit_part(model_dir, rows_dir, make_trainer, tmp_path, 2, lr=1e-9)
    record = read(tmp_path / "out")
    assert record["step"] == 4
    assert record["after"] == json.loads((tmp_path / "report.json").read_text("utf-8"))["after"]


def test_a_model_that_is_nowhere_fails_the_run(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """Whatever the reason: here somebody removes it at the end."""

    class Removes(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            shutil.rmtree(tmp_path / "out")

    callbacks = [RunReport(str(tmp_path)), Removes(), ExportModel(str(tmp_path / "out"))]
    with pytest.raises(OutputError, match="step 2, is not at"):
        make_trainer(max_epochs=1, callbacks=callbacks).fit(make(model_dir), datamodule=rows(rows_dir))
    assert (tmp_path / "report.json").is_file()


def test_a_copy_of_a_module_takes_no_lock_along(model_dir: str) -> None:
    """The command line's optimizer leads to the Trainer and its processes, which cannot be copied."""

    class WithLock:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.1)

    module = LitUnlearn(
        LanguageModel(model_dir),
        LogitMargin(),
        {"nll": Constraint(NLL(), 1.0, DualAscent(lr=1.0, init=1.0))},
        WithLock(),
    )
    assert isinstance(copy.deepcopy(module), LitUnlearn)


# Several processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "dtype", "keep"),
    [
        (
            ["--config=hardware/ddp.yaml", "--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.6"],
            "bfloat16",
            "best",
        ),
        (["--config=hardware/fsdp2.yaml", "--model.lm.adapter={r: 4}"], "float32", "best"),
        (["--config=hardware/ddp.yaml", "--model.lm.adapter={r: 4}"], "bfloat16", "last"),
    ],
    ids=["ddp, ema", "fsdp2, lora", "ddp, lora"],
)
def test_two_processes_export_what_they_measured(
    extra: list[str],
    dtype: str,
    keep: str,
    half_model_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    arguments = quick(
        half_model_dir, *extra, "--trainer.devices=2", "--trainer.accelerator=cpu", f"--model.keep={keep}"
    )
    codes, text = run_pair(tmp_path, *arguments)
    assert codes == [0, 0], text[-3000:]
    record = read(tmp_path / "out")
    report = json.loads((tmp_path / "log/run/version_0/report.json").read_text("utf-8"))
    assert record["after"] == report["after"] != record["before"]
    assert record["dtype"] == dtype
    assert {str(t.dtype) for t in load_file(tmp_path / "out/model.safetensors").values()} == {f"torch.{dtype}"}
    data = FictionalAuthors(3, 1, batch_size=5, retain_batch_size=20, max_length=200)
    parts = make_trainer().validate(make(str(tmp_path / "out"), epsilon=1.0), datamodule=data, verbose=False)
    measured = {name.removeprefix("val/"): value for part in parts for name, value in part.items()}
    # Merged in one place and computed beside the base in the other, where nothing is rounded.
    assert_same_values(record, measured, rel=1e-5)
