"""Llama models with random weights, and training batches whose examples are as long as TOFU's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lit_unlearn.data.example import IGNORED, Example, collate

# One optimizer step's batch of every stream, as the data modules of the package give it.
Step = dict[str, list[Example]]
PaddedStep = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model; a ``tied`` head shares the embedding's weight."""

    vocabulary: int
    hidden: int = 512
    intermediate: int = 2048
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    tied: bool = False

    def __str__(self) -> str:
        head = "tied" if self.tied else "untied"
        return f"{self.layers} layers × {self.hidden}, V = {self.vocabulary:,}, {head} head"


SHAPES = {
    "toy": Shape(1_000, hidden=64, intermediate=128, layers=2, heads=2, kv_heads=2),
    "32k": Shape(32_000),
    "128k": Shape(128_256),
    # The sizes of SmolLM2-135M, and of Llama-3.2-1B.
    "135m": Shape(49_152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, tied=True),
    "1b": Shape(128_256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, tied=True),
}


def build_model(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return a transformers model with the same random weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).train()


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_trunk_parameters(shape: Shape) -> int:
    """Return the number of parameters that belong neither to the embedding nor to the head."""
    # On the meta device a model has shapes and no memory.
    trunk = build_model(shape, "meta").base_model
    return count_parameters(trunk) - trunk.get_input_embeddings().weight.numel()


def make_steps(
    shape: Shape,
    number: int,
    *,
    rows: int = 8,
    scale: float = 1.0,
    streams: Sequence[str] = ("forget", "retain"),
    prefix: int = 0,
) -> list[Step]:
    """Return batches of random tokens, the same at every call.

    Examples have a prompt of about 20 tokens (12 to 30) without labels and an answer of about 42 (12 to 80) with labels:
    nearly the spread of TOFU's questions and answers.

    Args:
        shape: Gives the vocabulary.
        number: Number of steps.
        rows: Examples of one batch.
        scale: Factor of all lengths.
        streams: Names of the batches of a step.
        prefix: Tokens that all prompts begin with, before the others, as a chat template with a system message does.
    """
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(shape.vocabulary, (prefix,), generator=generator).tolist()

    def draw_length(mean: float, spread: float, low: int, high: int) -> int:
        length = mean + spread * torch.randn((), generator=generator).item()
        return max(1, round(scale * min(max(length, low), high)))

    def draw_example() -> Example:
        prompt, answer = draw_length(20, 4, 12, 30), draw_length(42, 16, 12, 80)
        ids = torch.randint(shape.vocabulary, (prompt + answer,), generator=generator).tolist()
        return Example(shared + ids, [IGNORED] * (prefix + prompt) + ids[prompt:])

    steps = []
    for _ in range(number):
        step: Step = {}
        for stream in streams:
            step[stream] = [draw_example() for _ in range(rows)]
        steps.append(step)
    return steps


def make_tiny_step(streams: Sequence[str] = ("forget", "retain")) -> Step:
    """Return one example of two tokens per stream: it makes the optimizer create its state, at hardly any other cost."""
    return {stream: [Example([1, 2], [IGNORED, 2])] for stream in streams}


def pad_step(step: Step, device: str) -> PaddedStep:
    """Return the same examples as padded Hugging Face batches on a device."""
    padded = {}
    for stream, examples in step.items():
        padded[stream] = move_data_to_device(collate(examples, pad_id=0), torch.device(device))
    return padded


def count_tokens(steps: Sequence[Step], *, padded: bool = False) -> int:
    """Return the number of tokens in all batches of all steps, without or with padding."""
    total = 0
    for step in steps:
        for examples in step.values():
            lengths = [len(example.input_ids) for example in examples]
            total += len(lengths) * max(lengths) if padded else sum(lengths)
    return total


def count_answer_tokens(steps: Sequence[Step], stream: str) -> int:
    """Return the number of supervised tokens of one stream in all steps."""
    total = 0
    for step in steps:
        for example in step[stream]:
            total += len(example.labels) - example.labels.count(IGNORED)
    return total


def compute_floor_flops(shape: Shape, steps: Sequence[Step], adapter: int | None = None) -> dict[str, float]:
    """Return the mean FLOPs that a step cannot avoid, in the trunk and at the head.

    Args:
        shape: Sizes of the model.
        steps: Steps to average over.
        adapter: Number of parameters of the adapter that is trained instead of the model, if there is one.
    """
    # FLOPs per parameter and token: of the outputs, of the gradient in the inputs, and of that in the weights.
    forward, inputs, weights = 2, 2, 2
    trunk = count_trunk_parameters(shape)
    if adapter is None:
        flops_per_token = (forward + inputs + weights) * trunk
        nll_products = 3
    else:
        # Frozen weights pass the gradient on and have none themselves, in the trunk as at the head.
        flops_per_token = (forward + inputs) * trunk + (forward + inputs + weights) * adapter
        nll_products = 2
    # One product for the margin: its gradient is the largest logit's weights minus the mean weights, and needs no other.
    head_tokens = count_answer_tokens(steps, "forget") + nll_products * count_answer_tokens(steps, "retain")
    return {
        "trunk": flops_per_token * count_tokens(steps) / len(steps),
        "head": 2.0 * shape.hidden * shape.vocabulary * head_tokens / len(steps),
    }
