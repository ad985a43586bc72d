"""Suites: the metrics that are computed on the streams of a run, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lit_unlearn.functional import token_logp, uniformity
from lit_unlearn.metrics import AnswerLikelihood, ForgetUniformity
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import TokenModel


class Suite(nn.Module, ABC):
    """Measures a model on named streams; runs in ``validate``, ``test`` and during ``fit`` on any number of processes."""

    @abstractmethod
    def update(self, stream: str, lm: TokenModel, tokens: SupervisedTokens) -> None:
        """Add one batch of a stream.

        Args:
            stream: Its name, such as ``forget``.
            lm: The model, for functions of logits.
            tokens: The ``N`` supervised tokens of the batch, with their states.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return values named ``<stream>/<metric>``, over everything added on all processes."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything added."""


class AnswerSuite(Suite):
    """Likelihood of the answers and flatness of the distributions that predict them, on every stream.

    Gives ``nll`` and ``probability`` (see `AnswerLikelihood`), ``margin``, ``entropy`` and ``kl_to_uniform`` (see
    `ForgetUniformity`) for every stream that is validated.
    """

    def __init__(self) -> None:
        super().__init__()
        # Streams are not known before the first batch: a metric is made when its stream appears.
        self._metrics = nn.ModuleDict()

    def update(self, stream: str, lm: TokenModel, tokens: SupervisedTokens) -> None:
        """Add one batch, with a single pass over the logits."""
        if stream not in self._metrics:
            self._metrics[stream] = _AnswerMetrics().to(tokens.labels.device)
        metrics = cast(_AnswerMetrics, self._metrics[stream])
        values = lm.map_logits(_answer_values, tokens, tokens.labels)
        metrics.likelihood.update(values[:, 0], tokens.sequence, tokens.num_sequences)
        metrics.uniformity.update(values[:, 1:])

    def compute(self) -> dict[str, float]:
        """Return values named ``<stream>/<metric>``."""
        values = {}
        for stream, metrics in cast(Iterable[tuple[str, _AnswerMetrics]], self._metrics.items()):
            for name, value in (metrics.likelihood.compute() | metrics.uniformity.compute()).items():
                values[f"{stream}/{name}"] = value.item()
        return values

    def reset(self) -> None:
        """Forget everything added, and which streams there were."""
        # New metrics, not reset ones: a stream that is not measured next time must give no values.
        self._metrics = nn.ModuleDict()


class _AnswerMetrics(nn.Module):
    """The metrics of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = AnswerLikelihood()
        self.uniformity = ForgetUniformity()


def _answer_values(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log p of the label and the values of `ForgetUniformity`, shape ``(N, 1 + values)``."""
    return torch.cat([token_logp(logits, labels)[:, None], uniformity(logits)], dim=1)
