"""Representation misdirection."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_unlearn.functional import activation_distance
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Objective, TokenModel, get_layer_output
from lit_unlearn.utils.validation import check_integer, check_number


class RMU(Objective):
    """Draws a layer's output on forget answers to a fixed random direction; `ActivationMatch` keeps it elsewhere.

    Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024 (arXiv 2403.03218).

    Args:
        coefficient: Length c > 0 of the vector that the output is drawn to.
        layer: Transformer block whose output is read, from 0; not the last one's, which ends in the final norm.
        seed: Of the direction, which is uniform on the positive side, as in the authors' code.

    Raises:
        ConfigError: If a number is out of range.
    """

    unit = "squared activation per component"
    formula = "token mean of ‖h_layer − c·u‖²/D, u a fixed random unit vector"
    paper = "Li et al. 2024, arXiv 2403.03218"

    def __init__(self, coefficient: float = 2.0, layer: int = 7, seed: int = 0) -> None:
        super().__init__()
        self.coefficient = check_number(self, "coefficient", coefficient, above=0)
        self.layer = check_integer(self, "layer", layer)
        self.seed = seed

    @property
    def layers(self) -> frozenset[int]:
        """The layer whose output is drawn away."""
        return frozenset({self.layer})

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the distance for each token, shape ``(N,)``."""
        states = get_layer_output(tokens, self.layer)
        # Drawn anew in every pass from its own generator: the same on every process and after every resume, without a
        # buffer that checkpoints would have to carry.
        generator = torch.Generator().manual_seed(self.seed)
        direction = torch.rand(states.shape[-1], generator=generator, dtype=torch.float32)
        target = self.coefficient * direction / direction.norm()
        return activation_distance(states, target.to(states, non_blocking=True))
