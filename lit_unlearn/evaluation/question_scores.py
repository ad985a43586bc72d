"""Scores over the rows of question benchmarks: means, memorisation, membership attacks, and what compares with the retain-only model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lit_unlearn.evaluation.benchmark import Aggregate
from lit_unlearn.evaluation.question_sets import QuestionSets
from lit_unlearn.evaluation.results import Results, Values, get_column
from lit_unlearn.metrics import (
    attack_score,
    auc,
    forget_quality,
    memorization_score,
    privacy_score,
    privleak,
    truth_ratio_score,
)

# Membership inference attacks, and whether members have the higher value.
ATTACKS = {
    "min_k": True,
    "min_k_plus_plus": True,
    "loss": False,
    "zlib": False,
    "reference": False,
    "gradient_norm": False,
}

PUBLISHED_ATTACKS = ("min_k", "min_k_plus_plus", "loss", "zlib")
"""The attacks that published privacy scores are made of; the other ones are switched on by settings."""

AVERAGED = (
    "probability",
    "paraphrase_probability",
    "rougeL_recall",
    "rougeL_f1",
    "nll",
    "exact_memorization",
    "extraction_strength",
    "extraction_strength_floored",
    "repetition",
    "refusal",
)
"""Values of an example whose mean over a set is a value of the benchmark."""


def aggregate_questions(
    questions: QuestionSets, examples: Mapping[str, Sequence[Values]], retain: Results | None
) -> Aggregate:
    """Compute the means of every set, forget quality and, where there is a holdout set, the attacks.

    Args:
        questions: The sets, with the settings that say why a value is missing.
        examples: The values of every example, by set.
        retain: Results of the retain-only model; ``None`` if there are none.
    """
    values: dict[str, float] = {}
    missing = {"forget_quality": f"the forget rows have no '{questions.wrong_column}'"}
    for name, rows in examples.items():
        for key in AVERAGED:
            if all_have(key, rows):
                values[f"{name}/{key}"] = float(np.mean(get_column(rows, key)))
        unread = sum("generated" in row and "rougeL_recall" not in row for row in rows)
        if unread:
            reason = f"{unread} of {len(rows)} answers have no words that ROUGE knows, which are of the letters a to z"
            missing |= dict.fromkeys((f"{name}/rougeL_recall", f"{name}/rougeL_f1"), reason)
        lacking = sum("paraphrase_probability" not in row for row in rows)
        if 0 < lacking < len(rows):
            reason = f"{lacking} of {len(rows)} rows have no text in '{questions.paraphrase_column}'"
            missing[f"{name}/paraphrase_probability"] = reason
        if all_have("truth_ratio", rows):
            kind: Literal["forget", "utility"] = "forget" if name == "forget" else "utility"
            values[f"{name}/truth_ratio"] = truth_ratio_score(get_column(rows, "truth_ratio"), kind)
        if all_have("fluency_nll", rows):
            losses = [row["fluency_nll"] for row in rows if row["fluency_nll"] is not None]
            values[f"{name}/empty"] = 1 - len(losses) / len(rows)
            if losses:
                values[f"{name}/fluency_nll"] = float(np.mean(losses))
            else:
                missing[f"{name}/fluency_nll"] = "all generated answers are empty"
    if "holdout" in examples:
        for attack in ATTACKS:
            if all_have(attack, examples["forget"]):
                values[f"auc/{attack}"] = compute_attack_auc(examples, attack)
    for attack in _list_extra_attacks(questions):
        missing[f"auc/{attack}"] = "it needs a holdout set"
    values |= compute_memorization(examples["forget"], values)

    compared = compare_with_retain(examples, retain)
    values |= compared.values
    missing |= compared.missing
    return Aggregate(values, {name: reason for name, reason in missing.items() if name not in values})


def _list_extra_attacks(questions: QuestionSets) -> list[str]:
    """Return the attacks that settings switch on."""
    chosen = {"reference": questions.reference_model is not None, "gradient_norm": questions.gradient_norm}
    return [attack for attack, is_chosen in chosen.items() if is_chosen]


def compare_with_retain(examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
    """Compute the scores that compare with the retain-only model: forget quality and, with a holdout set, PrivLeak and Privacy.

    Args:
        examples: The values of every example, by stream, of the same rows as the retain-only model's.
        retain: Results of the retain-only model; ``None`` if there are none.

    Returns:
        ``forget_quality``, if the forget rows have truth ratios, ``privleak``, if forget and holdout rows have Min-K, and
        ``privacy``, if they have all published attacks, each among the values or, with the reason, among the missing ones.
        Beside ``privacy`` there is ``attack_score/…`` of every attack.
    """
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    # A distribution over some of the rows would be another one: all of them need a truth ratio.
    if all_have("truth_ratio", examples.get("forget")):
        if retain is None:
            missing["forget_quality"] = "it needs `retain_results`, measured in the same way"
        else:
            retain_ratios = get_column(retain.examples["forget"], "truth_ratio")
            values["forget_quality"] = forget_quality(get_column(examples["forget"], "truth_ratio"), retain_ratios)

    if all_have("min_k", examples.get("forget")) and all_have("min_k", examples.get("holdout")):
        if retain is None or "holdout" not in retain.examples:
            missing["privleak"] = "it needs `retain_results` with a holdout set, measured in the same way"
        else:
            # MUSE's area is that of holdout against forget.
            retain_area = 1 - compute_attack_auc(retain.examples, "min_k")
            if retain_area:
                values["privleak"] = privleak(1 - compute_attack_auc(examples, "min_k"), retain_area)
            else:
                missing["privleak"] = "it divides by 1 − AUC of the retain-only model, which is 0"

    if all(_have_attack(attack, examples) for attack in PUBLISHED_ATTACKS):
        if retain is None or not all(_have_attack(attack, retain.examples) for attack in PUBLISHED_ATTACKS):
            missing["privacy"] = "it needs `retain_results` with a holdout set, measured in the same way"
        else:
            values |= _compute_privacy(examples, retain.examples)
            if "privacy" not in values:
                missing["privacy"] = "it divides by the AUCs of the retain-only model, of which one is 0"
    return Aggregate(values, missing)


def _compute_privacy(
    examples: Mapping[str, Sequence[Values]], retain: Mapping[str, Sequence[Values]]
) -> dict[str, float]:
    """Compute the score of every attack that both models have, and Privacy, where the published ones all have a score."""
    values: dict[str, float] = {}
    for attack in ATTACKS:
        if _have_attack(attack, examples) and _have_attack(attack, retain):
            retain_area = compute_attack_auc(retain, attack)
            if retain_area:
                values[f"attack_score/{attack}"] = attack_score(compute_attack_auc(examples, attack), retain_area)
    names = [f"attack_score/{attack}" for attack in PUBLISHED_ATTACKS]
    if all(name in values for name in names):
        values["privacy"] = privacy_score([values[name] for name in names])
    return values


def compute_memorization(rows: Sequence[Values], values: Mapping[str, float]) -> dict[str, float]:
    """Compute Memorization of the forget set, if all of its parts were measured."""
    strength = values.get("forget/extraction_strength_floored", values.get("forget/extraction_strength"))
    exact, paraphrase = values.get("forget/exact_memorization"), values.get("forget/paraphrase_probability")
    if strength is None or exact is None or paraphrase is None or not all_have("truth_ratio", rows):
        return {}
    # Not the aggregate `forget/truth_ratio`, which rises as a model forgets.
    truth = truth_ratio_score(get_column(rows, "truth_ratio"), "memorization")
    return {"memorization": memorization_score(strength, exact, paraphrase, truth)}


def _have_attack(attack: str, examples: Mapping[str, Sequence[Values]]) -> bool:
    return all_have(attack, examples.get("forget")) and all_have(attack, examples.get("holdout"))


def all_have(key: str, rows: Sequence[Values] | None) -> bool:
    """Return whether there are rows, and all of them have a value."""
    return rows is not None and all(key in row for row in rows)


def compute_attack_auc(examples: Mapping[str, Sequence[Values]], attack: str) -> float:
    """Compute the area under the curve of an attack that takes forget rows for members."""
    sign = 1 if ATTACKS[attack] else -1
    forget = np.array(get_column(examples["forget"], attack))
    holdout = np.array(get_column(examples["holdout"], attack))
    return auc((sign * forget).tolist(), (sign * holdout).tolist())
