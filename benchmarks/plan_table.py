"""Plan runs on large models with `lit-unlearn plan`: the table of docs/scale.md. Nothing in it is measured."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown_blocks import markdown_table
from lit_unlearn import cli

GIB = 2**30
# Hidden width, MLP width, layers, heads, heads of keys and values, vocabulary, and whether the head is tied.
MODELS = {
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "3B": (3072, 8192, 28, 24, 8, 128_256, True),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "70B": (8192, 28_672, 80, 64, 8, 128_256, False),
}
# As on the page: every run has the rows of configs/tofu.yaml at 128 tokens, 32 + 32 a step, micro-batches of 4.
RUN = ("--config=configs/tofu.yaml", "--rows=400", "--length=128")
CHECKPOINTED = "--model.lm.activation_checkpointing=true"
LORA = ("--config=configs/hardware/lora.yaml", "--trainer.precision=bf16-true")
FSDP2 = ("--config=configs/hardware/fsdp2.yaml", "--trainer.devices=8")
QUANTISED = "--model.lm.quantization={quant_method: bitsandbytes, load_in_4bit: true, bnb_4bit_quant_type: nf4}"
SETUPS: dict[str, Sequence[str]] = {
    "full": (CHECKPOINTED,),
    "full, FSDP2 × 8": (CHECKPOINTED, *FSDP2),
    "full, bf16-true, FSDP2 × 8": (CHECKPOINTED, *FSDP2, "--trainer.precision=bf16-true"),
    "LoRA": LORA,
    "LoRA, FSDP2 × 8": (*LORA, *FSDP2),
    "QLoRA": (*LORA, QUANTISED),
}


def write_config(folder: Path, name: str) -> None:
    """Write the config of a Llama model of that size, and nothing else, into a folder."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = MODELS[name]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def read_plan(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what `lit-unlearn plan` says."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        cli.main(["plan", *arguments, "--format=json"])
    plan: dict[str, Any] = json.loads(printed.getvalue())
    return plan


def make_table() -> str:
    """Return the table: GiB of a device by model and setup."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in MODELS:
            folder = Path(work) / name
            write_config(folder, name)
            row = [name]
            for options in SETUPS.values():
                plan = read_plan([*RUN, f"--model.lm.model={folder}", *options])
                row.append(f"{plan['peak_bytes'] / GIB:.1f}")
            rows.append(row)
    return markdown_table(["GiB of a device", *SETUPS], rows)
