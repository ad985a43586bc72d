"""One teacher-forced pass over rows: what every likelihood-based score of a benchmark is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_unlearn.data.encoding import Example
from lit_unlearn.models import LanguageModel, SupervisedTokens, locate
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.packing import pack_or_pad


class Scored(NamedTuple):
    """What a model makes of the supervised tokens of one row, all of shape ``(n,)``.

    Args:
        labels: Token ids.
        predictions: The likeliest token at each place.
        logp: Log-probability of each label, nats.
        mean: Expectation of log p over the vocabulary at each place, minus the entropy.
        std: Its standard deviation.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    logp: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @property
    def nll(self) -> float:
        """Mean NLL, nats per token."""
        return float(-self.logp.mean())


def score_examples(
    lm: LanguageModel,
    rows: Sequence[Example],
    token_budget: int = 8192,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Scored]:
    """Scores rows in batches of bounded size, the longest first; no logits are kept.

    Args:
        lm: Loaded; it is left as it was.
        rows: Each with a supervised token.
        token_budget: Largest batch, in tokens; one row may exceed it.
        progress: Called with the number of rows that a batch had.

    Returns:
        One item per row, in the order given.
    """
    found: dict[int, Scored] = {}
    with evaluation_mode(lm):
        for batch in _batches([len(row.input_ids) for row in rows], token_budget):
            found |= zip(batch, _score_batch(lm, [rows[i] for i in batch]), strict=True)
            progress(len(batch))
    return [found[i] for i in range(len(rows))]


def _batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_batch(lm: LanguageModel, rows: Sequence[Example]) -> list[Scored]:
    device = next(lm.parameters()).device
    sequences = [
        {
            "input_ids": torch.tensor(row.input_ids, device=device),
            "labels": torch.tensor(row.labels, device=device),
            "sequence": torch.full((len(row.labels),), i, device=device),
        }
        for i, row in enumerate(rows)
    ]
    batch = pack_or_pad(sequences, lm.packs)
    tokens = locate(batch)

    def compute(tokens: SupervisedTokens) -> Tensor:
        return lm.map_logits(_token_scores, tokens, tokens.labels)

    values = lm(batch, compute, index=[tokens]).double().cpu().numpy()
    labels, owner = tokens.labels.cpu().numpy(), tokens.examples[tokens.sequence].cpu().numpy()
    return [
        Scored(labels[mine], values[mine, 1].astype(np.int64), values[mine, 0], values[mine, 2], values[mine, 3])
        for mine in (owner == i for i in range(len(rows)))
    ]


def _token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label, likeliest token, mean and standard deviation of log p, shape ``(n, 4)``."""
    logp = logits.log_softmax(dim=-1)
    finite = logp.clamp_min(torch.finfo(logp.dtype).min / 2)  # −∞ has no mean, and 0 · −∞ is nan
    p = logp.exp()
    mean = (p * finite).sum(dim=-1)
    variance = (p * (finite - mean[:, None]).square().nan_to_num(posinf=0.0)).sum(dim=-1)
    chosen = finite.gather(1, labels[:, None]).squeeze(1)
    return torch.stack([chosen, logits.argmax(dim=-1).to(logp.dtype), mean, variance.sqrt()], dim=1)
