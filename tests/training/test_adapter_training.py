"""LoRA in a run: checkpoints hold the adapter alone, the export is the merged model and the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.callbacks import ExportModel


def make(model_dir: str, **adapter: Any) -> LitUnlearn:
    lm = LanguageModel(model_dir, adapter={"r": 4, "lora_alpha": 8, **adapter}, activation_checkpointing=True)
    constraint = Constraint(NLL(), 5.0, DualAscent(lr=5.0, init=3.0))
    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, lambda p: torch.optim.AdamW(p, lr=1e-2))


def data() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


def test_checkpoints_hold_the_adapter_alone_and_resume(
    model_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    whole = make(model_dir)
    torch.manual_seed(0)  # an adapter starts at random
    make_trainer(max_epochs=2).fit(whole, datamodule=data())
    first, trainer = make(model_dir), make_trainer(max_epochs=1)
    torch.manual_seed(0)
    trainer.fit(first, datamodule=data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    trainable = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert saved.keys() == trainable
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 28  # seven layers of two blocks, two matrices each
    resumed = make(model_dir)
    torch.manual_seed(1)
    make_trainer(max_epochs=2).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.constraints["nll"].multiplier.value == whole.constraints["nll"].multiplier.value
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    kept = {name: value for name, value in saved.items() if "layers.0.mlp" not in name and "down" not in name}
    torch.save({**half, "state_dict": kept}, tmp_path / "broken.ckpt")
    trainer = make_trainer(max_epochs=2)
    with pytest.raises(
        ValueError, match=r"the checkpoint does not fit the adapter: 8 tensors, such as 'lm\.model.*down_proj"
    ):
        trainer.fit(make(model_dir), datamodule=data(), ckpt_path=tmp_path / "broken.ckpt")


def test_a_checkpoint_is_measured_with_its_adapter(
    model_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make(model_dir), datamodule=data())
    expected = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    results = make_trainer().validate(
        make(model_dir), datamodule=data(), ckpt_path=tmp_path / "one.ckpt", verbose=False
    )
    values = {name: value for result in results for name, value in result.items()}
    assert values == pytest.approx(expected)
    before = make_trainer().validate(make(model_dir), datamodule=data(), verbose=False)
    assert before[0]["val/forget/margin"] != pytest.approx(expected["val/forget/margin"], rel=1e-3)


def test_the_export_is_the_merged_model_and_the_adapter(
    model_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = make(model_dir)
    make_trainer(max_epochs=2, callbacks=[ExportModel(str(tmp_path / "out"))]).fit(module, datamodule=data())
    assert module.best is not None
    assert module.best.step == 4
    ids = torch.arange(1, 30)[None]
    live = module.lm.model.eval()(input_ids=ids).logits  # type: ignore[misc, union-attr]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(input_ids=ids).logits, live, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert not torch.allclose(base(input_ids=ids).logits, live, atol=1e-3)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(adapted(input_ids=ids).logits, live, rtol=1e-5, atol=1e-6)
