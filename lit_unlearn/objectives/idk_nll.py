"""Likelihood of refusals."""

from __future__ import annotations

from lit_unlearn.objectives.retain import NLL


class IdkNLL(NLL):
    """NLL of the alternate answers: fine-tunes on refusals, or any other text, in place of the forget answers.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121), "IDK".
    """

    reads = "alternate"
    formula = "token mean of −log p on the alternate answers"
    paper = "Maini et al. 2024, arXiv 2401.06121"
