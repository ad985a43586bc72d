"""The language model as the rest of the package sees it."""

from lit_unlearn.models.language_model import LanguageModel
from lit_unlearn.models.tokens import Alignment, Batch, SupervisedTokens, locate

__all__ = ["Alignment", "Batch", "LanguageModel", "SupervisedTokens", "locate"]
