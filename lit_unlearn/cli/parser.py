"""The parser of all commands, and jsonargparse's refusals as a person reads them.

Every command is parsed by jsonargparse: `fit`, `validate` and `test` must be (LightningCLI), and with one parser all commands
refuse a mistake in the same way and complete in the same way.

jsonargparse says only in prose why it refuses something. These patterns read that prose, because its exceptions carry nothing
else; pyproject.toml bounds its version for their sake:

* ``_KEY``, ``_VALUE``: where the refused value stands, and what it is. One line per level of nesting.
* ``_OWNER``, ``_CALLABLE_OWNER``: the class whose argument it is.
* ``_TYPE``, ``_CHOICES``, ``_SUBCLASS``: what was expected there; a union has several.
* ``_NO_CLASS``: a class name that was not found.
* ``_UNKNOWN``: a setting that does not exist, to which `ReadableErrors` adds the nearest name that does.
* ``_NOISE``: lines that repeat the above.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

import lit_unlearn
from lit_unlearn.errors import ConfigError, LitUnlearnError
from lit_unlearn.utils.io import expand_home, expand_path

_LIBRARIES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies", "torch.optim")
_MAX_LISTED = 20  # names in a message

_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*')
_VALUE = re.compile(r"(?:^Given value: |\. Got value: )(.*?)(?:\. Got value: .*)?$")
_OWNER = re.compile(r"Problem with given class_path '(?:.*\.)?(\w+)':")
_CALLABLE_OWNER = re.compile(r".*expects a function or a callable class: ")
_CLASS_PATH = re.compile(r"class_path='(?:.*?\.)?(\w+)'")
_TYPE = re.compile(r"Expected a <class '(?:.*\.)?(\w+)'>")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.+)\]")
_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN = re.compile(
    r"(?:Subcommand '\w+' does not accept option|Group '\w+' does not accept option|Option) '([^']+)'(?: is not accepted)?"
)
_NOISE = re.compile(
    r"(Does not validate against|Subtypes:|Errors:|Given value type:|Expected a path but|Subclass types expect one of"
    r"|a class path \(str\)|a dict with|Not of type Path: .* not (NestedArg|dict)$|$)"
)
_NO_SETTING = "no setting"
_CONTAINERS = {"Mapping": "{key: value}", "dict": "{key: value}", "Sequence": "a list", "list": "a list"}


class ReadableErrors:
    """Makes jsonargparse's parsers raise a `ConfigError` of a line or two, instead of printing every option."""

    _actions: list[argparse.Action]
    exit_on_error: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviations work on the command line but not in a file: `--trainer.max_step` would be `max_steps` in one of the two.
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, with the user's home folder in place of every leading ``~``: shells leave it in ``--key=~/file``."""
        if args and args[0] is not None and not self.exit_on_error:
            args = ([_restore_nulls(argument) for argument in args[0]], *args[1:])
        return _expand_homes(super().parse_args(*args, **kwargs))  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ConfigError that says what is wrong, and where, from what jsonargparse says and what it caught."""
        names = [name for name in _iterate_names(self._actions) if not name.endswith("help")]
        if not self.exit_on_error:
            # The parser of a nested value. Its caller adds where that stands, but only this one knows the names.
            super().error(_suggest_names(message, names), ex)  # type: ignore[misc]
        raise_typed_cause(ex)
        raise ConfigError(explain(_suggest_names(message, names, prefix="--"))) from ex


class CommandParser(ReadableErrors, ArgumentParser):
    """Parses the options of one command."""


def _restore_nulls(argument: str) -> str:
    """Return an argument with the nulls that it had: jsonargparse formats values of nested classes again, as Python writes them."""
    name, _, text = argument.partition("=")
    if text == "None":
        return f"{name}=null"
    if "None" in text and text.startswith(("{", "[")):
        # A text of the user's that only looks like it is no Python, or has no None outside of quotes.
        with suppress(ValueError, SyntaxError):
            return f"{name}={json.dumps(ast.literal_eval(text))}"
    return argument


def _expand_homes(value: Any) -> Any:
    """Replace the ``~`` of every text and path in a parsed configuration, in place where it is a mapping."""
    if isinstance(value, str):
        return expand_home(value)
    if isinstance(value, Path):
        return expand_path(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_expand_homes, value))
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _expand_homes(item)
    elif isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _expand_homes(item))
    return value


def raise_typed_cause(error: BaseException | None) -> None:
    """Raise the error of ours that jsonargparse has wrapped in one of its own, if there is one.

    It tries every type of a union, and puts what they raise into one text.
    """
    while error is not None:
        if isinstance(error, LitUnlearnError):
            raise error
        error = error.__cause__


def explain(message: str) -> str:
    """Return, from jsonargparse's message, the place in the configuration, what was expected there and what arrived."""
    refusal = _Refusal()
    for line in message.splitlines():
        refusal.read_line(line.strip().removeprefix("- "))
    # The parsers of nested values repeat the key of the value around them.
    key = ".".join(dict.fromkeys(refusal.keys))
    reason = refusal.describe_reason() or message
    return f"{key}: {reason}" if key else reason


