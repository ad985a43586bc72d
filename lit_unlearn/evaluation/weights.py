"""What stresses do to the weights of a model: they train or round a copy of it."""

from __future__ import annotations

import copy
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_unlearn.data.tokens import Row, collate
from lit_unlearn.evaluation.processes import place
from lit_unlearn.functional import upcast
from lit_unlearn.lm import LanguageModel, locate
from lit_unlearn.lm.adapters import inner_model
from lit_unlearn.lm.files import load_pretrained
from lit_unlearn.objectives import NLL


@dataclass(frozen=True)
class Relearn:
    """An attack that fine-tunes the model on a few of the rows that it was made to forget.

    Args:
        rows: How many of the forget rows.
        steps: Optimizer steps, each on all of these rows.
        lr: Learning rate of AdamW, which has no weight decay here.
        seed: Draws the rows.

    Raises:
        ValueError: If a number is out of range.
    """

    rows: int
    steps: int
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.steps < 1 or not self.lr > 0:
            raise ValueError(f"Relearn: `rows`, `steps` and `lr` must be positive, but are {asdict(self)}.")

    def choose(self, total: int) -> list[int]:
        """The numbers of the rows, ascending: the same wherever they are drawn from ``total``.

        Example:
            >>> Relearn(rows=3, steps=1, lr=1e-5, seed=7).choose(10)
            [2, 5, 6]
        """
        return sorted(random.Random(self.seed).sample(range(total), self.rows))


def copy_of(lm: LanguageModel) -> LanguageModel:
    """The same model in memory of its own; an adapter is merged into it, as by an export.

    Args:
        lm: Loaded, not quantised.

    Raises:
        ValueError: If the adapter cannot be merged.
    """
    model: Any = copy.deepcopy(lm.model)
    if lm.has_adapter:
        try:
            model = model.merge_and_unload()
        except (RuntimeError, ValueError) as reason:  # what peft raises for kinds and biases that have no merged form
            raise ValueError(
                f"stresses change the weights of the exported model, into which this adapter cannot be merged ({reason}): set "
                "`relearn` to null and `bits` to [], or train another kind of adapter."
            ) from reason
    return LanguageModel.wrap(model, lm.tokenizer, lm.chunk_size)


def relearn(lm: LanguageModel, rows: Sequence[Row], attack: Relearn, token_budget: int) -> None:
    """Fine-tunes all weights on a few rows, without dropout; a collective call that leaves all processes the same weights.

    Args:
        lm: Loaded, without adapter; left in evaluation mode. Half precision is widened meanwhile: it would swallow the steps
            of a usual ``lr``.
        rows: Each with a supervised token. Every step minimises their NLL, nats per token.
        attack: Steps and learning rate.
        token_budget: Largest batch, in tokens; one row may exceed it. Gradients add up over batches.

    Raises:
        ValueError: If the NLL is not finite.
    """
    parameters = [parameter.requires_grad_() for parameter in lm.eval().parameters()]
    dtypes = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = upcast(parameter.data)
    optimizer, nll = torch.optim.AdamW(parameters, attack.lr, weight_decay=0.0), NLL()
    size = max(1, token_budget // max(len(row.input_ids) for row in rows))
    parts = [collate(rows[i : i + size], pad_id=0) for i in range(0, len(rows), size)]
    batches = [{key: value.to(parameters[0].device) for key, value in part.items()} for part in parts]
    count = sum(nll.count(locate(batch)) for batch in batches)
    for step in range(attack.steps):
        for batch in batches:
            loss = lm(batch, partial(nll, lm)).total / count
            if not loss.isfinite():
                raise ValueError(
                    f"relearning diverged: the NLL is {loss.item()} at step {step}; lower `relearn.lr` ({attack.lr:g})."
                )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter, dtype in zip(parameters, dtypes, strict=True):
        if place()[1] > 1:
            dist.broadcast(parameter.data, src=0)  # some kernels add up in any order, differently in every process
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def round_weights(model: Any, bits: int) -> None:
    """Rounds the weights of every linear layer but the head, in place, by `round_to_nearest`.

    Args:
        model: A causal LM of transformers. What is no ``nn.Linear``, such as experts that share one tensor, stays.
        bits: As for `round_to_nearest`.

    Raises:
        ValueError: If there is no such layer.
    """
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear but the head, so that nothing would be rounded: set `bits` to []."
        )
    for layer in layers:
        layer.weight.copy_(round_to_nearest(layer.weight, bits))


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """The nearest of 2 ** bits − 1 values, evenly spaced from a row's largest magnitude down to minus that.

    Args:
        weight: Shape ``(rows, columns)``.
        bits: Width of the integers that could be stored instead, at least 2.

    Returns:
        Shape ``(rows, columns)``, float32 or wider; nowhere further from ``weight`` than half a step.

    Example:
        >>> round_to_nearest(torch.tensor([[3.0, 1.4, -0.6], [0.0, 0.0, 0.0]]), bits=3)
        tensor([[ 3.,  1., -1.],
                [ 0.,  0.,  0.]])
    """
    wide = upcast(weight)
    step = wide.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = step.where(step > 0, 1.0)
    return torch.round(wide / step).mul(step)


def quantized_by_bitsandbytes(lm: LanguageModel, bits: int) -> LanguageModel:
    """A copy of a model as it would be deployed: LLM.int8 or NF4, loaded by transformers from an export in between.

    What counts are the weights in memory, which after training or ``--ckpt_path`` are not those of ``lm.name``.

    Args:
        lm: Loaded, not quantised.
        bits: 8 or 4.
    """
    from transformers import BitsAndBytesConfig

    # LLM.int8 computes in float16, and warns of it in every layer of every pass
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    model = inner_model(lm.model)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": model.dtype}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if bits == 8 else four))
    settings = {"dtype": model.dtype, "device_map": {"": model.device}, "quantization_config": config, **lm._hub}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_pretrained(str(lm.save(Path(folder) / "model")), use_safetensors=True, **settings)
    return LanguageModel.wrap(loaded, lm.tokenizer, lm.chunk_size)
