from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import run_pair
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, StrategyRegistry
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy

from lit_unlearn import NLL, Constraint, FictionalAuthors, FixedMultiplier, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.training import FSDP2Strategy, strategies
from lit_unlearn.training.strategies import check_strategy, leave_process_group

REGISTERED = [*StrategyRegistry.available_strategies(), "auto", "my.own.HorovodStrategy"]
TAKEN = [name for name in REGISTERED if name.startswith(("ddp", "auto", "single_device"))]


@pytest.mark.parametrize("name", [*TAKEN, FSDP2Strategy.__name__, "lightning.pytorch.strategies.ModelParallelStrategy"])
def test_these_strategies_are_taken(name: str) -> None:
    check_strategy(name)


@pytest.mark.parametrize(
    "name", [*sorted(set(REGISTERED) - set(TAKEN)), FSDPStrategy.__name__, DeepSpeedStrategy.__name__, "XLAStrategy"]
)
def test_every_other_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"the strategy '{name}' is refused.*configs/hardware/fsdp2.yaml"):
        check_strategy(name)


def test_a_static_graph_is_refused(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that what Lightning sets is gone afterwards
        monkeypatch.delenv(name)
    module = LitUnlearn(tiny_lm(), LogitMargin(), {"nll": Constraint(NLL(), 5.0, FixedMultiplier(1.0))}, lambda p: None)
    trainer = make_trainer(strategy=DDPStrategy(static_graph=True), max_steps=1)
    with pytest.raises(ValueError, match=r"static_graph=True\) is refused: a step has several backward passes"):
        trainer.fit(module, datamodule=FictionalAuthors(4, 1))
    leave_process_group()


# Weights on the host --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_offloaded_weights_take_the_same_steps_and_resume(tmp_path: Path, model_dir: str) -> None:
    """On CPUs, host and device are one memory: the policy, the gradients' way through it and the checkpoints are tried."""
    exported = {}
    for offload, epochs in (("false", [3]), ("true", [1, 3])):
        folder = tmp_path / offload
        folder.mkdir()
        strategy = f"{{class_path: FSDP2Strategy, init_args: {{cpu_offload: {offload}}}}}"
        for number in epochs:
            options = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.accelerator=cpu"]
            options += ["--model.scheduler=null", "--model.keep=last", "--picture.answers=0", "--ckpt_path=last"]
            codes, text = run_pair(folder, *quick(model_dir, *options, f"--trainer.max_epochs={number}"))
            assert codes == [0, 0], text[-3000:]
        assert ("resumed after step" in text) == (offload == "true")
        exported[offload] = load_file(folder / "out" / "model.safetensors")
    for name, value in exported["false"].items():
        assert torch.equal(exported["true"][name], value)


def test_offloading_shards_says_so_to_fsdp2(monkeypatch: pytest.MonkeyPatch, tiny_lm: Any) -> None:
    policies = []
    monkeypatch.setattr(strategies, "fully_shard", lambda module, mesh, offload_policy: policies.append(offload_policy))
    mesh: Any = {"tensor_parallel": SimpleNamespace(size=lambda: 1), "data_parallel": None}
    for offload in (False, True):
        lm = tiny_lm()
        lm.load(torch.float32, "cpu")
        policies.clear()
        strategies.shard(lm, mesh, torch.device("cuda"), offload)
        assert [isinstance(policy, CPUOffloadPolicy) for policy in policies] == [offload] * 3  # two blocks and the rest
        # Batches go to where the model computes, and not to where its weights are.
        assert lm.input_device.type == ("cuda" if offload else "cpu")
    assert all(policy.pin_memory for policy in policies)
