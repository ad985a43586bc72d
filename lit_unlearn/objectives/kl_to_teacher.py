"""Distillation from a model that never saw the forget set."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_unlearn.functional import kl
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel
from lit_unlearn.utils.validation import check_choice


class KLToTeacher(Objective):
    """Token mean of KL(p_teacher‖p): what a model that never saw the forget set says, in place of what was learned.

    The teacher is the language model's `teacher`, best the base model: what it says at each token of an answer is close to
    what a retain-only model says there. The value is zero where both agree: there forgetting stops, and answers are as
    fluent as the teacher's. Its epsilon, as a constraint, is absolute: nats per token.
    Chundawat et al., AAAI 2023 (arXiv 2205.08096), distil the forget set from a second, incompetent teacher, which has random
    weights there.

    Args:
        reads: ``"answer"``: at the tokens of the forget answers. ``"alternate"``: at those of the alternate answers, such as
            the teacher's own, which the unlearned model will meet when it generates.

    Raises:
        ConfigError: If ``reads`` is neither.
    """

    needs = frozenset[Need]({"teacher"})
    stops = True
    unit = "nats per token"
    formula = "token mean of KL(p_teacher‖p)"
    paper = "Chundawat et al. 2023, arXiv 2205.08096"

    def __init__(self, reads: Literal["answer", "alternate"] = "answer") -> None:
        super().__init__()
        check_choice(("answer", "alternate"), self, reads=reads)
        self.reads = reads

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the divergence for each token, shape ``(N,)``, nats."""
        return lm.map_logit_pairs(_kl_from_teacher, tokens, other="teacher")


def _kl_from_teacher(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kl(teacher_logits, logits)
