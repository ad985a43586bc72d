"""Settings of the Trainer that cannot work with a primal-dual step, or leave no step to take: refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from lit_unlearn.errors import ConfigError, LitUnlearnError

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
