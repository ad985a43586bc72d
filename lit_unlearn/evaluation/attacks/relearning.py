"""An attack that fine-tunes the model on a few of the forgotten examples."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lit_unlearn.data.encoding import Example, collate
from lit_unlearn.functional import upcast
from lit_unlearn.models import LanguageModel, locate
from lit_unlearn.objectives import NLL
from lit_unlearn.utils.distributed import rank_and_world_size


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


def relearn(lm: LanguageModel, rows: Sequence[Example], attack: Relearn, token_budget: int) -> None:
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
        if rank_and_world_size()[1] > 1:
            dist.broadcast(parameter.data, src=0)  # some kernels add up in any order, differently in every process
        parameter.data = parameter.data.to(dtype)
