"""Losses and scores of single tokens: tensors in, tensors out, nothing reduced. Imports torch alone."""

from lit_unlearn.functional.chunks import map_logits, upcast
from lit_unlearn.functional.divergence import Direction, kl_to_uniform, uniformity
from lit_unlearn.functional.likelihood import linear_token_logp, token_logp
from lit_unlearn.functional.margin import linear_logit_margin, logit_margin

__all__ = [
    "Direction",
    "kl_to_uniform",
    "linear_logit_margin",
    "linear_token_logp",
    "logit_margin",
    "map_logits",
    "token_logp",
    "uniformity",
    "upcast",
]
