"""The identity of a run, so that a start of it resumes its own checkpoint and no other."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import lightning as L

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source
from lit_unlearn.models import LanguageModel
from lit_unlearn.training import LitLanguageModel

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
    if module.lm.teacher is not None:
        identity["teacher"] = _digest_base_model(module.lm.teacher)
    if isinstance(data, ForgetRetain):
        identity["seed of the data"] = str(data.seed)
        for name, source in data.sources.items():
            drops = data.drop_duplicates and name != "forget"
            identity[f"{name} rows"] = _digest_rows(source, *(["without duplicates"] if drops else []))
    return identity


def find_differences(one: Identity, other: Identity) -> list[str]:
    """Return the names of what differs; what one of the two does not know is left out."""
    return [name for name in one if name in other and one[name] != other[name]]


def _digest_base_model(lm: LanguageModel) -> str:
    if lm.files is not None:
        return lm.files.sample()
    # Random weights follow from the config and the seed. Of a model that was given in memory, this is its type alone.
    return _digest(lm.config)


def _digest_rows(source: Source, *settings: Any) -> str:
    if source.rows is not None:
        content: list[Any] = [list(map(dict, source.rows)), source.max_rows]
    elif (digest := source.digest()) is not None:
        content = [digest, source.max_rows]
    else:
        content = [source.path, source.name, source.split, source.max_rows]
    # In any order, a list of values chooses the same rows.
    rules = {}
    for rule, columns in source.rules.items():
        rules[rule] = {column: sorted(values) for column, values in columns.items()}
    # Only where there is a rule, so that the checkpoints of earlier versions are known.
    return _digest([*content, *([rules] if rules else []), *settings])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
