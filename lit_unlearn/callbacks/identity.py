"""What makes a run the same run, so that a start of it resumes its own checkpoint and no other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source
from lit_unlearn.models import LanguageModel
from lit_unlearn.training import LitLanguageModel
from lit_unlearn.utils.io import file_digest

Identity = dict[str, str]


def identify_run(trainer: L.Trainer) -> Identity:
    """Return what stays the same whenever a run is started again, by the name that a message gives it.

    The run's name, and settings that may change in between, such as a learning rate or an epsilon, are no part of it; nor are
    paths, because folders are moved. Nothing is loaded for it, so it is known before a checkpoint is chosen.

    Args:
        trainer: With its module and data module attached, which need not be set up.
    """
    module: Any = trainer.lightning_module
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(module, LitLanguageModel):
        return {}
    identity = {"class of the module": type(module).__name__, "seed of the module": str(module.seed)}
    identity["base model"] = _digest_base_model(module.lm)
    if isinstance(data, ForgetRetain):
        identity["seed of the data"] = str(data.seed)
        for name, source in data.sources.items():
            identity[f"{name} rows"] = _digest_rows(source)
    return identity


def find_differences(one: Identity, other: Identity) -> list[str]:
    """Return the names of what differs; what one of the two does not know is left out."""
    return [name for name in one if name in other and one[name] != other[name]]


def _digest_base_model(lm: LanguageModel) -> str:
    if lm.files is not None:
        return lm.files.sample()
    # Random weights follow from the config and the seed. Of a model that was given in memory, this is its type alone.
    return _digest(lm.config)


def _digest_rows(source: Source) -> str:
    if source.rows is not None:
        return _digest([list(map(dict, source.rows)), source.max_rows])
    if Path(source.path).is_file():
        return _digest([file_digest(Path(source.path)), source.max_rows])
    return _digest([source.path, source.name, source.split, source.max_rows])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
