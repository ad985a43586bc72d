"""The forward plan of a step: packed passes through the model, and which tokens each objective reads in them.

Everything here happens on the CPU. A pass goes to the device when it is run, and nothing is read back from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_unlearn.data.batches import VISIBLE, pack_visible, to_sequence
from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.errors import BatchError
from lit_unlearn.models import Batch, LanguageModel, SupervisedTokens, TokenIndex, locate
from lit_unlearn.models.packed_attention import BOUNDS, find_bounds, is_packed
from lit_unlearn.models.packing import divide_evenly
from lit_unlearn.models.tokens import check_batch
from lit_unlearn.models.transfer import drop_full_mask, known_packing, send
from lit_unlearn.objectives import Need, Objective

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
        teacher: Whether one of them needs the teacher to run on the batch.
    """

    batch: dict[str, Tensor]
    terms: list[int]
    indices: list[TokenIndex]
    reference: bool
    layers: frozenset[int]
    teacher: bool = False

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
        device = lm.input_device

        def read(*tokens: SupervisedTokens) -> list[Value]:
            return [readers[term](lm, seen) for term, seen in zip(self.terms, tokens, strict=True)]

        batch = drop_full_mask(self.batch)
        sent: dict[str, Any] = {key: send(value, device) for key, value in batch.items()}
        if is_packed(batch):
            sent[BOUNDS] = find_bounds(batch["position_ids"])
        indices = [index.to(device) for index in self.indices]
        others = {"reference": self.reference, "teacher": self.teacher}
        with known_packing(batch, device):
            return lm(sent, read, index=indices, layers=self.layers, **others)  # type: ignore[no-any-return]


def build_forward_plan(
    batch: Mapping[str, Batch],
    terms: Sequence[Term],
    packs: bool,
    micro_batch_size: int | None,
    order: PassOrder,
    reference_logp: Callable[[Example], float] | None = None,
    shares_prefix: bool = False,
) -> list[ForwardPass]:
    """Split a training batch into packed forward passes and record which tokens each objective reads.

    Args:
        batch: For every stream examples, or a padded or packed Hugging Face batch.
        terms: The objectives of the step.
        packs: Whether the model separates packed sequences.
        micro_batch_size: Examples per pass and stream, on average: the passes have about as many tokens. ``None``: all.
        order: ``"sequential"``: a pass has one stream's examples. ``"joint"``: it has examples of every stream, where they
            can be packed together. Reference model and teacher see no example that they need not see.
        reference_logp: Log-probability of an example under the reference model, nats; for objectives that need it.
        shares_prefix: Whether packed sequences may share their first tokens.

    Returns:
        As many passes on every process, if all have as many examples.

    Raises:
        BatchError: If a stream is missing, its batch lacks ``input_ids``, ``labels`` or ``alternate``, an example has an
            answer and no alternate one, or an objective needs what packed batches cannot have.
    """
    batches: dict[str, Batch] = {}
    packed: dict[str, Mapping[str, Any]] = {}  # batches that the user has packed: their rows cannot be divided
    for term in terms:
        if term.stream not in batches:
            stream_batch = _batch_of(batch, term.stream)
            batches[term.stream] = stream_batch
            if isinstance(stream_batch, Mapping) and is_packed(stream_batch):
                packed[term.stream] = stream_batch
    together = order == "joint" and packs and not packed

    plan: list[ForwardPass] = []
    # Streams that need another model have passes of their own, so that it sees nothing else.
    for reference, teacher in product((False, True), repeat=2):
        streams = []
        for stream in batches:
            needs = _collect_needs(terms, stream)
            if ("reference" in needs, "teacher" in needs) == (reference, teacher):
                streams.append(stream)
        groups = [streams] if together and streams else [[stream] for stream in streams]
        for group in groups:
            numbers = [i for i, term in enumerate(terms) if term.stream in group]
            readers = [terms[i] for i in numbers]
            if group[0] in packed:
                passes = _split_packed_batch(packed[group[0]], readers, micro_batch_size)
            else:
                sources = _collect_sources(batches, readers, reference_logp)
                passes = _pack_passes(sources, readers, packs, micro_batch_size, shares_prefix)
            layers = frozenset[int]()
            for term in readers:
                layers |= term.objective.layers
            for rows, indices in passes:
                plan.append(ForwardPass(rows, numbers, indices, reference, layers, teacher))
    return plan


