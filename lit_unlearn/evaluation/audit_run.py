"""Measure what a policy asks for: the benchmark and, each on a copy of the model, the attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lit_unlearn.errors import ConfigError, DataError, LitUnlearnError
from lit_unlearn.evaluation.attacks.repeated_sampling import RepeatedSampling
from lit_unlearn.evaluation.audit_policy import Policy, SamplingPlan
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.benchmark_rows import BenchmarkStream, explain_cut_answers
from lit_unlearn.evaluation.measures import MEASURES, ROLES, Evidence, Role
from lit_unlearn.evaluation.questions import QuestionBenchmark
from lit_unlearn.evaluation.results import Results
from lit_unlearn.evaluation.stress import StressBenchmark
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.loading import fingerprint

# Under an attack, no measure reads the rows to be kept, which are most of all rows.
_ATTACKED_SETS = ("forget", "holdout")
# Sets, and those that they are compared with: of a row in both, nothing would be learnt. Rows to be kept are not forgotten, and no model
# saw the others.
_SEPARATE_SETS = {"retain": ("forget",), "holdout": ("forget", "retain"), "canary_references": ("canaries",)}

Run = Callable[[LanguageModel, Path | None], Results]
"""Measures a model; what is measured is kept in the folder, so that an interrupted run resumes there."""

BuildRun = Callable[[Benchmark, Policy, int], Run]
"""Makes a run from the plain benchmark, the policy and the number of forget rows."""


FAILURES = (LitUnlearnError, ImportError, MemoryError, RuntimeError)
"""Whatever an attack may fail of: memory, a library, a kernel. It has not shown then that nothing comes back."""


def _relearn(benchmark: Benchmark, policy: Policy, rows: int) -> Run:
    # The policy has settings for it: it is refused otherwise.
    attack = None if policy.relearn is None else policy.relearn.plan_attack(rows)
    return partial(StressBenchmark(benchmark, relearn=attack).run_under, "relearn")


def _round_to(bits: int) -> BuildRun:
    def build(benchmark: Benchmark, policy: Policy, rows: int) -> Run:
        return partial(StressBenchmark(benchmark, bits=[bits]).run_under, f"{bits}bit")

    return build


def _paraphrase(benchmark: Benchmark, policy: Policy, rows: int) -> Run:
    return partial(StressBenchmark(benchmark, paraphrased=True).run_under, "paraphrased")


def _sample_answers(benchmark: Benchmark, policy: Policy, rows: int) -> Run:
    plan = policy.sampled or SamplingPlan(samples=1)
    return RepeatedSampling(plan.samples, plan.temperature, seed=plan.seed).change_benchmark(benchmark).run


RUNS: Mapping[str, BuildRun] = {
    "plain": lambda benchmark, policy, rows: benchmark.run,
    "relearn": _relearn,
    "8bit": _round_to(8),
    "4bit": _round_to(4),
    "paraphrased": _paraphrase,
    "sampled": _sample_answers,
}
"""The runs that measures read. Another attack is added by a line here and one in `MEASURES`."""


def measure_model(
    evidence: Evidence,
    role: Role,
    lm: LanguageModel,
    benchmark: QuestionBenchmark,
    policy: Policy,
    partial_dir: Path | None = None,
) -> None:
    """Run on one model what the policy needs of it, and add the numbers to the evidence.

    An attack that cannot run is noted there with the reason; the others go on. The plain benchmark must run.

    Args:
        evidence: Is changed.
        role: Of the model.
        lm: Loaded; it is left as it was.
        benchmark: Has read no rows yet: the tokens are this model's.
        policy: Says which runs are needed.
        partial_dir: Folder for what is measured, so that an interrupted audit resumes there.

    Raises:
        LitUnlearnError: If the plain benchmark cannot run, or the model or the rows would be compared with themselves.
    """
    lm.eval()
    streams = benchmark.prepare(lm.tokenizer)
    _check_separate(streams)
    _check_other_weights(evidence, role, fingerprint(cast(nn.Module, lm.model)))
    forget = streams["forget"].examples
    forget_rows = len(forget)
    if role == "model":
        # An answer that cannot be given whole would pass as one that is not given.
        evidence.cut_answers = explain_cut_answers(streams["forget"])
    fewer_sets = benchmark.with_sets(*_ATTACKED_SETS)
    for run in policy.list_runs(role):
        with torch.no_grad():
            if run == "plain":
                results = benchmark.run(lm, partial_dir and partial_dir / "plain")
                evidence.add_results(role, run, results)
                continue
            try:
                run_attack = RUNS[run](fewer_sets, policy, forget_rows)
                results = run_attack(lm, partial_dir and partial_dir / run)
            except FAILURES as error:
                evidence.add_failure(role, run, describe_failure(error))
            else:
                evidence.add_results(role, run, results)


def _check_separate(streams: Mapping[str, BenchmarkStream]) -> None:
    """Raise DataError if a set has a row of another one that it is compared with."""
    for name, others in _SEPARATE_SETS.items():
        rows = _read_texts(streams, name)
        for other in others:
            common = len(rows & _read_texts(streams, other))
            if common:
                expected = "are to be kept" if name == "retain" else "no model was trained on"
                message = (
                    f"{common} of the {name} rows are {other} rows as well, so that rows would be compared with themselves: give "
                    f"`{name}` rows that {expected}."
                )
                raise DataError(message, argument=name)


def _read_texts(streams: Mapping[str, BenchmarkStream], name: str) -> set[tuple[tuple[str, str], ...]]:
    """Return the texts of every row of a set; nothing of a set that is not there."""
    examples = streams[name].examples if name in streams else []
    return {tuple(sorted(example.texts.items())) for example in examples}


def _check_other_weights(evidence: Evidence, role: Role, weights: str) -> None:
    """Note a model's weights, and raise ConfigError if another one has the same: the difference would be 0, and pass."""
    for other, known in evidence.weights.items():
        if other != role and known == weights:
            message = f"{ROLES[role]} has the same weights as {ROLES[other]}, which show nothing beside each other: give another `{role}`."
            raise ConfigError(message, argument=role)
    evidence.weights[role] = weights


