"""Turns jsonargparse's nested error messages into the line that says what is wrong."""

from __future__ import annotations

import difflib
import re

import lit_unlearn

_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>|- Expected a path but"
    r"|Problem with given class_path 'lit_unlearn(\.\w+)*\.Lit\w+'"
)
_KEY = re.compile(r'Parser key "(.+)":\s*(.*)')
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")


def is_nested(message: str) -> bool:
    """Whether this is jsonargparse's report of a value that fits none of the types allowed."""
    return "Does not validate against any of the Union subtypes" in message


def shorten(message: str) -> str:
    """The place in the configuration and what is wrong there.

    Args:
        message: As jsonargparse gives it, with one level of indentation per level of nesting.
    """
    keys: list[str] = []
    reasons: list[str] = []
    for line in message.splitlines():
        key = _KEY.search(line)
        if key:
            keys.append(key[1])
        text = (key[2] if key else line).strip()
        if text and not _NOISE.search(text):
            reasons.append(_NO_CLASS.sub(_unknown_class, text.removeprefix("- ")))
    reason = "\n  ".join(dict.fromkeys(reasons)) or message
    return f"{'.'.join(dict.fromkeys(keys))}: {reason}" if keys else reason


def _unknown_class(match: re.Match[str]) -> str:
    near = difflib.get_close_matches(match[1], lit_unlearn.__all__, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "give the name of a class of this package, or a full import path."
    return f"there is no class '{match[1]}': {hint}"
