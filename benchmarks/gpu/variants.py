"""Variants of the package's own step: packing, order of passes, attention, adapters, compilation."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from benchmarks.memory import PeakMemory
from benchmarks.random_llama import build_model, count_tokens, make_tiny_step
from benchmarks.step_variants import count_gradient_bytes, make_unlearn_module, run_trainer
from benchmarks.timing import Clock
from lit_unlearn.models.adapter_configs import adapter_config, quantization_config
from lit_unlearn.models.adapters import attach_adapter
from lit_unlearn.models.loading import load_pretrained

if TYPE_CHECKING:
    from benchmarks.step import Job

ADAPTER = {"r": 16, "lora_alpha": 32}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@dataclass(frozen=True)
class StepVariant:
    """One way to run the step.

    Args:
        passes: As for `LitUnlearn`.
        packed: Whether examples share rows; otherwise they are padded.
        attention: As for transformers.
        trained: Everything, an adapter, or an adapter beside weights in 4 bits.
        compiled: Whether the trunk is compiled.
    """

    passes: Literal["joint", "sequential"] = "joint"
    packed: bool = True
    attention: str = "sdpa"
    trained: Literal["full", "lora", "qlora"] = "full"
    compiled: bool = False


# What may break a GPU's context comes last.
VARIANTS = {
    "joint, packed": StepVariant(),
    "sequential, packed": StepVariant(passes="sequential"),
    "joint, padded": StepVariant(packed=False),
    "LoRA": StepVariant(trained="lora"),
    "QLoRA": StepVariant(trained="qlora"),
    "eager attention": StepVariant(attention="eager"),
    "flash attention 2": StepVariant(attention="flash_attention_2"),
    "flash attention 3": StepVariant(attention="flash_attention_3"),
    "flex attention": StepVariant(attention="flex_attention"),
    "compiled": StepVariant(compiled=True),
}


class _Both:
    """Observer that hands every call on to a clock and a meter."""

    def __init__(self, *observers: Any) -> None:
        self._observers = observers

    def on_step_start(self, number: int) -> None:
        for observer in self._observers:
            observer.on_step_start(number)

    def on_step_end(self, number: int, losses: dict[str, float]) -> None:
        for observer in self._observers:
            observer.on_step_end(number, losses)


def measure_variant(variant: StepVariant, job: Job) -> dict[str, Any]:
    """Return seconds, tokens per second and memory of a step.

    Raises:
        ModuleNotFoundError: If the variant needs a package that is not installed.
        NotImplementedError: If the device is a CPU and something would be compiled.
    """
    check_packages(variant, job.device)
    steps = job.make_steps()
    module = make_unlearn_module(build_variant(variant, job), passes=variant.passes)
    module.lm.packs = module.lm.packs and variant.packed
    if variant.compiled:
        module.lm.causal_lm.base_model.compile(dynamic=True)
    # The first time, kernels are chosen, and compiled.
    warmup = [make_tiny_step(), *steps]
    clock = Clock(job.device, skip=len(warmup))
    memory = PeakMemory(len(warmup), len(warmup) + len(steps) - 1, job.device)
    gc.collect()
    run_trainer(module, [*warmup, *steps], _Both(memory, clock), job.device, job.precision)
    seconds = statistics.median(clock.step_seconds())
    return {
        **asdict(variant),
        "packed": module.lm.packs,
        "weights": str(module.lm.causal_lm.dtype).removeprefix("torch."),
        "seconds": seconds,
        "tokens_per_second": count_tokens(steps) / len(steps) / seconds,
        "peak_bytes": memory.peak,
        "extra_bytes": memory.extra_bytes(count_gradient_bytes(module.lm)),
        "first_losses": clock.losses[1],
    }


def check_packages(variant: StepVariant, device: str) -> None:
    """Raise `ModuleNotFoundError` for a package that is missing; transformers would ask the hub for another form of it."""
    is_compiled = variant.compiled or variant.attention == "flex_attention"
    if is_compiled and device == "cpu":
        raise NotImplementedError("not tried on a CPU, where torch compiles for minutes")
    needed = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(variant.attention)
    if variant.trained == "qlora":
        needed = "bitsandbytes"
    if is_compiled:
        needed = "triton"
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise ModuleNotFoundError(f"the package {needed} is not installed")


def build_variant(variant: StepVariant, job: Job) -> Any:
    """Return the model, on its device."""
    # Frozen weights need no digits beyond 16 bits, and flash attention takes no 32-bit ones where nothing casts them.
    needs_half = variant.trained != "full" or variant.attention.startswith("flash")
    is_half = job.precision == "bf16-true" or (needs_half and job.precision != "32-true")
    dtype = torch.bfloat16 if is_half else torch.float32
    model = build_model(job.shape, job.device, dtype)
    model.set_attn_implementation(variant.attention)
    if variant.trained == "qlora":
        # transformers rounds weights on the way from files.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = load_pretrained(folder, use_safetensors=True, dtype=dtype, **quantization_config(NF4, folder, True))
    if variant.trained == "full":
        return model
    torch.manual_seed(0)
    return attach_adapter(model, adapter_config(ADAPTER))
