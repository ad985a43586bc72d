"""Keep the vocabulary of docs/glossary.md: documentation, docstrings, messages and comments avoid these words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ROOT

# What to avoid, as a regular expression, and what to write.
REPLACEMENTS = {
    r"of no account": "not meaningful",
    r"mend(s|ed|ing)?": "fix, correct",
    r"lest": "so that … not",
    r"(is|are|was) through": "has finished",
    r"(take|takes|taking|took) (\w+ ){0,2}away": "export, remove",
    r"so many": "this many",
    r"(it|that|they) (may|might) cost": "the allowed increase",
    r"taught|teach(es|ing)?": "fine-tune, fine-tuned",
    r"bound (is |was )?broken|broken bound": "violated",
    r"nobody": "no one, or say who",
    r"be it": "whether",
    r"goes? on from": "resumes from",
}
# A status in capitals: "is violated" is what to write, and "broken" may be a pipe.
CASE_SENSITIVE = {r"(IS )?BROKEN|IS VIOLATED": "violated"}

# By file, occurrences that stay.
ALLOWED = {
    "benchmarks/quality/protocol.py": {"TEACH"},  # a key of the digest that stored results carry
    "lit_unlearn/data/fictional_authors.py": {"Mended"},  # part of a fictional author's title
    "lit_unlearn/export/card.py": {"taught"},  # a value in records of earlier versions, which are still read
}

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
PYTHON = sorted(path for folder in ("lit_unlearn", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
YAML = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob(".github/**/*.yml")])


def get_relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def find_words(text: str) -> list[str]:
    """Return the words of a text that are to be avoided, each with what to write."""
    patterns = [(pattern, advice, re.IGNORECASE) for pattern, advice in REPLACEMENTS.items()]
    patterns += [(pattern, advice, 0) for pattern, advice in CASE_SENSITIVE.items()]

    # A phrase may run over the end of a line.
    text = re.sub(r"\s+(# ?)?", " ", text)
    words = []
    for pattern, advice, flags in patterns:
        for match in re.finditer(rf"\b(?:{pattern})\b", text, flags):
            words.append(f"{match[0]!r}: write {advice!r}")
    return words


def read_page(path: Path) -> str:
    """Return a Markdown page without inline code: that quotes what a program says or said."""
    return re.sub(r"`[^`\n]+`", "", path.read_text(encoding="utf-8"))


def read_python(path: Path) -> Iterator[str]:
    """Yield docstrings, other strings and comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    yield "\n".join(comments)


def check(path: Path, texts: Iterator[str]) -> None:
    allowed = ALLOWED.get(get_relative_name(path), set())
    words = [word for text in texts for word in find_words(text)]
    words = [word for word in words if word.split("'")[1] not in allowed]
    assert not words, f"{get_relative_name(path)} uses {', '.join(words)}; see docs/glossary.md"


@pytest.mark.parametrize("path", PAGES, ids=get_relative_name)
def test_pages(path: Path) -> None:
    check(path, iter([read_page(path)]))


@pytest.mark.parametrize("path", PYTHON, ids=get_relative_name)
def test_docstrings_messages_and_comments(path: Path) -> None:
    check(path, read_python(path))


@pytest.mark.parametrize("path", YAML, ids=get_relative_name)
def test_configurations(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    # Issue templates are prose as a whole; of a configuration, the comments are.
    check(path, iter([text if ".github" in path.parts else "\n".join(re.findall(r"(?:^|\s)#.*", text))]))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("It mends that.", "mends"),
        ("The run is\n    # through.", "is through"),
        ("nll 0.021 of 0.0113 BROKEN", "BROKEN"),
        ("The model was taught the rows.", "taught"),
        ("How to take it away", "take it away"),
    ],
)
def test_words_are_found(text: str, word: str) -> None:
    (message,) = find_words(text)
    assert word in message


@pytest.mark.parametrize("text", ["a broken pipe", "the latest recommendation", "a violated constraint"])
def test_other_words_pass(text: str) -> None:
    assert find_words(text) == []
