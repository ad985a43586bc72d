"""Pages with blocks that are written by a program, between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_unlearn.utils.io import atomic_file


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, name: str, content: str) -> str:
    """The text with a block's content replaced.

    Raises:
        ValueError: If it has not exactly one block of that name.
    """
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    text, count = pattern.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"the page has {count} blocks '<!-- begin {name} -->', expected one.")
    return text


def fill(page: Path, contents: Mapping[str, str]) -> None:
    """Writes blocks of a page anew; what is around them stays."""
    text = page.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = filled(text, name, content)
    with atomic_file(page) as file:
        file.write_text(text, encoding="utf-8")
