"""The teacher of a model: errors that name it, and what the two must share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import nn

from lit_unlearn.errors import LitUnlearnError, ModelError

if TYPE_CHECKING:
    from lit_unlearn.models.language_model import LanguageModel


def check_teacher(lm: LanguageModel, teacher: LanguageModel) -> None:
    """Raise unless each token id, in the rows and in the logits, means the same to both models."""
    difference = None
    tokenizer, other = lm.tokenizer, teacher.tokenizer
    if tokenizer is not None and other is not None and tokenizer.get_vocab() != other.get_vocab():
        difference = f"has another tokenizer ({len(other)} entries, here {len(tokenizer)})"
    there, here = (len(cast(nn.Linear, lm.causal_lm.get_output_embeddings()).weight) for lm in (teacher, lm))
    if there != here:
        difference = f"gives {there} logits, this model {here}"
    if difference is not None:
        raise ModelError(
            f"the teacher '{teacher.name}' cannot be compared with this model token by token: it {difference}. Set `teacher` to "
            "the model that this one was fine-tuned from.",
            owner=lm,
            argument="teacher",
        )


@contextmanager
def naming_teacher(name: str, owner: LanguageModel) -> Iterator[None]:
    """Make ``teacher`` the argument of an error about the teacher's own ``model``."""
    try:
        yield
    except LitUnlearnError as error:
        error.owner, error.argument = owner, "teacher"
        error.args = (f"the teacher '{name}': {error}",)
        raise
