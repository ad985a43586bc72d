"""A saved adapter in a run: its reference, its checkpoints, its export and its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick

from lit_unlearn import NLL, NPO, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, cli
from lit_unlearn.utils.io import file_digest


@pytest.fixture
def adapter_dir(model_dir: str, tmp_path: Path) -> str:
    """As people have it: peft's folder, with the path of the base model."""
    torch.manual_seed(0)
    lm = LanguageModel(model_dir, adapter={"r": 4, "lora_alpha": 8})
    lm.load(torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model: Any = lm.model
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def make(adapter_dir: str) -> LitUnlearn:
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    lm = LanguageModel(adapter_dir)
    return LitUnlearn(lm, NPO(), {"nll": constraint}, lambda p: torch.optim.AdamW(p, lr=1e-2))


def data() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


def test_a_run_resumes_with_the_adapter_and_its_reference(
    adapter_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    whole = make(adapter_dir)
    make_trainer(max_epochs=2).fit(whole, datamodule=data())
    first, trainer = make(adapter_dir), make_trainer(max_epochs=1)
    trainer.fit(first, datamodule=data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert all(".default." in name for name in saved)

    resumed = make(adapter_dir)
    make_trainer(max_epochs=2).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    assert resumed.reference_cache.values == whole.reference_cache.values


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_the_export_of_a_checkpoint_is_that_of_the_run(
    merge: bool, adapter_dir: str, model_dir: str, in_tmp: Path
) -> None:
    cli.main(quick(adapter_dir, "--model.keep=last", f"--model.lm.merge_adapter={json.dumps(merge)}"))
    (checkpoint,) = Path().glob("log/run/checkpoints/last-*.ckpt")
    cli.main(["export", str(checkpoint), "again"])
    own, again = (json.loads(Path(name, "unlearning.json").read_text()) for name in ("out", "again"))
    assert own["files"] == again["files"]
    assert ("adapter/adapter_model.safetensors" in own["files"]) != merge

    assert own["model"]["weights"] == {
        "adapter_model.safetensors": file_digest(Path(adapter_dir) / "adapter_model.safetensors")
    }
    base = own["model"]["base"]
    assert base["weights"] == {"model.safetensors": file_digest(Path(model_dir) / "model.safetensors")}
    assert (base["name"], base["merged"]) == (Path(model_dir).name, merge)
    card = Path("out", "README.md").read_text(encoding="utf-8")
    assert f"this adapter, {'merged into' if merge else 'on'} `{Path(model_dir).name}`" in card
    assert base["weights"]["model.safetensors"] in card
