"""What one pass through the model takes: rows of a step, without their padding, and whose tokens are whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_unlearn.data.encoding import IGNORED
from lit_unlearn.models import Alignment, Batch, LanguageModel, TokenIndex, locate
from lit_unlearn.models.packing import divide_evenly, is_packed, pack_or_pad
from lit_unlearn.models.tokens import check_batch
from lit_unlearn.objectives import Objective, Reads

Order = Literal["joint", "sequential"]

ANSWERS: dict[Reads, tuple[str, ...]] = {
    "answer": ("answer",),
    "alternate": ("alternate",),
    "pair": ("answer", "alternate"),
}


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
        reference: Whether one of them needs the reference model to run on it.
        layers: The layers whose output they read.
    """

    batch: Batch
    terms: list[int]
    tokens: list[TokenIndex]
    reference: bool
    layers: frozenset[int]


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
            be packed together; the reference model sees no row that it need not see.

    Returns:
        As many passes on every process, if all have as many rows.

    Raises:
        KeyError: If a stream is missing, or its batch lacks ``input_ids`` or ``labels``, or ``alternate`` where an
            objective reads it.
        ValueError: If a row has an answer and no alternate one, or an objective needs what packed batches cannot have.
    """
    batches = {stream: _batch_of(batch, stream) for stream in dict.fromkeys(term.stream for term in terms)}
    together = order == "joint" and lm.packs and not any(is_packed(part) for part in batches.values())
    passes: list[Pass] = []
    for referred in (False, True):
        streams = [s for s in batches if referred == _needs(terms, s, "reference")]
        for group in [streams] if together and streams else [[stream] for stream in streams]:
            own = [i for i, term in enumerate(terms) if term.stream in group]
            plan = _packed_passes if is_packed(batches[group[0]]) else _passes
            layers = frozenset().union(*(terms[i].objective.layers for i in own))
            for rows, tokens in plan(
                {s: batches[s] for s in group}, [terms[i] for i in own], lm.packs, micro_batch_size
            ):
                passes.append(Pass(rows, own, tokens, referred, layers))
    return passes


def _needs(terms: Sequence[Term], stream: str, need: str) -> bool:
    return any(need in term.objective.needs for term in terms if term.stream == stream)


def _passes(
    batches: Mapping[str, Batch], terms: Sequence[Term], packs: bool, micro_batch_size: int | None
) -> list[tuple[Batch, list[TokenIndex]]]:
    """Passes over the rows of some streams; the answers of a row stay together."""
    number = max(_parts(batch, micro_batch_size) for batch in batches.values())
    sources = list(dict.fromkeys((t.stream, answer) for t in terms for answer in ANSWERS[t.objective.reads]))
    answers = {source: _answers_of(batches[source[0]], *source) for source in sources}
    rows = {source: _unpadded(batch) for source, batch in answers.items()}
    shares = {}
    for stream in batches:
        lengths = [[len(row["labels"]) for row in rows[source]] for source in sources if source[0] == stream]
        shares[stream] = divide_evenly([sum(of_row) for of_row in zip(*lengths, strict=True)], number)
    passes: list[tuple[Batch, list[TokenIndex]]] = []
    for k in range(number):
        laid = _LaidOut([(m, i, rows[src][i]) for m, src in enumerate(sources) for i in shares[src[0]][k]], packs)
        tokens = [
            _combined(
                term,
                [
                    laid.tokens(sources.index(source), answers[source], term.objective.alignment)
                    for source in [(term.stream, answer) for answer in ANSWERS[term.objective.reads]]
                ],
            )
            for term in terms
        ]
        passes.append((laid.batch, tokens))
    return passes


class _LaidOut:
    """Rows of several sources in one batch, packed or padded, that knows which token is of which row.

    Args:
        rows: Number of the source, number of the row in it, and the row.
        packs: Whether rows of different lengths may be packed.
    """

    def __init__(self, rows: Sequence[tuple[int, int, Mapping[str, Tensor]]], packs: bool) -> None:
        marked = [
            {**row, "source": torch.full_like(row["labels"], m), "sequence": torch.full_like(row["labels"], i)}
            for m, i, row in rows
        ]
        self.batch = pack_or_pad(marked, packs)
        self._source, self._sequence = self.batch.pop("source"), self.batch.pop("sequence")

    def tokens(self, source: int, origin: Batch, alignment: Alignment) -> TokenIndex:
        """The supervised tokens of one source, whose rows came from the batch ``origin``."""
        own = self.batch["labels"].masked_fill(self._source != source, IGNORED)
        tokens = locate({**self.batch, "labels": own, "sequence": self._sequence}, alignment)
        logp = origin.get("reference_logp")
        return tokens if logp is None else tokens._replace(reference_logp=logp[tokens.examples])


def _combined(term: Term, answers: Sequence[TokenIndex]) -> TokenIndex:
    """What an objective is given: one answer's tokens, or a pair's."""
    first, *alternate = answers
    if alternate and not torch.equal(first.examples, alternate[0].examples):
        raise ValueError(
            f"'{term.name}' compares the answers of the '{term.stream}' rows with their alternate ones, but some row has "
            "supervised tokens in only one of them: drop such rows from the data."
        )
    return first._replace(alternate=alternate[0]) if alternate else first


def _packed_passes(
    batches: Mapping[str, Batch], terms: Sequence[Term], packs: bool, micro_batch_size: int | None
) -> list[tuple[Batch, list[TokenIndex]]]:
    """Passes over rows that were packed by the user, left as they are."""
    ((stream, batch),) = batches.items()
    for term in terms:
        if term.objective.needs & {"alternate", "reference_logp"}:
            raise ValueError(
                f"'{term.name}' ({type(term.objective).__name__}) needs to know the rows of the '{stream}' batch one by one, "
                "which came packed: give it padded rows, `input_ids` with `attention_mask`, and no `position_ids`."
            )
    size = -(-len(batch["labels"]) // _parts(batch, micro_batch_size))
    split = {key: value.split(size) for key, value in batch.items() if isinstance(value, Tensor)}
    parts = [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
    return [(part, [locate(part, term.objective.alignment) for term in terms]) for part in parts]


def _parts(batch: Batch, micro_batch_size: int | None) -> int:
    return 1 if micro_batch_size is None else -(-len(batch["labels"]) // micro_batch_size)


def _unpadded(batch: Batch) -> list[dict[str, Tensor]]:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    lengths = mask.sum(dim=1).tolist()
    tokens = (batch[key][mask].split(lengths) for key in ("input_ids", "labels"))
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*tokens, strict=True)]


def _answers_of(batch: Batch, stream: str, answer: str) -> Batch:
    if answer == "answer":
        return batch
    alternate = batch.get("alternate")
    if not isinstance(alternate, Mapping) or len(alternate["labels"]) != len(batch["labels"]):
        raise KeyError(
            f"an objective reads alternate answers of the '{stream}' rows, but the batch has none: give it a batch `alternate` "
            "whose row i is question i with another answer, as the data modules of this package do for their forget set."
        )
    check_batch(alternate)
    return alternate


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
