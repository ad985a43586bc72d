"""The configuration as a whole: what in it cannot work, and what changed since the run that is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.training.strategies import check_strategy

_MAY_DIFFER = ("ckpt_path", "logs", "trainer.logger", "trainer.callbacks")


def check_trainer(trainer: Namespace) -> None:
    """Refuses Trainer flags that cannot work here, before anything is made.

    Args:
        trainer: The Trainer's part of the configuration.

    Raises:
        ValueError: With what to write instead.
    """
    if (trainer.accumulate_grad_batches or 1) != 1:
        raise ValueError(
            f"`trainer.accumulate_grad_batches` ({trainer.accumulate_grad_batches}) is refused: one batch is one optimizer "
            "step. Set `data.batch_size` to the rows of a whole step and `model.micro_batch_size` to what fits in memory; "
            "the gradient is that of the whole step."
        )
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ValueError(
            f"`trainer.gradient_clip_algorithm` {trainer.gradient_clip_algorithm!r} is refused: only clipping by the norm "
            "of the whole gradient is exact over processes. Leave it out and set `trainer.gradient_clip_val`."
        )
    if trainer.overfit_batches:
        raise ValueError(
            "`trainer.overfit_batches` is refused: it would stop the retain stream. Set `max_rows` of the data instead."
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise ValueError(
            "`trainer.reload_dataloaders_every_n_epochs` is refused: every epoch has its own order anyway."
        )
    strategy = trainer.strategy
    check_strategy(strategy if isinstance(strategy, str) else strategy.class_path)


class SaveSettings(SaveConfigCallback):
    """Saves the configuration beside the logs and in checkpoints; a resumed run says which settings changed."""

    def state_dict(self) -> dict[str, Any]:
        """The configuration, flat."""
        return {"settings": self._flat()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Says what changed; the new settings are the ones used."""
        old, new = state_dict["settings"], self._flat()
        changed = [
            f"{key}: {old.get(key, 'not set')} → {new.get(key, 'not set')}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and not key.startswith(_MAY_DIFFER)
        ]
        if changed:
            rank_zero_info("resumed with changed settings: " + "; ".join(changed))

    def _flat(self) -> dict[str, str]:
        return _flatten(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): str(value)}
    return {key: text for name, part in value.items() for key, text in _flatten(part, f"{prefix}{name}.").items()}
