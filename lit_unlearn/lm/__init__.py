"""The language model as the rest of the package sees it."""

from lit_unlearn.lm.model import LanguageModel
from lit_unlearn.lm.packing import IGNORED
from lit_unlearn.lm.tokens import Alignment, Batch, SupervisedTokens, locate

__all__ = ["IGNORED", "Alignment", "Batch", "LanguageModel", "SupervisedTokens", "locate"]
