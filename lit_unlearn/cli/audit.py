"""Run ``lit-unlearn audit``: measure a model against a policy, and end with pass, fail or not decidable."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from lit_unlearn.cli.main import print_warning
from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.cli.questions import (
    SETS_HELP,
    add_question_options,
    add_set_options,
    find_sets,
    prepare_benchmarks,
    read_settings,
)
from lit_unlearn.data.source import digest_if_whole
from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import NotDecidable, RequirementNotMet
from lit_unlearn.evaluation.audit import FAIL, PASS, AuditResult, check_prompts, judge
from lit_unlearn.evaluation.audit_policy import Policy, read_policy
from lit_unlearn.evaluation.audit_run import check_roles, check_rows, measure_model
from lit_unlearn.evaluation.measures import Evidence, Role
from lit_unlearn.evaluation.partial_files import remove_partials
from lit_unlearn.evaluation.qa import QABenchmark
from lit_unlearn.evaluation.results import Values
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.export.audit_files import (
    AUDIT_FILE,
    PAGE_FILE,
    build_audit,
    describe_record,
    load_described,
    read_question_settings,
    read_record,
    was_fixed_before,
    write_audit,
)
from lit_unlearn.export.ledger import append_entry, check_ledger, describe_audit, read_ledger
from lit_unlearn.export.record import RECORD_FILE, digest_examples
from lit_unlearn.export.signature import KEY_VARIABLE, load_signing_key
from lit_unlearn.models import LanguageModel
from lit_unlearn.utils.folders import check_export_target
from lit_unlearn.utils.io import check_writable


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn audit",
        description="Measures a model against a policy, a file of thresholds that were fixed beforehand: writes audit.json and, for "
        "people, audit.html, and ends with exit code 0 (pass), 1 (fail) or 3 (not decidable). Neither file shows a row.",
        epilog=SETS_HELP,
    )
    parser.add_argument("model", type=str, metavar="MODEL", help="A model directory, or a name on the hub.")
    parser.add_argument(
        "--policy", type=str, required=True, metavar="FILE", help="A YAML file, or a packaged one: policy/default.yaml."
    )
    add_set_options(parser)
    parser.add_argument(
        "--retain_only", type=str, metavar="MODEL", help="A model trained without the forget rows, to compare with."
    )
    parser.add_argument("--before", type=str, metavar="MODEL", help="The model before unlearning, to compare with.")
    parser.add_argument("--output", type=Path, default=Path("audit"), metavar="DIR", help="Folder to write.")
    parser.add_argument("--request", type=str, metavar="ID", help="Who asked for the deletion, for page and ledger.")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="Ledger to append the verdict to.")
    # Not the key itself: it would show in the list of processes.
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help=f"Private Ed25519 key in PEM to sign with; by default ${KEY_VARIABLE}."
    )
    add_question_options(parser)
    return parser


def run(arguments: list[str]) -> None:
    """Audit one model.

    Raises:
        RequirementNotMet: If the verdict is "fail".
        NotDecidable: If it is "not decidable", or the model was replaced meanwhile.
    """
    started = time.monotonic()
    parser = build_parser()
    options = parser.parse_args(arguments)
    # Everything that can be refused is refused before a model is loaded.
    policy, key = read_policy(options.policy), load_signing_key(options.key)
    models: dict[Role, str | None] = {
        "model": options.model,
        "retain_only": options.retain_only,
        "before": options.before,
    }
    for warning in check_roles(policy, models):
        print_warning(warning)
    check_export_target(options.output, models.values(), argument="output")
    check_writable(options.output.parent, argument="output")
    if options.ledger is not None:
        check_ledger(options.ledger)
        if options.ledger.exists():
            read_ledger(options.ledger)
    record = read_record(options.model)
    # No measure reads wrong answers, of which a row may have many.
    settings = {"wrong_column": "", **read_question_settings(record), **read_settings(parser, options)}
    sources = find_sets(parser.instantiate(options), record)
    # This looks at the files of a model, and does not load it yet.
    language_models: dict[Role, LanguageModel] = {}
    for role, name in models.items():
        if name is not None:
            language_models[role] = LanguageModel(name)

    def make_benchmark() -> QABenchmark:
        arguments: dict[str, Any] = {**sources, **settings, "max_new_tokens": policy.max_new_tokens}
        return QABenchmark(token_budget=options.token_budget, **arguments)

    benchmarks = prepare_benchmarks(language_models, make_benchmark)
    tokenizer = language_models["model"].tokenizer
    data = benchmarks["model"].describe_data(tokenizer)
    forget = benchmarks["model"].prepare(tokenizer)["forget"].examples
    # As the run trained on them, if these are its rows in its prompt.
    answers = list(chain.from_iterable(example.sequences.get("answer", []) for example in forget))
    for warning in check_rows(policy, len(forget)):
        print_warning(warning)
    partial_dir = options.output.with_name(f"{options.output.name}.partial")
    evidence = Evidence()
    described: dict[str, Values] = {}
    for role, lm in language_models.items():
        print(f"measuring {lm.name}: {', '.join(policy.list_runs(role))}")
        described[role] = _measure(evidence, role, lm, benchmarks[role], policy, options.dtype, partial_dir)
    for warning in check_prompts(policy, evidence):
        print_warning(warning)
    if read_record(options.model) != record:
        raise NotDecidable(
            f"another model was exported to '{options.model}' meanwhile, and its record is not that of the measured one: nothing is "
            "certified. Audit it again."
        )
    result = judge(policy, evidence)

    files = {stream: digest_if_whole(source.describe()) for stream, source in sources.items()}
    for stream, digest in files.items():
        if digest is not None:
            data[stream]["sha256"] = digest
    audit = build_audit(
        result,
        model=described.pop("model"),
        data=data,
        record=describe_record(options.model, digest_examples(answers), files["forget"]),
        policy_fixed_before=was_fixed_before(record, policy.sha256),
        compared_with=described,
        settings={name: asdict(value) if isinstance(value, Chat) else value for name, value in settings.items()},
        request=options.request,
    )
    write_audit(options.output, audit, key, Path(options.model) / RECORD_FILE)
    # It has the rows' texts, and was kept only so that an interrupted audit could resume.
    remove_partials(partial_dir)
    if options.ledger is not None:
        append_entry(options.ledger, describe_audit(audit))

    print(audit_table(result))
    if key is not None:
        print(f"signed with the key whose public half is {key.public_key().public_bytes_raw().hex()}")
    print(f"audit: {options.output / PAGE_FILE} and {AUDIT_FILE} ({time.monotonic() - started:.0f} s)")
    _end_with_verdict(result)


def _measure(
    evidence: Evidence,
    role: Role,
    lm: LanguageModel,
    benchmark: QABenchmark,
    policy: Policy,
    dtype: str | None,
    partial_dir: Path,
) -> Values:
    """Measure one model, and return its description."""
    described = load_described(lm, dtype)
    measure_model(evidence, role, lm, benchmark, policy, partial_dir / role)
    # The next one is not to be in memory beside it.
    lm.model = None
    return described


def audit_table(result: AuditResult) -> str:
    """Format the outcome of every requirement as a table, the verdict below it."""
    rows = []
    for finding in result.findings:
        requirement = finding.requirement
        interval = None
        if finding.low is not None and finding.high is not None:
            interval = f"{finding.low:.3g} to {finding.high:.3g}"
        kind = "required" if requirement.required else "advisory"
        rows.append(
            [requirement.measure, kind, requirement.describe_threshold(), finding.value, interval, finding.outcome]
        )
    headers = ["measure", "", "threshold", "value", f"{100 * result.policy.confidence:.4g} % interval", "outcome"]
    lines = [format_table(rows, headers, "ruled")]
    for finding in result.findings:
        if finding.outcome != PASS:
            lines.append(f"{finding.requirement.measure}: {finding.outcome}, {finding.reason}")
    lines.append(f"verdict: {result.verdict}")
    return "\n".join(lines)


def _end_with_verdict(result: AuditResult) -> None:
    if result.verdict == PASS:
        return
    undone = []
    for finding in result.findings:
        if finding.requirement.required and finding.outcome != PASS:
            undone.append(f"{finding.requirement.measure} ({finding.outcome})")
    if result.verdict == FAIL:
        raise RequirementNotMet(f"the audit fails: {', '.join(undone)}.")
    raise NotDecidable(f"the audit decides nothing, and is no pass: {', '.join(undone)}.")
