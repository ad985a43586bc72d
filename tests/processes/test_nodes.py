"""Two nodes on one machine: as one process, and after one of them is lost, the other says so, and both go on from the checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import find_port
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

FIT = [
    *(
        "fit",
        "--config=demo/unlearn.yaml",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.max_epochs=8",
    ),
    *("--data.num_authors=4", "--data.max_length=200", "--model.constraints.nll.warmup_epochs=1"),
    "--model.constraints.nll.epsilon.relative=-0.1",
    *("--report.require_forgotten=false", "--report.require_feasible=false", "--trainer.enable_progress_bar=false"),
    "--ckpt_path=last",
]
NODES = "--trainer.num_nodes=2"


def describe_slurm(rank: int, port: int) -> dict[str, str]:
    """What srun tells a task, as Lightning reads it, for two nodes of one task each."""
    names = {"JOB_ID": "77", "JOB_NAME": "unlearn", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2"}
    names |= {"NODEID": str(rank), "PROCID": str(rank), "LOCALID": "0", "NODELIST": "127.0.0.1"}
    return {**{f"SLURM_{name}": value for name, value in names.items()}, "MASTER_PORT": str(port)}


def start_node(launcher: str, rank: int, port: int, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start what a user starts on one node; what it prints goes to ``node<rank>.txt``."""
    environment, command = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, "-m"]
    if launcher == "torchrun":
        command += ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}", "-m"]
    else:
        environment |= describe_slurm(rank, port)
    with (folder / f"node{rank}.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, "lit_unlearn", *FIT, NODES, *arguments],
            cwd=folder,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def start_nodes(launcher: str, folder: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    port = find_port()
    return [start_node(launcher, rank, port, folder, *arguments) for rank in (0, 1)]


def read_output(folder: Path, rank: int) -> str:
    file = folder / f"node{rank}.txt"
    return file.read_text("utf-8") if file.exists() else ""


def wait_for_checkpoint(folder: Path, step: int) -> None:
    end = time.monotonic() + 120
    while newest_step(folder) < step:
        assert time.monotonic() < end, read_output(folder, 0)[-3000:]
        time.sleep(0.002)


def newest_step(folder: Path) -> int:
    names = [path.name for path in (folder / "runs/demo/unlearn/checkpoints").glob("last-*.ckpt")]
    return max((int(match[1]) for name in names if (match := re.search(r"step=(\d+)", name))), default=0)


def list_children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return list(map(int, listed.stdout.split()))


def lose(node: subprocess.Popen[bytes]) -> None:
    """End a node's processes as a power cut does: torchrun's workers are in sessions of their own."""
    for pid in [node.pid, *list_children(node.pid)]:
        os.kill(pid, signal.SIGKILL)
    node.wait(timeout=10)


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    [*_, report] = sorted(folder.glob("runs/demo/unlearn/version_*/report.json"), key=lambda path: path.stat().st_mtime)
    weights = AutoModelForCausalLM.from_pretrained(folder / "runs/demo/unlearned").state_dict()
    return json.loads(report.read_text(encoding="utf-8")), weights


@pytest.fixture(scope="module")
def alone(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "lit_unlearn", *FIT, f"--model.lm.model={model_dir}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return read_results(folder)


@pytest.mark.parametrize(("launcher", "overlay"), [("torchrun", "ddp"), ("slurm", "fsdp2")])
def test_a_run_on_two_nodes_survives_the_loss_of_one(
    launcher: str, overlay: str, alone: Any, model_dir: str, tmp_path: Path
) -> None:
    arguments = [f"--config=hardware/{overlay}.yaml", "--trainer.devices=1", f"--model.lm.model={model_dir}"]
    nodes = start_nodes(launcher, tmp_path, *arguments)
    wait_for_checkpoint(tmp_path, 8)
    lose(nodes[1])
    # A minute would be enough, too: what must not be is a node that waits for the other one.
    assert nodes[0].wait(timeout=60) == 1, read_output(tmp_path, 0)[-3000:]
    assert "lit-unlearn: error: another process of the run has ended" in read_output(tmp_path, 0)

    nodes = start_nodes(launcher, tmp_path, *arguments)
    codes = [node.wait(timeout=240) for node in nodes]
    printed = read_output(tmp_path, 0)
    assert codes == [0, 0], printed[-3000:]
    assert printed.count("on 2 × cpu") == 2
    assert "resum" in printed

    (expected, expected_weights), (report, weights) = alone, read_results(tmp_path)
    assert report["after"] == pytest.approx(expected["after"], rel=1e-4)
    multiplier = report["constraints"]["nll"]["multiplier_after"]
    assert multiplier == pytest.approx(expected["constraints"]["nll"]["multiplier_after"], rel=1e-5)
    assert multiplier != 100.0
    assert max((weights[name] - value).abs().max().item() for name, value in expected_weights.items()) < 1e-5


def test_a_node_whose_peer_never_comes_gives_up_with_a_sentence(model_dir: str, tmp_path: Path) -> None:
    limit = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:03", f"--model.lm.model={model_dir}"]
    node = start_node("slurm", 0, find_port(), tmp_path, *limit)
    assert node.wait(timeout=60) == 1
    printed = read_output(tmp_path, 0)
    assert "another process of the run has ended, or cannot be reached (Timed out after" in printed
    assert "Traceback" not in printed
