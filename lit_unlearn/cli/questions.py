"""Options of commands that ask questions of models: the sets of rows, and how their questions are put."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.data.fictional_authors import FictionalAuthors
from lit_unlearn.data.source import Rows, Source, to_source
from lit_unlearn.data.templates import Chat, check_chat, check_template
from lit_unlearn.errors import ConfigError

if TYPE_CHECKING:
    from lit_unlearn.evaluation.qa import QABenchmark
    from lit_unlearn.evaluation.results import Values
    from lit_unlearn.models import LanguageModel

SETS = {
    "forget": "Rows that were to be deleted",
    "retain": "Rows that were to be kept",
    "holdout": "Rows like the forget rows that the model has never seen",
    "general": "Rows that have nothing to do with the deletion",
    "canaries": "Random sequences that were planted among the forget rows",
    "canary_references": "Sequences like them that were not planted",
}
SETS_HELP = (
    "Questions are put as the record in MODEL says, unless options say otherwise. Of a model that was trained on the embedded authors, "
    "the sets need not be given. Rules choose rows of a file as for `fit`: --forget.path=FILE --forget.where='{customer: c-17}'."
)
_EMBEDDED = FictionalAuthors.__name__

RoleT = TypeVar("RoleT", bound=str)


def add_set_options(parser: CommandParser, names: Iterable[str] = SETS, *, takes_rules: bool = True) -> None:
    """Add an option for each of these sets: a file and, unless only files are taken, rules that choose rows of it."""
    for name in names:
        help_text = f"{SETS[name]}: a file, or a data set on the hub."
        parser.add_argument(f"--{name}", type=Rows if takes_rules else str, metavar="FILE", help=help_text)


def add_question_options(parser: CommandParser) -> None:
    """Add the options of columns, prompt and lengths, and of the model's arithmetic."""
    parser.add_argument("--question_column", type=str, help="Column with the question.")
    parser.add_argument("--answer_column", type=str, help="Column with the answer.")
    parser.add_argument("--template", type=str, help="Text with {question} and {answer}.")
    parser.add_argument("--chat", type=Chat | None, help="Settings of the chat template, as the data has them.")
    parser.add_argument("--max_length", type=int, help="Tokens of an example.")
    parser.add_argument("--token_budget", type=int, default=8192, help="Largest batch, in tokens.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], help="Of the weights; by default as a run has them."
    )


def read_settings(parser: CommandParser, options: Namespace) -> dict[str, Any]:
    """Return the settings of the questions that are given as options."""
    settings = {}
    for name in ("question_column", "answer_column", "template", "max_length"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    chat = parser.instantiate(options).chat
    check_chat(chat, check_template(options.template))
    if chat is not None:
        settings["chat"] = chat
    return settings


def find_sets(options: Namespace, record: dict[str, Any] | None) -> dict[str, Source]:
    """Return the sources of the sets: those that are given, or the embedded authors that the record names.

    Args:
        options: Instantiated.
        record: Of the model.

    Raises:
        ConfigError: If the forget or the retain set is not known.
    """
    values = {name: getattr(options, name, None) for name in SETS}
    given = {name: to_source(rows, name) for name, rows in values.items() if rows is not None}
    if not given and ((record or {}).get("data") or {}).get("class") == _EMBEDDED:
        config = (record or {}).get("config") or {}
        arguments = (config.get("data") or {}).get("init_args") or {}
        names = ("num_authors", "forget_authors", "authors_seed", "canaries")
        counts = {name: arguments[name] for name in names if name in arguments}
        # As many unseen authors as were forgotten: the two sets are compared.
        unseen = counts.get("forget_authors", 1)
        data = FictionalAuthors(**counts, unseen_authors=unseen)
        sets = {"forget": data.sources["forget"], "retain": data.sources["retain"], "holdout": data.sources["unseen"]}
        return {**sets, **data.canary_sources}
    for name in ("forget", "retain"):
        if name not in given:
            raise ConfigError(
                f"this command needs --forget FILE and --retain FILE: --{name} is missing.", argument=name
            )
    return given


def prepare_benchmarks(
    models: Mapping[RoleT, LanguageModel], make_benchmark: Callable[[], QABenchmark]
) -> dict[RoleT, QABenchmark]:
    """Return a benchmark for each model, which has read the rows with its tokenizer; none of the models need be loaded.

    Args:
        models: The measured one, and those that it is compared with, by option.
        make_benchmark: Makes a benchmark that has read no rows.

    Raises:
        ConfigError: If a model is the measured one itself, or reads the rows as other tokens: row by row, values of other tokens
            would be compared, as of another prompt, in which a model hardly knows the rows.
    """
    (_, measured), *_ = models.items()
    benchmarks: dict[RoleT, QABenchmark] = {}
    # Of the measured model.
    weights: str | None = None
    data: dict[str, Values] = {}
    for option, lm in models.items():
        sample = None if lm.files is None else lm.files.sample()
        if sample is not None and sample == weights:
            message = f"'{lm.name}' has the same weights as '{measured.name}', which show nothing beside each other: give another one."
            raise ConfigError(message, argument=option)
        weights = weights or sample
        benchmarks[option] = make_benchmark()
        described = benchmarks[option].describe_data(lm.tokenizer)
        data = data or described
        different = [name for name, values in data.items() if values["tokens"] != described[name]["tokens"]]
        if different:
            raise ConfigError(
                f"'{lm.name}' reads the {', '.join(different)} rows as other tokens than '{measured.name}': its tokenizer or its chat "
                "template is another one, and the values cannot be compared. With the same tokenizer, give the prompt of all models: "
                "--chat.template=FILE or --template=TEXT.",
                argument=option,
            )
    return benchmarks
