"""`lit-unlearn plan`: counts that are known, activations as autograd saves them, and fits whose memory was planned."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.plan_table import MODELS, read_plan, write_config
from lit_unlearn import cli
from lit_unlearn.models.memory_plan import PassSizes, Setup, activation_bytes
from lit_unlearn.models.model_sizes import measure_model
from lit_unlearn.objectives import NLL, UNDIAL, KLToUniform, LogitMargin
from lit_unlearn.training.step_sizes import count_steps, head_kind

TOFU = ("--config=tofu.yaml", "--length=100")
TINY = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but config.json for each size."""
    folder = tmp_path_factory.mktemp("configs")
    for name in MODELS:
        write_config(folder / name, name)
    return folder


def saved_bytes(layers: int, adapter: dict[str, Any] | None, dtype: torch.dtype, is_mixed: bool) -> int:
    """What autograd saves of packed rows, beside the weights and autocast's copies of them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**TINY, "num_hidden_layers": layers})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **adapter))
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    saved, keep = dict[int, int](), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep.append(tensor)  # so that no other tensor gets its memory
        if tuple(tensor.shape) not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids, positions = torch.randint(500, (2, 128)), torch.arange(64).repeat(2, 2)
    base = model if adapter is None else model.get_base_model()
    with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
        base.model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(saved.values())


@pytest.mark.parametrize("adapter", [None, {"r": 8}, {"r": 8, "lora_dropout": 0.1}], ids=["full", "lora", "dropout"])
@pytest.mark.parametrize(
    ("dtype", "is_mixed"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["32-true", "bf16-true", "bf16-mixed"],
)
def test_activations_are_what_autograd_saves(
    adapter: dict[str, Any] | None, dtype: torch.dtype, is_mixed: bool
) -> None:
    """Of two models, one with a block more than the other."""
    expected = saved_bytes(2, adapter, dtype, is_mixed) - saved_bytes(1, adapter, dtype, is_mixed)
    model = measure_model({"config": TINY, "adapter": adapter}, dtype)
    planned = activation_bytes(model, Setup(dtype, is_mixed, "cpu"), PassSizes(2, 128, True, ()))
    assert planned * 2 * 128 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "parameters"), [("1B", 1_235_814_400), ("8B", 8_030_261_248)])
def test_known_models_are_planned_from_their_config(name: str, parameters: int, folders: Path) -> None:
    plan = read_plan([*TOFU, f"--model.lm.model={folders / name}", "--rows=400"])
    assert plan["parameters"] == plan["trained_parameters"] == parameters
    assert (plan["steps_per_epoch"], plan["steps"]) == (13, 130)
    parts = plan["moments"]["backward ends"]
    assert parts["weights"] == parts["gradients"] == 4 * parameters
    assert parts["optimizer states"] == 8 * parameters
    assert "assumed" in plan["rows"]


def test_sharding_adapters_and_bits_take_less(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = [*TOFU, f"--model.lm.model={folders / '8B'}"]
    whole = read_plan(full)
    sharded = read_plan([*full, "--config=hardware/fsdp2.yaml", "--trainer.devices=8"])
    assert sharded["strategy"] == "fsdp2"
    parts = sharded["moments"]["optimizer step"]
    assert parts["optimizer states"] == whole["moments"]["optimizer step"]["optimizer states"] // 8
    lora = read_plan([*full, "--config=hardware/lora.yaml", "--trainer.precision=bf16-true"])
    assert (
        lora["moments"]["validation"]["copies"] > 2 * 8_030_261_248 - 1
    )  # files of 16 bits: what is measured is rounded
    bits = "--model.lm.quantization={quant_method: bitsandbytes, load_in_4bit: true}"
    quantised = read_plan([*full, "--config=hardware/lora.yaml", "--trainer.precision=bf16-true", bits])
    assert quantised["peak_bytes"] < lora["peak_bytes"] < sharded["peak_bytes"] < whole["peak_bytes"]
    with pytest.raises(SystemExit) as refused:
        cli.main(["plan", *full, "--config=hardware/ddp.yaml"])
    assert refused.value.code == 2
    assert "trainer.devices" in capsys.readouterr().err


def test_local_rows_are_read_and_nothing_is_written(
    model_dir: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config=demo/unlearn.yaml", f"--model.lm.model={model_dir}", "--data.num_authors=3"]
    cli.main(["plan", *options, "--data.forget_authors=1", "--data.max_length=200"])
    printed = capsys.readouterr().out
    assert "10 forget, 20 retain examples as read" in printed
    assert "steps: 2 per epoch, 50 in all" in printed
    assert "peak of a device" in printed
    assert list(in_tmp.iterdir()) == []


def test_a_model_that_is_not_there_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("./nothing", "no-such/model"):
        with pytest.raises(SystemExit) as refused:
            cli.main(["plan", *TOFU, f"--model.lm.model={name}"])
        assert refused.value.code == 2
        assert "model.lm.model" in capsys.readouterr().err


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    printed = capsys.readouterr().out
    assert "--length" in printed
    assert "config.json" in printed


@pytest.mark.parametrize(
    ("objective", "kind"), [(NLL, "nll"), (LogitMargin, "margin"), (KLToUniform, "dense"), (UNDIAL, "dense")]
)
def test_objectives_say_how_they_use_the_head(objective: Any, kind: str) -> None:
    assert head_kind(objective()) == kind


def test_steps_are_bounded_by_what_comes_first() -> None:
    assert count_steps(13, 10, -1) == 130
    assert count_steps(13, 10, 50) == 50
    assert count_steps(None, 10, 50) == 50
    assert count_steps(None, 10, -1) is None


@pytest.mark.slow
def test_fits_take_what_was_planned() -> None:
    from benchmarks import plan

    results = plan.measure_cases(["full", "full, larger batch", "LoRA"])
    for name, values in results.items():
        assert values["plan"] == pytest.approx(values["measured"], rel=plan.TOLERANCE), json.dumps({name: values})
