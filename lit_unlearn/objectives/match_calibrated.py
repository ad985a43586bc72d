"""Matching the likelihood of unseen examples, answer by answer, with the base model as the measure of each answer's difficulty."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
from torch import Tensor

from lit_unlearn.functional import token_logp
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel, count_answer_tokens
from lit_unlearn.objectives.reference_level import Measure, ReferenceLevel
from lit_unlearn.utils.validation import check_number

SHARPNESSES = tuple(1.1**power for power in range(15))
"""Values of 1/T at which the teacher is measured, in one pass. Between them, its NLL is taken for linear: T is then off by about 0.01."""
MIN_TEMPERATURE = 1 / SHARPNESSES[-1]


class MatchCalibrated(Objective):
    """Answer mean of (d̄² + w · var d), d = NLL − teacher's NLL at T by token: every answer is moved to its own level, and held there.

    The level stands for the NLL of a retain-only model, as that of `MatchUnseen` does. Answers differ in how hard they are, though,
    and authors do: a retain-only model finds hard what the base model finds hard. So the teacher, best the base model, says how hard
    each answer is. Membership inference is calibrated in the same way (Watson et al., ICLR 2022, arXiv 2111.08440).

    A fine-tuned model is surer of what it says than its base model, also where it is wrong. So the teacher's logits are divided by a
    temperature T that makes it as sure, as Guo et al. (ICML 2017, arXiv 1706.04599) calibrate a classifier, in the other direction.

    With the level of the answers alone, the model still gets most of their tokens right, and is very wrong at a few. With a level
    for each token, it is too regular. A small weight of the variance over an answer's tokens is between the two (tried on one forget
    set, see the protocol in ``benchmarks/quality/smollm2.py``).

    Args:
        stream: Stream of examples that neither the model nor the teacher ever saw, among the data module's ``streams``. It is only
            measured, never trained on.
        token_weight: w, at least 0. With 0, only the mean of an answer has a level; with 1, every token has a level of its own.
        temperature: T, > 0. ``None``: the one at which the teacher's NLL of those examples is that of the model before unlearning,
            see `TeacherTemperature`. The loss is infinite until that is measured when a fit starts.

    Raises:
        ConfigError: If ``token_weight`` is below 0, or ``temperature`` is not above 0 or not finite.
    """

    needs = frozenset[Need]({"teacher"})
    per = "answer"
    stops = True
    unit = "squared nats per token"
    formula = (
        "answer mean of ((mean of d)² + w · variance of d), d = NLL − NLL_teacher at the temperature T, over its tokens"
    )
    paper = "this package, docs/results.md"

    def __init__(self, stream: str = "unseen", token_weight: float = 0.1, temperature: float | None = None) -> None:
        super().__init__()
        self.token_weight = check_number(self, "token_weight", token_weight, at_least=0)
        if temperature is None:
            self.level = TeacherTemperature(stream)
        else:
            check_number(self, "temperature", temperature, above=0)
        self._temperature = temperature

    @property
    def temperature(self) -> float | None:
        """T; ``None`` until it is measured."""
        return self._temperature if self.level is None else self.level.value

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the distance of each answer from its level, shape ``(S,)``, squared nats per token."""
        # Infinite, so that a loss which is read too early shows: Lightning validates once before the temperature is measured.
        if self.temperature is None:
            return tokens.by_sequence(lm.token_logp(tokens)) * 0 + math.inf
        compute = partial(_compute_logp_pair, temperature=self.temperature)
        logp, teacher_logp = lm.map_logit_pairs(compute, tokens, tokens.labels, other="teacher").unbind(-1)

        difference, lengths = logp - teacher_logp, count_answer_tokens(tokens)
        squared_mean = (tokens.by_sequence(difference) / lengths).square()
        variance = tokens.by_sequence(difference.square()) / lengths - squared_mean
        return squared_mean + self.token_weight * variance


class TeacherTemperature(ReferenceLevel):
    """The temperature at which the teacher's NLL of a stream is the reference model's.

    Neither model saw these examples, so that fine-tuning has changed only how sure the model is of them. The temperature is 1 if the
    reference model's NLL is not above the teacher's, and `MIN_TEMPERATURE` at least.

    Args:
        stream: Stream to measure it on.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(NLLByTemperature(), stream, factor=1.0)

    def measure(self, measure: Measure) -> float | None:
        """Return the temperature; ``None`` if there is no such stream."""
        means = measure(self.objective)
        if means is None:
            return None
        wanted, *of_teacher = means
        if wanted <= of_teacher[0]:
            return 1.0
        # The teacher's NLL is a convex function of 1/T, which begins below the wanted one and crosses it at most once.
        for sharpness, low, high in zip(itertools.pairwise(SHARPNESSES), of_teacher, of_teacher[1:], strict=False):
            if high >= wanted:
                share = (wanted - low) / (high - low)
                return 1 / (sharpness[0] + share * (sharpness[1] - sharpness[0]))
        return MIN_TEMPERATURE

    def describe(self) -> str:
        """Return what was measured, for people."""
        return f"at the temperature {self.value:.3g}, the teacher has the reference model's NLL on '{self.stream}'"


class NLLByTemperature(Objective):
    """Token mean of the NLL and of the teacher's NLL at each of `SHARPNESSES`, in columns; measured only, see `TeacherTemperature`."""

    needs = frozenset[Need]({"teacher"})
    unit = "nats per token"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the NLLs of each label, shape ``(N, 1 + K)`` for K sharpnesses, nats."""
        return -lm.map_logit_pairs(_compute_logps, tokens, tokens.labels, other="teacher")


def _compute_logps(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each label under the model and under the teacher by sharpness, ``(N, 1 + K)``, nats."""
    of_teacher = [token_logp(sharpness * teacher_logits, labels) for sharpness in SHARPNESSES]
    return torch.stack([token_logp(logits, labels), *of_teacher], dim=-1)


def _compute_logp_pair(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the log-probability of each label under the model and under the teacher at a temperature, ``(N, 2)``, nats."""
    return torch.stack([token_logp(logits, labels), token_logp(teacher_logits / temperature, labels)], dim=-1)
