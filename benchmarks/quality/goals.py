"""The goals of the comparison on real models, as yes or no for a method on one forget set and seed, and the scores behind them.

- (a) The retain NLL is at most epsilon.
- (b) Forget quality is above 0.05.
- (c) Answers are as fluent as the retain-only model's: their mean NLL under the base model is within 0.5 nats of its answers', and
  the shares of repeated groups of four words and of empty answers are at most 0.05 above its shares.
- (d) After each relearning attack, the probability of the other forget answers is at most twice that of the retain-only model.
- (e) Overall is above that of every published method that has one, at least one, and at least 95 % of the retain-only model's.

Overall is the harmonic mean of Memorization, Privacy with the Unlearning Depth Score, and the Utility relative to the target model's
(docs/scores.md). Utility's fluency is the stand-in `fluency_share`: an answer is fluent if its NLL under the base model is at most that
of 95 % of the retain-only model's answers. By definition, the retain-only model itself has a Privacy of 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from benchmarks.quality.collecting import Line
from benchmarks.quality.measuring import RELEARNING
from lit_unlearn.evaluation.question_scores import PUBLISHED_ATTACKS
from lit_unlearn.evaluation.verdict import is_feasible
from lit_unlearn.metrics import fluency_share, overall_score, privacy_score, relative_utility, utility_score

MIN_FORGET_QUALITY, MAX_NLL_DIFFERENCE, MAX_SHARE_DIFFERENCE = 0.05, 0.5, 0.05
MAX_RELEARNED, MIN_OVERALL = 2.0, 0.95  # multiples of the retain-only model's
# Of a tuning run, which was not attacked.
TUNED_GOALS = ("a", "b", "c")

Parts = dict[str, float]
Goals = dict[str, bool | None]
"""Whether each goal is reached; ``None`` where something was not measured."""


def find_line(lines: Sequence[Line], line: Line) -> Line | None:
    """Return the line of the same forget set and seed that has ended well; published models have no seed."""
    labels = line["labels"]
    for candidate in lines:
        of_candidate = candidate["labels"]
        is_same_seed = of_candidate.get("seed", labels.get("seed")) == labels.get("seed")
        if "error" not in candidate and of_candidate["size"] == labels["size"] and is_same_seed:
            return candidate
    return None


def get_value(line: Line | None, file: str, *keys: str) -> float | None:
    """Return a finite number from a line; ``None`` if it was not measured or is not finite."""
    value = {} if line is None else line.get(file, {})
    for key in keys:
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    # A number that is not finite is stored as text.
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def get_tofu(line: Line | None, name: str) -> float | None:
    """Return a value of TOFU's benchmark."""
    return get_value(line, "tofu", "aggregate", name)


def get_relearned(line: Line | None, attack: str = RELEARNING[0]) -> float | None:
    """Return the probability of the forget answers after an attack that the attacker did not have."""
    return get_value(line, "attack", attack, "probability")


def get_nll_share(line: Line) -> float | None:
    """Return the retain NLL of the kept model divided by epsilon."""
    value = get_value(line, "report", "constraints", "nll", "value")
    epsilon = get_value(line, "report", "constraints", "nll", "epsilon")
    return None if value is None or epsilon is None else value / epsilon


def compute_fluency(line: Line, reference: Line) -> float | None:
    """Return the share of fluent answers, empty ones counted as not fluent; ``None`` if it was not measured."""
    rows, reference_rows = _get_forget_rows(line), _get_forget_rows(reference)
    if "fluency_nll" not in rows or "fluency_nll" not in reference_rows:
        return None
    losses, repetitions = [], []
    for loss, repeated in zip(rows["fluency_nll"], rows["repetition"], strict=True):
        if loss is not None:
            losses.append(loss)
            repetitions.append(repeated)
    references = [loss for loss in reference_rows["fluency_nll"] if loss is not None]
    if not losses or not references:
        return 0.0
    return fluency_share(losses, references, repetitions) * len(losses) / len(rows["fluency_nll"])


def _get_forget_rows(line: Line) -> dict[str, list[float | None]]:
    rows: dict[str, list[float | None]] = line.get("tofu", {}).get("forget", {})
    return rows


