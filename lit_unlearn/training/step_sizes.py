"""The passes of a run's steps, counted without a model: the batches are those of training, and so is their division into passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import torch

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.models.memory_plan import HeadKind, PassSizes
from lit_unlearn.objectives import NLL, Objective
from lit_unlearn.training.forward_plan import ForwardPass, Term, build_forward_plan
from lit_unlearn.training.module import LitLanguageModel

MAX_STEPS = 200
"""Steps that are looked at in search of the largest."""


class RunSizes(NamedTuple):
    """Steps of a run.

    Args:
        steps: Of those looked at, the passes of one device.
        per_epoch: Optimizer steps of an epoch; ``None`` if the number of rows is unknown.
        validation_tokens: Supervised tokens of a validation batch, at most.
        source: Where rows and lengths come from, in words.
    """

    steps: list[list[PassSizes]]
    per_epoch: int | None
    validation_tokens: int
    source: str


def can_read(data: ForgetRetain, has_tokenizer: bool) -> bool:
    """Return whether all rows are on this machine, and a tokenizer for them."""
    return has_tokenizer and all(
        source.digest() is not None or source.rows is not None for source in data.sources.values()
    )


def read_run(data: ForgetRetain, module: LitLanguageModel, devices: int, shares_prefix: bool) -> RunSizes:
    """Read and tokenise the rows, and return the passes of the first epoch.

    Args:
        data: With local rows and a tokenizer of its own.
        module: Whose objectives read them; its model is not loaded.
        devices: Processes that share a step.
        shares_prefix: Whether packed examples share their first tokens.

    Raises:
        LitUnlearnError: If the rows cannot be used.
    """
    data.setup("fit")
    # Without a Trainer there is one process.
    data.trainer = SimpleNamespace(global_rank=0, world_size=devices)  # type: ignore[assignment]
    loader = data.train_dataloader()
    batches = (batch for batch, _, _ in loader)
    steps = [count_passes(batch, module, shares_prefix) for batch in islice(batches, MAX_STEPS)]
    limit = data.examples["forget"] if data.train_on == "pairs" else _trained_examples(data)
    rows = ", ".join(f"{len(examples)} {name}" for name, examples in data.examples.items())
    longest = validated = 0
    for examples in data.examples.values():
        longest = max([longest, *(len(example.input_ids) for example in examples)])
        counts = sorted((len(example.labels) - example.labels.count(IGNORED) for example in examples), reverse=True)
        validated = max(validated, sum(counts[: data.eval_batch_size]))
    return RunSizes(
        steps, -(-len(limit) // data.batch_size), validated, f"{rows} examples as read, up to {longest} tokens"
    )


def _trained_examples(data: ForgetRetain) -> list[Example]:
    together = []
    for name, examples in data.examples.items():
        if name != "forget" or data.train_on == "all":
            together += examples
    return together


def assume_run(
    data: ForgetRetain, module: LitLanguageModel, devices: int, rows: int | None, length: int | None
) -> RunSizes:
    """Return the passes of one step of examples of one length, all of whose tokens are supervised.

    Args:
        data: Whose rows are not read.
        module: Whose objectives read them.
        devices: Processes that share a step.
        rows: Number of forget rows, or of those that are fine-tuned on; ``None`` if unknown.
        length: Tokens of every example; ``None`` for the data's ``max_length``.
    """
    tokens = data.max_length if length is None else length
    # A pair of lengths, so that they are packed as rows of different lengths are: equal ones need no mask.
    sizes = [tokens, max(1, tokens - 1)]
    batch: dict[str, list[Example]] = {}
    streams = {term.stream for term in module.terms()} or {"train"}
    for stream in streams:
        of_all = data.batch_size if stream in ("forget", "train") else data.retain_batch_size
        if rows is not None and stream in ("forget", "train"):
            of_all = min(of_all, rows)
        batch[stream] = [_make_example(sizes[i % 2]) for i in range(-(-of_all // devices))]
    per_epoch = None if rows is None else -(-rows // data.batch_size)
    number = "an unknown number of" if rows is None else str(rows)
    said = "--length" if length is not None else "the largest length, data.max_length"
    source = f"assumed, not read: {number} rows of {tokens} tokens ({said}), all supervised"
    return RunSizes([count_passes(batch, module)], per_epoch, data.eval_batch_size * tokens, source)


def _make_example(length: int) -> Example:
    return Example([1] * length, [1] * length)


def count_passes(
    batch: Mapping[str, Sequence[Example]], module: LitLanguageModel, shares_prefix: bool = False
) -> list[PassSizes]:
    """Return the sizes of the passes of a step; alternate answers count as long as the answers where they are not there."""
    terms = module.terms() or [Term(stream, stream, NLL(), 1.0) for stream in batch]
    streams = {}
    for stream in {term.stream for term in terms}:
        streams[stream] = [_with_alternate(example) for example in batch[stream]]
    size, order = module.micro_batch_size, module.passes
    plan = build_forward_plan(streams, terms, True, size, order, lambda _: 0.0, shares_prefix)
    return [_measure_pass(forward_pass, terms) for forward_pass in plan]


def _with_alternate(example: Example) -> Example:
    return example if example.alternate is not None else example._replace(alternate=example)


def _measure_pass(forward_pass: ForwardPass, terms: Sequence[Term]) -> PassSizes:
    rows, width = forward_pass.batch["input_ids"].shape
    heads: list[tuple[HeadKind, int]] = []
    for number, index in zip(forward_pass.terms, forward_pass.indices, strict=True):
        count = index.labels.numel() * (2 if terms[number].objective.reads == "pair" else 1)
        heads.append((head_kind(terms[number].objective), count))
    num_models = 1 + forward_pass.reference + forward_pass.teacher
    return PassSizes(rows, width, _is_masked(forward_pass.batch), tuple(heads), num_models)


def _is_masked(batch: Mapping[str, torch.Tensor]) -> bool:
    """Return whether attention needs a mask: where a row is one whole example, it is causal and nothing else."""
    if "attention_mask" in batch:
        return not bool(batch["attention_mask"].all())
    # Positions that restart within a row.
    return bool((batch["position_ids"].diff(dim=1) != 1).any())


def head_kind(objective: Objective) -> HeadKind:
    """Return how an objective uses the head, from the names that its `forward` calls."""
    # Without a model it cannot be run; classes of the user's have no declaration of it.
    names = type(objective).forward.__code__.co_names
    if "map_logits" in names or "map_logit_pairs" in names:
        return "dense"
    return "margin" if "logit_margin" in names else "nll"


def count_steps(per_epoch: int | None, max_epochs: int | None, max_steps: int) -> int | None:
    """Return the steps of a run; ``None`` if they are unknown.

    Args:
        per_epoch: Steps of an epoch, or ``None``.
        max_epochs: Of the Trainer; ``None`` or -1 for no bound.
        max_steps: Of the Trainer; -1 for no bound.
    """
    bounds = [max_steps] if max_steps >= 0 else []
    if per_epoch is not None and max_epochs is not None and max_epochs >= 0:
        bounds.append(per_epoch * max_epochs)
    elif per_epoch is None and max_steps < 0:
        return None
    return min(bounds, default=None)
