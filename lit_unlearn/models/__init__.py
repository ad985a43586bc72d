"""The language model as the rest of the package sees it: a Hugging Face causal LM, reduced to its supervised tokens.

Losses belong in ``objectives/``, text and tokenisation in ``data/``; nothing here knows Lightning.
"""

from lit_unlearn.models.language_model import LanguageModel
from lit_unlearn.models.tokens import Alignment, Batch, SupervisedTokens, TokenIndex, locate

__all__ = ["Alignment", "Batch", "LanguageModel", "SupervisedTokens", "TokenIndex", "locate"]
