"""Trainer settings, examples and checkpoints that a fit cannot work with: refused before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.errors import CheckpointError, ConfigError, DataError, LitUnlearnError
from lit_unlearn.models.probing import learned_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_STEP_PER_BATCH = (
    "one batch is one optimizer step. Set the data's `batch_size` to the examples of a whole step and the model's "
    "`micro_batch_size` to what fits in memory; the gradient is that of the whole step."
)
_REFUSED_CALLBACKS: dict[type, str] = {
    BatchSizeFinder: f"it looks for a batch size that fits in memory, but {ONE_STEP_PER_BATCH}",
    GradientAccumulationScheduler: ONE_STEP_PER_BATCH,
    LearningRateFinder: (
        "it needs Lightning's automatic optimisation. Set the optimizer's `lr`: 1e-5 for models of a billion parameters and "
        "more, 1e-4 with an adapter, 1e-3 for tiny ones."
    ),
    StochasticWeightAveraging: (
        "the averaged weights would be neither measured nor exported. Use `EMAWeightAveraging`, whose average is validated."
    ),
}


def check_callbacks(kinds: Iterable[type]) -> None:
    """Refuse callbacks that cannot work under manual optimisation, and classes derived from them.

    Raises:
        ConfigError: With what to set instead.
    """
    for kind in kinds:
        for refused, reason in _REFUSED_CALLBACKS.items():
            if issubclass(kind, refused):
                raise ConfigError(
                    f"the callback {kind.__name__} is refused: {reason}", owner=L.Trainer, argument="callbacks"
                )


def check_limits(trainer: L.Trainer) -> None:
    """Refuse limits of 0, with which a fit would end without a step and without a word.

    Raises:
        ConfigError: With the limit.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            message = f"`{name}=0` leaves no step to take: raise it, or leave it out."
            raise ConfigError(message, owner=L.Trainer, argument=name)


def check_lengths(model: PreTrainedModel, data: object) -> None:
    """Refuse examples that are longer than the positions that a model has learned.

    Past the end of the table, the first forward pass would fail: on a GPU without a word about the cause.

    Args:
        model: Loaded.
        data: The data module; of others than `ForgetRetain` the examples are not known.

    Raises:
        DataError: With the row.
    """
    positions = learned_positions(model)
    if positions is None or not isinstance(data, ForgetRetain):
        return
    for name, examples in data.examples.items():
        for number, example in enumerate(examples):
            for part in (example, example.alternate):
                if part is not None and len(part.input_ids) > positions:
                    raise DataError(
                        f"row {number} of the {name} set has {len(part.input_ids)} tokens, but the model has learned only "
                        f"{positions} positions: lower `max_length` to {positions} or less.",
                        owner=data,
                        argument="max_length",
                    )


def check_progress(checkpoint: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Refuse a checkpoint that a fit cannot resume: it is beyond the last epoch, or has weights alone.

    Raises:
        CheckpointError: With what to do instead.
    """
    epochs, limit = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], trainer.max_epochs
    if limit is not None and 0 <= limit < epochs:
        raise CheckpointError(
            f"the checkpoint has {epochs} epochs behind it (step {checkpoint['global_step']}), more than `max_epochs` "
            f"({limit}): raise it, or start a new run.",
            owner=L.Trainer,
            argument="max_epochs",
        )
    needs_optimizer = trainer.strategy.lightning_restore_optimizer
    if needs_optimizer and not {"optimizer_states", "lr_schedulers"} <= checkpoint.keys():
        raise CheckpointError(
            "the checkpoint has weights alone, without the optimizer, so it cannot be resumed: make a model of it with "
            "`lit-unlearn export`, and start a new run from that."
        )


def prepare_loaders(trainer: L.Trainer) -> None:
    """Make the loaders of a fit now, so that the number of steps is known, and limits that do not fit them are refused.

    Raises:
        ConfigError: If `val_check_interval` is longer than an epoch, or a fraction of batches comes to none.
    """
    loop = trainer.fit_loop
    with _refusing("limit_train_batches"):
        try:
            loop.setup_data()
        except ValueError:
            interval = trainer.val_check_interval
            if not isinstance(interval, int) or interval <= loop.max_batches:
                raise
            raise ConfigError(
                f"`val_check_interval` ({interval}) is longer than an epoch, which has {loop.max_batches} steps: lower it, or "
                "set `check_val_every_n_epoch` to null to count the steps of all epochs.",
                owner=L.Trainer,
                argument="val_check_interval",
            ) from None
    # Otherwise Lightning makes them at the first validation.
    if 0.0 < trainer.limit_val_batches < 1.0:
        trainer.validating = True
        with _refusing("limit_val_batches"):
            loop.epoch_loop.val_loop.setup_data()
        trainer.training = True


@contextmanager
def _refusing(argument: str) -> Iterator[None]:
    try:
        yield
    except LitUnlearnError:
        raise
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split()), owner=L.Trainer, argument=argument) from error
