"""An attack that fine-tunes the model on some of the forgotten examples."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lit_unlearn.data.encoding import IGNORED, Example
from lit_unlearn.errors import DivergedError, ModelError
from lit_unlearn.evaluation.scoring import build_batch
from lit_unlearn.functional import upcast
from lit_unlearn.models import LanguageModel, SupervisedTokens
from lit_unlearn.utils.distributed import rank_and_world_size
from lit_unlearn.utils.validation import check_number

GRADIENT_SHARE = 4
"""A pass with gradients keeps the states of all layers, so it gets this fraction of the tokens of a pass without."""


@dataclass(frozen=True)
class Relearn:
    """An attack that fine-tunes the model on some of the rows that it was made to forget.

    Args:
        rows: Number of forget rows.
        steps: Optimizer steps, each on all of these rows.
        lr: Learning rate of AdamW, which has no weight decay here.
        seed: Draws the rows.

    Raises:
        ConfigError: If a number is out of range.
    """

    rows: int
    steps: int
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        for argument in ("rows", "steps", "lr"):
            check_number(self, argument, getattr(self, argument), above=0)

    def choose(self, total: int) -> list[int]:
        """Draw the numbers of the rows, ascending: the same wherever they are drawn from ``total``.

        Example:
            >>> Relearn(rows=3, steps=1, lr=1e-5, seed=7).choose(10)
            [2, 5, 6]
        """
        return sorted(random.Random(self.seed).sample(range(total), self.rows))


def copy_model(lm: LanguageModel) -> LanguageModel:
    """Return the same model in memory of its own, not quantised; an adapter is merged into it, as by an export."""
    model: Any = copy.deepcopy(lm.model)
    if lm.has_adapter:
        try:
            model = model.merge_and_unload()
        except (RuntimeError, ValueError) as reason:  # what peft raises for kinds and biases that have no merged form
            raise ModelError(
                f"stresses change the weights of the exported model, into which this adapter cannot be merged ({reason}): set "
                "`relearn` to null and `bits` to [], or train another kind of adapter."
            ) from reason
    return LanguageModel.wrap(model, lm.tokenizer, lm.chunk_size)


def relearn(lm: LanguageModel, examples: Sequence[Example], attack: Relearn, token_budget: int) -> None:
    """Fine-tune all weights on some examples, without dropout; a collective call that leaves all processes the same weights.

    Every step minimises the mean NLL over the supervised tokens of all examples, whose gradients add up over passes.

    Args:
        lm: Loaded, without adapter; left in evaluation mode. Half precision is widened meanwhile: it would swallow the steps
            of a usual ``lr``.
        examples: Each with a supervised token.
        attack: Steps and learning rate.
        token_budget: Largest batch without gradients, in tokens; see `GRADIENT_SHARE`.

    Raises:
        DivergedError: If the NLL is not finite.
    """
    # All weights move, whatever the unlearning trained: an attacker is not bound to its adapter or frozen layers.
    parameters = list(lm.eval().requires_grad_().parameters())
    dtypes = []
    for parameter in parameters:
        dtypes.append(parameter.dtype)
        parameter.data = upcast(parameter.data)
    # No weight decay: it would pull the weights towards zero, which is no part of learning the rows again.
    optimizer = torch.optim.AdamW(parameters, attack.lr, weight_decay=0.0)

    def compute_loss(tokens: SupervisedTokens) -> torch.Tensor:
        return -lm.token_logp(tokens).sum() / num_tokens

    num_tokens = sum(map(_count_supervised, examples))
    batches = [build_batch(lm, group) for group in _group_by_tokens(examples, token_budget // GRADIENT_SHARE)]
    for step in range(attack.steps):
        for batch in batches:
            loss = lm(batch, compute_loss)
            if not loss.isfinite():
                message = f"relearning diverged: the NLL is {loss.item()} at step {step}; lower `lr` ({attack.lr:g})."
                raise DivergedError(message, owner=attack, argument="lr")
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for parameter, dtype in zip(parameters, dtypes, strict=True):
        if rank_and_world_size()[1] > 1:
            # Some kernels add up in any order, differently in every process: all take the first one's weights.
            dist.broadcast(parameter.data, src=0)
        parameter.data = parameter.data.to(dtype)


def _count_supervised(example: Example) -> int:
    # Nothing predicts the first token.
    return sum(label != IGNORED for label in example.labels[1:])


def _group_by_tokens(examples: Sequence[Example], budget: int) -> Iterator[list[Example]]:
    """Yield groups of consecutive examples with at most ``budget`` tokens; an example that is longer is alone."""
    group: list[Example] = []
    tokens = 0
    for example in examples:
        length = len(example.input_ids)
        if group and tokens + length > budget:
            yield group
            group, tokens = [], 0
        group.append(example)
        tokens += length
    yield group
