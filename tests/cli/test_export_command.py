"""``lit-unlearn export``: what a checkpoint gives is what the fit itself exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import run_pair

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin, cli
from lit_unlearn.export.checkpoint import read_checkpoint


def fit(model: str, *extra: str, folder: Path = Path()) -> Path:
    """A run whose export is of the last step; its checkpoint."""
    cli.main(quick(model, "--model.keep=last", *extra))
    (checkpoint,) = folder.glob("log/run/checkpoints/last-*.ckpt")
    return checkpoint


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "unlearning.json").read_text())
    return found


def same_files(one: str, other: str, *names: str) -> bool:
    return all((Path(one) / name).read_bytes() == (Path(other) / name).read_bytes() for name in names)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an export that must be refused, and returns what is said."""

    def run(*arguments: str, exit_code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(["export", *arguments])
        assert caught.value.code == exit_code
        return capsys.readouterr().err

    return run


def test_the_weights_and_the_record_are_those_of_the_fit(in_tmp: Path, model_dir: str, capsys: Any) -> None:
    checkpoint = fit(model_dir)
    cli.main(["export", str(checkpoint), "again"])
    assert capsys.readouterr().out.splitlines()[-1] == "model: again"
    own, again = record("out"), record("again")
    assert own["files"] == again["files"]
    assert same_files("out", "again", *own["files"])
    assert {**own, "created": ""} == {**again, "created": ""}
    assert own["config"]["model"]["init_args"]["lm"]["model"] == Path(model_dir).name
    assert own["before"]
    assert own["after"]
    cards = [(Path(name) / "README.md").read_text().splitlines() for name in ("out", "again")]
    assert sum(a != b for a, b in zip(*cards, strict=True)) <= 1  # when it was written


def test_the_last_model_is_not_the_one_that_the_run_keeps(in_tmp: Path, model_dir: str, capsys: Any) -> None:
    """A learning rate that ruins the model, under a bound that only the first epoch's comes near."""
    cli.main(quick(model_dir, "--model.optimizer.lr=0.3", "--trainer.max_epochs=4"))
    kept = record("out")["step"]
    (checkpoint,) = Path().glob("log/run/checkpoints/last-*.ckpt")
    assert record("out")["steps"] == 8 != kept
    cli.main(["export", str(checkpoint), "again"])
    assert f"this is the model of step 8; the run keeps that of step {kept}" in capsys.readouterr().out
    assert not same_files("out", "again", "model.safetensors")
    found = record("again")
    assert (found["step"], found["kept_step"], found["after"]) == (8, kept, {})
    assert found["constraints"]["nll"]["value"] is None
    assert found["constraints"]["nll"]["epsilon"] == record("out")["constraints"]["nll"]["epsilon"]
    assert "**This is the model of step 8, from a checkpoint." in (in_tmp / "again" / "README.md").read_text()


@pytest.mark.slow
def test_an_adapter_is_put_on_the_base_it_was_trained_on(
    in_tmp: Path, model_dir: str, tiny_lm: Callable[..., LanguageModel], refused: Callable[..., str]
) -> None:
    checkpoint = fit(model_dir, "--model.lm.adapter={r: 4, lora_alpha: 16}", "--model.optimizer.lr=0.05")
    cli.main(["export", str(checkpoint), "again"])
    weights = ["model.safetensors", "adapter/adapter_model.safetensors"]
    assert same_files("out", "again", *weights)
    assert not same_files("out", model_dir, "model.safetensors")
    shutil.copytree(model_dir, "moved")
    cli.main(["export", str(checkpoint), "again", "--model", "moved"])
    assert same_files("out", "again", *weights)
    other = tiny_lm(seed=7)
    other.load(torch.float32)
    other.save("other")
    message = refused(str(checkpoint), "again", "--model", "other")
    assert f"'other' is not the base model that the adapter was trained on: that was '{model_dir}'" in message
    assert same_files("out", "again", *weights)  # what was there before


def test_a_model_from_scratch_needs_no_base(in_tmp: Path, tokenizer_dir: str) -> None:
    fields = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    lm = f"--model.lm={{config: {fields}, tokenizer: {tokenizer_dir}}}"
    cli.main(
        [
            "fit",
            "--model=LitFinetune",
            lm,
            "--model.optimizer=torch.optim.SGD",
            "--model.optimizer.lr=0.1",
            "--data=FictionalAuthors",
            "--data.num_authors=3",
            "--data.forget_authors=1",
            "--data.train_on=all",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--logs={save_dir: log, name: run}",
            "--export.dirpath=out",
        ]
    )
    (checkpoint,) = Path().glob("log/run/checkpoints/last-*.ckpt")
    cli.main(["export", str(checkpoint), "again"])
    assert same_files("out", "again", "model.safetensors", "config.json")
    assert record("again")["kind"] == "fine-tuned"


def test_a_checkpoint_made_in_python_needs_the_base(
    in_tmp: Path, model_dir: str, make_trainer: Callable[..., L.Trainer], refused: Callable[..., str]
) -> None:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    module = LitUnlearn(LanguageModel(model_dir), LogitMargin(), {"nll": constraint}, partial(torch.optim.SGD, lr=0.01))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200))
    trainer.save_checkpoint("mine.ckpt")
    module.lm.save("expected")
    assert "`base_model` (--model)" in refused("mine.ckpt", "out")
    assert not Path("out").exists()
    cli.main(["export", "mine.ckpt", "out", "--model", model_dir])
    assert same_files("expected", "out", "model.safetensors", "config.json")
    found = record("out")
    assert found["constraints"]["nll"]["multiplier_after"] == constraint.multiplier.value
    assert found["constraints"]["nll"]["epsilon"] == pytest.approx(5.0)
    assert found["model"]["weights"]
    small = LanguageModel(config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}, tokenizer=model_dir)
    small.load(torch.float32)
    small.save("small")
    assert "do not fit the model 'small'" in refused("mine.ckpt", "again", "--model", "small")


