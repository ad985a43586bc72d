"""What is benchmarked: Llama models with random weights, and batches with rows as long as TOFU's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_unlearn.data.encoding import IGNORED, Example, collate

Batch = dict[str, Tensor]
Step = dict[str, Batch]  # one batch per stream: what an optimizer step takes


@dataclass(frozen=True)
class Shape:
    """A Llama model by its sizes, and whether its head shares the embedding's weight."""

    vocabulary: int
    hidden: int = 512
    intermediate: int = 2048
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    tied: bool = False

    def __str__(self) -> str:
        return (
            f"{self.layers} layers × {self.hidden}, V = {self.vocabulary:,}, {'tied' if self.tied else 'untied'} head"
        )


SHAPES = {
    "toy": Shape(1_000, hidden=64, intermediate=128, layers=2, heads=2, kv_heads=2),
    "32k": Shape(32_000),
    "128k": Shape(128_256),
    # the sizes of Llama-3.2-1B
    "1b": Shape(128_256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, tied=True),
}


def build_model(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model with the same random weights at every call."""
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


def trunk_parameters(shape: Shape) -> int:
    """Parameters that are neither embedding nor head."""
    trunk = build_model(shape, "meta").base_model
    return sum(p.numel() for p in trunk.parameters()) - trunk.get_input_embeddings().weight.numel()


def make_steps(
    shape: Shape,
    number: int,
    *,
    rows: int = 8,
    scale: float = 1.0,
    streams: Sequence[str] = ("forget", "retain"),
    device: str = "cpu",
) -> list[Step]:
    """Padded batches of random tokens, the same at every call.

    Rows have a prompt of about 20 tokens (12 to 30) without labels and an answer of about 42 (12 to 80) with labels:
    nearly the spread of TOFU's questions and answers.

    Args:
        shape: Tells the vocabulary.
        number: How many steps.
        rows: Of one batch.
        scale: Factor of all lengths.
        streams: Names of the batches of a step.
        device: Where the tensors lie.
    """
    generator = torch.Generator().manual_seed(0)

    def length(mean: float, spread: float, low: int, high: int) -> int:
        drawn = mean + spread * torch.randn((), generator=generator).item()
        return max(1, round(scale * min(max(drawn, low), high)))

    def row() -> Example:
        prompt, answer = length(20, 4, 12, 30), length(42, 16, 12, 80)
        ids = torch.randint(shape.vocabulary, (prompt + answer,), generator=generator).tolist()
        return Example(ids, [IGNORED] * prompt + ids[prompt:])

    def batch() -> Batch:
        padded = collate([row() for _ in range(rows)], pad_id=0)
        return {key: value.to(device) for key, value in padded.items()}

    return [{stream: batch() for stream in streams} for _ in range(number)]


def tiny_step(streams: Sequence[str] = ("forget", "retain"), device: str = "cpu") -> Step:
    """One row of two tokens per stream: with it the optimizer makes its state, and hardly anything else happens."""
    row = Example([1, 2], [IGNORED, 2])
    return {stream: {key: value.to(device) for key, value in collate([row], 0).items()} for stream in streams}


def real_tokens(steps: Sequence[Step]) -> int:
    """Tokens that are no padding, in all batches of all steps."""
    return sum(int(batch["attention_mask"].sum()) for step in steps for batch in step.values())


def answer_tokens(steps: Sequence[Step], stream: str) -> int:
    """Supervised tokens of one stream in all steps."""
    return sum(int((step[stream]["labels"] != IGNORED).sum()) for step in steps)


def floor_flops(shape: Shape, steps: Sequence[Step], adapter: int | None = None) -> dict[str, float]:
    """Mean FLOPs of a step that must be done, in the trunk and at the head.

    Args:
        shape: Of the model.
        steps: Over which the mean is taken.
        adapter: Parameters of the adapter that is trained in place of the model, if one is.
    """
    forward, inputs, weights = 2, 2, 2  # FLOPs per parameter and token
    trunk = trunk_parameters(shape)
    if adapter is None:
        per_token, products = (forward + inputs + weights) * trunk, 3
    else:
        per_token, products = (forward + inputs) * trunk + (forward + inputs + weights) * adapter, 2
    head_products = answer_tokens(steps, "forget") + products * answer_tokens(steps, "retain")
    return {
        "trunk": per_token * real_tokens(steps) / len(steps),
        "head": 2.0 * shape.hidden * shape.vocabulary * head_products / len(steps),
    }
