"""Matching the likelihood of unseen examples, answer by answer, with the base model as the measure of each answer's difficulty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_unlearn.functional import token_logp
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel, count_answer_tokens
from lit_unlearn.objectives.reference_level import ReferenceLevel
from lit_unlearn.utils.validation import check_number


class NLLOverTeacher(Objective):
    """Answer mean of NLL ÷ the teacher's NLL: how much harder an answer is for the model than for its teacher."""

    needs = frozenset[Need]({"teacher"})
    per = "answer"
    unit = "multiples of the teacher's NLL"
    formula = "answer mean of NLL ÷ NLL_teacher"
    paper = "Watson et al. 2022, arXiv 2111.08440"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the ratio for each answer, shape ``(S,)``."""
        nll, teacher_nll = _compute_answer_nll(lm, tokens)
        return nll / teacher_nll


class MatchCalibrated(Objective):
    """Answer mean of (NLL per token − level · teacher's NLL per token)²: every answer is moved to a level of its own, and held there.

    The level stands for the NLL of a retain-only model, as that of `MatchUnseen` does. Answers differ in how hard they are, though,
    and authors do: a retain-only model finds hard what the base model finds hard. So the teacher, best the base model, says how hard
    each answer is, and examples that neither model saw say by what factor the fine-tuning on other examples has changed that.
    Membership inference is calibrated in the same way (Watson et al., ICLR 2022, arXiv 2111.08440).

    Args:
        stream: Stream of examples that neither the model nor the teacher ever saw, among the data module's ``streams``. It is only
            measured, never trained on.
        factor: The level is this times the mean of NLL ÷ NLL_teacher on that stream, before unlearning; > 0. The loss is infinite
            until the level is measured when a fit starts.

    Raises:
        ConfigError: If ``factor`` is not above 0 or not finite.
    """

    needs = frozenset[Need]({"teacher"})
    per = "answer"
    stops = True
    unit = "squared nats per token"
    formula = "answer mean of (NLL per token − factor · [NLL ÷ NLL_teacher of unseen examples] · NLL_teacher)²"
    paper = "this package, docs/results.md"

    def __init__(self, stream: str = "unseen", factor: float = 1.0) -> None:
        super().__init__()
        check_number(self, "factor", factor, above=0)
        self.level: ReferenceLevel = ReferenceLevel(NLLOverTeacher(), stream, factor)

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the squared distance of each answer from its level, shape ``(S,)``, squared nats per token."""
        # Infinite, so that a loss which is read too early shows: Lightning validates once before the level is measured.
        level = math.inf if self.level.value is None else self.level.value
        nll, teacher_nll = _compute_answer_nll(lm, tokens)
        return (nll - level * teacher_nll).square()


def _compute_answer_nll(lm: TokenModel, tokens: SupervisedTokens) -> tuple[Tensor, Tensor]:
    """Return the NLL per token of each answer under the model and under the teacher, both ``(S,)``, nats."""
    logp, teacher_logp = lm.map_logit_pairs(_compute_logp_pair, tokens, tokens.labels, other="teacher").unbind(-1)
    lengths = count_answer_tokens(tokens)
    return -tokens.by_sequence(logp) / lengths, -tokens.by_sequence(teacher_logp) / lengths


def _compute_logp_pair(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([token_logp(logits, labels), token_logp(teacher_logits, labels)], dim=-1)