def compute_parts(line: Line, reference: Line | None, target: Line | None) -> Parts:
    """Compute Memorization, Privacy, Utility and Overall, as far as they were measured.

    Args:
        line: Of a method, or of the retain-only model itself.
        reference: Of the retain-only model of the same forget set and seed.
        target: Of the target model, likewise.
    """
    parts: Parts = {}
    if reference is None or target is None:
        return parts
    memorization = get_tofu(line, "memorization")
    if memorization is not None:
        parts["memorization"] = memorization
    attacks = [get_tofu(line, f"attack_score/{attack}") for attack in PUBLISHED_ATTACKS]
    uds = get_value(line, "depth", "unlearning_depth")
    if line is reference:
        parts["privacy"] = 1.0
    elif uds is not None and None not in attacks:
        parts["privacy"] = privacy_score(attacks, uds)  # type: ignore[arg-type]

    utilities = []
    for of_model in (line, target):
        utility, fluency = get_tofu(of_model, "model_utility"), compute_fluency(of_model, reference)
        if utility is not None and fluency is not None:
            utilities.append(utility_score(utility, fluency))
    if len(utilities) == 2 and utilities[1] > 0:
        parts["utility"] = relative_utility(*utilities)
    if len(parts) == 3:
        parts["overall"] = overall_score(parts["memorization"], parts["privacy"], parts["utility"])
    return parts


def judge(line: Line, reference: Line | None, overalls: Mapping[str, float], published: Collection[str]) -> Goals:
    """Judge a method on one forget set and seed.

    Args:
        line: Of the method.
        reference: Of the retain-only model.
        overalls: Overall by method on the same forget set and seed; that of the retain-only model has the name ``""``.
        published: Names of the methods that the others are compared with.
    """
    share, quality = get_nll_share(line), get_tofu(line, "forget_quality")
    return {
        "a": None if share is None else is_feasible(share, 1.0),
        "b": None if quality is None else quality > MIN_FORGET_QUALITY,
        "c": _is_fluent(line, reference),
        "d": _withstands_relearning(line, reference),
        "e": _is_best(line["labels"].get("method", ""), overalls, published),
    }


def _is_fluent(line: Line, reference: Line | None) -> bool | None:
    if get_tofu(line, "forget/empty") == 1:
        return False
    limits = {
        "fluency_nll": MAX_NLL_DIFFERENCE,
        "repetition": MAX_SHARE_DIFFERENCE,
        "empty": MAX_SHARE_DIFFERENCE,
    }
    for name, limit in limits.items():
        value, of_reference = get_tofu(line, f"forget/{name}"), get_tofu(reference, f"forget/{name}")
        if value is None or of_reference is None:
            return None
        # Answers that are more likely than ordinary ones are not fluent either; less repetition is no fault.
        difference = abs(value - of_reference) if name == "fluency_nll" else value - of_reference
        if difference > limit:
            return False
    return True


def _withstands_relearning(line: Line, reference: Line | None) -> bool | None:
    for attack in RELEARNING:
        value, of_reference = get_relearned(line, attack), get_relearned(reference, attack)
        if value is None or of_reference is None:
            return None
        if value > MAX_RELEARNED * of_reference:
            return False
    return True


def _is_best(method: str, overalls: Mapping[str, float], published: Collection[str]) -> bool | None:
    if method not in overalls or "" not in overalls:
        return None
    # One that failed has no Overall to exceed.
    others = [overalls[name] for name in published if name != method and name in overalls]
    if overalls[method] < MIN_OVERALL * overalls[""] or any(other >= overalls[method] for other in others):
        return False
    # Beside nothing, it is not known to be the best.
    return True if others else None


def choose_run(lines: Sequence[Line], references: Sequence[Line]) -> Line:
    """Choose one of a method's tuning runs: most goals of (a) to (c), then the highest forget quality.

    Args:
        lines: Of the runs of one method, without those that failed.
        references: Of the retain-only models.
    """

    def rank(line: Line) -> tuple[int, float]:
        goals = judge(line, find_line(references, line), {}, ())
        return sum(goals[goal] is True for goal in TUNED_GOALS), get_tofu(line, "forget_quality") or 0.0

    return max(lines, key=rank)
