"""Strategies of the Trainer: those that take exact steps, and sharding a model with FSDP2."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from lit_unlearn.errors import ConfigError, LitUnlearnError, OutputError
from lit_unlearn.models import LanguageModel
from lit_unlearn.training.checkpoint_files import check_checkpoint
from lit_unlearn.utils.distributed import is_lost_process
from lit_unlearn.utils.io import describe_os_error

_REASONS = {
    "fsdp": "FSDP1 fails under manual optimisation, which the primal-dual step needs",
    "deepspeed": "DeepSpeed keeps only the last of a step's backward passes, so the gradient would be wrong",
}


def check_strategy(name: str) -> None:
    """Refuse a strategy that would take wrong steps, or has not been shown to take right ones.

    Args:
        name: As in ``--trainer.strategy``, or the class name or path of a strategy.

    Raises:
        ConfigError: If only `ddp` or FSDP2 would do.
    """
    kind = _kind_of(name)
    if shards(name) or kind in ("auto", "singledevice") or kind.startswith("ddp"):
        return
    reason = next((text for key, text in _REASONS.items() if key in kind), "it has not been shown to take exact steps")
    raise ConfigError(
        f"the strategy '{name}' is refused: {reason}. Use `ddp`, or FSDP2 to shard the model over the devices: "
        "--config configs/hardware/fsdp2.yaml."
    )


def shards(name: str) -> bool:
    """Return whether a strategy of that name shards the model over the devices."""
    return _kind_of(name) in ("fsdp2", "modelparallel")


def _kind_of(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("_", "").removesuffix("strategy")


def guard_checkpoint_loading(strategy: Strategy) -> None:
    """Make a strategy refuse checkpoints with code in them, and those that it cannot read, whatever ``weights_only`` says.

    Not an override: every strategy has its own way to read, and before it reads, no one knows which checkpoint it will be.

    Args:
        strategy: The Trainer's; its `load_checkpoint` raises `CheckpointError` from now on.
    """
    load = strategy.load_checkpoint
    if getattr(load, "is_guarded", False):
        return

    def load_checked(checkpoint_path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        check_checkpoint(Path(checkpoint_path), isinstance(strategy, ModelParallelStrategy))
        return load(checkpoint_path, *args, **settings)

    load_checked.is_guarded = True  # type: ignore[attr-defined]
    strategy.load_checkpoint = load_checked  # type: ignore[method-assign]


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes, with checkpoints that are whole or absent.

    Lightning's own class takes tensor parallelism for the default and needs the number of devices spelt out; it writes
    a distributed checkpoint into its final folder, where an interruption leaves a part of one.

    Args:
        save_distributed_checkpoint: Whether every process writes its shard (a folder), or the first one everything (a
            file, for which it must hold the whole model and optimizer in its memory).
        process_group_backend: ``None`` for NCCL on GPUs and Gloo on CPUs.
        timeout: How long a process waits for the others, at the start and in every collective call, before it gives up.
        cpu_offload: Whether sharded weights, gradients and optimizer states are in the memory of the host. The optimizer steps
            there, and a GPU has only the blocks that it computes with.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        cpu_offload: bool = False,
    ) -> None:
        if cpu_offload and process_group_backend is None and torch.cuda.is_available():
            # Norms of gradients are summed where these are.
            process_group_backend = "cpu:gloo,cuda:nccl"
        self.cpu_offload = cpu_offload
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Shard over all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move to the device what is not sharded: with ``cpu_offload``, FSDP2 itself sends weights there and back."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        module = cast(nn.Module, self.model)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.root_device)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write beside the final path, and move there when all processes have finished."""
        final = Path(self.broadcast(str(filepath)))
        unfinished = unfinished_checkpoint(final)
        if self.is_global_zero and unfinished.is_dir():  # of a run that was killed
            shutil.rmtree(unfinished)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, unfinished, storage_options)
        except LitUnlearnError:
            raise
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_lost_process(error):
                raise
            # Of all processes, if one of them fails: torch tells the others.
            if self.is_global_zero:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OutputError(f"'{final}' cannot be written: {_describe_failure(error)}") from error
        self.barrier()
        if self.is_global_zero:
            if final.is_dir():
                shutil.rmtree(final)
            unfinished.replace(final)
        self.barrier()


def unfinished_checkpoint(final: Path) -> Path:
    """Return the path beside a checkpoint's own under which it is written."""
    return final.with_name(f".{final.name}.unfinished")


def _describe_failure(error: OSError | RuntimeError | CheckpointException) -> str:
    reason: BaseException = error
    if isinstance(error, CheckpointException):
        # By process, each with its traceback.
        reason = next(iter(error.failures.values()))[0]
    return describe_os_error(reason) if isinstance(reason, OSError) else str(reason)


def shard(lm: LanguageModel, mesh: DeviceMesh, device: torch.device, cpu_offload: bool = False) -> None:
    """Shard a loaded model with FSDP2, one group of parameters per transformer block and one for the rest; once.

    Args:
        lm: Loaded; its forward is where all weights are whole.
        mesh: Lightning's, with its dimensions ``data_parallel`` and ``tensor_parallel``.
        device: Where the model computes.
        cpu_offload: Whether the shards are in the memory of the host.

    Raises:
        ConfigError: If tensors are to be split over devices, too, or the model is quantised.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "tensor parallelism is not supported: give ModelParallelStrategy `tensor_parallel_size: 1` and the number of "
            "devices as `data_parallel_size`, or use FSDP2Strategy (configs/hardware/fsdp2.yaml)."
        )
    from transformers import PreTrainedModel

    if any(isinstance(module, FSDPModule) for module in lm.modules()):
        return
    models = [module for module in lm.modules() if isinstance(module, PreTrainedModel)]
    if any(getattr(model, "is_quantized", False) for model in models):
        raise ConfigError(
            "a quantised model cannot be sharded: use `ddp`, with which every device holds it, or leave out "
            "`model.lm.quantization`."
        )
    blocks = set[str]()
    for model in models:
        blocks.update(model._no_split_modules or ())  # accelerate keeps the same modules together
    # Memory can be pinned for a GPU alone.
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for module in lm.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh["data_parallel"], offload_policy=policy)
    fully_shard(lm, mesh=mesh["data_parallel"], offload_policy=policy)
    # Generation calls the model inside, and not `forward`.
    register_fsdp_forward_method(lm, "run_with_whole_weights")
    if cpu_offload:
        lm.compute_device = device


def whole_state(lm: LanguageModel) -> dict[str, Tensor] | None:
    """Return the state of a sharded model, gathered to the CPU of the first process; ``None`` if it is not sharded.

    A collective call: every process must make it. The others get an empty dict.
    """
    module: nn.Module = lm
    if not isinstance(module, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(lm, options=options)
    # Not the weights of a frozen reference model or a teacher, which lie beside it.
    prefix = "model."
    return {name.removeprefix(prefix): cast(Tensor, value) for name, value in state.items() if name.startswith(prefix)}


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, over all processes where they are sharded."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def leave_process_group() -> None:
    """End the communication between processes: left to the exit of the interpreter, it aborts now and then."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
