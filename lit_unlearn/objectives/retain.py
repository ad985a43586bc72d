"""Retention objectives."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.errors import BatchError
from lit_unlearn.functional import activation_distance, jensen_shannon, kl
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Need, Objective, TokenModel, get_layer_output
from lit_unlearn.utils.validation import check_integer


class NLL(Objective):
    """Negative log-likelihood of the answers: nats per supervised token, the usual retention loss."""

    unit = "nats per token"
    formula = "token mean of −log p"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute −log p(label) of each token, shape ``(N,)``, nats."""
        return -lm.token_logp(tokens)


class KLToReference(Objective):
    """Token mean of KL(p_ref‖p): how far the next-token distributions have moved, zero for the reference model.

    Since it starts at zero, its epsilon is absolute: nats per token.
    """

    needs = frozenset[Need]({"reference"})
    unit = "nats per token"
    formula = "token mean of KL(p_ref‖p)"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the divergence for each token, shape ``(N,)``, nats."""
        return lm.map_logit_pairs(_kl_from_reference, tokens)


class JensenShannonToReference(Objective):
    """Token mean of JSD(p_ref‖p), the retention loss of JensUn: like `KLToReference`, and at most log 2 per token.

    Singh et al., "Unlearning That Lasts", 2025 (arXiv 2509.02820). Its epsilon is absolute: nats per token.
    """

    needs = frozenset[Need]({"reference"})
    unit = "nats per token"
    formula = "token mean of JSD(p_ref‖p)"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the divergence for each token, shape ``(N,)``, nats."""
        return lm.map_logit_pairs(jensen_shannon, tokens)


class ActivationMatch(Objective):
    """Mean squared difference of a layer's output from the reference model's: the retention loss of `RMU`.

    Li et al., "The WMDP Benchmark", ICML 2024 (arXiv 2403.03218). Its epsilon is absolute, in squares of the
    activations' unit.

    Args:
        layer: Transformer block whose output is read, from 0; not the last one's, which ends in the final norm.

    Raises:
        ConfigError: If ``layer`` is negative.
    """

    needs = frozenset[Need]({"reference"})
    unit = "squared activation per component"
    formula = "token mean of ‖h_layer − h_layer,ref‖²/D"

    def __init__(self, layer: int = 7) -> None:
        super().__init__()
        self.layer = check_integer(self, "layer", layer)

    @property
    def layers(self) -> frozenset[int]:
        """The layer whose output is compared."""
        return frozenset({self.layer})

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
        """Compute the distance for each token, shape ``(N,)``.

        Raises:
            BatchError: If the reference model did not run on the batch, or the layer's output was not kept.
        """
        if tokens.reference is None:
            raise BatchError("ActivationMatch: the reference model did not run on these tokens (`reference=True`).")
        return activation_distance(get_layer_output(tokens, self.layer), get_layer_output(tokens.reference, self.layer))


def _kl_from_reference(logits: Tensor, reference_logits: Tensor) -> Tensor:
    return kl(reference_logits, logits)
