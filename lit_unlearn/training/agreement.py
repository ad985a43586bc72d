"""Check that the processes of a run have the same rows and the same configuration."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.example import Example
from lit_unlearn.errors import DataError
from lit_unlearn.utils.distributed import gather_objects

if TYPE_CHECKING:
    from lit_unlearn.evaluation.benchmark_rows import BenchmarkStream
    from lit_unlearn.training.module import LitLanguageModel

Facts = dict[str, str]

_COUNT, _TOKENS = "number of {} rows", "prompts and answers of the {} rows"
_TRAINER_SETTINGS = (
    *("max_epochs", "max_steps", "precision", "check_val_every_n_epoch", "val_check_interval"),
    *("limit_train_batches", "limit_val_batches"),
)
_MODULE_SETTINGS = ("seed", "micro_batch_size", "gradient_clip_val", "passes", "keep", "forget_weight")
_DATA_SETTINGS = ("train_on", "seed", "batch_size", "retain_batch_size", "eval_batch_size")


def check_processes_agree(facts: Facts) -> None:
    """Raise an error on every process if one of them has other facts; a collective call.

    A second machine may have a stale copy of a file. With other numbers of rows the processes would wait for each other for
    ever; with other texts they would train, and the record would tell of the first one's rows only.

    Args:
        facts: What this process has, by what it is called.

    Raises:
        DataError: With what differs, and on which ranks. It shows no row.
    """
    facts_by_rank = gather_objects(facts)
    names: dict[str, None] = {}
    for facts_there in facts_by_rank:
        names |= dict.fromkeys(facts_there)
    differences = []
    for name in names:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, facts_there in enumerate(facts_by_rank):
            ranks_by_value.setdefault(facts_there.get(name, "none"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = [f"{value} on {_format_ranks(ranks)}" for value, ranks in ranks_by_value.items()]
            differences.append(f"{name}: {', '.join(values)}")
    if not differences:
        return
    raise DataError(
        "\n- ".join(
            [
                "the processes of this run have not read the same. Give every machine the same files and configuration:",
                *differences,
            ]
        )
    )


def _format_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def describe_setup(module: LitLanguageModel) -> Facts:
    """Return what is known of rows and configuration before the model is loaded."""
    trainer = module.trainer
    facts = {}
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ForgetRetain):
        for name, examples in data.examples.items():
            facts[_COUNT.format(name)] = str(len(examples))
            facts[_TOKENS.format(name)] = _digest_examples(examples)
        facts |= {f"data's `{name}`": str(getattr(data, name)) for name in _DATA_SETTINGS}
    for name in _MODULE_SETTINGS:
        if hasattr(module, name):
            facts[f"model's `{name}`"] = str(getattr(module, name))
    facts |= {f"Trainer's `{name}`": str(getattr(trainer, name)) for name in _TRAINER_SETTINGS}
    for term in module.terms():
        facts[f"objective '{term.name}'"] = _describe(term.objective)
    robustness = getattr(module, "robustness", None)
    facts["model's `robustness`"] = "none" if robustness is None else _describe(robustness)
    for name, constraint in getattr(module, "constraints", {}).items():
        epsilon = constraint.epsilon if constraint.relative is None else f"{1 + constraint.relative} × the value before"
        settings = {
            **read_arguments(constraint),
            "epsilon": str(epsilon),
            "multiplier": _describe(constraint.multiplier),
        }
        facts[f"constraint '{name}'"] = json.dumps(settings, sort_keys=True)
    return facts


def describe_start(module: LitLanguageModel, optimizer: list[dict[str, Any]]) -> Facts:
    """Return what is known before the first step: the optimizer's settings and the base model."""
    facts = {"optimizer": json.dumps(optimizer, sort_keys=True, default=str)}
    # The weights of a model that was made in memory may differ: DDP gives every process those of the first one.
    if module.lm.name is not None:
        facts["base model"] = str(module.lm.base_checksum())
    return facts


def describe_benchmark(streams: Mapping[str, BenchmarkStream]) -> Facts:
    """Return what is known of a benchmark's rows."""
    facts = {}
    for name, stream in streams.items():
        content = [[example.prompt, example.texts, example.sequences] for example in stream.examples]
        facts[_COUNT.format(name)] = str(len(stream.examples))
        facts[_TOKENS.format(name)] = _digest(content)
    return facts


def read_arguments(instance: Any) -> dict[str, Any]:
    """Return the arguments that an object was made with, as far as it keeps plain values under their names."""
    # By convention of this package an object keeps its arguments under their names.
    arguments = {}
    for name in inspect.signature(type(instance)).parameters:
        value = getattr(instance, name, None)
        if isinstance(value, (bool, int, float, str)):
            arguments[name] = value
    return arguments


def _describe(instance: Any) -> str:
    return f"{type(instance).__name__} {json.dumps(read_arguments(instance), sort_keys=True)}"


def _digest_examples(examples: list[Example]) -> str:
    content = []
    for example in examples:
        alternate = None if example.alternate is None else example.alternate.digest()
        content.append([example.digest(), alternate])
    return _digest(content)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:12]
