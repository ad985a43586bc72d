"""Values of one question or text: likelihoods, memorisation, ROUGE, fluency, and the attacks that need another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lit_unlearn.data.encoding import encode_examples
from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.errors import ModelError
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.question_sets import QuestionSets
from lit_unlearn.evaluation.results import Values
from lit_unlearn.evaluation.scoring import Scored, measure_gradient_norms, score_examples
from lit_unlearn.metrics import (
    exact_memorization,
    extraction_strength,
    is_refusal,
    min_k,
    min_k_plus_plus,
    normalized_probability,
    repetition,
    rouge,
    truth_ratio,
    zlib_score,
)
from lit_unlearn.metrics.memorization import can_rouge_read
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.distributed import measure_shares


def measure_question(
    questions: QuestionSets,
    stream: str,
    example: BenchmarkExample,
    scored: Mapping[str, Sequence[Scored]],
    generated: str | None,
) -> Values:
    """Compute likelihoods, memorisation, attacks and ROUGE of one question.

    Args:
        questions: The sets, with what decides values.
        stream: Name of the set.
        example: The question, or a chunk of raw text.
        scored: What the model gives the sequences of the example.
        generated: The model's answer; ``None`` if it was not asked.
    """
    kind, _ = _get_measured(example)
    (answer,) = scored[kind]
    # The end token is not a part of the answer that could be memorised, and published Min-K does not count it either.
    recalled = slice(None, -1) if _has_end(example) else slice(None)
    predictions, labels = answer.predictions[recalled], answer.labels[recalled]
    logp = answer.logp[recalled]
    values: Values = {
        **example.texts,
        "nll": answer.nll,
        "probability": float(np.exp(-answer.nll)),
        "exact_memorization": exact_memorization(predictions, labels),
        "extraction_strength": extraction_strength(predictions, labels),
        # The same number again, under the name that the attack has.
        "loss": answer.nll,
        "min_k": min_k(logp, questions.k),
        "min_k_plus_plus": min_k_plus_plus(logp, answer.mean[recalled], answer.std[recalled], questions.k),
        "zlib": zlib_score(answer.nll, example.texts["answer"]),
    }
    if questions.floor:
        values["extraction_strength_floored"] = extraction_strength(predictions, labels, floor=True)
    if "paraphrase" in scored:
        values["paraphrase_probability"] = float(np.exp(-scored["paraphrase"][0].nll))
    if "wrong" in scored:
        (truth,) = scored["paraphrase" if questions.compares_paraphrase(stream) else "answer"]
        wrong_losses = [score.nll for score in scored["wrong"]]
        values["truth_ratio"] = float(truth_ratio([truth.nll], [wrong_losses], questions.ratio)[0])
        if questions.sets[stream].is_multiple_choice:
            values["probability"] = float(normalized_probability([answer.nll], [wrong_losses])[0])
    if generated is not None:
        values["generated"] = generated
        # A 0 of an answer that ROUGE cannot read would pass as one that is not given.
        if can_rouge_read(example.texts["answer"]):
            values |= rouge(generated, example.texts["answer"])
        values |= {"repetition": repetition(generated), "refusal": float(is_refusal(generated))}
    return values


def add_fluency(questions: QuestionSets, rows: Sequence[Values], lm: LanguageModel, token_budget: int) -> None:
    """Add to each row the NLL per token of the generated answer under the fluency model, given the question.

    Args:
        questions: The sets, whose ``fluency_model`` this is.
        rows: With ``question`` and ``generated``; they get ``fluency_nll``, which is ``None`` for an empty answer.
        lm: The model that generated the answers, whose device is used.
        token_budget: Largest batch, in tokens.
    """
    if questions.fluency_model is None:
        return
    judge = _load_beside(questions.fluency_model, lm)
    if judge.tokenizer is None:
        message = f"the fluency model '{questions.fluency_model}' has no tokenizer."
        raise ModelError(message, owner=questions.owner, argument="fluency_model")

    with_text, pairs = [], []
    for row in rows:
        # Raw text without a context has none.
        if "generated" not in row:
            continue
        row["fluency_nll"] = None
        # An empty answer has no token whose NLL could be taken; the share of these is a value of its own, `empty`.
        if row["generated"].strip():
            with_text.append(row)
            pairs.append((row["question"], row["generated"]))
    encoded = encode_examples(pairs, judge.tokenizer, name="generated", settings=questions.encoding)
    for row, score in zip(with_text, score_examples(judge, encoded, token_budget), strict=True):
        row["fluency_nll"] = score.nll


def add_attacks(
    questions: QuestionSets,
    rows: Mapping[str, Sequence[Values]],
    streams: Mapping[str, BenchmarkStream],
    lm: LanguageModel,
    token_budget: int,
) -> None:
    """Add the values of the attacks that settings switch on to the forget and the holdout rows; a collective call.

    Args:
        questions: The sets, whose settings say which attacks.
        rows: By stream; they get ``reference``, the NLL minus the reference model's, and ``gradient_norm``.
        streams: The examples of these rows.
        lm: The measured model; it is left as it was.
        token_budget: Largest batch, in tokens.
    """
    # Without rows that the model never saw there is no attack.
    if "holdout" not in rows:
        return
    sets = ("forget", "holdout")
    if questions.reference_model is not None:
        reference = _load_beside(questions.reference_model, lm)
        for name in sets:
            examples = [_get_measured(example)[1] for example in streams[name].examples]
            scores = measure_shares(examples, lambda share: score_examples(reference, share, token_budget))
            for row, score in zip(rows[name], scores, strict=True):
                row["reference"] = row["nll"] - score.nll
    if questions.gradient_norm:
        for name in sets:
            examples = [_leave_out_end(example) for example in streams[name].examples]
            norms = measure_shares(examples, lambda share: measure_gradient_norms(lm, share), lm.is_sharded)
            for row, norm in zip(rows[name], norms, strict=True):
                row["gradient_norm"] = norm


def _get_measured(example: BenchmarkExample) -> tuple[str, Example]:
    """Return the kind and the tokens of what a row's own values are measured on: its answer, or a chunk of raw text."""
    kind = "answer" if "answer" in example.sequences else "text"
    (sequence,) = example.sequences[kind]
    return kind, sequence


def _has_end(example: BenchmarkExample) -> bool:
    """Return whether the last supervised token is the end of an answer: one that was cut has none, nor has raw text."""
    kind, sequence = _get_measured(example)
    # Nothing predicts the first token.
    supervised = sum(label != IGNORED for label in sequence.labels[1:])
    return kind == "answer" and not sequence.is_cut and supervised > 1


def _leave_out_end(example: BenchmarkExample) -> Example:
    """Return what a row's values are measured on, with the end token unsupervised."""
    _, sequence = _get_measured(example)
    if not _has_end(example):
        return sequence
    labels = list(sequence.labels)
    last = max(place for place, label in enumerate(labels) if label != IGNORED)
    labels[last] = IGNORED
    return sequence._replace(labels=labels)


def _load_beside(name: str, lm: LanguageModel) -> LanguageModel:
    """Load another model onto the measured one's device, as late as possible: generation needs the memory."""
    other = LanguageModel(name)
    other.load(torch.float32)
    other.to(lm.input_device)
    return other
