"""Errors as a person reads them: what is wrong, what arrived, and the nearest name that would be right."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import lit_unlearn
from lit_unlearn.cli import _is_ours

_PACKAGE = Path(lit_unlearn.__file__).parent
_CLASSES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies", "torch.optim")

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_OWNER = re.compile(r"Problem with given class_path '(?:.*\.)?(\w+)':")
_TYPE = re.compile(r"Expected a <class '(?:.*\.)?(\w+)'>")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.+)\]")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)")
_UNKNOWN = re.compile(
    r"(?:Subcommand '\w+' does not accept option|Group '\w+' does not accept option|Option) '([^']+)'(?: is not accepted)?"
)
_CLASS_PATH = re.compile(r"class_path='(?:.*?\.)?(\w+)'")
_CALLABLE = "expects a function or a callable class: "
_NO_SETTING = "no setting"
_FEW = 20  # names that a message may list
_NOISE = re.compile(
    r"(Does not validate against|Subtypes:|Errors:|Given value type:|Expected a path but|Subclass types expect one of"
    r"|a class path \(str\)|a dict with|$)"
)


class ReadableErrors:
    """For jsonargparse's parsers: errors in a line or two, without the list of all options."""

    _actions: list[argparse.Action]
    exit_on_error: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False  # `--trainer.max_step` was `max_steps`, but not in a file
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the command. A nested value's parser raises, as it should, but is the one that knows its names."""
        known = [name for name in _names(self._actions) if not name.endswith("help")]
        if not self.exit_on_error:
            super().error(_with_names(message, known), ex)  # type: ignore[misc]
        fail(explain(_with_names(message, known, "--")), 2)


def fail(message: str, code: int) -> NoReturn:
    """Ends the process: 1 where a run failed, 2 where nothing was started because of what the user wrote."""
    text = f"lit-unlearn: error: {message}"
    print(text, file=sys.stderr)
    end = SystemExit(text)  # for those who call `main` in Python, the text; for the shell, the number
    end.code = code
    raise end


def mendable(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of what the user can mend; ``None`` for any other error, which shall keep its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    names, last = {frame.name for frame in frames}, Path(frames[-1].filename)
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)  # its str is a repr
    ours = isinstance(error, ValueError | LookupError | OSError | RuntimeError) and _is_ours(error)
    refused = "instantiate_trainer" in names and "lightning" in last.parts  # Trainer's checks of its flags
    no_checkpoint = isinstance(error, FileNotFoundError) and message.startswith("Checkpoint file not found")
    nested = "Does not validate against any of the Union subtypes" in message
    if not (ours or refused or no_checkpoint or nested):
        return None
    configured = "check_configs" in names or any(
        Path(frame.filename) == _PACKAGE / "cli/trainer.py" for frame in frames
    )
    nothing_started = configured and names.isdisjoint({"_run_stage", "on_fit_end"})  # Trainer's loops, and after
    return explain(message) if nested else message, 2 if nothing_started else 1


def check_configs(values: Iterable[str], folders: Sequence[Path]) -> None:
    """Refuses what ``--config`` cannot read, before anything heavy is imported.

    Args:
        values: Given to ``--config``: a file, or YAML itself.
        folders: Where the packaged files are.

    Raises:
        ValueError: With the nearest packaged name, or with line and column of what is no YAML.
    """
    import yaml

    for value in values:
        try:
            is_file = Path(value).is_file()
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8") if is_file else value)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise ValueError(f"{value}{place}: {error.problem} {error.context or ''}".strip()) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"'{value}' is no YAML file: {str(error).splitlines()[0]}") from None
        if is_file and not isinstance(content, dict | None):
            raise ValueError(f"'{value}' has no settings: expected `key: value` lines, not a {type(content).__name__}")
        if not is_file and not isinstance(content, dict):
            packaged = {file.relative_to(folder).as_posix() for folder in folders for file in folder.rglob("*.yaml")}
            named = next((file for file in packaged if file.endswith(f"/{value}")), value.removeprefix("configs/"))
            raise ValueError(
                f"there is no configuration file '{value}'{_hint(named, sorted(packaged))}\n"
                f"  looked in {Path.cwd()} and among the packaged ones in {next(filter(Path.is_dir, folders))}"
            )


def explain(message: str) -> str:
    """The place in the configuration, what was expected there and what arrived.

    Args:
        message: As jsonargparse gives it, with one level of indentation per level of nesting.
    """
    found = _Found()
    for line in message.splitlines():
        found.read(line.strip().removeprefix("- "))
    places = ".".join(dict.fromkeys(found.places))
    reason = found.reason() or message
    return f"{places}: {reason}" if places else reason