class _Refusal:
    """Collects what the lines of a message say.

    The innermost value and the last class are those that the reason is about.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.types: list[str] = []
        self.choices: list[str] = []
        self.reasons: list[str] = []
        self.owner = self.unknown_class = self.value = ""

    def read_line(self, line: str) -> None:
        text = self._read_key(self._read_value(line))
        if match := _OWNER.match(text):
            self.owner = match[1]
        elif match := _TYPE.match(text):
            # That null is possible, too, would hide the answer.
            if match[1] != "NoneType":
                self.types.append(_CONTAINERS.get(match[1], match[1]))
        elif match := _CHOICES.match(text):
            self.choices += re.findall(r"[^\s',]+", match[1])
        elif match := _NO_CLASS.match(text):
            self.unknown_class = match[1]
        elif match := _SUBCLASS.match(text):
            self.types.append(f"the name of a class, or {{class_path: …, init_args: …}}, that is an {match[1]}")
        elif not _NOISE.match(text):
            self.reasons.append(text)

    def _read_value(self, line: str) -> str:
        match = _VALUE.search(line)
        value = match[1] if match else ""
        text = line[: match.start()] if match else line
        # Those are jsonargparse's containers, not what the user wrote.
        if not value.startswith(("Namespace(", "NestedArg(")):
            self.value = self.value or value
        if callable_owner := _CALLABLE_OWNER.match(text):
            class_path = _CLASS_PATH.search(value)
            self.owner = class_path[1] if class_path else ""
            text = text[callable_owner.end() :]
        return text

    def _read_key(self, text: str) -> str:
        match = _KEY.search(text)
        if match is None:
            return text
        self.keys.append(match[1])
        return text[match.end() :]

    def describe_reason(self) -> str:
        if self.reasons:
            return self._missing_arguments() or self._joined_reasons()
        # A word in lower case where a number is possible is a wrong number, not the name of a class.
        if self.unknown_class and (self.unknown_class[0].isupper() or not self.types):
            return self._unknown_class_reason()
        if self.choices:
            expected = f"one of {', '.join(self.choices)}"
        elif self.types:
            expected = " or ".join(dict.fromkeys(self.types))
        else:
            return ""
        value = self.value if len(self.value) <= 80 else f"{self.value[:80]}…"
        hint = _suggest_near(self.value, self.choices)
        # All choices are listed already.
        return f"expected {expected}, not '{value}'{hint if hint.startswith(':') else ''}"

    def _joined_reasons(self) -> str:
        no_setting = f"{self.owner} has no setting" if self.owner else "there is no setting"
        return "; ".join(dict.fromkeys(self.reasons)).replace(_NO_SETTING, no_setting)

    def _missing_arguments(self) -> str:
        names = self.reasons[0].partition("arguments are required: ")[2]
        if not names:
            return ""
        # A module has many required arguments, so its options were not meant to be given one by one.
        if self.owner.startswith("Lit"):
            names += "; start from a complete configuration, such as --config demo/unlearn.yaml or --config tofu.yaml"
        return f"{self.owner} needs {names}".strip()

    def _unknown_class_reason(self) -> str:
        names = [*lit_unlearn.__all__]
        for library in _LIBRARIES:
            names += getattr(sys.modules.get(library), "__all__", ())
        if self.unknown_class in names:
            return f"the class '{self.unknown_class}' is of another kind than what is expected here"
        hint = _suggest_near(self.unknown_class, names)
        return (
            f"there is no class '{self.unknown_class}'"
            f"{hint or '; give the name of a class of this package, or a full import path'}"
        )


def _suggest_names(message: str, names: Sequence[str], prefix: str = "") -> str:
    # argparse's own message, for what it does not know at all.
    if message.startswith("unrecognized arguments: "):
        name = message.split()[2].partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument '{name}': options are written --name=value"
        name = name.lstrip("-")
        return f"{_NO_SETTING} '{prefix}{name}'{_suggest_near(name, names, prefix)}"
    if match := _UNKNOWN.search(message):
        return message.replace(match[0], f"{_NO_SETTING} '{match[1]}'{_suggest_near(match[1], names)}")
    return message


def _iterate_names(actions: Iterable[argparse.Action]) -> Iterator[str]:
    for action in actions:
        if isinstance(action.choices, dict):  # subcommands
            for parser in action.choices.values():
                yield from _iterate_names(parser._actions)
        elif action.dest != argparse.SUPPRESS:
            yield action.dest


def _suggest_near(name: str, names: Sequence[str], prefix: str = "") -> str:
    head, dot, rest = name.partition(".")
    heads = list(dict.fromkeys(candidate.partition(".")[0] for candidate in names))
    if dot and rest and head not in heads and "/" not in name:
        # `modle.lm`: only the head can be compared, because what follows may belong to a class.
        near = [f"{match}.{rest}" for match in difflib.get_close_matches(head, heads, n=1)]
    else:
        # Without regard to case: `Adamw` is closer to `Adam` than to `AdamW`, but was meant as the latter.
        by_lower = {candidate.lower(): candidate for candidate in names}
        near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=1)]
    if near:
        return f": did you mean '{prefix}{near[0]}'?"
    return f"; it has {', '.join(heads)}" if 0 < len(heads) <= _MAX_LISTED else ""
