"""Run ``lit-unlearn attack``: a list of attacks on copies of a model, as a table, a picture and a results file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

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
from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.attack_run import (
    ATTACKS,
    NO_ATTACK,
    VALUES,
    Attack,
    Outcome,
    Role,
    Value,
    attack_table,
    build_report,
    run_attacks,
)
from lit_unlearn.evaluation.benchmark_rows import BenchmarkStream, explain_cut_answers
from lit_unlearn.evaluation.partial_files import remove_partials
from lit_unlearn.evaluation.qa import QABenchmark
from lit_unlearn.evaluation.results import Values
from lit_unlearn.export.audit_files import load_described, read_question_settings, read_record
from lit_unlearn.models import LanguageModel
from lit_unlearn.plotting import draw_attacks
from lit_unlearn.utils.folders import check_export_target, replace_folder
from lit_unlearn.utils.io import check_writable, read_yaml_text, write_json
from lit_unlearn.utils.validation import list_names

RESULTS_FILE = "attack.json"
PICTURE_FILE = "attack.png"


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn attack",
        description="Runs a list of attacks, each on a copy of a model and, if there is one, of the retain-only model: prints what "
        "of the forget set comes back, and writes attack.json and attack.png. Neither shows a row. An interrupted run resumes.",
        epilog=SETS_HELP,
    )
    parser.add_argument("model", type=str, metavar="MODEL", help="A model directory, or a name on the hub.")
    parser.add_argument(
        "--config", type=str, required=True, metavar="FILE", help="A YAML file, or a packaged one: attack/default.yaml."
    )
    add_set_options(parser, ("forget", "retain", "holdout", "general"))
    parser.add_argument("--retain_only", type=str, metavar="MODEL", help="A model trained without the forget rows.")
    parser.add_argument("--output", type=Path, default=Path("attack"), metavar="DIR", help="Folder to write.")
    add_question_options(parser)
    return parser


def run(arguments: list[str]) -> None:
    """Attack one model, and beside it the retain-only model."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    # Everything that can be refused is refused before a model is loaded.
    content = yaml.safe_load(read_yaml_text(options.config))
    attacks, max_new_tokens, value = read_config(content or {})
    models: dict[Role, str | None] = {"model": options.model, "retain_only": options.retain_only}
    check_export_target(options.output, models.values(), argument="output")
    check_writable(options.output.parent, argument="output")
    record = read_record(options.model)
    settings = {**read_question_settings(record), **read_settings(parser, options), "max_new_tokens": max_new_tokens}
    sources = find_sets(parser.instantiate(options), record)
    # This looks at the files of a model, and does not load it yet.
    language_models: dict[Role, LanguageModel] = {}
    for role, name in models.items():
        if name is not None:
            language_models[role] = LanguageModel(name)

    partial_dir = options.output.with_name(f"{options.output.name}.partial")
    outcomes: dict[Role, dict[str, Outcome]] = {}
    described: Values = {}

    def make_benchmark() -> QABenchmark:
        # Answers that no attack is measured by need not be scored.
        arguments: dict[str, Any] = {**sources, **settings, "wrong_column": "", "paraphrase_column": ""}
        return QABenchmark(token_budget=options.token_budget, **arguments)

    benchmarks = prepare_benchmarks(language_models, make_benchmark)
    data = benchmarks["model"].describe_data(language_models["model"].tokenizer)
    for role, lm in language_models.items():
        benchmark = benchmarks[role]
        _warn_of_cut_answers(benchmark.prepare(lm.tokenizer)["forget"])
        described[role] = load_described(lm, options.dtype)
        if role != "model" and described[role]["weights"] == described["model"]["weights"]:
            message = f"'{lm.name}' has the same weights as '{options.model}', which show nothing beside each other: give another model."
            raise ConfigError(message, argument=role)
        print(f"attacking {lm.name}")
        outcomes[role] = run_attacks(lm, attacks, benchmark, partial_dir / role, _print_outcome)
        # The next one is not to be in memory beside it.
        lm.model = None

    plain_settings = {name: asdict(value) if isinstance(value, Chat) else value for name, value in settings.items()}
    report = build_report(attacks, outcomes, models=described, data=data, settings=plain_settings)
    with replace_folder(options.output, [name for name in models.values() if name is not None]) as staging:
        write_json(staging / RESULTS_FILE, report)
        draw_attacks(report, value, staging / PICTURE_FILE)
    # It has texts of answers, and was kept only so that an interrupted run could resume.
    remove_partials(partial_dir)
    print(attack_table(report, value))
    print(f"attacks: {options.output / RESULTS_FILE} and {PICTURE_FILE}")


def read_config(content: Mapping[str, Any]) -> tuple[dict[str, Attack], int, Value]:
    """Return the attacks by label, the longest generated answer, and the measure of leakage to show.

    Args:
        content: Of the file.

    Raises:
        ConfigError: If a key or a setting is not possible.
    """
    known = ("attacks", "max_new_tokens", "value")
    for key in content:
        if key not in known:
            raise ConfigError(f"the list of attacks has no setting '{key}': {list_names(str(key), known)}.")
    entries = content.get("attacks")
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(
            "`attacks` must have an entry for each attack, such as `4 bits: {attack: rounding, bits: 4}`."
        )
    attacks = {str(label): _build_attack(str(label), entry) for label, entry in entries.items()}
    max_new_tokens, value = content.get("max_new_tokens", 100), content.get("value", "rougeL_recall")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"`max_new_tokens` must be a whole number of at least 1, not {max_new_tokens!r}.")
    if value not in VALUES:
        raise ConfigError(f"`value` must be a measure of leakage, not {value!r}: {list_names(str(value), VALUES)}.")
    return attacks, max_new_tokens, value


def _build_attack(label: str, entry: Any) -> Attack:
    """Return the attack of an entry, whose ``attack`` is its name, or its label is."""
    settings = dict(entry) if isinstance(entry, Mapping) else {}
    name = settings.pop("attack", label)
    if name not in ATTACKS:
        raise ConfigError(f"'{label}' is no attack: there is no '{name}'; {list_names(str(name), ATTACKS)}.")
    if label == NO_ATTACK:
        raise ConfigError(f"an attack cannot be called '{NO_ATTACK}': choose another name.")
    build: Callable[..., Attack] = ATTACKS[name]
    parser = CommandParser()
    parser.add_class_arguments(ATTACKS[name])
    try:
        return build(**vars(parser.parse_object(settings)))
    except ConfigError as error:
        raise ConfigError(f"the attack '{label}' cannot be used: {error}") from error


def _warn_of_cut_answers(stream: BenchmarkStream) -> None:
    if reason := explain_cut_answers(stream):
        print_warning(f"of the forget set, {reason}: less leaks than would. Raise `max_length` or `max_new_tokens`.")


def _print_outcome(label: str, outcome: Outcome) -> None:
    ending = "" if outcome.not_tested is None else f", not tested: {outcome.not_tested}"
    print(f"  {label}: {outcome.seconds:.1f} s{ending}", flush=True)