@dataclass
class _Found:
    """What jsonargparse's lines say; the innermost value and the last class are those that the reason is about."""

    places: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    owner: str = ""
    unknown: str = ""
    value: str = ""

    def read(self, text: str) -> None:
        text = self._without_place_and_value(text)
        if match := _OWNER.match(text):
            self.owner = match[1]
        elif match := _TYPE.match(text):
            self.types += [match[1]] * (match[1] != "NoneType")
        elif match := _CHOICES.match(text):
            self.choices += re.findall(r"[^\s',]+", match[1])
        elif match := _NO_CLASS.match(text):
            self.unknown = match[1]
        elif match := _NO_SUBCLASS.match(text):
            self.types.append(f"the name of a class, or {{class_path: …, init_args: …}}, that is an {match[1]}")
        elif not _NOISE.match(text):
            self.reasons.append(text)

    def _without_place_and_value(self, text: str) -> str:
        text, _, got = text.partition(". Got value: ")
        if text.startswith("Given value: "):
            text, got = "", text.removeprefix("Given value: ")
        if not got.startswith(("Namespace(", "NestedArg(")):
            self.value = self.value or got
        if _CALLABLE in text:
            text = text.partition(_CALLABLE)[2]
            self.owner = ""
            if of := _CLASS_PATH.search(got):
                self.owner = of[1]
        if key := _KEY.search(text):
            self.places.append(key[1])
            text = text[key.end() :]
        return text

    def reason(self) -> str:
        if self.reasons:
            return self._needs() or "; ".join(dict.fromkeys(self.reasons)).replace(_NO_SETTING, self._has_no_setting())
        if self.unknown and (self.unknown[0].isupper() or not self.types):
            return self._no_class()
        if not (self.types or self.choices):
            return ""
        expected = " or ".join(dict.fromkeys(self.types)) if not self.choices else f"one of {', '.join(self.choices)}"
        arrived = self.value if len(self.value) <= 80 else f"{self.value[:80]}…"
        return f"expected {expected}, not '{arrived}'{_hint(self.value, self.choices)}"

    def _no_class(self) -> str:
        known = _class_names()
        if self.unknown in known:
            return f"the class '{self.unknown}' is of another kind than what is expected here"
        or_path = "; give the name of a class of this package, or a full import path"
        return f"there is no class '{self.unknown}'{_hint(self.unknown, known) or or_path}"

    def _has_no_setting(self) -> str:
        return f"{self.owner} has no setting" if self.owner else "there is no setting"

    def _needs(self) -> str:
        needed = self.reasons[0].partition("arguments are required: ")[2]
        if needed and self.owner.startswith("Lit"):
            needed += "; start from a whole configuration, such as --config demo/unlearn.yaml or --config tofu.yaml"
        return f"{self.owner} needs {needed}".strip() if needed else ""


def _with_names(message: str, known: Sequence[str], prefix: str = "") -> str:
    """The message, with the nearest name where it has an unknown one."""
    if message.startswith("unrecognized arguments: "):
        name = message.split()[2].partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument '{name}': options are written --name=value"
        name = name.lstrip("-")
        return f"{_NO_SETTING} '{prefix}{name}'{_hint(name, known, prefix)}"
    if match := _UNKNOWN.search(message):
        return message.replace(match[0], f"{_NO_SETTING} '{match[1]}'{_hint(match[1], known)}")
    return message


def _names(actions: Iterable[argparse.Action]) -> Iterator[str]:
    for action in actions:
        if isinstance(action.choices, dict):  # subcommands
            for parser in action.choices.values():
                yield from _names(parser._actions)
        elif action.dest != argparse.SUPPRESS:
            yield action.dest


def _class_names() -> list[str]:
    return [
        *lit_unlearn.__all__,
        *(name for home in _CLASSES for name in getattr(sys.modules.get(home), "__all__", ())),
    ]


def _hint(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of a sentence about a name that is not known."""
    head, dot, rest = name.partition(".")
    heads = list(dict.fromkeys(one.partition(".")[0] for one in known))
    if dot and rest and head not in heads and "/" not in name:  # `modle.lm`: what follows may be of a class
        near = [f"{one}.{rest}" for one in difflib.get_close_matches(head, heads, n=1)]
    else:
        lower = {one.lower(): one for one in known}
        near = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=1)]
    if near:
        return f": did you mean '{prefix}{near[0]}'?"
    return f"; it has {', '.join(heads)}" if 0 < len(heads) <= _FEW else ""
