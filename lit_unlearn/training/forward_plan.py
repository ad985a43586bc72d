"""The forward plan of a step: packed passes through the model, and which tokens each objective reads in them.

Everything here happens on the CPU. A pass goes to the device when it is run, and nothing is read back from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_unlearn.data.encoding import IGNORED, Example
from lit_unlearn.errors import BatchError
from lit_unlearn.models import Alignment, Batch, LanguageModel, SupervisedTokens, TokenIndex, locate
from lit_unlearn.models.packing import divide_evenly, is_packed, pack_or_pad
from lit_unlearn.models.tokens import check_batch
from lit_unlearn.objectives import Objective

PassOrder = Literal["joint", "sequential"]
Answer = Literal["answer", "alternate"]
Sequences = list[dict[str, Tensor]]
Value = TypeVar("Value")

ANSWERS_READ: dict[str, tuple[Answer, ...]] = {
    "answer": ("answer",),
    "alternate": ("alternate",),
    "pair": ("answer", "alternate"),
}


class Term(NamedTuple):
    """One weighted objective on one stream: a part of the Lagrangian.

    Args:
        name: For logs and messages.
        stream: Key of its batch.
        objective: Loss that is averaged over the stream's examples.
        weight: Its factor in the sum that the primal step descends.
    """

    name: str
    stream: str
    objective: Objective
    weight: float


class ForwardPass(NamedTuple):
    """One pass through the model, on the CPU.

    Args:
        batch: Examples of one stream, or of several packed together.
        terms: Indices of the terms that read it.
        indices: For each of them the tokens that it reads.
        reference: Whether one of them needs the reference model to run on the batch.
        layers: The layers whose output they read.
    """

    batch: dict[str, Tensor]
    terms: list[int]
    indices: list[TokenIndex]
    reference: bool
    layers: frozenset[int]

    def run(
        self, lm: LanguageModel, readers: Sequence[Callable[[LanguageModel, SupervisedTokens], Value]]
    ) -> list[Value]:
        """Run the model and hand each term's tokens to its reader.

        The readers are called inside of the model's forward, because FSDP2 has the head's weight whole only there.

        Args:
            lm: The model; the pass goes to its device.
            readers: One for each term of the plan, such as the objectives themselves.

        Returns:
            Results of the readers of this pass, in the order of ``terms``.
        """
        device = next(lm.parameters()).device

        def read(*tokens: SupervisedTokens) -> list[Value]:
            return [readers[term](lm, seen) for term, seen in zip(self.terms, tokens, strict=True)]

        batch = {key: _send(value, device) for key, value in self.batch.items()}
        indices = [index.to(device) for index in self.indices]
        return lm(batch, read, index=indices, reference=self.reference, layers=self.layers)  # type: ignore[no-any-return]


def build_forward_plan(
    batch: Mapping[str, Batch],
    terms: Sequence[Term],
    packs: bool,
    micro_batch_size: int | None,
    order: PassOrder,
    reference_logp: Callable[[Example], float] | None = None,
) -> list[ForwardPass]:
    """Split a training batch into packed forward passes and record which tokens each objective reads.

    Args:
        batch: For every stream examples, or a padded or packed Hugging Face batch.
        terms: The objectives of the step.
        packs: Whether the model separates packed sequences.
        micro_batch_size: Examples per pass and stream, on average: the passes have about as many tokens. ``None``: all.
        order: ``"sequential"``: a pass has one stream's examples. ``"joint"``: it has examples of every stream, where they
            can be packed together. The reference model sees no example that it need not see.
        reference_logp: Log-probability of an example under the reference model, nats; for objectives that need it.

    Returns:
        As many passes on every process, if all have as many examples.

    Raises:
        BatchError: If a stream is missing, its batch lacks ``input_ids``, ``labels`` or ``alternate``, an example has an
            answer and no alternate one, or an objective needs what packed batches cannot have.
    """
    batches = {}
    for stream in dict.fromkeys(term.stream for term in terms):
        batches[stream] = _batch_of(batch, stream)
    # Batches that the user has packed: their rows cannot be divided.
    packed: dict[str, Mapping[str, Any]] = {}
    for stream, part in batches.items():
        if isinstance(part, Mapping) and is_packed(part):
            packed[stream] = part
    together = order == "joint" and packs and not packed

    plan: list[ForwardPass] = []
    # Streams that need the reference model have passes of their own, so that it sees nothing else.
    for reference in (False, True):
        streams = [stream for stream in batches if reference == _needs_reference(terms, stream)]
        groups = [streams] if together and streams else [[stream] for stream in streams]
        for group in groups:
            numbers = [i for i, term in enumerate(terms) if term.stream in group]
            read_by = [terms[i] for i in numbers]
            layers = frozenset[int]().union(*(term.objective.layers for term in read_by))
            if group[0] in packed:
                passes = _split_packed_batch(packed[group[0]], read_by, micro_batch_size)
            else:
                group_batches = {stream: batches[stream] for stream in group}
                passes = _pack_passes(group_batches, read_by, packs, micro_batch_size, reference_logp)
            for rows, indices in passes:
                plan.append(ForwardPass(rows, numbers, indices, reference, layers))
    return plan


def _pack_passes(
    batches: Mapping[str, Batch],
    terms: Sequence[Term],
    packs: bool,
    micro_batch_size: int | None,
    reference_logp: Callable[[Example], float] | None,
) -> list[tuple[dict[str, Tensor], list[TokenIndex]]]:
    """Return passes over the examples of some streams; the answers of an example stay in one pass."""
    number = max(_count_passes(batch, micro_batch_size) for batch in batches.values())
    # The answers that go through the model: a source is a stream with the kind of its answers.
    sources: list[tuple[str, Answer]] = []
    for term in terms:
        for answer in ANSWERS_READ[term.objective.reads]:
            if (term.stream, answer) not in sources:
                sources.append((term.stream, answer))
    scored = {(term.stream, answer) for term in terms for answer in _answers_with_reference(term)}

    sequences: list[Sequences] = []
    values: list[Tensor | None] = []
    for stream, answer in sources:
        part = select_answer(batches[stream], stream, answer)
        sequences.append(unpad(part))
        values.append(_reference_values(part, (stream, answer) in scored, reference_logp))
    shares = {stream: _share(stream, sources, sequences, number) for stream in batches}

    passes = []
    for k in range(number):
        marked: Sequences = []
        for source, (stream, _) in enumerate(sources):
            for i in shares[stream][k]:
                # Every token carries its source and its example's number through the packing.
                sequence = sequences[source][i]
                origin = torch.full_like(sequence["labels"], source)
                marked.append({**sequence, "source": origin, "sequence": torch.full_like(sequence["labels"], i)})
        packed = pack_or_pad(marked, packs)
        origins, numbers = packed.pop("source"), packed.pop("sequence")

        def index_of(source: int, alignment: Alignment) -> TokenIndex:
            labels = packed["labels"].masked_fill(origins != source, IGNORED)  # noqa: B023  (used within this round)
            index = locate({**packed, "labels": labels, "sequence": numbers}, alignment)  # noqa: B023
            logp = values[source]
            return index if logp is None else index._replace(reference_logp=logp[index.examples])

        indices = []
        for term in terms:
            answers = ANSWERS_READ[term.objective.reads]
            found_indices = [index_of(sources.index((term.stream, a)), term.objective.alignment) for a in answers]
            indices.append(term.objective.select(_pair(term, found_indices)))
        passes.append((packed, indices))
    return passes


def _share(
    stream: str, sources: Sequence[tuple[str, Answer]], sequences: Sequence[Sequences], number: int
) -> list[list[int]]:
    """Return which examples of a stream go into which pass, so that passes have about as many tokens."""
    totals: list[int] = []
    for source, (name, _) in enumerate(sources):
        if name == stream:
            lengths = [len(sequence["labels"]) for sequence in sequences[source]]
            totals = [a + b for a, b in zip(totals, lengths, strict=True)] if totals else lengths
    return divide_evenly(totals, number)


def _pair(term: Term, indices: Sequence[TokenIndex]) -> TokenIndex:
    """Return the one answer's tokens that a term reads, or those of a pair."""
    if len(indices) == 1:
        return indices[0]
    answer, alternate = indices
    if not torch.equal(answer.examples, alternate.examples):
        raise BatchError(
            f"'{term.name}' compares the answers of the '{term.stream}' examples with their alternate ones, but some example "
            "has supervised tokens in only one of them: drop such rows from the data."
        )
    return answer._replace(alternate=alternate)


