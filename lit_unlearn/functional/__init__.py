"""Losses and scores of single tokens: tensors in, tensors out, nothing reduced. Imports torch alone; a kernel's file also triton."""

from lit_unlearn.functional.activation import activation_distance
from lit_unlearn.functional.chunks import map_logits, matmul_dtype, upcast
from lit_unlearn.functional.divergence import (
    Direction,
    ceu,
    jensen_shannon,
    jensen_shannon_to_label,
    kl,
    kl_to_uniform,
    undial,
    uniformity,
)
from lit_unlearn.functional.likelihood import linear_token_logp, token_logp
from lit_unlearn.functional.margin import linear_logit_margin, logit_margin
from lit_unlearn.functional.preference import dpo, npo, satimp_weight, simnpo, wga_weight

__all__ = [
    "Direction",
    "activation_distance",
    "ceu",
    "dpo",
    "jensen_shannon",
    "jensen_shannon_to_label",
    "kl",
    "kl_to_uniform",
    "linear_logit_margin",
    "linear_token_logp",
    "logit_margin",
    "map_logits",
    "matmul_dtype",
    "npo",
    "satimp_weight",
    "simnpo",
    "token_logp",
    "undial",
    "uniformity",
    "upcast",
    "wga_weight",
]
