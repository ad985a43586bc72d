"""Markdown pages with blocks that a program writes, between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_unlearn.utils.io import atomic_file


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_block(text: str, name: str, content: str) -> str:
    """Return the text with a block's content replaced.

    Raises:
        ValueError: If the text does not have exactly one block of that name.
    """
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    # A function, not a template: `sub` would read a backslash in the content as an escape.
    text, count = pattern.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"the page has {count} blocks '<!-- begin {name} -->', expected one.")
    return text


def fill_page(page: Path, contents: Mapping[str, str]) -> None:
    """Replace the content of a page's blocks; the text around them stays."""
    text = page.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = replace_block(text, name, content)
    with atomic_file(page) as file:
        file.write_text(text, encoding="utf-8")