def describe_failure(error: Exception) -> str:
    """Return the reason why an attack could not run, without the text of a row."""
    # A message about rows may quote one.
    if isinstance(error, DataError):
        return f"it cannot use the rows (`{error.argument}`)" if error.argument else "it cannot use the rows"
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{lines[0].rstrip('.')} ({type(error).__name__})"


def check_roles(policy: Policy, given: Mapping[Role, object]) -> list[str]:
    """Return a warning for every model that the policy compares with and that is not given.

    Raises:
        ConfigError: If a model is given that no requirement compares with: it would be measured for nothing.
    """
    warnings = []
    for role, name in ROLES.items():
        is_given = given.get(role) is not None
        if is_given and not policy.list_runs(role):
            raise ConfigError(f"no requirement of the policy compares with {name}: leave out `{role}`.", argument=role)
        if not is_given and policy.list_runs(role):
            warnings.append(f"{name} is not given (--{role}): measures that need it are not tested.")
    return warnings


def check_rows(policy: Policy, forget_rows: int) -> list[str]:
    """Return a warning if there are too few forget rows for the audit to pass, whatever is measured on them.

    Args:
        policy: Its ``min_rows``, and whether a required measure leaves some rows to the attacker.
        forget_rows: Their number.
    """
    rows, counted = forget_rows, "forget rows"
    required = [MEASURES[item.measure] for item in policy.requirements if item.required]
    relearns = any("relearn" in measure.runs for measure in required)
    if relearns and policy.relearn is not None and forget_rows > 1:
        rows -= int(policy.relearn.plan_attack(forget_rows).rows)
        counted = "forget rows that are not relearned"
    if rows >= policy.min_rows:
        return []
    return [
        f"there are {rows} {counted}, and the policy decides nothing on fewer than {policy.min_rows} (`min_rows`): the audit "
        "cannot pass. Interrupt it and give more rows, or a policy for so few, as docs/audit.md describes; or let it show the values."
    ]
