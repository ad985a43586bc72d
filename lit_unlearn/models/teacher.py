"""The teacher of a model: errors that name it, what the two must share, and the way back to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

from lit_unlearn.errors import ConfigError, LitUnlearnError, ModelError
from lit_unlearn.models.weights import local_part

if TYPE_CHECKING:
    from lit_unlearn.models.language_model import LanguageModel


def check_teacher(lm: LanguageModel, teacher: LanguageModel) -> None:
    """Raise unless each token id, in the rows and in the logits, means the same to both models."""
    difference = None
    tokenizer, other = lm.tokenizer, teacher.tokenizer
    if tokenizer is not None and other is not None and tokenizer.get_vocab() != other.get_vocab():
        difference = f"has another tokenizer ({len(other)} entries, here {len(tokenizer)})"
    there, here = (model.causal_lm.config.get_text_config().vocab_size for model in (teacher, lm))
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
        message = str(error).replace("`model`", "`teacher`")
        error.args = (f"the teacher '{name}': {message}",)
        raise


@torch.no_grad()
def move_to_teacher(lm: LanguageModel, share: float) -> None:
    """Set the weights to (1 − share) · weights + share · the teacher's.

    Args:
        lm: With its teacher loaded; both sharded alike, or neither.
        share: From 0 to 1.

    Raises:
        ConfigError: If an adapter is trained, which the teacher does not have.
        ModelError: If the teacher has other weights, by name or by shape.
    """
    if lm.has_adapter:
        raise ConfigError(
            "an adapter cannot be moved towards the teacher, which has none: leave out `rewind`, or train all weights (with "
            "`merge_adapter: true` where the model itself is an adapter).",
            owner=lm,
            argument="adapter",
        )
    teacher = cast("LanguageModel", lm.teacher)
    # A head that is tied to the embeddings is in `named_parameters` once, under either name.
    there = dict(teacher.causal_lm.named_parameters(remove_duplicate=False))
    moves = []
    for name, parameter in lm.causal_lm.named_parameters():
        if name not in there or there[name].shape != parameter.shape:
            raise ModelError(
                f"the weights cannot be moved towards the teacher '{teacher.name}', whose '{name}' is missing or has another shape: "
                "set `teacher` to the model that this one was fine-tuned from, or leave out `rewind`.",
                owner=lm,
                argument="teacher",
            )
        moves.append((local_part(parameter), local_part(there[name])))
    # Only now: a model that is refused stays as it was.
    for part, aim in moves:
        part.lerp_(aim.to(part.dtype), share)
