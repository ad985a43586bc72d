"""Matching the likelihood of examples that the model never saw."""

from __future__ import annotations

import math

from torch import Tensor

from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel, count_answer_tokens
from lit_unlearn.objectives.reference_level import ReferenceLevel
from lit_unlearn.objectives.retain import NLL
from lit_unlearn.utils.validation import check_number


class MatchUnseen(Objective):
    """Answer mean of (NLL per token − level)²: forgetting that stops, because answers beyond the level are pulled back.

    The level stands for the NLL of a retain-only model on the forget set. That model is not available, but the NLL that
    the model has, before unlearning, on similar examples that it never saw comes close to it. Below the level the gradient
    is that of gradient ascent, and fades with the distance.
    Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?", ICML 2020 (arXiv 2002.08709),
    hold a training loss at a level in a similar way.

    Args:
        stream: Stream of the examples that the model never saw, among the data module's ``streams``. It is only measured,
            never trained on.
        factor: The level is this times the NLL of that stream, nats per token; > 0. On small models, the truth ratio stays
            below that of a retain-only model at 1 (``docs/results.md``). The loss is infinite until the level is measured when a fit starts.

    Raises:
        ConfigError: If ``factor`` is not above 0 or not finite.
    """

    per = "answer"
    stops = True
    unit = "squared nats per token"
    formula = "answer mean of (NLL per token − factor · NLL of unseen examples)²"
    paper = "this package, docs/results.md"

    def __init__(self, stream: str = "unseen", factor: float = 1.5) -> None:
        super().__init__()
        self.level: ReferenceLevel = ReferenceLevel(NLL(), stream, check_number(self, "factor", factor, above=0))

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the squared distance of each answer from the level, shape ``(S,)``, squared nats per token."""
        # Infinite, so that a loss which is read too early shows: Lightning validates once before the level is measured.
        level = math.inf if self.level.value is None else self.level.value
        nll = -tokens.by_sequence(lm.token_logp(tokens)) / count_answer_tokens(tokens)
        return (nll - level).square()