def _split_packed_batch(
    batch: Mapping[str, Any], terms: Sequence[Term], micro_batch_size: int | None
) -> list[tuple[dict[str, Tensor], list[TokenIndex]]]:
    """Return passes over rows that the user has packed; the rows are left as they are."""
    rows = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    for term in terms:
        objective = term.objective
        if objective.reads != "answer" or "reference_logp" in objective.needs:
            raise BatchError(
                f"'{term.name}' ({type(objective).__name__}) needs to know the examples of the '{term.stream}' batch one by "
                "one, which came packed: give it padded rows, `input_ids` with `attention_mask`, and no `position_ids`."
            )
    size = -(-len(rows["labels"]) // _count_passes(rows, micro_batch_size))
    passes = []
    for start in range(0, len(rows["labels"]), size):
        part = {key: value[start : start + size] for key, value in rows.items()}
        passes.append((part, [term.objective.select(locate(part, term.objective.alignment)) for term in terms]))
    return passes


# Batches --------------------------------------------------------------------------------------------------------------


def _batch_of(batch: Mapping[str, Batch], stream: str) -> Batch:
    """Return the batch of a stream, on the CPU."""
    part = batch.get(stream) if isinstance(batch, Mapping) else None
    if isinstance(part, Mapping):
        check_batch(part)
        return _to_cpu(part)
    if part is not None and all(isinstance(example, Example) for example in part):
        return part
    got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise BatchError(
        f"a training batch must be a dict with '{stream}' among its keys, whose value is a batch with `input_ids`, "
        f"`attention_mask` and `labels`, or a list of examples; got {got}."
    )


def select_answer(batch: Batch, stream: str, answer: Answer) -> Batch:
    """Return the examples of a batch, or their alternate answers.

    Raises:
        BatchError: If there are no alternate answers.
    """
    if answer == "answer":
        return batch
    alternate: Any = None
    if isinstance(batch, Mapping):
        alternate = batch.get("alternate")
        if isinstance(alternate, Mapping) and len(alternate["labels"]) == len(batch["labels"]):
            check_batch(alternate)
            return alternate
    else:
        alternate = [example.alternate for example in batch if example.alternate is not None]
        if len(alternate) == len(batch):
            return alternate  # type: ignore[no-any-return]
    raise BatchError(
        f"an objective reads alternate answers of the '{stream}' examples, but the batch has none: give it a batch `alternate` "
        "whose row i is question i with another answer, as the data modules of this package do for their forget set."
    )


def unpad(batch: Batch) -> Sequences:
    """Return ``input_ids`` and ``labels`` of every example, without padding, shape ``(length,)`` each."""
    if not isinstance(batch, Mapping):
        return [
            {"input_ids": torch.tensor(example.input_ids), "labels": torch.tensor(example.labels)} for example in batch
        ]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    sequences = []
    for kept_tokens, ids, labels in zip(mask, batch["input_ids"], batch["labels"], strict=True):
        sequences.append({"input_ids": ids[kept_tokens], "labels": labels[kept_tokens]})
    return sequences


def as_examples(batch: Batch) -> list[Example]:
    """Return a batch as examples; those of a padded batch have no id."""
    if not isinstance(batch, Mapping):
        return list(batch)
    return [Example(row["input_ids"].tolist(), row["labels"].tolist()) for row in unpad(_to_cpu(batch))]


def _reference_values(batch: Batch, needed: bool, logp: Callable[[Example], float] | None) -> Tensor | None:
    """Return the log-probabilities of a batch's examples under the reference model, float64, shape ``(B,)``."""
    if isinstance(batch, Mapping) and "reference_logp" in batch:
        return torch.as_tensor(batch["reference_logp"])
    if not needed or logp is None:
        return None
    return torch.tensor([logp(example) for example in as_examples(batch)], dtype=torch.float64)


def _answers_with_reference(term: Term) -> tuple[Answer, ...]:
    needs_logp = "reference_logp" in term.objective.needs
    return ANSWERS_READ[term.objective.reads] if needs_logp else ()


def _needs_reference(terms: Sequence[Term], stream: str) -> bool:
    return any("reference" in term.objective.needs for term in terms if term.stream == stream)


def _count_passes(batch: Batch, micro_batch_size: int | None) -> int:
    size = len(batch["labels"]) if isinstance(batch, Mapping) else len(batch)
    return 1 if micro_batch_size is None else -(-size // micro_batch_size)


def _send(value: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory does a copy run beside the computation.
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _to_cpu(batch: Mapping[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            moved[key] = value.cpu()
        else:
            moved[key] = _to_cpu(value) if isinstance(value, Mapping) else value
    return moved
