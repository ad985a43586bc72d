"""A lower bound on the NLL of forget answers."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel, count_answer_tokens
from lit_unlearn.utils.validation import check_number


class NLLFloor(Objective):
    """Answer mean of (floor − NLL per token)₊: how far answers are still too likely, zero once none is.

    As a constraint on the forget stream it is the forget side of *retain loss subject to forgetting*: ``NLLFloor ≤ epsilon``
    with an epsilon close to zero says that every answer's NLL is at or above the floor, and its multiplier rises until that
    holds. The mean NLL would not say so: one gibberish answer outweighs many that are still known. Below the floor the gradient
    is that of gradient ascent on the answer's mean, above it there is none.
    Ishida et al., ICML 2020 (arXiv 2002.08709), keep a training loss off zero; `MatchUnseen` also pulls back from beyond.

    Args:
        floor: Least NLL of an answer, nats per token; > 0. The NLL of similar examples that the model never saw,
            ``unseen/nll`` in reports, is near what a retain-only model has.

    Raises:
        ConfigError: If ``floor`` is not above 0 or not finite.
    """

    per = "answer"
    stops = True
    unit = "nats per token"
    formula = "answer mean of (floor − NLL per token)₊"
    paper = "this package, docs/methods.md"

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = check_number(self, "floor", floor, above=0)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the shortfall of each answer, shape ``(S,)``, nats per token."""
        nll = -tokens.by_sequence(lm.token_logp(tokens)) / count_answer_tokens(tokens)
        return (self.floor - nll).clamp_min(0)