@pytest.mark.slow
def test_results_go_into_the_record_of_an_export(in_tmp: Path, model_dir: str, refused: Callable[..., str]) -> None:
    fit(model_dir)
    data = {"forget": {"rows": 7, "texts": "a", "tokens": "b"}}
    aggregate = {"forget/rougeL_recall": 0.125, "model_utility": 0.5}
    results = {"suite": "tofu", "aggregate": aggregate, "examples": {"forget": [{"answer": "secret"}]}, "data": data}
    results["missing"] = {"forget_quality": "no retain-only results"}
    before = record("out")
    # What `evaluate` writes of an export has the digests of its weights.
    weights = {"model.safetensors": before["files"]["model.safetensors"]}
    Path("tofu.json").write_text(json.dumps({**results, "model": {"name": "out", "files": weights}}))
    for files in ({"model.safetensors": "0" * 64}, {}):
        Path("other.json").write_text(json.dumps({**results, "model": {"name": "retain_only", "files": files}}))
        message = refused("out", "out", "--results", "tofu.json", "other.json")
        assert "the results of 'retain_only' (tofu) were not measured on the files in 'out'" in message
    cli.main(["export", "out", "out", "--results", "tofu.json"])
    cli.main(["export", "out", "out", "--results", "tofu.json"])  # the same file is not added twice
    found, card = record("out"), Path("out/README.md").read_text()
    (benchmark,) = found["benchmarks"]
    assert benchmark["aggregate"] == aggregate
    assert {**found, "benchmarks": []} == before
    assert "| forget/rougeL_recall | 0.125 |" in card
    assert "forget_quality is missing: no retain-only results" in card
    assert "secret" not in card + json.dumps(found)
    with Path("out/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "the files in 'out' are not those that its record was made with" in refused("out", "elsewhere")
    # They are copied as they are.
    for option in ("--dtype=bfloat16", f"--model={model_dir}"):
        assert "give its checkpoint, or leave out" in refused("out", "elsewhere", option)
    assert not Path("elsewhere").exists()


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_in_words(
    in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    assert "there is no checkpoint 'none.ckpt'" in refused("none.ckpt", "out")
    assert "is a folder without 'meta.pt'" in refused(model_dir, "out")
    for name, content in {"text.ckpt": b"hello", "empty.ckpt": b""}.items():
        Path(name).write_bytes(content)
        assert f"'{name}' is damaged, or cannot be read without running its code" in refused(name, "out")
    of_lightning = {"global_step": 3, "callbacks": {}, "loops": {}, "pytorch-lightning_version": "2.5"}
    torch.save(of_lightning, "foreign.ckpt")
    assert "'foreign.ckpt' is no checkpoint of a LitUnlearn or LitFinetune run" in refused("foreign.ckpt", "out")
    torch.save({**of_lightning, "module": L.Trainer}, "code.ckpt")
    assert "without running its code" in refused("code.ckpt", "out")
    checkpoint = fit(model_dir)
    Path("notes").mkdir()
    Path("notes/mine.txt").touch()
    assert "mine.txt" in refused(str(checkpoint), "notes")
    assert "there is no results file 'none.json'" in refused(str(checkpoint), "new", "--results", "none.json")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "`push_to_hub` must be a repository" in refused(str(checkpoint), "new", "--push_to_hub", "a/b/c")
    assert not Path("new").exists()
    # HF_HUB_OFFLINE is set: the export is written, then the upload fails.
    message = refused(str(checkpoint), "new", "--push_to_hub", "me/it", exit_code=1)
    assert "The export is complete at 'new'. To upload it by hand: hf upload me/it new --private" in message
    assert same_files("out", "new", "model.safetensors")


@pytest.mark.slow
def test_a_sharded_checkpoint_is_put_together(tmp_path: Path, model_dir: str, refused: Callable[..., str]) -> None:
    """Two processes, each of which writes its part."""
    overlay = ["--config=hardware/fsdp2.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu", "--model.keep=last"]
    codes, text = run_pair(tmp_path, *quick(model_dir, *overlay))
    assert codes == [0, 0], text[-3000:]
    (checkpoint,) = tmp_path.glob("log/run/checkpoints/last-*.ckpt")
    assert len(list(checkpoint.glob("*.distcp"))) == 2
    assert not any("optimizer" in name for name in read_checkpoint(checkpoint)["state_dict"])
    cli.main(["export", str(checkpoint), str(tmp_path / "again")])
    own, again = record(str(tmp_path / "out")), record(str(tmp_path / "again"))
    assert {**own, "created": ""} == {**again, "created": ""}
    assert same_files(str(tmp_path / "out"), str(tmp_path / "again"), *own["files"])
    (checkpoint / "meta.pt").unlink()  # written last: what an interruption leaves
    assert "is a folder without 'meta.pt'" in refused(str(checkpoint), str(tmp_path / "again"))
