"""Run ``lit-unlearn judge``: an LLM grades the answers that an evaluation generated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import ConfigError, DataError, MissingFileError, reading
from lit_unlearn.evaluation.endpoint import Endpoint, RequestFailed
from lit_unlearn.evaluation.judge import judge_results, judge_table
from lit_unlearn.evaluation.judge_client import KEY_VARIABLE, ReplyCache, request_replies
from lit_unlearn.utils.io import read_json, write_json

_URL_VARIABLE, _MODEL_VARIABLE = "LIT_UNLEARN_JUDGE_URL", "LIT_UNLEARN_JUDGE_MODEL"


def build_parser() -> CommandParser:
    """Return the command's parser."""
    # The key is no option: it would show in the list of processes.
    parser = CommandParser(
        prog="lit-unlearn judge",
        description="Lets an LLM grade the generated answers in a results file, adds the grades to it and prints their means. "
        f"The endpoint's key, where it needs one, is read from {KEY_VARIABLE}.",
    )
    parser.add_argument("results", type=Path, help="JSON file with examples that have generated answers.")
    parser.add_argument("--streams", type=str, nargs="+", help="Streams to judge; all by default.")
    parser.add_argument("--url", type=str, help=f"What precedes /chat/completions, such as …/v1; or {_URL_VARIABLE}.")
    parser.add_argument("--model", type=str, help=f"The endpoint's name of the judge; or {_MODEL_VARIABLE}.")
    parser.add_argument("--workers", type=PositiveInt, default=8, help="Requests at a time.")
    parser.add_argument("--limit", type=PositiveInt, help="Judge only this many rows of each stream.")
    parser.add_argument("--cache", type=Path, help="Folder of replies; $LIT_UNLEARN_CACHE/judge by default.")
    return parser


def run(arguments: list[str]) -> None:
    """Grade a results file."""
    options = build_parser().parse_args(arguments)
    results = _read_results(options.results)
    url = _require_setting("url", options.url, _URL_VARIABLE)
    model = _require_setting("model", options.model, _MODEL_VARIABLE)
    endpoint = Endpoint(url, model, os.environ.get(KEY_VARIABLE, "").strip(), "judge", KEY_VARIABLE)
    cache = ReplyCache(model, options.cache)

    def ask_judge(prompts: Sequence[str]) -> Mapping[str, str | RequestFailed]:
        return request_replies(prompts, endpoint, cache, options.workers)

    judge_results(results, ask_judge, model, options.streams, options.limit)
    write_json(options.results, results)
    print(judge_table(results))


def _read_results(file: Path) -> dict[str, Any]:
    # Not `Results.read`: files of other tools can be judged, too, if they have examples with generated answers.
    if not file.is_file():
        raise MissingFileError(f"there is no results file '{file}'.")
    with reading("the results file", file, "Give a JSON file that `lit-unlearn evaluate` wrote.", DataError):
        results = read_json(file)
    if not isinstance(results, dict) or not isinstance(results.get("examples"), dict):
        raise DataError(f"'{file}' is no results file: it has no 'examples' by stream.")
    return results


def _require_setting(option: str, value: str | None, variable: str) -> str:
    setting = value or os.environ.get(variable)
    if not setting:
        raise ConfigError(f"the judge's {option} is missing: give --{option} or set {variable}.")
    return setting
