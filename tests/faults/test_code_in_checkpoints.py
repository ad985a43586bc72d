"""Code in a checkpoint does not run, wherever it is hidden, and the refusal names the file."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import quick
from forked import run_command
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from lit_unlearn import cli
from lit_unlearn.errors import CheckpointError
from lit_unlearn.training.checkpoint_files import check_checkpoint, read_sharded_weights
from lit_unlearn.training.strategies import guard_checkpoint_loading

WEIGHT = torch.arange(6.0).view(2, 3)
LR = "optimizer_0.param_groups.0.lr"
TENSOR = "state_dict.lm.model.weight"
META = {"run": {}, "callbacks": {}, "loops": {}, "global_step": 1, "pytorch-lightning_version": "2"}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """As Lightning writes it: weights, an optimizer with plain values, and `meta.pt`."""
    folder = tmp_path / "last-step=1.ckpt"
    state = {
        "state_dict": {"lm.model.weight": WEIGHT},
        "optimizer_0": {"param_groups": [{"lr": 0.1, "betas": (0.9, 1)}]},
    }
    save(state, checkpoint_id=folder, no_dist=True)
    torch.save(META, folder / "meta.pt")
    return folder


def hide_in_index(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def hide_in_nested_index(folder: Path, payload: Payload) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"deep": [payload]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def hide_in_value(folder: Path, payload: Payload, name: str = LR) -> None:
    """In a shard, as a value that is no tensor: torch reads those without restriction."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    index = MetadataIndex(name)
    info = next(value for key, value in metadata.storage_data.items() if key.fqn == name)
    shard = folder / info.relative_path
    content = shard.read_bytes()
    shard.write_bytes(content + buffer.getvalue())
    info.offset, info.length = len(content), len(buffer.getvalue())
    metadata.storage_data[index] = info
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def hide_in_place_of_tensor(folder: Path, payload: Payload) -> None:
    hide_in_value(folder, payload, next(iter(pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata)))


def hide_in_mark(folder: Path, payload: Payload) -> None:
    torch.save({**META, "run": payload}, folder / "meta.pt")


HIDERS = [hide_in_index, hide_in_nested_index, hide_in_value, hide_in_place_of_tensor, hide_in_mark]


def test_an_honest_checkpoint_is_read(sharded: Path) -> None:
    check_checkpoint(sharded, is_sharding=True)
    (weight,) = read_sharded_weights(sharded, "lm.model.").values()
    assert torch.equal(weight, WEIGHT)


@pytest.mark.parametrize("hide", HIDERS)
def test_code_in_a_sharded_checkpoint_does_not_run(sharded: Path, tmp_path: Path, hide: Callable[..., None]) -> None:
    hide(sharded, Payload(tmp_path / "ran"))
    with pytest.raises(CheckpointError, match=r"last-step=1\.ckpt"):
        check_checkpoint(sharded, is_sharding=True)
    assert not (tmp_path / "ran").exists()
    # What an export reads are tensors alone: it may succeed, but it must not run anything.
    with suppress(CheckpointError):
        read_sharded_weights(sharded, "lm.model.")
    assert not (tmp_path / "ran").exists()


def test_the_payload_of_these_tests_runs_where_it_is_not_refused(sharded: Path, tmp_path: Path) -> None:
    hide_in_value(sharded, Payload(tmp_path / "ran"))
    state = {"optimizer_0": {"param_groups": [{"lr": 0.0, "betas": (0.0, 0)}]}}
    torch.distributed.checkpoint.load(state, checkpoint_id=sharded, no_dist=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"cposix\nsystem\n.", b"not a pickle"])
def test_a_damaged_index_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        check_checkpoint(sharded, is_sharding=True)


def test_a_shard_elsewhere_is_refused(sharded: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="elsewhere"):
        check_checkpoint(sharded, is_sharding=True)


def test_every_strategy_checks_before_it_reads(
    sharded: Path, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    torch.save({"run": Payload(tmp_path / "ran")}, tmp_path / "file.ckpt")
    strategy = make_trainer().strategy
    guard_checkpoint_loading(strategy)
    guard_checkpoint_loading(strategy)  # a trainer sets up again
    with pytest.raises(CheckpointError, match=r"file\.ckpt"):
        strategy.load_checkpoint(tmp_path / "file.ckpt", weights_only=False)
    with pytest.raises(CheckpointError, match=r"sharded.*lit-unlearn export"):
        strategy.load_checkpoint(sharded)
    assert not (tmp_path / "ran").exists()
    torch.save(META, tmp_path / "file.ckpt")
    assert strategy.load_checkpoint(tmp_path / "file.ckpt") == META


@pytest.mark.slow
def test_commands_run_no_code_of_a_sharded_checkpoint(tmp_path: Path, model_dir: str) -> None:
    """Two runs of FSDP2, as a user starts them."""
    overlay = [
        "--config=hardware/fsdp2.yaml",
        "--trainer.devices=1",
        "--trainer.accelerator=cpu",
        "--picture.answers=0",
    ]
    command = quick(model_dir, *overlay)
    code, text = run_command(tmp_path, *command)
    assert code == 0, text[-2000:]
    (checkpoint,) = tmp_path.glob("log/run/checkpoints/last-*.ckpt")
    for hide, name in ((hide_in_nested_index, "export"), (hide_in_value, "resume")):
        copied = tmp_path / f"{hide.__name__}.ckpt"
        shutil.copytree(checkpoint, copied)
        hide(copied, Payload(tmp_path / "ran"))
        # An export asks for tensors alone, so that it never meets the code in another value.
        arguments = [*command, f"--ckpt_path={copied}"] if name == "resume" else ["export", str(copied), "again"]
        code, text = run_command(tmp_path, *arguments)
        assert code == 2, text[-2000:]
        assert "Traceback" not in text
        assert copied.name in text
        assert not (tmp_path / "ran").exists()
    code, text = run_command(tmp_path, *command, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=3")
    assert code == 0, text[-2000:]


def test_export_of_a_damaged_checkpoint_is_refused(sharded: Path, tmp_path: Path, capsys: Any) -> None:
    hide_in_index(sharded, Payload(tmp_path / "ran"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(sharded), str(tmp_path / "out")])
    assert caught.value.code == 2
    assert ".metadata" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
