"""An attack that fine-tunes the model, on some of the forgotten examples or on other rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist

from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.errors import ConfigError, DivergedError, arguments_of
from lit_unlearn.evaluation.attacks.copies import changing_weights, copy_model
from lit_unlearn.evaluation.scoring import build_batch
from lit_unlearn.functional import upcast
from lit_unlearn.models import LanguageModel, SupervisedTokens
from lit_unlearn.models.adapter_configs import adapter_config
from lit_unlearn.models.adapters import attach_adapter
from lit_unlearn.utils.distributed import rank_and_world_size
from lit_unlearn.utils.validation import check_at_least, check_integer, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_unlearn.evaluation.benchmark import Benchmark

GRADIENT_SHARE = 4
"""A pass with gradients keeps the states of all layers, so it gets this fraction of the tokens of a pass without."""

_FORGET = "forget"


@dataclass(frozen=True)
class Relearn:
    """An attack that fine-tunes the model on some of the rows that it was made to forget, or on other rows.

    Args:
        rows: Number of rows; below 1, the share of the rows of ``source``.
        steps: Optimizer steps, each on all of these rows.
        lr: Learning rate of AdamW, which has no weight decay here.
        seed: Draws the rows, and the first weights of LoRA.
        source: Where the rows are: ``"forget"``, of which those that are not drawn are the ones to measure; another set of
            the benchmark, such as ``"retain"``; or a file of questions or of text, which may have nothing to do with the
            forget set. A set comes before a file of the same name.
        lora_rank: Rank of a LoRA adapter that is trained in place of all weights; ``None`` for all weights.
        curve: Steps after which the model is measured as well, ascending and below ``steps``.

    Raises:
        ConfigError: If a number is out of range.
    """

    rows: int | float
    steps: int
    lr: float
    seed: int = 0
    source: str = _FORGET
    lora_rank: int | None = None
    curve: tuple[int, ...] = ()

    name: ClassVar[str] = "relearn"
    unit: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        check_number(self, "rows", self.rows, above=0)
        if self.rows > 1:
            check_integer(self, "rows", self.rows)
        check_number(self, "lr", self.lr, above=0)
        check_at_least(1, self, steps=self.steps)
        if self.lora_rank is not None:
            check_at_least(1, self, lora_rank=self.lora_rank)
        points = [0, *self.curve, self.steps]
        if points != sorted(set(points)):
            raise ConfigError(
                f"`curve` must have ascending steps between 0 and `steps` ({self.steps}), not {list(self.curve)}.",
                owner=self,
                argument="curve",
            )

    @property
    def effort(self) -> int:
        """Number of steps."""
        return self.steps

    def choose(self, total: int) -> list[int]:
        """Draw the numbers of the rows, ascending: the same wherever they are drawn from ``total``.

        Raises:
            ConfigError: If there are fewer.

        Example:
            >>> Relearn(rows=3, steps=1, lr=1e-5, seed=7).choose(10)
            [2, 5, 6]
        """
        count = max(1, round(self.rows * total)) if self.rows < 1 else int(self.rows)
        if count > total:
            message = f"`rows` is {count}, but there are {total} rows in '{self.source}': lower it."
            raise ConfigError(message, owner=self, argument="rows")
        return sorted(random.Random(self.seed).sample(range(total), count))

    def find_examples(
        self, benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[list[Example], list[int]]:
        """Return the examples to fine-tune on, and the numbers of the forget rows among them.

        Args:
            benchmark: Has the sets, and the prompt.
            tokenizer: The model's.

        Raises:
            ConfigError: If there are too few rows, or none that can be learned.
            DataError: If the rows cannot be used.
        """
        with arguments_of(self):
            rows = benchmark.read_sequences(self.source, tokenizer)
        chosen = self.choose(len(rows))
        examples: list[Example] = []
        for number in chosen:
            examples += rows[number]
        return examples, chosen if self.source == _FORGET else []

    def change_model(
        self, lm: LanguageModel, examples: Sequence[Example] = (), token_budget: int = 8192
    ) -> Iterator[tuple[int, LanguageModel]]:
        """Yield the number of steps and a copy that has taken them: the same copy, which goes on afterwards.

        Args:
            lm: Loaded; it is left as it was.
            examples: From `find_examples`.
            token_budget: As for `relearn`.

        Raises:
            DivergedError: If the NLL is not finite.
            ModelError: If the model cannot be trained.
        """
        with changing_weights(lm):
            changed = copy_model(lm)
            if self.lora_rank is not None:
                changed = _add_lora(changed, self.lora_rank, self.seed)
        for step in relearn(changed, examples, self, token_budget):
            yield step, changed


def relearn(lm: LanguageModel, examples: Sequence[Example], attack: Relearn, token_budget: int) -> Iterator[int]:
    """Fine-tune on some examples, without dropout, and yield at the steps that are measured; a collective call.

    Every step minimises the mean NLL over the supervised tokens of all examples, whose gradients add up over passes. At every
    yield all processes have the same weights, those of a run that ends there.

    Args:
        lm: Loaded, and left in evaluation mode. An adapter is trained alone, otherwise all weights are. Half precision is widened
            between two yields: it would swallow the steps of a usual ``lr``.
        examples: Each with a supervised token.
        attack: Steps and learning rate.
        token_budget: Largest batch without gradients, in tokens; see `GRADIENT_SHARE`.

    Raises:
        DivergedError: If the NLL is not finite.
    """
    lm.eval()
    if not lm.has_adapter:
        # All weights move, whatever the unlearning trained: an attacker is not bound to its adapter or frozen layers.
        lm.requires_grad_()
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    dtypes = [parameter.dtype for parameter in parameters]
    num_tokens = sum(map(_count_supervised, examples))

    def compute_loss(tokens: SupervisedTokens) -> torch.Tensor:
        return -lm.token_logp(tokens).sum() / num_tokens

    with changing_weights(lm):
        weights = [upcast(parameter.data) for parameter in parameters]
        # No weight decay: it would pull the weights towards zero, which is no part of learning the rows again.
        optimizer = torch.optim.AdamW(parameters, attack.lr, weight_decay=0.0)
        batches = [build_batch(lm, group) for group in _group_by_tokens(examples, token_budget // GRADIENT_SHARE)]
    start = 0
    for end in (*attack.curve, attack.steps):
        with changing_weights(lm):
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.data = values
            for step in range(start, end):
                for batch in batches:
                    loss = lm(batch, compute_loss)
                    if not loss.isfinite():
                        message = (
                            f"relearning diverged: the NLL is {loss.item()} at step {step}; lower `lr` ({attack.lr:g})."
                        )
                        raise DivergedError(message, owner=attack, argument="lr")
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            # What is measured has the model's own dtype. The next steps go on from the wide weights.
            for parameter, values, dtype in zip(parameters, weights, dtypes, strict=True):
                if rank_and_world_size()[1] > 1:
                    # Some kernels add up in any order, differently in every process: all take the first one's weights.
                    dist.broadcast(values, src=0)
                parameter.data = values.to(dtype)
        start = end
        yield end


def _add_lora(lm: LanguageModel, rank: int, seed: int) -> LanguageModel:
    """Put a new adapter into a model; the random numbers around it stay as they are."""
    config = adapter_config({"r": rank, "lora_alpha": 2 * rank})
    device = next(lm.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        adapted = attach_adapter(lm.causal_lm, config)
    return LanguageModel.wrap(adapted, lm.tokenizer, lm.chunk_size)


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
