"""Run ``lit-unlearn evaluate``: the short form of ``test --config eval/tofu.yaml …``, which builds the same objects."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Literal

from lit_unlearn.cli.main import find_configs
from lit_unlearn.cli.parser import CommandParser

_SUITES = {
    "tofu": ["--config=eval/tofu.yaml"],
    "muse": ["--config=eval/muse.yaml"],
    "lume": ["--config=eval/lume.yaml"],
    "lm_eval": ["--config=eval/lm_eval.yaml"],
    "stress": ["--config=eval/stress.yaml"],
    # Of your own files; paraphrased questions would need a column of their own.
    "stress_qa": [
        *("--model=LitEvaluate", "--model.benchmark=StressBenchmark", "--model.benchmark.paraphrased=false"),
        *("--model.benchmark.benchmark=QABenchmark", "--trainer.devices=1", "--logs.name=stress"),
    ],
    "leak": ["--config=eval/leak.yaml"],
    "leak_qa": [
        *("--model=LitEvaluate", "--model.benchmark=LeakBenchmark", "--model.benchmark.sampling.samples=64"),
        *("--model.benchmark.benchmark=QABenchmark", "--trainer.devices=1", "--logs.name=leak"),
    ],
    "qa": ["--model=LitEvaluate", "--model.benchmark=QABenchmark", "--trainer.devices=1", "--logs.name=eval"],
}
_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}
_BENCHMARK_OPTIONS = ("source", "forget_split", "corpus", "retain_results")
# Of suites that have a benchmark within: their own options. All others are those of that benchmark.
_OUTER_OPTIONS = {
    "stress": ("relearn", "bits", "backend", "paraphrased"),
    "leak": ("sampling", "attempts", "confidence", "texts"),
}
_SECTIONS = ("ckpt_path", "logs", "model", "seed_everything", "trainer")  # of the configuration
# Suites that put questions in a prompt of the user's. The others have that of their publication.
_ASKS = ("qa", "tofu", "stress", "leak")
_COLUMNS = ("question_column", "answer_column", "messages_column", "text_column", "context_column", "format")
_OF_PROMPT = {"template", "chat"}  # which exclude each other


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn evaluate",
        description="Runs a benchmark on a model and writes a results file.",
        epilog="Any other option is one of the benchmark, such as --max_new_tokens=100, or of the whole configuration, such as "
        "--trainer.accelerator=cpu.",
    )
    parser.add_argument("model", type=str, metavar="MODEL", help="A model directory, or a name on the hub.")
    parser.add_argument(
        "--suite",
        type=Literal["tofu", "muse", "lume", "qa", "stress", "leak", "lm_eval"],
        required=True,
        help="The benchmark.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Results file to write.")
    parser.add_argument("--source", type=str, metavar="DIR", help="Folder, or hub name, of the benchmark's files.")
    parser.add_argument("--forget_split", type=str, help="TOFU's split, such as forget10.")
    parser.add_argument("--corpus", type=str, help="MUSE's corpus, News or Books.")
    parser.add_argument(
        "--forget", type=str, metavar="FILE", help="Questions of the forget set, for qa, stress and leak."
    )
    parser.add_argument("--retain", type=str, metavar="FILE", help="Questions of the retain set, likewise.")
    parser.add_argument("--retain_results", type=str, metavar="FILE", help="Results of the retain-only model.")
    parser.add_argument("--max_rows", type=int, help="Only this many rows of every set.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], help="Of the weights; by default as configured."
    )
    return parser


def run(arguments: list[str]) -> None:
    """Evaluate a model."""
    parser = build_parser()
    # jsonargparse has no parse_known_args: what belongs to the benchmark is taken out first, and refused by it if wrong.
    own_arguments: list[str] = []
    passed_on: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or name in parser._option_string_actions:
            own_arguments.append(argument)
        else:
            # As with any option, the value may be a word of its own.
            passed_on.append(argument if equals else f"{name}={next(remaining, '')}")
    options = parser.parse_args(own_arguments)
    gives_forget, gives_retain = (_gives_set(options, passed_on, name) for name in ("forget", "retain"))
    if options.suite == "qa" and not (gives_forget and gives_retain):
        parser.error("--suite qa needs --forget FILE and --retain FILE")
    if gives_forget != gives_retain:
        parser.error("--forget FILE and --retain FILE belong together")

    # Imported only now: a wrong option is refused at once.
    from lit_unlearn.cli.trainer import run as run_trainer

    run_trainer(find_configs(["test", *build_test_arguments(options, passed_on)]))


def build_test_arguments(options: Namespace, passed_on: list[str]) -> list[str]:
    """Return the ``test`` command's arguments for parsed options and, ``passed_on``, ``--key=value`` for other objects."""
    outer_options = _OUTER_OPTIONS.get(options.suite, ())
    asks_own_files = options.suite == "qa" or bool(outer_options and _gives_set(options, passed_on, "forget"))
    suite = f"{options.suite}_qa" if outer_options and asks_own_files else options.suite
    arguments = [*_SUITES[suite], f"--model.lm.model={options.model}", f"--model.results={options.output}"]
    prefix = "--model.benchmark.benchmark" if outer_options else "--model.benchmark"
    for name in _BENCHMARK_OPTIONS:
        if (value := getattr(options, name)) is not None:
            arguments.append(f"{prefix}.{name}={value}")
    if asks_own_files:
        # Its rows are limited for each file, those of the published benchmarks for all sets together.
        for name in ("forget", "retain"):
            path = getattr(options, name)
            if path is None:
                # It is given key by key, to which this one belongs.
                limit = [] if options.max_rows is None else [f"--{name}.max_rows={options.max_rows}"]
                passed_on = [*passed_on, *limit]
            else:
                source = path if options.max_rows is None else json.dumps({"path": path, "max_rows": options.max_rows})
                arguments.append(f"{prefix}.{name}={source}")
    elif options.max_rows is not None:
        arguments.append(f"{prefix}.max_rows={options.max_rows}")
    if options.dtype is not None:
        arguments.append(f"--trainer.precision={_PRECISIONS[options.dtype]}")

    if options.suite in _ASKS:
        given = {argument.removeprefix("--").partition("=")[0].partition(".")[0] for argument in passed_on}
        arguments += [f"{prefix}.{setting}" for setting in _recorded_settings(options.model, given, asks_own_files)]
    for argument in passed_on:
        key = argument.removeprefix("--")
        head = key.partition("=")[0].partition(".")[0]
        if head in _SECTIONS:
            arguments.append(argument)
        elif head in outer_options:
            arguments.append(f"--model.benchmark.{key}")
        else:
            arguments.append(f"{prefix}.{key}")
    return arguments


def _recorded_settings(model: str, given: Collection[str], asks_own_files: bool) -> Iterator[str]:
    """Yield ``key=value`` for the prompt of the run that a model was exported from: in another one, it hardly knows the rows.

    Args:
        model: Directory; a model without a record has none.
        given: Keys that the user has set.
        asks_own_files: Whether the files are the user's, whose columns the record knows.
    """
    from lit_unlearn.export.audit_files import read_question_settings, read_record

    for name, value in read_question_settings(read_record(model)).items():
        is_replaced = name in given or (name in _OF_PROMPT and _OF_PROMPT & set(given))
        is_of_files = name in _COLUMNS or name == "max_length"
        if is_replaced or (is_of_files and not asks_own_files):
            continue
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        yield f"{name}={plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)}"


def _gives_set(options: Namespace, passed_on: Sequence[str], name: str) -> bool:
    """Return whether the file of a set is given, as an option or, beside a rule for its rows, as the path of a source."""
    has_source = any(argument.startswith(f"--{name}.path=") for argument in passed_on)
    return has_source or getattr(options, name) is not None
