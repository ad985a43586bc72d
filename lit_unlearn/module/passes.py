"""What one pass through the model takes: rows of a step, without their padding, and whose tokens are whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.lm import LanguageModel, SupervisedTokens, locate
from lit_unlearn.lm.packing import IGNORED, is_packed, pack, share_out
from lit_unlearn.lm.tokens import check_batch
from lit_unlearn.module.measured import Batch
from lit_unlearn.objectives import Objective

Order = Literal["joint", "sequential"]


class Term(NamedTuple):
    """One weighted objective on one stream: a part of the Lagrangian.

    Args:
        name: For logs and messages.
        stream: Key of its batch.
        objective: What is averaged over the stream's rows.
        weight: Its factor in the sum that the primal step descends.
    """

    name: str
    stream: str
    objective: Objective
    weight: float


class Pass(NamedTuple):
    """One pass through the model.

    Args:
        batch: Rows of one stream, or of several packed together.
        terms: Indices of the objectives that read it.
        tokens: For each of them the tokens it reads, as `locate` gives them.
    """

    batch: Batch
    terms: list[int]
    tokens: list[SupervisedTokens]


def plan_passes(
    batch: Mapping[str, Batch], terms: Sequence[Term], lm: LanguageModel, micro_batch_size: int | None, order: Order
) -> list[Pass]:
    """Divides a step into passes through the model.

    Args:
        batch: One batch per stream, padded or packed.
        terms: The objectives of the step.
        lm: Tells whether sequences may be packed.
        micro_batch_size: Rows per pass and stream, on average: the passes have about as many tokens. ``None`` for all.
        order: ``"sequential"``: a pass has one stream's rows. ``"joint"``: it has rows of every stream, where they can
            be packed together.

    Returns:
        As many passes on every process, if all have as many rows.

    Raises:
        KeyError: If a stream is missing, or its batch lacks ``input_ids`` or ``labels``.
    """
    streams = list(dict.fromkeys(term.stream for term in terms))
    batches = [_batch_of(batch, stream) for stream in streams]
    if order == "joint" and lm.packs and not any(is_packed(part) for part in batches):
        return _joint_passes(
            batches, [(term.objective, streams.index(term.stream)) for term in terms], micro_batch_size
        )
    passes = []
    for stream, rows in zip(streams, batches, strict=True):
        own = [i for i, term in enumerate(terms) if term.stream == stream]
        for part in _split(rows, lm.packs, micro_batch_size):
            passes.append(Pass(part, own, [locate(part, terms[i].objective.alignment) for i in own]))
    return passes


def _joint_passes(
    batches: Sequence[Batch], terms: Sequence[tuple[Objective, int]], micro_batch_size: int | None
) -> list[Pass]:
    number = max(_parts(batch, micro_batch_size) for batch in batches)
    rows = [_unpadded(batch) for batch in batches]
    shares = [share_out([len(row["labels"]) for row in of_stream], number) for of_stream in rows]
    passes = []
    for k in range(number):
        marked = [
            {**rows[stream][i], "stream": torch.full_like(rows[stream][i]["labels"], stream)}
            for stream in range(len(batches))
            for i in shares[stream][k]
        ]
        packed = pack(marked)
        stream, labels = packed.pop("stream"), packed["labels"]
        tokens = [
            locate({**packed, "labels": labels.masked_fill(stream != own, IGNORED)}, objective.alignment)
            for objective, own in terms
        ]
        passes.append(Pass(packed, list(range(len(terms))), tokens))
    return passes


def _split(batch: Batch, packs: bool, micro_batch_size: int | None) -> list[Batch]:
    number = _parts(batch, micro_batch_size)
    if is_packed(batch):
        size = -(-len(batch["labels"]) // number)
        split = {key: value.split(size) for key, value in batch.items() if isinstance(value, Tensor)}
        return [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
    rows = _unpadded(batch)
    lengths = [len(row["labels"]) for row in rows]
    return [
        pack([rows[i] for i in share]) if packs and len({lengths[i] for i in share}) > 1 else _padded(batch, share)
        for share in share_out(lengths, number)
    ]


def _parts(batch: Batch, micro_batch_size: int | None) -> int:
    return 1 if micro_batch_size is None else -(-len(batch["labels"]) // micro_batch_size)


def _mask(batch: Batch) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _unpadded(batch: Batch) -> list[dict[str, Tensor]]:
    mask = _mask(batch)
    lengths = mask.sum(dim=1).tolist()
    tokens = (batch[key][mask].split(lengths) for key in ("input_ids", "labels"))
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*tokens, strict=True)]


def _padded(batch: Batch, rows: list[int]) -> Batch:
    """Some rows, without the columns that are padding in all of them."""
    mask = _mask(batch)[rows]
    used = mask.any(dim=0)
    parts = {key: batch[key][rows][:, used] for key in ("input_ids", "labels")}
    return {**parts, "attention_mask": mask[:, used].to(batch["input_ids"].dtype)}


def _batch_of(batch: Mapping[str, Batch], stream: str) -> Batch:
    part = batch.get(stream) if isinstance(batch, Mapping) else None
    if isinstance(part, Mapping):
        check_batch(part)
        return part
    got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise KeyError(
        f"a training batch must be a dict with '{stream}' among its keys, whose value is a batch with `input_ids`, "
        f"`attention_mask` and `labels`; got {got}."
    )
