"""Retention objectives."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.functional import activation_distance, jensen_shannon, kl
from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives.base import Average, Need, Objective, TokenModel, whole


class NLL(Objective):
    """Negative log-likelihood of the answers: nats per supervised token, the retention loss of the paper."""

    formula = "token mean of −log p"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of −log p(label) over the ``N`` tokens."""
        return Average(-lm.token_logp(tokens).sum(), self.count(tokens))


class KLToReference(Objective):
    """Token mean of KL(p_ref‖p): how far the next-token distributions have moved, zero for the reference model.

    Since it starts at zero, its epsilon is absolute: nats per token.
    """

    needs = frozenset[Need]({"reference"})
    formula = "token mean of KL(p_ref‖p)"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the divergence over the ``N`` tokens, nats."""
        divergence = lm.map_logit_pairs(_kl_from_reference, tokens)
        return Average(divergence.sum(), self.count(tokens))


class JensenShannonToReference(Objective):
    """Token mean of JSD(p_ref‖p), the retention loss of JensUn: like `KLToReference`, and at most log 2 per token.

    Singh et al., "Unlearning That Lasts", 2025 (arXiv 2509.02820). Its epsilon is absolute: nats per token.
    """

    needs = frozenset[Need]({"reference"})
    formula = "token mean of JSD(p_ref‖p)"

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the divergence over the ``N`` tokens, nats."""
        return Average(lm.map_logit_pairs(jensen_shannon, tokens).sum(), self.count(tokens))


class ActivationMatch(Objective):
    """Mean squared difference of a layer's output from the reference model's: the retention loss of `RMU`.

    Li et al., "The WMDP Benchmark", ICML 2024 (arXiv 2403.03218). Its epsilon is absolute, in squares of the
    activations' own unit.

    Args:
        layer: Which transformer block's output, from 0; not the last one's, which ends in the final norm.

    Raises:
        ValueError: If ``layer`` is negative.
    """

    needs = frozenset[Need]({"reference", "activations"})
    formula = "token mean of ‖h_layer − h_layer,ref‖²/D"

    def __init__(self, layer: int = 7) -> None:
        super().__init__()
        self.layer = whole(self, "layer", layer)

    @property
    def layers(self) -> frozenset[int]:
        """The one layer."""
        return frozenset({self.layer})

    def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Average:
        """Sum of the distance over the ``N`` tokens."""
        if tokens.reference is None:
            raise ValueError("ActivationMatch: the reference model did not run on these tokens.")
        states, target = (layer_output(t, self.layer) for t in (tokens, tokens.reference))
        return Average(activation_distance(states, target).sum(), self.count(tokens))


def layer_output(tokens: SupervisedTokens, layer: int) -> Tensor:
    """What a layer put out for each token, shape ``(N, D)``.

    Raises:
        ValueError: If it was not kept.
    """
    if tokens.activations is None or layer not in tokens.activations:
        raise ValueError(
            f'the output of layer {layer} was not kept: the objective must need "activations" and name it in `layers`.'
        )
    return tokens.activations[layer]


def _kl_from_reference(logits: Tensor, reference_logits: Tensor) -> Tensor:
    return kl(reference_logits, logits)
