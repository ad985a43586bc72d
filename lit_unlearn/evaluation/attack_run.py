"""Run a list of attacks on a model, each on a copy of it, and keep what every one brings back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.attacks.few_shot import FewShot
from lit_unlearn.evaluation.attacks.other_questions import OtherQuestions
from lit_unlearn.evaluation.attacks.prefix import Prefix
from lit_unlearn.evaluation.attacks.relearning import Relearn
from lit_unlearn.evaluation.attacks.repeated_sampling import RepeatedSampling
from lit_unlearn.evaluation.attacks.rounding import Rounding
from lit_unlearn.evaluation.attacks.several_turns import SeveralTurns
from lit_unlearn.evaluation.audit_run import FAILURES, describe_failure
from lit_unlearn.evaluation.leakage import starts_with_answer
from lit_unlearn.evaluation.partial_files import describe_precision, read_partial, write_partial
from lit_unlearn.evaluation.questions import QuestionBenchmark
from lit_unlearn.evaluation.results import Results, Values, content_digest, package_versions
from lit_unlearn.evaluation.tables import TableStyle, format_table
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.io import expand_path, file_digest

Attack = Relearn | Rounding | FewShot | Prefix | SeveralTurns | OtherQuestions | RepeatedSampling

ATTACKS: Mapping[str, type[Attack]] = {
    attack.name: attack
    for attack in (Relearn, Rounding, FewShot, Prefix, SeveralTurns, OtherQuestions, RepeatedSampling)
}
"""The attacks by name. Another one is a file in ``attacks/`` and an entry here."""

Value = Literal["probability", "rougeL_recall", "exact", "extraction_strength"]
VALUES: Mapping[Value, str] = {
    "probability": "probability of the answer, per token",
    "rougeL_recall": "ROUGE-L recall of the given answer",
    "exact": "share of answers given word for word",
    "extraction_strength": "extraction strength",
}
"""The measures of leakage, each a mean over the forget rows that the attacker does not have, from 0 to 1."""

Role = Literal["model", "retain_only"]
ROLES: Mapping[Role, str] = {"model": "model", "retain_only": "retain-only"}

NO_ATTACK = "no attack"
_NO_ATTACK_UNIT = ""


class Outcome(NamedTuple):
    """What an attack on one model brought back.

    Args:
        points: For each effort, with ``effort``, ``rows`` (the number of rows that were measured) and `VALUES`.
        seconds: Time that it took, when it ran.
        not_tested: Why it could not run; ``None`` if it did.
    """

    points: list[Values]
    seconds: float = 0.0
    not_tested: str | None = None

    def describe(self) -> Values:
        """Return what a report has of it: no time, so that an interrupted run ends in the same file."""
        return {"points": self.points} if self.not_tested is None else {"not_tested": self.not_tested}


def run_attacks(
    lm: LanguageModel,
    attacks: Mapping[str, Attack],
    benchmark: QuestionBenchmark,
    partial_dir: Path | None = None,
    report: Callable[[str, Outcome], object] = lambda label, outcome: None,
) -> dict[str, Outcome]:
    """Measure a model without an attack, and after each.

    Args:
        lm: Loaded; it is left as it was.
        attacks: Settings by label.
        benchmark: Has the sets, of which the forget set is measured. It has read no rows yet: the tokens are this model's.
        partial_dir: Folder for finished attacks, so that an interrupted run resumes there. It also has the texts of answers.
        report: Called with each label and outcome.

    Returns:
        The outcome of each attack by label, after that of `NO_ATTACK`. An attack that could not run is ``not_tested``.

    Raises:
        LitUnlearnError: If the model cannot be measured even without an attack.
    """
    lm.eval()
    forget = benchmark.with_sets("forget")
    with torch.no_grad():
        start = time.monotonic()
        plain = forget.run(lm, partial_dir and partial_dir / "plain")
        outcomes = {NO_ATTACK: Outcome([_average(plain, effort=0)], time.monotonic() - start)}
        report(NO_ATTACK, outcomes[NO_ATTACK])

        # Everything that decides the numbers.
        model = [fingerprint(cast(nn.Module, lm.model)), describe_precision(lm), package_versions()]
        # The data first: reading the rows settles the prompt, which is a setting.
        common = [*model, benchmark.describe_data(lm.tokenizer), benchmark.settings()]
        for label, attack in attacks.items():
            key = content_digest([*common, attack.name, asdict(attack), _digest_source(attack)])
            file = partial_dir and partial_dir / f"{key}.json"
            partial = read_partial(file, key)
            if partial is None:
                outcomes[label] = _try_attack(attack, lm, forget, benchmark, plain)
                if outcomes[label].not_tested is None:
                    write_partial(file, key, [outcomes[label]._asdict()])
            else:
                outcomes[label] = Outcome(**partial[0])
            report(label, outcomes[label])
    return outcomes


def _digest_source(attack: Attack) -> str | None:
    """Return the digest of the file that an attack relearns, if it does."""
    file = expand_path(attack.source) if isinstance(attack, Relearn) else None
    return file_digest(file) if file is not None and file.is_file() else None


def _try_attack(
    attack: Attack, lm: LanguageModel, forget: QuestionBenchmark, benchmark: QuestionBenchmark, plain: Results
) -> Outcome:
    start = time.monotonic()
    try:
        points = list(_iterate_points(attack, lm, forget, benchmark, plain))
    except FAILURES as error:
        return Outcome([], time.monotonic() - start, describe_failure(error))
    return Outcome(points, time.monotonic() - start)


def _iterate_points(
    attack: Attack, lm: LanguageModel, forget: QuestionBenchmark, benchmark: QuestionBenchmark, plain: Results
) -> Iterator[Values]:
    """Yield what is measured at each effort.

    Args:
        attack: The attack.
        lm: The model.
        forget: The benchmark with the forget set alone.
        benchmark: The benchmark with all sets, from which rows may be relearned.
        plain: Results of ``forget`` without an attack.
    """
    if isinstance(attack, Relearn | Rounding):
        examples, known = attack.find_examples(benchmark, lm.tokenizer) if isinstance(attack, Relearn) else ([], [])
        if isinstance(attack, Relearn):
            # The curve begins with the same rows.
            yield _average(plain, 0, known)
        for effort, changed in attack.change_model(lm, examples, benchmark.token_budget):
            yield _average(forget.run(changed), effort, known)
    elif isinstance(attack, RepeatedSampling):
        leak = attack.change_benchmark(forget)
        results = leak.run(lm)
        for number in leak.attempts:
            leaked: Values = {value: results.aggregate.get(f"leak@{number}/{value}") for value in VALUES}
            yield {"effort": number, "rows": len(results.examples["forget"]), **leaked}
    elif isinstance(attack, OtherQuestions):
        yield _average(attack.change_benchmark(forget).run(lm), attack.effort)
    else:
        prompt = forget.questions.prompt or {}
        if isinstance(attack, FewShot | SeveralTurns) and attack.template is None and not prompt.get("chat_template"):
            # Without a chat template, the turns stand in the question as the training rows were written.
            attack = replace(attack, template=prompt.get("text"))
        answers = [str(row.get("generated", "")) for row in plain.examples["forget"]]
        attacked = forget.with_attack(attack, answers)
        if _count_cut(attacked, lm) > _count_cut(forget, lm):
            # The rest of an answer would be measured as if it were all of it.
            message = "`max_length` leaves no place for the answer after this attack's longer prompt: raise it."
            raise ConfigError(message, argument="max_length")
        yield _average(attacked.run(lm), attack.effort)


def _count_cut(benchmark: QuestionBenchmark, lm: LanguageModel) -> int:
    """Count the forget rows whose answer is cut."""
    rows = benchmark.read_sequences("forget", lm.tokenizer)
    return sum(row[0].is_cut for row in rows)


def _average(results: Results, effort: int, known: Sequence[int] = ()) -> Values:
    """Return the mean values of the forget rows that the attacker does not have; no text."""
    columns: dict[str, list[float | None]] = {value: [] for value in VALUES}
    for number, row in enumerate(results.examples["forget"]):
        if number in known:
            continue
        exact = starts_with_answer(row["generated"], row["answer"]) if "generated" in row else None
        for value, numbers in columns.items():
            numbers.append(exact if value == "exact" else row.get(value))

    rows = len(columns["probability"])
    if not rows:
        message = "every forget row was relearned, and none is left to measure: lower `rows`."
        raise ConfigError(message, argument="rows")
    # A mean over those rows that happen to have the value would be that of another set.
    means = {name: None if None in numbers else float(np.mean(numbers)) for name, numbers in columns.items()}  # type: ignore[arg-type]
    return {"effort": effort, "rows": rows, **means}


# Reports --------------------------------------------------------------------------------------------------------------


def build_report(
    attacks: Mapping[str, Attack], outcomes: Mapping[Role, Mapping[str, Outcome]], **description: Any
) -> Values:
    """Return the content of the results file: every attack with its settings, and what it brought back from each model.

    Args:
        attacks: Settings by label.
        outcomes: From `run_attacks`, by model.
        **description: What else the file has, in plain types: ``models``, ``data``, ``settings``.
    """
    entries: Values = {}
    for label in (NO_ATTACK, *attacks):
        attack = attacks.get(label)
        entry: Values = {"attack": None, "unit": _NO_ATTACK_UNIT, "settings": {}}
        if attack is not None:
            settings = asdict(attack)
            entry = {"attack": attack.name, "unit": attack.unit, "settings": settings}
        for role in ROLES:
            if role in outcomes:
                entry[role] = outcomes[role][label].describe()
        entries[label] = entry
    return {"benchmark": "attack", **description, "versions": package_versions(), "attacks": entries}


def choose_value(entry: Values, value: Value) -> Value:
    """Return the measure of leakage that is shown of an attack: the first that was measured of the chosen one, ROUGE-L and exact answers.

    Args:
        entry: Of a report, for one attack.
        value: The chosen measure.
    """
    points = []
    for role in ROLES:
        points += entry.get(role, {}).get("points", [])
    candidates: tuple[Value, ...] = (value, "rougeL_recall", "exact")
    for candidate in candidates:
        if any(point[candidate] is not None for point in points):
            return candidate
    return value


def attack_table(report: Values, value: Value = "rougeL_recall", style: TableStyle = "ruled") -> str:
    """Format a report: a line for each attack and effort, and below the table why attacks were not tested.

    Args:
        report: From `build_report`.
        value: The measure of leakage.
        style: As for `format_table`.
    """
    rows: list[list[object]] = []
    reasons: dict[str, list[str]] = {}
    others: list[str] = []
    for label, entry in report["attacks"].items():
        shown_value = choose_value(entry, value)
        if shown_value != value:
            others.append(f"{label}: {VALUES[shown_value]}")
        points: dict[int, dict[str, float | None]] = {}
        for role, role_name in ROLES.items():
            outcome = entry.get(role, {})
            if "not_tested" in outcome:
                reasons.setdefault(f"{label}: not tested: {outcome['not_tested']}", []).append(role_name)
            for point in outcome.get("points", []):
                points.setdefault(point["effort"], {})[role] = point[shown_value]
        if "not_tested" in entry["model"]:
            rows.append([label, "not tested", None, None, None])
            continue
        for effort, of_roles in points.items():
            leaked, reference = of_roles.get("model"), of_roles.get("retain_only")
            difference = None if leaked is None or reference is None else leaked - reference
            shown = None if entry["attack"] is None else f"{effort} {entry['unit']}"
            rows.append([label, shown, leaked, reference, difference])
    headers = ["attack", "effort", *ROLES.values(), "difference"]
    lines = [format_table(rows, headers, style), f"leakage: {'; of '.join([VALUES[value], *others])}"]
    for reason, roles in reasons.items():
        # The table shows that the model was not tested, and not whether the other one was.
        lines.append(reason if "model" in roles else f"{reason} ({', '.join(roles)})")
    return "\n".join(lines)
