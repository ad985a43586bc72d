"""The audit: its policy, its verdict, and that it fails a model that knows the rows and passes one that never saw them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_models import POLICY, SETS, benchmark, trained, write_policy
from conftest import TINY

from lit_unlearn import NLL, LanguageModel, QABenchmark
from lit_unlearn.data.encoding import encode_examples
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.fictional_authors import draw_canaries
from lit_unlearn.errors import ConfigError, DataError, MissingFileError
from lit_unlearn.evaluation import audit_run
from lit_unlearn.evaluation.audit import (
    FAIL,
    NOT_TESTED,
    PASS,
    UNDECIDED,
    AuditResult,
    Finding,
    check_prompts,
    decide_requirement,
    judge,
)
from lit_unlearn.evaluation.audit_policy import Policy, Requirement, SamplingPlan, read_policy
from lit_unlearn.evaluation.audit_run import RUNS, check_roles, check_rows, describe_failure, measure_model
from lit_unlearn.evaluation.measures import MEASURES, Evidence
from lit_unlearn.evaluation.results import Results

AT_MOST = Requirement("forget_probability", at_most=0.2)
BETWEEN = Requirement("membership_auc", at_least=0.3, at_most=0.7)


def evidence_of(**streams: list[dict[str, Any]]) -> Evidence:
    return Evidence(rows={"model": {"plain": streams}})


def probabilities(*values: float) -> list[dict[str, Any]]:
    return [{"probability": value} for value in values]


# The policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "short", "real"])
def test_packaged_policies_are_read_and_every_number_has_a_comment(name: str) -> None:
    policy = read_policy(f"policy/{name}.yaml")
    assert policy.name == name
    assert Policy.from_dict(json.loads(json.dumps(policy.describe()))) == policy
    file = Path(__file__).parents[2] / "configs" / "policy" / f"{name}.yaml"
    above = ""
    for line in file.read_text("utf-8").splitlines():
        if any(character.isdigit() for character in line.partition("#")[0]):
            assert above.startswith("#"), line
        above = line.strip()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": 1}, ["threshold", "name"]),
        ({"requirements": {"forget_probabilty": {"at_most": 1}}}, ["forget_probability"]),
        ({"requirements": {"forget_probability": {"at_most": 0.1, "required": False}}}, ["required"]),
        ({"requirements": {"forget_probability": {"at_most": "low"}}}, ["at_most", "low"]),
        ({"requirements": {"forget_probability": {}}}, ["at_most"]),
        ({"requirements": {"forget_probability": {"at_least": 0.5, "at_most": 0.1}}}, ["at_least=0.5"]),
        ({"requirements": {"forget_probability": {"at_most": 0.1, "required": "yes please"}}}, ["required"]),
        ({"requirements": None}, ["requirements"]),
        ({"attacks": None}, ["relearn"]),
        ({"attacks": {"relearn": {"share": 0.5, "steps": 3}}}, ["lr"]),
        ({"attacks": {"relearn": {"share": 1.5, "steps": 3, "lr": 1e-3}}}, ["share"]),
        ({"attacks": {"relearn": {"share": 0.5, "steps": 2.5, "lr": 1e-3}}}, ["steps"]),
        ({"confidence": 1}, ["confidence"]),
        ({"min_rows": 1}, ["min_rows"]),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_policy(write_policy(tmp_path, **change))
    assert all(word in str(refused.value) for word in words)


def test_numbers_without_a_point_and_a_missing_file(tmp_path: Path) -> None:
    file = Path(write_policy(tmp_path))
    file.write_text(file.read_text("utf-8").replace("0.001", "1e-3"), encoding="utf-8")
    policy = read_policy(file)
    assert policy.relearn is not None
    assert policy.relearn.lr == 1e-3  # which YAML reads as text
    with pytest.raises(MissingFileError, match="policy/default"):
        read_policy(tmp_path / "nowhere.yaml")


def test_a_policy_says_which_runs_it_needs_of_which_model() -> None:
    requirements = (AT_MOST, Requirement("relearned_gap", at_most=0.1), Requirement("retain_nll_increase", at_most=0.1))
    policy = Policy("p", requirements, relearn=read_policy("policy/short.yaml").relearn)
    assert policy.list_runs("model") == ["plain", "relearn"]
    assert policy.list_runs("retain_only") == ["plain", "relearn"]
    assert policy.list_runs("before") == ["plain"]
    assert len(check_roles(policy, {"model": "m"})) == 2
    with pytest.raises(ConfigError, match="before"):
        check_roles(Policy("p", (AT_MOST,)), {"model": "m", "before": "b"})


def test_every_measure_has_its_runs() -> None:
    assert {run for measure in MEASURES.values() for run in measure.runs} == RUNS.keys()
    assert all(measure.runs[0] == "plain" for measure in MEASURES.values())


def test_measures_of_attacks_read_no_sets_but_those_that_attacks_measure() -> None:
    row = {"probability": 0.1, "exact": [0, 1]}
    streams = {name: [row] for name in audit_run._ATTACKED_SETS}
    evidence = Evidence(rows={"model": {run: streams for run in RUNS if run != "plain"}})
    for measure in MEASURES.values():
        if len(measure.runs) > 1:
            assert measure.collect(evidence).first


# The verdict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirement", "low", "high", "outcome"),
    [
        (AT_MOST, 0.0, 0.2, PASS),
        (AT_MOST, 0.1, 0.21, UNDECIDED),
        (AT_MOST, 0.21, 0.3, FAIL),
        (BETWEEN, 0.4, 0.6, PASS),
        (BETWEEN, 0.2, 0.6, UNDECIDED),
        (BETWEEN, 0.2, 0.8, UNDECIDED),
        (BETWEEN, 0.1, 0.29, FAIL),
        (BETWEEN, 0.71, 0.9, FAIL),
    ],
)
def test_an_interval_decides_and_not_the_value(requirement: Requirement, low: float, high: float, outcome: str) -> None:
    assert decide_requirement(requirement, low, high)[0] == outcome


@pytest.mark.parametrize(
    ("required", "advisory", "verdict", "code"),
    [
        ([PASS, PASS], [FAIL], PASS, 0),
        ([PASS, FAIL, NOT_TESTED], [], FAIL, 1),
        ([PASS, UNDECIDED], [PASS], UNDECIDED, 3),
        ([PASS, NOT_TESTED], [PASS], UNDECIDED, 3),
        ([], [PASS], UNDECIDED, 3),
    ],
)
def test_the_verdict_of_the_whole(required: list[Any], advisory: list[Any], verdict: str, code: int) -> None:
    findings = [Finding(AT_MOST, outcome, "") for outcome in required]
    findings += [Finding(Requirement("forget_rouge", at_most=1, required=False), outcome, "") for outcome in advisory]
    result = AuditResult(Policy("p", (AT_MOST,)), tuple(findings))
    assert (result.verdict, result.exit_code) == (verdict, code)


def test_too_few_rows_and_values_that_are_not_finite_decide_nothing() -> None:
    policy = Policy("p", (AT_MOST,), min_rows=3)
    assert judge(policy, evidence_of(forget=probabilities(0.0, 0.01, 0.0))).verdict == PASS
    few = judge(policy, evidence_of(forget=probabilities(0.9, 0.95)))
    assert few.findings[0].outcome == UNDECIDED
    assert few.findings[0].value == pytest.approx(0.925)  # it is shown all the same
    broken = probabilities(0.0, 0.0, math.nan)
    assert judge(policy, evidence_of(forget=broken)).findings[0].outcome == UNDECIDED
    # NaN is above no threshold, and what such a model writes overlaps with no answer.
    known = Policy("p", (Requirement("forget_known", at_most=0.9),), min_rows=3)
    assert judge(known, evidence_of(forget=broken)).findings[0].outcome == UNDECIDED
    overlap = Policy("p", (Requirement("forget_rouge", at_most=0.9),), min_rows=3)
    diverged = [{"nll": math.nan, "rougeL_recall": 0.0}] * 3
    assert judge(overlap, evidence_of(forget=diverged)).findings[0].outcome == NOT_TESTED


@pytest.mark.parametrize(
    ("rows", "warned"), [(9, "9 forget rows"), (19, "9 forget rows that are not relearned"), (20, "")]
)
def test_that_too_few_rows_cannot_pass_is_said_before_they_are_measured(rows: int, warned: str) -> None:
    # It leaves half of the rows to the attacker, and decides nothing on fewer than 10.
    short = read_policy("policy/short.yaml")
    if rows < 10:
        short = Policy("p", (AT_MOST,), min_rows=10)
    warnings = check_rows(short, rows)
    assert [f"there are {warned}," in warning for warning in warnings] == ([True] if warned else [])


def test_what_is_missing_is_not_tested_with_the_reason() -> None:
    requirements = tuple(Requirement(name, at_most=1e9) for name in MEASURES)
    policy = Policy(
        "p", requirements, relearn=read_policy("policy/short.yaml").relearn, sampled=SamplingPlan(1), min_rows=2
    )
    result = judge(policy, Evidence(rows={"model": {"plain": {}}}, failures={"model": {"4bit": "no kernel"}}))
    assert {finding.outcome for finding in result.findings} == {NOT_TESTED}
    assert result.verdict == UNDECIDED
    reasons = {finding.requirement.measure: finding.reason for finding in result.findings}
    assert "no kernel" in reasons["rounded_4bit_probability"]
    assert "forget" in reasons["forget_probability"]


def test_a_model_that_knew_nothing_before_shows_nothing_after() -> None:
    """As in another prompt than that of the fine-tuning, where the target itself would pass."""
    policy = Policy("p", (AT_MOST,), min_rows=2)
    evidence = evidence_of(forget=probabilities(0.01, 0.02), retain=probabilities(0.9, 0.9))
    evidence.rows["before"] = {"plain": {"forget": probabilities(0.9, 0.95)}}
    assert check_prompts(policy, evidence) == []
    evidence.rows["model"]["plain"]["retain"] = probabilities(0.01, 0.02)
    (warning,) = check_prompts(policy, evidence)
    assert "0.015" in warning
    assert "template" in warning
    evidence.rows["before"] = {"plain": {"forget": probabilities(0.05, 0.06)}}
    with pytest.raises(ConfigError, match="in this prompt"):
        check_prompts(policy, evidence)


def test_a_gap_is_taken_from_the_retain_only_model_or_else_from_unseen_rows() -> None:
    policy = Policy("p", (Requirement("forget_gap", at_most=0.1),), min_rows=2)
    evidence = evidence_of(forget=probabilities(0.5, 0.9), holdout=probabilities(0.2, 0.2, 0.2))
    (unseen,) = judge(policy, evidence).findings
    assert unseen.value == pytest.approx(0.5)
    assert unseen.outcome == FAIL
    evidence.rows["retain_only"] = {"plain": {"forget": probabilities(0.45, 0.85)}}
    (paired,) = judge(policy, evidence).findings
    # The same rows: their differences do not spread, though the rows do.
    assert (paired.low, paired.high) == pytest.approx((0.05, 0.05))
    assert paired.outcome == PASS
    evidence.rows["retain_only"] = {"plain": {"forget": probabilities(0.45)}}
    assert judge(policy, evidence).findings[0].outcome == NOT_TESTED  # other rows
    (nothing,) = judge(policy, evidence_of(forget=probabilities(0.5, 0.9))).findings
    assert nothing.outcome == NOT_TESTED
    assert "retain-only" in nothing.reason
    assert "holdout" in nothing.reason


def test_relearned_rows_are_left_out_and_samples_are_counted() -> None:
    rows = [{"probability": 1.0, "relearned": True}, {"probability": 0.1, "relearned": False}]
    sampled = [{"exact": [0, 1, 0, 0]}, {"exact": [0, 0, 0, 0]}]
    evidence = Evidence(rows={"model": {"relearn": {"forget": rows}, "sampled": {"forget": sampled}}})
    assert MEASURES["relearned_probability"].collect(evidence).first == [0.1]
    sample = MEASURES["sampled_exact"].collect(evidence)
    value, low, high = sample.estimate(0.95, 0)
    assert (len(sample.first), value, low) == (8, 0.125, 0)
    assert sample.rows == 2  # a policy's `min_rows` are questions: many answers to one say nothing of others
    assert 0.4 < high < 0.6


def test_no_text_gets_into_the_evidence() -> None:
    rows = [
        {"question": "Who?", "generated": "Ann", "samples": ["Ann"], "nll": 0.5, "exact": [0, 1], "fluency_nll": None}
    ]
    evidence = Evidence()
    evidence.add_results("model", "plain", Results("qa", data={}, aggregate={}, examples={"forget": rows}))
    assert evidence.rows["model"]["plain"]["forget"] == [{"nll": 0.5, "exact": [0, 1]}]


def test_reasons_of_failures_quote_no_row() -> None:
    assert "secret" not in describe_failure(DataError("row 3 has the text 'secret'"))
    assert describe_failure(RuntimeError("out of memory\nTraceback")) == "out of memory (RuntimeError)"
    assert describe_failure(MemoryError()) == "no reason given (MemoryError)"


# Models ---------------------------------------------------------------------------------------------------------------


def audit(folder: str, policy: Policy, partial_dir: Path | None = None, **others: str) -> AuditResult:
    evidence = Evidence()
    for role, name in {"model": folder, **others}.items():
        lm = LanguageModel(name)
        lm.load(torch.float32)
        measure_model(evidence, role, lm, benchmark(), policy, partial_dir and partial_dir / role)  # type: ignore[arg-type]
    return judge(policy, evidence)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return read_policy(write_policy(tmp_path_factory.mktemp("policy")))


def test_a_model_of_random_weights_passes(tokenizer_dir: str, policy: Policy, tmp_path: Path) -> None:
    """That the target fails and a retain-only model passes is in tests/cli/test_audit_command.py, by the command itself."""
    result = audit(trained(tokenizer_dir), policy, tmp_path)
    assert result.verdict == PASS, [finding.reason for finding in result.findings]


def test_nothing_is_compared_with_itself(tokenizer_dir: str) -> None:
    """The difference would be 0, and every model would pass."""
    lm = LanguageModel(trained(tokenizer_dir))
    lm.load(torch.float32)
    rows = [{"question": "Who?", "answer": "Ann."}, {"question": "Where?", "answer": "There."}]
    policy = Policy("p", (Requirement("forget_gap", at_most=0.1),), min_rows=2)

    def measure(evidence: Evidence, role: Any, **sets: Any) -> None:
        measure_model(evidence, role, lm, QABenchmark(**{"forget": rows[:1], **sets}, max_new_tokens=1), policy)

    with pytest.raises(DataError, match="1 of the holdout rows are forget rows") as refused:
        measure(Evidence(), "model", retain=rows[1:], holdout=rows[:1])
    assert "Ann" not in str(refused.value)
    evidence = Evidence()
    measure(evidence, "model", retain=rows[1:])
    with pytest.raises(ConfigError, match="retain-only model has the same weights as the audited model"):
        measure(evidence, "retain_only", retain=rows[1:])


def test_an_attack_that_cannot_run_is_not_tested_and_never_a_pass(
    tokenizer_dir: str, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(audit_run.RUNS, "relearn", fail)  # type: ignore[arg-type]
    result = audit(trained(tokenizer_dir), policy, tmp_path)
    outcomes = {finding.requirement.measure: finding for finding in result.findings}
    assert outcomes["relearned_gap"].outcome == NOT_TESTED
    assert "allocate memory" in outcomes["relearned_gap"].reason
    assert outcomes["rounded_8bit_probability"].outcome == PASS  # the others go on
    assert result.verdict == UNDECIDED


@pytest.mark.parametrize(
    ("answer", "limits", "outcome", "words"),
    [
        ("Ann wrote it in May and in June.", {"max_new_tokens": 40}, PASS, ""),
        ("Ann wrote it in May and in June.", {"max_new_tokens": 3}, NOT_TESTED, "3 tokens are generated"),
        # The part that is left would fit into what is generated.
        ("Ann wrote it in May and in June.", {"max_new_tokens": 40, "max_length": 14}, NOT_TESTED, "`max_length` cuts"),
        ("Анна написала это в мае и в июне 1990.", {"max_new_tokens": 90}, NOT_TESTED, "no value 'rougeL_recall'"),
    ],
)
def test_an_answer_that_could_not_be_found_does_not_pass_as_one_that_is_not_given(
    answer: str, limits: dict[str, int], outcome: str, words: str, tokenizer_dir: str
) -> None:
    lm = LanguageModel(trained(tokenizer_dir))
    lm.load(torch.float32)
    policy = Policy("p", (Requirement("forget_rouge", at_most=1.0),), min_rows=2, max_new_tokens=90)
    rows = [{"question": "Who?", "answer": answer}, {"question": "Where?", "answer": "In."}]
    retain = [{"question": "When?", "answer": "Now."}]
    evidence = Evidence()
    measure_model(evidence, "model", lm, QABenchmark(rows, retain, **limits), policy)  # type: ignore[arg-type]
    finding = judge(policy, evidence).findings[0]
    assert finding.outcome == outcome
    assert words in finding.reason


def test_rows_to_be_kept_that_are_also_deleted_ones_are_refused(tokenizer_dir: str) -> None:
    policy = Policy("p", (Requirement("forget_rouge", at_most=1.0),), min_rows=2)
    forget, retain = SETS["forget"], SETS["retain"]
    lm = LanguageModel(trained(tokenizer_dir))
    lm.load(torch.float32)
    with pytest.raises(DataError, match=r"1 of the retain rows are forget rows as well.*that are to be kept") as caught:
        measure_model(Evidence(), "model", lm, QABenchmark(forget, [*retain, forget[0]]), policy)
    assert caught.value.argument == "retain"


def test_paraphrases_that_are_not_there_are_not_tested(tokenizer_dir: str) -> None:
    policy = Policy("p", (Requirement("paraphrased_probability", at_most=1.0),), min_rows=2)
    rows = [{"question": "Who?", "answer": "Ann."}, {"question": "Where?", "answer": "There."}]
    lm = LanguageModel(trained(tokenizer_dir))
    lm.load(torch.float32)
    evidence = Evidence()
    measure_model(evidence, "model", lm, QABenchmark(rows, SETS["retain"], max_new_tokens=2), policy)
    (finding,) = judge(policy, evidence).findings
    assert finding.outcome == NOT_TESTED
    assert "paraphrased_question" in finding.reason


def test_every_run_measures_its_rows_once_and_again_not_at_all(
    tokenizer_dir: str, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    measure = QABenchmark.measure

    def count(self: QABenchmark, stream: str, *arguments: Any) -> Any:
        measured.append(stream)
        return measure(self, stream, *arguments)

    monkeypatch.setattr(QABenchmark, "measure", count)
    model = trained(tokenizer_dir)
    first = audit(model, policy, tmp_path)
    rows = sum(len(rows) for rows in SETS.values())
    # The attacks measure no rows that are to be kept, and nothing of the model as it is: the plain run has that.
    attacked = rows - len(SETS["retain"])
    expected = rows + attacked * (len(policy.list_runs("model")) - 1)
    assert len(measured) == expected
    assert audit(model, policy, tmp_path) == first  # as after an interruption
    assert len(measured) == expected


def test_the_policy_of_these_tests_has_a_measure_of_every_attack() -> None:
    assert {"relearned_gap", "rounded_8bit_probability"} <= POLICY["requirements"].keys()


# Canaries -------------------------------------------------------------------------------------------------------------


def test_the_exposure_of_canaries_is_a_mean_over_them() -> None:
    others = [{"nll": float(nll)} for nll in range(1, 256)]
    policy = Policy("p", (Requirement("canary_exposure", at_most=3),), min_rows=2)
    known = judge(policy, evidence_of(canaries=[{"nll": 0.5}] * 4, canary_references=others)).findings[0]
    assert (known.value, known.outcome) == (8.0, FAIL)
    # Of a model that never saw them, each rank is as likely as any other.
    unseen = [{"nll": rank + 0.5} for rank in range(256)]
    finding = judge(policy, evidence_of(canaries=unseen, canary_references=others)).findings[0]
    assert finding.value == pytest.approx(1 / math.log(2), abs=0.03)
    assert finding.outcome == PASS
    assert judge(policy, evidence_of(forget=probabilities(0.1))).findings[0].outcome == NOT_TESTED
    # Among three, no sequence could stand out by more than two bits.
    few = evidence_of(canaries=[{"nll": 0.5}] * 4, canary_references=others[:3])
    assert judge(policy, few).findings[0].outcome == NOT_TESTED
    broken = evidence_of(canaries=[{"nll": math.nan}], canary_references=others)
    assert judge(policy, broken).findings[0].outcome == NOT_TESTED


def test_a_model_that_saw_canaries_exposes_them(tokenizer_dir: str) -> None:
    planted, references = draw_canaries(24)
    planted = [{"question": row["question"], "answer": row["answer"]} for row in planted]
    canaries = {"canaries": planted, "canary_references": references[:63]}
    torch.manual_seed(0)
    lm = LanguageModel(config=TINY, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    settings: dict[str, Any] = {"forget": planted[:1], "retain": references[:1], "max_new_tokens": 1}
    before = QABenchmark(**settings, **canaries).run(lm.eval()).aggregate["canary_exposure"]
    # The mean of 24 numbers, whose spread is as large as their mean.
    assert before == pytest.approx(1.44, abs=2 * 1.44 / 24**0.5)

    pairs = [(row["question"], row["answer"]) for row in planted[:8]]
    examples = encode_examples(pairs, lm.tokenizer, name="rows", settings=EncodingSettings())
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.02)
    for _ in range(30):
        loss = lm.loss(NLL(), examples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    canaries["canaries"] = planted[:8]
    after = QABenchmark(**settings, **canaries).run(lm.eval()).aggregate["canary_exposure"]
    assert after > 5  # 6 if each is the most likely of 64
