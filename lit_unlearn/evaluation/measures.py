"""The measures that an audit's policy can set thresholds for: which numbers each takes from which run, and its interval.

To add one, add an entry to `MEASURES`; if it needs a run of its own, add that to ``RUNS`` in ``audit_run.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from lit_unlearn.errors import LitUnlearnError
from lit_unlearn.evaluation.question_scores import ATTACKS
from lit_unlearn.evaluation.results import Results, Values
from lit_unlearn.metrics import exposure
from lit_unlearn.metrics.intervals import (
    Interval,
    auc_interval,
    difference_interval,
    mean_interval,
    share_interval,
)

Role = Literal["model", "retain_only", "before"]
"""The audited model, a model trained without the forget set, and the model before unlearning."""

ROLES: dict[Role, str] = {
    "model": "the audited model",
    "retain_only": "the retain-only model",
    "before": "the model before unlearning",
}
Kind = Literal["mean", "difference", "auc", "share"]

_UNSEEN = "holdout"  # the stream of rows that no model has seen
# Numbers of generated answers, which say nothing of a deleted answer that is longer than what is generated.
_OF_GENERATED = ("rougeL_recall", "exact")
# Exposure ends at the logarithm of their number and one: among a few, not even a sequence that is known by heart stands out.
_LEAST_REFERENCES = 63


class NotTested(LitUnlearnError):
    """A measure has no numbers, because a model, a set or an attack is missing; the message is the reason."""


class Sample(NamedTuple):
    """The numbers that a value and its interval are computed from: no texts.

    Args:
        kind: ``"mean"`` of ``first``; ``"difference"`` of the means of ``first`` and ``second``; ``"auc"`` of members,
            ``first``, against non-members, ``second``; ``"share"`` of ones among zeros and ones, ``first``.
        first: One number per row, or per sampled answer.
        second: Likewise, of other rows; empty for a mean and a share.
        basis: What the numbers are, or are compared with, as the end of a sentence; empty if that is plain.
        questions: Number of questions that sampled answers belong to; 0 where each number is of a row of its own.
    """

    kind: Kind
    first: list[float]
    second: list[float] = []  # noqa: RUF012  (never changed)
    basis: str = ""
    questions: int = 0

    def estimate(self, confidence: float, seed: int) -> Interval:
        """Return value and interval."""
        if self.kind == "mean":
            return mean_interval(self.first, confidence, seed)
        if self.kind == "share":
            return share_interval(self.first, confidence)
        estimator = difference_interval if self.kind == "difference" else auc_interval
        return estimator(self.first, self.second, confidence, seed)

    @property
    def rows(self) -> int:
        """Number of rows of the smaller set, on which a policy decides something or nothing."""
        if self.questions:
            # Many answers to one question say nothing of other questions.
            return self.questions
        return min(len(self.first), len(self.second)) if self.second else len(self.first)


@dataclass
class Evidence:
    """The numbers of every row in every run of every model, and the reasons why runs are missing.

    No text of a row is in it.

    Args:
        rows: By model, run and stream.
        failures: By model and run.
        weights: Digest of each model's weights.
        cut_answers: Why generated answers cannot be compared with the deleted ones: they are cut too early; ``None`` if they are not.
    """

    rows: dict[Role, dict[str, dict[str, list[Values]]]] = field(default_factory=dict)
    failures: dict[Role, dict[str, str]] = field(default_factory=dict)
    weights: dict[Role, str] = field(default_factory=dict)
    cut_answers: str | None = None

    def add_results(self, role: Role, run: str, results: Results) -> None:
        """Take over the numbers of a run.

        Args:
            role: The model.
            run: Name of the run.
            results: Of the run.
        """
        streams = self.rows.setdefault(role, {}).setdefault(run, {})
        for stream, examples in results.examples.items():
            streams[stream] = [_keep_numbers(example) for example in examples]

    def add_failure(self, role: Role, run: str, reason: str) -> None:
        """Note why a run is missing."""
        self.failures.setdefault(role, {})[run] = reason

    def read_rows(self, role: Role, run: str, stream: str) -> list[Values]:
        """Return the numbers of a stream's rows.

        Raises:
            NotTested: If there are none, with the reason.
        """
        if role not in self.rows and role not in self.failures:
            raise NotTested(f"{ROLES[role]} was not given")
        if run not in self.rows.get(role, {}):
            reason = self.failures.get(role, {}).get(run, "it was not run")
            raise NotTested(f"'{run}' of {ROLES[role]} has no results: {reason}")
        streams = self.rows[role][run]
        if stream not in streams:
            raise NotTested(f"there are no {stream} rows in the run '{run}'")
        return streams[stream]

    def read_values(self, role: Role, run: str, stream: str, key: str, only_others: bool = False) -> list[float]:
        """Return one number per row or, of a run that samples answers, per sample.

        Args:
            role: The model.
            run: Name of the run.
            stream: Name of the set.
            key: Name of the number.
            only_others: Whether rows are left out that the model was relearned on.

        Raises:
            NotTested: If there are none, with the reason.
        """
        rows = self.read_rows(role, run, stream)
        if key in _OF_GENERATED and self.cut_answers is not None:
            raise NotTested(self.cut_answers)
        if only_others:
            rows = [row for row in rows if not row.get("relearned")]
        if not rows:
            raise NotTested(f"every {stream} row was relearned, and none is left to measure")
        if not all(math.isfinite(row.get("nll", 0.0)) for row in rows):
            # Such a model writes nonsense, which overlaps with no answer: it would pass as one that forgot.
            raise NotTested(f"the loss of some {stream} rows is not finite: the model may have diverged")
        values: list[float] = []
        for row in rows:
            if key not in row:
                raise NotTested(f"the {stream} rows have no value '{key}'")
            # Of a run that samples answers, a row has one number per sample.
            values += row[key] if isinstance(row[key], list) else [float(row[key])]
        return values


def _keep_numbers(example: Values) -> Values:
    """Return the numbers of a row, and the lists of numbers that it has for sampled answers."""
    numbers = {}
    for key, value in example.items():
        entries = value if isinstance(value, list) else [value]
        if all(isinstance(entry, int | float) for entry in entries):
            numbers[key] = value
    return numbers


@dataclass(frozen=True)
class Measure:
    """Something that a policy can set a threshold for.

    Args:
        title: Its name for people.
        meaning: One or two sentences for readers who are no engineers.
        collect: Takes the numbers from the evidence, or raises `NotTested`.
        runs: Runs of the audited model that it reads.
        compares_with: Models that it compares with, if they are given.
    """

    title: str
    meaning: str
    collect: Callable[[Evidence], Sample]
    runs: tuple[str, ...] = ("plain",)
    compares_with: tuple[Role, ...] = ()


# Ways to collect ------------------------------------------------------------------------------------------------------


def _mean_of(run: str, stream: str, key: str, only_others: bool = False) -> Callable[[Evidence], Sample]:
    """Return a function that takes one number per row of the audited model."""

    def collect(evidence: Evidence) -> Sample:
        return Sample("mean", evidence.read_values("model", run, stream, key, only_others))

    return collect


def _share_of(run: str, stream: str, key: str, above: float, basis: str = "") -> Callable[[Evidence], Sample]:
    """Return a function that counts how many numbers of the audited model are above a number."""

    def collect(evidence: Evidence) -> Sample:
        values = evidence.read_values("model", run, stream, key)
        # What is not a number is above nothing, and stays, so that nothing is decided by it.
        hits = [float(value > above) if math.isfinite(value) else value for value in values]
        return Sample("share", hits, basis=basis, questions=len(evidence.read_rows("model", run, stream)))

    return collect


def _above_reference(run: str, key: str, only_others: bool = False) -> Callable[[Evidence], Sample]:
    """Return a function that compares forget rows with what a model says that never saw them.

    That is the retain-only model on the same rows; without one, the same model on rows that it never saw.
    """

    def collect(evidence: Evidence) -> Sample:
        forget = evidence.read_values("model", run, "forget", key, only_others)
        try:
            reference = evidence.read_values("retain_only", run, "forget", key, only_others)
        except NotTested as no_model:
            try:
                unseen = evidence.read_values("model", run, _UNSEEN, key)
            except NotTested as no_rows:
                raise NotTested(f"there is nothing to compare with: {no_model}; {no_rows}") from None
            return Sample("difference", forget, unseen, "compared with rows that the model has never seen")
        # The same rows: the spread between easy and hard questions cancels.
        return Sample(
            "mean", _subtract(forget, reference), basis="compared with the retain-only model on the same rows"
        )

    return collect


def _change_since_before(stream: str, key: str) -> Callable[[Evidence], Sample]:
    """Return a function that compares each row with the model before unlearning."""

    def collect(evidence: Evidence) -> Sample:
        now = evidence.read_values("model", "plain", stream, key)
        before = evidence.read_values("before", "plain", stream, key)
        return Sample(
            "mean", _subtract(now, before), basis="compared with the model before unlearning on the same rows"
        )

    return collect


def _attack_of(attack: str) -> Callable[[Evidence], Sample]:
    """Return a function that takes the scores of a membership attack, higher for members."""
    sign = 1 if ATTACKS[attack] else -1

    def collect(evidence: Evidence) -> Sample:
        members = np.array(evidence.read_values("model", "plain", "forget", attack))
        nonmembers = np.array(evidence.read_values("model", "plain", _UNSEEN, attack))
        basis = "forget rows against rows that the model has never seen"
        return Sample("auc", (sign * members).tolist(), (sign * nonmembers).tolist(), basis)

    return collect


def _expose_canaries(evidence: Evidence) -> Sample:
    """Compute how far each planted sequence stands out among sequences that were not planted, in bits."""
    planted = evidence.read_values("model", "plain", "canaries", "nll")
    others = evidence.read_values("model", "plain", "canary_references", "nll")
    if len(others) < _LEAST_REFERENCES:
        raise NotTested(f"there are {len(others)} canary_references, and exposure needs at least {_LEAST_REFERENCES}")
    basis = f"among {len(others)} sequences that were not planted; 1.4 is expected of a model that never saw them"
    return Sample("mean", [exposure(nll, others) for nll in planted], basis=basis)


def _subtract(first: Sequence[float], second: Sequence[float]) -> list[float]:
    if len(first) != len(second):
        raise NotTested(f"the two models were measured on {len(first)} and {len(second)} rows, which are not the same")
    return [mine - reference for mine, reference in zip(first, second, strict=True)]


# The registry ---------------------------------------------------------------------------------------------------------


_PROBABILITY = "Per token, the geometric mean of the probability that the model gives to the deleted answer: 1 is knowing it by heart."
_MEMBERSHIP = (
    "How often an attacker tells a deleted row from one that was never used, given one of each: 0.5 is a coin toss. Far below 0.5 "
    "is as telling as far above."
)

MEASURES: Mapping[str, Measure] = {
    "forget_probability": Measure(
        "probability of the deleted answers", _PROBABILITY, _mean_of("plain", "forget", "probability")
    ),
    "forget_known": Measure(
        "share of deleted answers that the model knows",
        "Share of the deleted rows whose answer the model gives a probability of more than one half. A mean can be low although "
        "some rows are known by heart.",
        _share_of("plain", "forget", "probability", above=0.5),
    ),
    "forget_gap": Measure(
        "probability of the deleted answers above the reference",
        "How much more probable the deleted answers are than they are to a model that never saw them. Around 0, the model "
        "cannot be told from such a model by this.",
        _above_reference("plain", "probability"),
        compares_with=("retain_only",),
    ),
    "forget_rouge": Measure(
        "overlap with the deleted answers",
        "Share of the words of a deleted answer that the model's own most likely answer has in the same order (ROUGE-L recall). "
        "Right answers share words with wrong ones: it is not 0 for a model that never saw the rows.",
        _mean_of("plain", "forget", "rougeL_recall"),
    ),
    "forget_extraction": Measure(
        "extractable part of the deleted answers",
        "Share of a deleted answer, counted from its end, that the model completes word for word if it is given the beginning.",
        _mean_of("plain", "forget", "extraction_strength"),
    ),
    "relearned_probability": Measure(
        "probability after relearning",
        "An attacker fine-tunes the model a little on some of the deleted rows; this is the probability of the other deleted "
        "answers then. A model that only hides what it knows gives them back.",
        _mean_of("relearn", "forget", "probability", only_others=True),
        runs=("plain", "relearn"),
    ),
    "relearned_gap": Measure(
        "probability after relearning, above the reference",
        "An attacker fine-tunes the model a little on some of the deleted rows; this is how much more probable the other deleted "
        "answers are then than answers that the model never saw. Around 0, the attack brings back nothing that was learned before.",
        _above_reference("relearn", "probability", only_others=True),
        runs=("plain", "relearn"),
        compares_with=("retain_only",),
    ),
    "rounded_8bit_probability": Measure(
        "probability with 8-bit weights",
        "The probability of the deleted answers after the weights were rounded to 8 bits, as models are deployed. Rounding can "
        "undo small changes of the weights, and with them the unlearning.",
        _mean_of("8bit", "forget", "probability"),
        runs=("plain", "8bit"),
    ),
    "rounded_4bit_probability": Measure(
        "probability with 4-bit weights",
        "The probability of the deleted answers after the weights were rounded to 4 bits, as models are deployed. Rounding can "
        "undo small changes of the weights, and with them the unlearning.",
        _mean_of("4bit", "forget", "probability"),
        runs=("plain", "4bit"),
    ),
    "paraphrased_probability": Measure(
        "probability for paraphrased questions",
        "The probability of the deleted answers if the questions are asked in other words.",
        _mean_of("paraphrased", "forget", "probability"),
        runs=("plain", "paraphrased"),
    ),
    "sampled_exact": Measure(
        "share of sampled answers that reveal a deleted one",
        "The model is asked each question many times, and answers at random as it does for users; this is the share of answers that "
        "begin with the deleted one.",
        _share_of("sampled", "forget", "exact", above=0.5, basis="over all samples of all questions"),
        runs=("plain", "sampled"),
    ),
    "membership_auc": Measure("membership attack by loss", _MEMBERSHIP, _attack_of("loss")),
    "membership_auc_min_k": Measure("membership attack by the least likely tokens", _MEMBERSHIP, _attack_of("min_k")),
    "canary_exposure": Measure(
        "exposure of planted sequences",
        "Random sequences were planted among the deleted rows. This says how far they still stand out among sequences that were "
        "not, in bits: 1.4 on average for a model that never saw them, 8 if each is the most likely of 256.",
        _expose_canaries,
    ),
    "retain_probability": Measure(
        "probability of the retained answers",
        "Per token, the geometric mean of the probability that the model gives to the answers it is to keep.",
        _mean_of("plain", "retain", "probability"),
    ),
    "retain_nll_increase": Measure(
        "increase of the loss on the retained rows",
        "How much worse the model predicts the rows it is to keep than before the deletion, in nats per token: 0.1 is a tenth less "
        "probability per token.",
        _change_since_before("retain", "nll"),
        compares_with=("before",),
    ),
    "general_nll_increase": Measure(
        "increase of the loss on general text",
        "How much worse the model predicts rows that have nothing to do with the deletion than before it, in nats per token.",
        _change_since_before("general", "nll"),
        compares_with=("before",),
    ),
}
