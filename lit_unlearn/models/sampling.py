"""Sampling: which tokens may be drawn, with random numbers that belong to a prompt and not to its batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_unlearn.errors import ConfigError, ModelError
from lit_unlearn.utils.validation import check_at_least, check_number


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults are the model's own distribution, which bounds on a leak rate refer to.

    Args:
        temperature: Divides the logits; below 1, likely tokens become likelier. For the likeliest token, leave sampling out.
        top_p: Only the likeliest tokens are drawn, as few as have this probability together; 1 for all.
        top_k: Only this many of the likeliest tokens are drawn, and those as likely as the last of them; ``None`` for all.
        samples: Number of answers to each prompt.
        seed: Decides the random numbers, with the id of the prompt and the number of the sample.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> Sampling(temperature=0.8, samples=100).top_p
        1.0
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "temperature", self.temperature, above=0)
        if not 0 < self.top_p <= 1:
            message = f"`top_p` must be above 0 and at most 1, not {self.top_p!r}."
            raise ConfigError(message, owner=self, argument="top_p")
        if self.top_k is not None:
            check_at_least(1, self, top_k=self.top_k)
        check_at_least(1, self, samples=self.samples)

    def random_numbers(self, prompt_id: str, sample: int) -> random.Random:
        """Return the random numbers of one answer, a generator that depends on nothing but the arguments and the seed.

        Python's generator, because its numbers are the same in every version and on every machine.

        Args:
            prompt_id: Names the prompt, such as ``"forget/17"``.
            sample: Number of the answer to this prompt, from 0.
        """
        return random.Random(f"{self.seed}/{prompt_id}/{sample}")


def choose_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Choose a token per row by inversion: the first whose cumulative probability exceeds a uniform number.

    Cumulative probabilities run in the order of the vocabulary, not of the probabilities: rounding, which differs between
    batches, then moves the limits between tokens by as little as itself, where it could exchange two tokens of an order.
    Temperature, ``top_k`` and ``top_p`` apply one after the other, as in transformers.

    Args:
        logits: Shape ``(B, V)``, on the CPU; −∞ for tokens that are ruled out.
        uniforms: Shape ``(B,)``, float64, at least 0 and below 1.
        sampling: Which tokens may be drawn.

    Returns:
        Token ids, shape ``(B,)``.

    Raises:
        ModelError: If logits are not numbers, so that there is no distribution.

    Example:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)
        >>> choose_tokens(logits, torch.tensor([0.4, 0.6, 0.9], dtype=torch.float64), Sampling())
        tensor([0, 1, 2])
    """
    # float64: a sum over a large vocabulary rounds in float32 by more than its rarest tokens have.
    scaled = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        probabilities = _keep_likeliest(probabilities, sampling.top_p)

    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise ModelError("the model's logits are not numbers, so no token can be drawn: its weights are damaged.")
    # The product may be rounded up to the total, which no cumulative probability exceeds.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    targets = torch.minimum(uniforms[:, None] * total, below_total)
    # A token that is ruled out adds nothing to the sum before it, so it is never the first to exceed a number.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


def _keep_likeliest(probabilities: Tensor, top_p: float) -> Tensor:
    """Set probabilities to zero, shape ``(B, V)``, once the likelier ones of the row reach ``top_p`` together."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    # The likeliest has nothing before it, so it always stays.
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.where(before < top_p, 0.0))


class Sampler:
    """Draws the next token of every row of a batch, as a logits processor of transformers.

    transformers' own sampling takes one random number after the other for the whole batch, so an answer would depend on the
    rows beside it.

    Args:
        sampling: Which tokens may be drawn.
        random_numbers: Those of every row, in order.
    """

    def __init__(self, sampling: Sampling, random_numbers: Sequence[random.Random]) -> None:
        self.sampling = sampling
        self.random_numbers = random_numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, shape ``(B, V)``, that rule out every token but the chosen ones."""
        # A number per row and step, for rows that have ended as well: a row's t-th token takes its t-th number.
        uniforms = torch.tensor([numbers.random() for numbers in self.random_numbers], dtype=torch.float64)
        # On the CPU, whose sums do not depend on the kind of accelerator.
        chosen = choose_tokens(scores.float().cpu(), uniforms, self.sampling).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)
