"""``lit-unlearn export``: a Hugging Face directory with its record, of any checkpoint of this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_unlearn.export.checkpoint import _export, _renew
from lit_unlearn.export.hub import obstacle, upload
from lit_unlearn.export.record import RECORD, benchmark
from lit_unlearn.utils.io import check_export_target


def run(arguments: list[str]) -> None:
    """Exports one checkpoint, or renews the record of an export.

    Args:
        arguments: After the command's name.

    Raises:
        FileNotFoundError: If there is no such checkpoint or results file.
        FileExistsError: If the target holds something that is not a model directory.
        ValueError: If it is no checkpoint of this package, or its base model is missing or another one.
        RuntimeError: If the upload fails.
    """
    parser = argparse.ArgumentParser(
        prog="lit-unlearn export",
        description="Makes a Hugging Face model directory, with its record of the deletion, of a checkpoint. The checkpoint's "
        "model is that of its last step; the directory that a fit exports by itself holds the best one.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="checkpoint; or an export, to add --results to it"
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to; an earlier export there is replaced")
    parser.add_argument(
        "--results", nargs="+", type=Path, default=[], help="files of `lit-unlearn test`, for the record"
    )
    parser.add_argument("--model", help="the base model, where it is not (or not any more) what the checkpoint says")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload to this repository of the hub, made private")
    options = parser.parse_args(arguments)
    check_export_target(options.directory)
    if options.push_to_hub and (reason := obstacle(options.push_to_hub)):
        raise ValueError(reason)
    benchmarks = [benchmark(file) for file in options.results]
    if (options.checkpoint / RECORD).is_file():
        _renew(options.checkpoint, options.directory, benchmarks)
    else:
        _export(options.checkpoint, options.directory, options.model, benchmarks)
    print(f"model: {options.directory}")
    if options.push_to_hub:
        print(f"uploaded: {upload(options.directory, options.push_to_hub)}")
