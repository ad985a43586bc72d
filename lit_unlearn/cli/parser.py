"""The parser of commands that have options of their own."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from lit_unlearn.cli.errors import ReadableErrors


class CommandParser(ReadableErrors, ArgumentParser):
    """Says what is wrong in a line or two."""
