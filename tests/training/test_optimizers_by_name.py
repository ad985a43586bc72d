"""Optimizers are chosen by the name of their class, those of other packages too; a run with each of them resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import quick
from safetensors.torch import load_file

from lit_unlearn import cli

OPTIMIZERS = {
    "fused AdamW": "{class_path: torch.optim.AdamW, init_args: {lr: 1e-3, fused: true}}",
    "AdamW8bit": "{class_path: bitsandbytes.optim.AdamW8bit, init_args: {lr: 1e-3, min_8bit_size: 16}}",
    "Float32Weights": "{class_path: lit_unlearn.training.Float32Weights, init_args: "
    "{optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-3}}}}",
}


def find_dtypes(state: dict[str, Any]) -> Iterator[torch.dtype]:
    for value in state.values():
        if isinstance(value, dict):  # where bitsandbytes puts what must not be converted
            yield from find_dtypes(value)
        elif isinstance(value, torch.Tensor):
            yield value.dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_an_optimizer_by_name_resumes(name: str, model_dir: str, in_tmp: Path) -> None:
    if name == "AdamW8bit":
        pytest.importorskip("bitsandbytes", reason="AdamW8bit is of bitsandbytes")
    weights = []
    for folder, epochs in (("whole", ["3"]), ("parts", ["1", "3"])):
        options = [f"--model.optimizer={OPTIMIZERS[name]}", "--model.scheduler=null", "--model.keep=last"]
        options += ["--trainer.precision=bf16-true", "--ckpt_path=last", "--picture.answers=0"]
        options += [f"--logs.save_dir={folder}", f"--export.dirpath={folder}/out", "--export.dtype=bfloat16"]
        for number in epochs:
            command = quick(model_dir, *options, f"--trainer.max_epochs={number}")
            cli.main(command)
        weights.append(load_file(in_tmp / folder / "out" / "model.safetensors"))
        (checkpoint,) = (in_tmp / folder / "run" / "checkpoints").glob("*.ckpt")
        (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
        dtypes = set(find_dtypes(state["state"][0]))
        assert (torch.uint8 in dtypes) == (name == "AdamW8bit")
    before = load_file(Path(model_dir) / "model.safetensors")
    whole, parts = weights
    for tensor in whole:
        assert torch.equal(whole[tensor], parts[tensor])
    assert any(not torch.equal(whole[tensor], before[tensor].bfloat16()) for tensor in whole)
