"""The audit: thresholds that were fixed beforehand, compared with confidence intervals of what was measured.

Everything here is arithmetic on numbers that are there already; ``audit_run.py`` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.audit_policy import Policy, Requirement
from lit_unlearn.evaluation.measures import MEASURES, Evidence, NotTested, Sample
from lit_unlearn.evaluation.verdict import MAX_FORGET_PROBABILITY

Outcome = Literal["pass", "fail", "not decidable", "not tested"]
PASS: Outcome = "pass"
FAIL: Outcome = "fail"
UNDECIDED: Outcome = "not decidable"
NOT_TESTED: Outcome = "not tested"

EXIT_CODES: Mapping[Outcome, int] = {PASS: 0, FAIL: 1, UNDECIDED: 3}
"""Exit code of ``lit-unlearn audit`` by the verdict of the whole audit."""

# Measures that a model which knows the forget rows misses without any attack.
_KNOWING = ("forget_probability", "forget_known", "forget_gap", "forget_extraction")


@dataclass(frozen=True)
class Finding:
    """What came of one requirement.

    Args:
        requirement: The requirement.
        outcome: ``"pass"``, ``"fail"``, ``"not decidable"`` or ``"not tested"``.
        reason: Why, as a sentence.
        value: What was measured; ``None`` if nothing was, as for the bounds of its interval.
        low: Lower end of the interval.
        high: Upper end.
        sample: The numbers of the rows.
    """

    requirement: Requirement
    outcome: Outcome
    reason: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    sample: Sample | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain types; the numbers of the rows are among them, texts are not."""
        measure = MEASURES[self.requirement.measure]
        content = {**asdict(self), **asdict(self.requirement), "title": measure.title, "meaning": measure.meaning}
        content.pop("requirement")
        content["sample"] = None if self.sample is None else self.sample._asdict()
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Finding:
        """Return the finding that `to_dict` gave."""
        keys = ("measure", "at_most", "at_least", "required")
        sample = None if content["sample"] is None else Sample(**content["sample"])
        numbers = {key: content[key] for key in ("outcome", "reason", "value", "low", "high")}
        return cls(Requirement(**{key: content[key] for key in keys}), sample=sample, **numbers)


@dataclass(frozen=True)
class AuditResult:
    """The outcome of every requirement, and of all of them.

    Args:
        policy: The thresholds.
        findings: One per requirement, in the policy's order.

    Example:
        >>> policy = Policy("example", (Requirement("forget_probability", at_most=0.2),), min_rows=2)
        >>> evidence = Evidence(rows={"model": {"plain": {"forget": [{"probability": 0.01}, {"probability": 0.03}]}}})
        >>> result = judge(policy, evidence)
        >>> result.verdict, round(result.findings[0].value, 3)
        ('pass', 0.02)
    """

    policy: Policy
    findings: tuple[Finding, ...] = field(default=())

    @property
    def verdict(self) -> Outcome:
        """``"fail"`` if a required measure fails; ``"pass"`` if all of them pass; else ``"not decidable"``.

        A pass needs no correction for several requirements: it is wrong only if some required measure passes wrongly, and each
        does so with a probability of at most (1 − confidence) / 2.
        """
        outcomes = [finding.outcome for finding in self.findings if finding.requirement.required]
        if FAIL in outcomes:
            return FAIL
        # Nor is an attack that could not run a pass.
        return PASS if outcomes and all(outcome == PASS for outcome in outcomes) else UNDECIDED

    @property
    def exit_code(self) -> int:
        """0, 1 or 3."""
        return EXIT_CODES[self.verdict]


def judge(policy: Policy, evidence: Evidence) -> AuditResult:
    """Compare what was measured with a policy's thresholds."""
    findings = []
    for requirement in policy.requirements:
        try:
            sample = MEASURES[requirement.measure].collect(evidence)
        except NotTested as reason:
            findings.append(Finding(requirement, NOT_TESTED, f"{reason}."))
        else:
            findings.append(judge_sample(requirement, sample, policy))
    return AuditResult(policy, tuple(findings))


def check_prompts(policy: Policy, evidence: Evidence) -> list[str]:
    """Return a warning if the audited model seems not to know the rows that it is to keep, as in a prompt that it never learned.

    Raises:
        ConfigError: If the model before unlearning meets the thresholds of the forget rows as well: nothing could be shown then.
    """
    if "before" in evidence.rows:
        of_before = Evidence(rows={"model": evidence.rows["before"]})
        if "retain_only" in evidence.rows:
            of_before.rows["retain_only"] = evidence.rows["retain_only"]
        findings = judge(policy, of_before).findings
        outcomes = [finding.outcome for finding in findings if finding.requirement.measure in _KNOWING]
        tested = [outcome for outcome in outcomes if outcome != NOT_TESTED]
        if tested and all(outcome == PASS for outcome in tested):
            message = (
                "the model before unlearning meets the thresholds of the forget rows as well: it does not know them in this prompt, so "
                "that nothing can be shown. Look at the prompt with `lit-unlearn inspect`, and set `template`, `chat` or the columns as "
                "the model was fine-tuned with. If it never saw the rows, there is nothing to audit."
            )
            raise ConfigError(message, argument="before")
    try:
        kept = fmean(evidence.read_values("model", "plain", "retain", "probability"))
    except NotTested:
        return []
    if kept > MAX_FORGET_PROBABILITY:
        return []
    return [
        f"the mean probability of the retained answers is {kept:.2g}: the model does not know the rows that it is to keep, or not in "
        "this prompt. If it was fine-tuned on them, the questions are put in another way (`template`, `chat`, columns), and the "
        "audit shows nothing."
    ]


def judge_sample(requirement: Requirement, sample: Sample, policy: Policy) -> Finding:
    """Compare the interval of some numbers with a threshold."""
    if not all(map(math.isfinite, [*sample.first, *sample.second])):
        reason = "some rows have a value that is not finite: the model may have diverged."
        return Finding(requirement, UNDECIDED, reason, sample=sample)
    value, low, high = sample.estimate(policy.confidence, policy.seed)
    outcome, reason = decide_requirement(requirement, low, high)
    if sample.rows < policy.min_rows:
        outcome = UNDECIDED
        reason = f"there are {sample.rows} rows, and the policy decides nothing on fewer than {policy.min_rows}."
    return Finding(requirement, outcome, reason, value, low, high, sample)


def decide_requirement(requirement: Requirement, low: float, high: float) -> tuple[Outcome, str]:
    """Decide by an interval: it passes if all of it is allowed, and fails if none of it is.

    Returns:
        The outcome and the reason, as a sentence.

    Example:
        >>> decide_requirement(Requirement("forget_probability", at_most=0.2), low=0.15, high=0.25)[0]
        'not decidable'
    """
    smallest = -math.inf if requirement.at_least is None else requirement.at_least
    largest = math.inf if requirement.at_most is None else requirement.at_most
    allowed = requirement.describe_threshold()
    if smallest <= low and high <= largest:
        return PASS, f"the whole interval is {allowed}."
    if low > largest or high < smallest:
        return FAIL, f"the whole interval misses {allowed}."
    return UNDECIDED, f"a part of the interval is {allowed}, and a part is not: more rows would narrow it."