class _Source(NamedTuple):
    """Answers of one kind of one stream that go through the model: sequences without padding, and their reference values."""

    sequences: Sequences
    reference_logp: Tensor | None

    @property
    def lengths(self) -> list[int]:
        return [len(sequence["labels"]) for sequence in self.sequences]


_Sources = dict[tuple[str, Answer], _Source]


def _collect_sources(
    batches: Mapping[str, Batch], terms: Sequence[Term], logp: Callable[[Example], float] | None
) -> _Sources:
    """Return the answers that the terms read, by stream and kind; what nothing reads does not go through the model."""
    scored = set[tuple[str, Answer]]()
    for term in terms:
        if "reference_logp" in term.objective.needs:
            scored.update((term.stream, answer) for answer in ANSWERS_READ[term.objective.reads])

    sources: _Sources = {}
    for term in terms:
        for answer in ANSWERS_READ[term.objective.reads]:
            key = (term.stream, answer)
            if key not in sources:
                answers = select_answer(batches[term.stream], term.stream, answer)
                values = _reference_values(answers, logp if key in scored else None)
                sources[key] = _Source(unpad(answers), values)
    return sources


def _pack_passes(
    sources: _Sources, terms: Sequence[Term], packs: bool, micro_batch_size: int | None, shares_prefix: bool
) -> list[tuple[dict[str, Tensor], list[TokenIndex]]]:
    """Return passes with about as many tokens each; the answers of an example stay in one pass."""
    totals: dict[str, list[int]] = {}  # by stream the tokens of every example, over all of its answers
    for (stream, _), source in sources.items():
        before = totals.get(stream, [0] * len(source.sequences))
        totals[stream] = [a + b for a, b in zip(before, source.lengths, strict=True)]
    number = max(_count_passes(len(lengths), micro_batch_size) for lengths in totals.values())
    shares = {stream: divide_evenly(lengths, number) for stream, lengths in totals.items()}

    passes = []
    for k in range(number):
        # Every token carries its source and its example's number through the packing.
        marked: Sequences = []
        for mark, ((stream, _), source) in enumerate(sources.items()):
            for i in shares[stream][k]:
                labels = source.sequences[i]["labels"]
                marks = {"source": torch.full_like(labels, mark), "sequence": torch.full_like(labels, i)}
                marked.append({**source.sequences[i], **marks})
        packed = pack_visible(marked, packs, shares_prefix)
        passes.append((packed, [_index_tokens(packed, sources, term) for term in terms]))
        # The model takes no marks.
        del packed["source"], packed["sequence"]
    return passes


def _index_tokens(packed: Mapping[str, Tensor], sources: _Sources, term: Term) -> TokenIndex:
    """Return the tokens of a packed pass that a term reads: one answer's, or a pair's."""
    objective = term.objective
    marks = list(sources)
    indices = []
    for answer in ANSWERS_READ[objective.reads]:
        key = (term.stream, answer)
        labels = packed["labels"].masked_fill(packed["source"] != marks.index(key), IGNORED)
        index = locate({**packed, "labels": labels}, objective.alignment)
        logp = sources[key].reference_logp
        indices.append(index if logp is None else index._replace(reference_logp=logp[index.examples]))

    first = indices[0]
    if objective.reads == "pair":
        alternate = indices[1]
        if not torch.equal(first.examples, alternate.examples):
            raise BatchError(
                f"'{term.name}' compares the answers of the '{term.stream}' examples with their alternate ones, but some "
                "example has supervised tokens in only one of them: drop such rows from the data."
            )
        first = first._replace(alternate=alternate)
    return objective.select(first)


