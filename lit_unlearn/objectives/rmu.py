"""Representation misdirection."""

from __future__ import annotations

import torch

from lit_unlearn.functional import activation_distance
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, Objective, TokenModel, checked, whole
from lit_unlearn.objectives.retain import layer_output


class RMU(Objective):
    """Draws a layer's output on forget answers to a fixed random direction; `ActivationMatch` keeps it elsewhere.

    Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024 (arXiv 2403.03218).

    Args:
        coefficient: Length c > 0 of the vector that the output is drawn to.
        layer: Which transformer block's output, from 0; not the last one's, which ends in the final norm.
        seed: Of the direction, which is uniform on the positive side, as in the authors' code.

    Raises:
        ValueError: If a number is out of range.
    """

    needs = frozenset[Need]({"activations"})
    formula = "token mean of ‖h_layer − c·u‖²/D, u a fixed random unit vector"
    paper = "Li et al. 2024, arXiv 2403.03218"

    def __init__(self, coefficient: float = 2.0, layer: int = 7, seed: int = 0) -> None:
        super().__init__()
        self.coefficient = checked(self, "coefficient", coefficient, above=0)
        self.layer = whole(self, "layer", layer)
        self.seed = seed

    @property
    def layers(self) -> frozenset[int]:
        """The one layer."""
        return frozenset({self.layer})

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the distance over the ``N`` tokens."""
        states = layer_output(tokens, self.layer)
        draw = torch.Generator().manual_seed(self.seed)  # the same on every process and after every resume
        direction = torch.rand(states.shape[-1], generator=draw, dtype=torch.float32)
        target = self.coefficient * direction / direction.norm()
        return Average(activation_distance(states, target.to(states)).sum(), self.count(tokens))
