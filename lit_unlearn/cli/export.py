"""Run ``lit-unlearn export``: a Hugging Face directory with its record, from any checkpoint of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_unlearn.cli.parser import CommandParser
from lit_unlearn.errors import ConfigError
from lit_unlearn.export.checkpoint import export_checkpoint, renew_record
from lit_unlearn.export.hub import find_upload_problem, upload_export
from lit_unlearn.export.record import RECORD_FILE, summarize_results
from lit_unlearn.utils.folders import check_export_target


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="lit-unlearn export",
        description="Makes a Hugging Face model directory, with its record of the deletion, from a checkpoint. A checkpoint's "
        "model is that of its last step; the directory that a fit exports by itself holds the best one.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="A checkpoint; or an export, to add --results to it."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="Where to; an earlier export there is replaced.")
    parser.add_argument("--results", nargs="+", type=Path, default=[], help="Results files, for the record.")
    parser.add_argument("--model", type=str, help="The base model, where it is no longer what the checkpoint says.")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"],
        help="Of the weights; by default that of the run's own export.",
    )
    parser.add_argument("--push_to_hub", type=str, metavar="REPO", help="Private repository of the hub to upload to.")
    return parser


def run(arguments: list[str]) -> None:
    """Export one checkpoint, or renew the record of an export."""
    options = build_parser().parse_args(arguments)
    # Everything that can be refused is refused before the model is loaded.
    check_export_target(options.directory)
    if options.push_to_hub:
        problem = find_upload_problem(options.push_to_hub)
        if problem is not None:
            raise ConfigError(problem, argument="push_to_hub")

    benchmarks = list(map(summarize_results, options.results))
    if (options.checkpoint / RECORD_FILE).is_file():
        for argument in ("model", "dtype"):
            if getattr(options, argument) is not None:
                raise ConfigError(
                    f"'{options.checkpoint}' is an export, whose weights are copied as they are: give its checkpoint, or leave "
                    f"out `{argument}`.",
                    argument=argument,
                )
        renew_record(options.checkpoint, options.directory, benchmarks)
    else:
        record = export_checkpoint(options.checkpoint, options.directory, options.model, benchmarks, options.dtype)
        if record["step"] != record["kept_step"]:
            print(f"this is the model of step {record['step']}; the run keeps that of step {record['kept_step']}")
    print(f"model: {options.directory}")
    if options.push_to_hub:
        print(f"uploaded: {upload_export(options.directory, options.push_to_hub)}")