def _split_packed_batch(
    batch: Mapping[str, Any], terms: Sequence[Term], micro_batch_size: int | None
) -> list[tuple[dict[str, Tensor], list[TokenIndex]]]:
    """Return passes over rows that the user has packed; the rows are left as they are."""
    for term in terms:
        objective = term.objective
        if objective.reads != "answer" or "reference_logp" in objective.needs:
            raise BatchError(
                f"'{term.name}' ({type(objective).__name__}) needs to know the examples of the '{term.stream}' batch one by "
                "one, which came packed: give it padded rows, `input_ids` with `attention_mask`, and no `position_ids`."
            )
    num_rows = len(batch["labels"])
    size = -(-num_rows // _count_passes(num_rows, micro_batch_size))
    passes = []
    for start in range(0, num_rows, size):
        rows = {}
        for key, value in batch.items():
            if isinstance(value, Tensor):
                rows[key] = value[start : start + size]
        indices = [term.objective.select(locate(rows, term.objective.alignment)) for term in terms]
        passes.append((rows, indices))
    return passes


def _collect_needs(terms: Sequence[Term], stream: str) -> frozenset[Need]:
    needs = frozenset[Need]()
    for term in terms:
        if term.stream == stream:
            needs |= term.objective.needs
    return needs


def _count_passes(num_examples: int, micro_batch_size: int | None) -> int:
    return 1 if micro_batch_size is None else -(-num_examples // micro_batch_size)


# Batches --------------------------------------------------------------------------------------------------------------


def _batch_of(batch: Mapping[str, Batch], stream: str) -> Batch:
    """Return the batch of a stream, on the CPU."""
    stream_batch = batch.get(stream) if isinstance(batch, Mapping) else None
    if isinstance(stream_batch, Mapping):
        check_batch(stream_batch)
        # A user's loader may have sent it to the device already.
        return _to_cpu(stream_batch)
    if stream_batch is not None and isinstance(stream_batch[0], Example):
        return stream_batch
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
    if isinstance(batch, Mapping):
        alternate = batch.get("alternate")
        if isinstance(alternate, Mapping) and len(alternate["labels"]) == len(batch["labels"]):
            check_batch(alternate)
            return alternate
    else:
        alternates = [example.alternate for example in batch if example.alternate is not None]
        if len(alternates) == len(batch):
            return alternates
    raise BatchError(
        f"an objective reads alternate answers of the '{stream}' examples, but the batch has none: give it a batch `alternate` "
        "whose row i is question i with another answer, as the data modules of this package do for their forget set."
    )


def unpad(batch: Batch) -> Sequences:
    """Return ``input_ids`` and ``labels`` of every example, without padding, shape ``(length,)`` each; see `to_sequence`.

    A token that is supervised, or between others, is no padding even where the mask hides it, as ``ids != pad`` hides end tokens.
    """
    if not isinstance(batch, Mapping):
        return [to_sequence(example) for example in batch]
    sequences = []
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for mask, ids, labels in zip(masks, batch["input_ids"], batch["labels"], strict=True):
        places = ((mask != 0) | (labels != IGNORED)).nonzero().flatten().tolist()
        extent = slice(places[0], places[-1] + 1) if places else slice(0)
        sequence = {"input_ids": ids[extent], "labels": labels[extent]}
        if not bool(mask[extent].all()):
            sequence[VISIBLE] = (mask[extent] != 0).long()
        sequences.append(sequence)
    return sequences


def as_examples(batch: Batch) -> list[Example]:
    """Return a batch as examples; those of a padded batch have no id."""
    if not isinstance(batch, Mapping):
        return list(batch)
    examples = []
    for row in unpad(_to_cpu(batch)):
        visible = row[VISIBLE].tolist() if VISIBLE in row else None
        examples.append(Example(row["input_ids"].tolist(), row["labels"].tolist(), attention_mask=visible))
    return examples


def _reference_values(batch: Batch, logp: Callable[[Example], float] | None) -> Tensor | None:
    """Return the log-probabilities of a batch's examples under the reference model, float64, shape ``(B,)``."""
    if isinstance(batch, Mapping) and "reference_logp" in batch:
        return torch.as_tensor(batch["reference_logp"])
    if logp is None:
        return None
    return torch.tensor([logp(example) for example in as_examples(batch)], dtype=torch.float64)


def _to_cpu(batch: Mapping[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            moved[key] = _to_cpu(value)
        else:
            moved[key] = value.cpu() if isinstance(value, Tensor) else value
    return moved
