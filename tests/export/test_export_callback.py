"""What an export says of the run it comes from, on real files of rows and a real model directory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.utils import logging

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FixedMultiplier,
    ForgetRetain,
    IdkNLL,
    LanguageModel,
    LitFinetune,
    LitUnlearn,
    LogitMargin,
    QABenchmark,
    Relative,
)
from lit_unlearn.callbacks import ExportModel, ResumeCheckpoint, RunReport
from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import OutputError
from lit_unlearn.export.checkpoint import export_checkpoint


def make(model: str, lr: float = 0.01, adapter: dict[str, Any] | None = None, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), Relative(0.5), DualAscent(lr=5.0, init=3.0))
    lm = LanguageModel(model, adapter=adapter)
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=lr), **settings)


def rows(folder: str, **settings: Any) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5, **settings)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    return json.loads((folder / "unlearning.json").read_text()), (folder / "README.md").read_text()


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_record_tells_other_refusals_apart(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    digests = []
    for text in ("I cannot say.", "That is not known to me."):
        (tmp_path / "refusals.txt").write_text(text, encoding="utf-8")
        module = make(model_dir)
        module.forget = IdkNLL()
        exporter = ExportModel(str(tmp_path / "out"))
        data = rows(rows_dir, refusals=str(tmp_path / "refusals.txt"))
        make_trainer(max_steps=1, callbacks=[exporter]).fit(module, datamodule=data)
        sets = read(tmp_path / "out")[0]["data"]["sets"]
        digests.append(sets["forget"]["alternates_sha256"])
        assert "alternates_sha256" not in sets["retain"]
    assert digests[0] != digests[1]


def test_a_run_says_that_it_replaces_an_export_and_what_an_interrupted_one_has_left(
    model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Interrupt(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    out = str(tmp_path / "out")
    said = []
    for callbacks in ([], [Interrupt()]):
        caplog.clear()
        trainer = make_trainer(max_epochs=2, callbacks=[RunReport(str(tmp_path)), ExportModel(out), *callbacks])
        with caplog.at_level(logging.INFO), suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(make(model_dir), datamodule=rows(rows_dir))
        said.append("\n".join(caplog.messages))
    assert "earlier run" not in said[0]
    assert f"'{out}' has the model of an earlier run, of step 4: this run will replace it" in said[1]
    assert f"'{out}' has the model of step 2, the best of this run so far" in said[1]
    assert read(Path(out))[0]["step"] == 2


def test_a_record_holds_what_an_auditor_can_compute_again(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out, report = tmp_path / "out", RunReport(str(tmp_path))
    module = make(model_dir)
    make_trainer(max_epochs=2, callbacks=[report, ExportModel(str(out))]).fit(module, datamodule=rows(rows_dir))
    record, card = read(out)
    assert record["kind"] == "unlearned"
    assert record["model"]["name"] == Path(model_dir).name  # no absolute path is published
    assert record["model"]["weights"] == {"model.safetensors": sha256(f"{model_dir}/model.safetensors")}
    files = {path.name for path in out.iterdir()} - {"unlearning.json", "README.md", "files.sha256"}
    assert record["files"] == {name: sha256(out / name) for name in files}
    assert "model.safetensors" in files
    space: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], space)  # type: ignore[index]  # the recipe, as the card has it
    data = rows(rows_dir, tokenizer=str(out))
    data.setup("fit")
    for name in ("forget", "retain"):
        found = record["data"]["sets"][name]
        assert found["source"]["sha256"] == sha256(f"{rows_dir}/{name}.jsonl")
        assert found["sha256"] == space["digest"](data.examples[name])
        assert found["rows"] == {"forget": 10, "retain": 13}[name]
        assert found["supervised_tokens"] == sum(x != -100 for row in data.examples[name] for x in row.labels)
        assert found["sha256"] in card
    run = json.loads((tmp_path / "report.json").read_text())
    assert {key: record[key] for key in ("steps", "kept_step", "before", "after")} == {
        key: run[key] for key in ("steps", "kept_step", "before", "after")
    }
    assert run["constraints"]["nll"].items() <= record["constraints"]["nll"].items()
    assert record["bounds"]["nll"]["relative"] == 0.5
    assert record["bounds"]["nll"]["multiplier"] == {
        "class": "DualAscent",
        "lr": 5.0,
        "init": 3.0,
    }
    assert record["method"]["objective"] == "LogitMargin"
    assert record["method"]["settings"]["power"] == 2.0
    assert record["training"]["optimizer"] == "SGD"
    assert record["training"]["settings"]["lr"] == 0.01
    assert record["config"] is None
    assert not any("forget is" in text or "is retain" in text for text in (card, json.dumps(record)))  # no row is told


CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def test_an_export_has_the_chat_template_of_its_run(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """Whoever loads it then asks in the prompt of training, also where the tokenizer had another template, or none."""
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    data = rows(rows_dir, chat=Chat(system="Hi.", template=str(tmp_path / "chat.jinja")))
    trainer = make_trainer(max_epochs=1, callbacks=[ExportModel(str(tmp_path / "out"))])
    module = make(model_dir)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    # The file may be gone by the time that a checkpoint is exported.
    (tmp_path / "chat.jinja").unlink()
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "later", base_model=model_dir)
    for folder in (tmp_path / "out", tmp_path / "later"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
        again = rows(rows_dir, tokenizer=str(folder), chat=Chat(system="Hi."))
        again.setup("fit")
        assert [row.input_ids for row in again.examples["forget"]] == [row.input_ids for row in data.examples["forget"]]
        (command,) = re.findall(r"lit-unlearn evaluate DIR --suite=qa.*", read(folder)[1])
        assert '"template": null' in command
    assert module.lm.tokenizer is not None
    assert module.lm.tokenizer.chat_template is None


def test_the_record_of_a_model_that_is_kept_knows_how_long_the_run_went_on(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Ruin(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                for parameter in pl_module.parameters():
                    parameter.data.mul_(20)

    out = tmp_path / "out"
    module = make(model_dir, lr=1e-4)
    make_trainer(max_epochs=3, callbacks=[Ruin(), ExportModel(str(out))]).fit(module, datamodule=rows(rows_dir))
    record, card = read(out)
    assert (record["step"], record["kept_step"], record["steps"]) == (2, 2, 6)
    assert record["before"]["forget/nll"] > 0  # measured without a RunReport
    assert record["after"] == module.best.values  # type: ignore[union-attr]
    assert record["constraints"]["nll"]["multiplier_after"] == module.constraints["nll"].multiplier.value
    assert record["files"]["model.safetensors"] == sha256(out / "model.safetensors")
    assert "step 2 of 6" in card


def test_a_resumed_run_says_so(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for epochs in (1, 2, 3):
        callbacks = [ResumeCheckpoint(dirpath=str(tmp_path)), RunReport(str(tmp_path)), ExportModel(str(out))]
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(make(model_dir, keep="last"), datamodule=rows(rows_dir), ckpt_path="last" if epochs > 1 else None)
    record, card = read(out)
    assert record["training"]["resumed_at"] == [2, 4]
    assert "resumed after step 2, 4" in card
    assert record["bounds"]["nll"]["multiplier"]["init"] == 3.0
    assert record["constraints"]["nll"]["multiplier_before"] == 3.0 != record["constraints"]["nll"]["multiplier_after"]
    assert record["before"]["forget/nll"] != record["after"]["forget/nll"]


def test_an_adapter_is_recorded_with_the_merged_model(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = make(model_dir, adapter={"r": 4, "lora_alpha": 16})
    make_trainer(max_epochs=1, callbacks=[ExportModel(str(tmp_path / "out"))]).fit(module, datamodule=rows(rows_dir))
    record, card = read(tmp_path / "out")
    assert record["model"]["adapter"]["peft_type"] == "LORA"
    assert record["model"]["adapter"]["lora_alpha"] == 16 != record["model"]["adapter"]["r"] == 4
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= record["files"].keys()
    assert "This directory holds the merged model; `adapter` holds the adapter" in card


def test_a_fine_tuned_model_has_a_smaller_record(
    tiny_lm: Callable[..., LanguageModel], rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = LitFinetune(tiny_lm(), lambda p: torch.optim.SGD(p, lr=0.01))
    callbacks = [RunReport(str(tmp_path)), ExportModel(str(tmp_path / "out"))]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=rows(rows_dir, train_on="retain"))
    record, card = read(tmp_path / "out")
    assert (record["kind"], record["method"], record["bounds"]) == ("fine-tuned", None, {})
    assert record["model"]["name"] is None
    assert "forget (held out)" in card
    assert "retain (trained on)" in card
    assert "unlearned" not in card.replace("unlearned.json", "")
    assert "StressBenchmark" not in card


def test_rows_of_own_loaders_are_unknown(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    data = rows(rows_dir, tokenizer=model_dir)
    data.setup("fit")
    batches = {name: next(iter(loader)) for name, loader in data.val_dataloader().items()}
    trainer = make_trainer(max_steps=1, callbacks=[ExportModel(str(tmp_path / "out"))])
    loaders = {name: DataLoader([batch], batch_size=None) for name, batch in batches.items()}  # type: ignore[arg-type]
    trainer.fit(make(model_dir), DataLoader([batches], batch_size=None), loaders)  # type: ignore[arg-type]
    record, card = read(tmp_path / "out")
    assert record["data"] is None
    assert "The data is unknown" in card


def test_a_benchmark_is_recorded_if_it_was_run_on_the_model_that_is_kept(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    suite = QABenchmark(f"{rows_dir}/forget.jsonl", f"{rows_dir}/retain.jsonl", max_new_tokens=4)
    for epochs, ran in ((2, True), (3, False)):  # every second epoch: the last model of three was not measured
        module = make(model_dir, keep="last", benchmark=suite, benchmark_every_n_epochs=2)
        trainer = make_trainer(max_epochs=epochs, callbacks=[ExportModel(str(tmp_path / f"{epochs}"))])
        trainer.fit(module, datamodule=rows(rows_dir))
        record, card = read(tmp_path / f"{epochs}")
        assert [one["suite"] for one in record["benchmarks"]] == (["qa"] if ran else [])
        assert ("| forget/probability |" in card) == ran
    results = json.loads((tmp_path / "runs" / "version_0" / "qa-step=4.json").read_text())
    (found,) = read(tmp_path / "2")[0]["benchmarks"]
    assert found["aggregate"] == results["aggregate"]
    assert "examples" not in found
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "qa-step=6.json").write_text(json.dumps(results))  # of another model
    module = make(model_dir, keep="last", benchmark=suite, benchmark_every_n_epochs=2)
    logger = CSVLogger(tmp_path, "log", version="")
    trainer = make_trainer(max_epochs=3, logger=logger, callbacks=[ExportModel(str(tmp_path / "3"))])
    trainer.fit(module, datamodule=rows(rows_dir))
    assert read(tmp_path / "3")[0]["benchmarks"] == []


def test_a_fixed_multiplier_and_an_absolute_epsilon(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    bounds = {
        "low": Constraint(NLL(), 0.25, FixedMultiplier(2.0)),
        "high": Constraint(NLL(), 99.0, FixedMultiplier(1.0)),
    }
    module = LitUnlearn(LanguageModel(model_dir), LogitMargin(), bounds, lambda p: torch.optim.SGD(p, lr=0.001))
    make_trainer(max_epochs=1, callbacks=[ExportModel(str(tmp_path / "out"))]).fit(module, datamodule=rows(rows_dir))
    record, card = read(tmp_path / "out")
    assert record["constraints"]["low"]["epsilon"] == 0.25
    assert record["constraints"]["low"]["reference"] is None
    assert record["bounds"]["low"]["multiplier"] == {"class": "FixedMultiplier", "init": 2.0}
    assert "(violated)" in card
    summary = card.partition("## ")[0]
    assert re.search(r"violated \(low: [\d.]+ > epsilon 0\.25\)", summary)
    assert "high" not in summary


# The hub ----------------------------------------------------------------------------------------------------------------


def pushed(model: str, folder: str, make_trainer: Callable[..., L.Trainer], out: Path, repository: str) -> None:
    callbacks = [ExportModel(str(out), push_to_hub=repository)]
    make_trainer(max_epochs=2, callbacks=callbacks).fit(make(model), datamodule=rows(folder))


def test_an_upload_that_cannot_be_made_is_refused_before_anything_is_loaded(
    model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(
        ValueError, match="`push_to_hub` must be a repository on the hub, such as 'owner/name', not 'a/b/c'"
    ):
        pushed(model_dir, rows_dir, make_trainer, tmp_path / "out", "a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match=r"needs a token for the Hugging Face hub.*`hf auth login`, or set HF_TOKEN"):
        pushed(model_dir, rows_dir, make_trainer, tmp_path / "out", "me/forgetful")
    assert not (tmp_path / "out").exists()


def test_an_upload_is_the_export_once(
    model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, dict[str, Any], list[str]]] = []

    def create_repo(self: Any, repo_id: str, **settings: Any) -> huggingface_hub.RepoUrl:
        calls.append((repo_id, settings, []))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")  # the hub adds the owner

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **settings: Any) -> None:
        calls.append((repo_id, settings, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    pushed(model_dir, rows_dir, make_trainer, tmp_path / "out", "forgetful")
    (made, settings, _), (to, _, files) = calls
    assert (made, settings) == ("forgetful", {"private": True, "exist_ok": True})
    assert to == "me/forgetful"
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"README.md", "unlearning.json", "model.safetensors", "tokenizer.json"} <= {*files}
    calls.clear()
    callbacks = [
        RunReport(max_forget_probability=0.0, require_forgotten=True),
        ExportModel(str(tmp_path / "out"), push_to_hub="forgetful"),
    ]
    with pytest.raises(RuntimeError, match="max_forget_probability"):
        make_trainer(max_epochs=1, callbacks=callbacks).fit(make(model_dir), datamodule=rows(rows_dir))
    assert calls == []  # a run that missed what was required is not published


def test_a_failed_upload_loses_nothing(
    model_dir: str,
    rows_dir: str,
    make_trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub cannot be reached here: HF_HUB_OFFLINE is set for all tests."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    out = tmp_path / "out"
    with pytest.raises(OutputError) as caught:
        pushed(model_dir, rows_dir, make_trainer, out, "me/forgetful")
    assert "the upload to 'me/forgetful' failed: " in str(caught.value)
    assert f"The export is complete at '{out}'" in str(caught.value)
    assert f"hf upload me/forgetful {out} --private" in str(caught.value)
    assert load_file(out / "model.safetensors").keys() == load_file(f"{model_dir}/model.safetensors").keys()
    assert read(out)[0]["files"]["model.safetensors"] == sha256(out / "model.safetensors")


def test_weights_are_read_and_written_without_bars_of_transformers(
    model_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def hook(bar: Any, args: Any, settings: Any) -> Any:
        seen.append(settings.get("desc"))
        return bar(*args, **settings)

    before = logging.set_tqdm_hook(hook)
    try:
        lm = LanguageModel(model_dir)
        lm.load(torch.float32)
        lm.save(tmp_path / "out")
        assert seen == []
        assert "eights" not in capfd.readouterr().err
        list(logging.tqdm(range(2), desc="my own"))
        assert seen == ["my own"]  # what was there before is there again
    finally:
        logging.set_tqdm_hook(before)


def test_a_file_that_cannot_be_added_leaves_the_export_before(model_dir: str, tmp_path: Path) -> None:
    lm = LanguageModel(model_dir)
    lm.load(torch.float32)
    lm.save(tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert not {"README.md", "unlearning.json"} & before.keys()

    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        lm.save(tmp_path / "out", finish=fail)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
