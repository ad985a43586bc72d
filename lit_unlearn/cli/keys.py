"""Find the YAML keys that an error's argument was set by."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lit_unlearn.errors import LitUnlearnError

# Classes that a configuration names by their place, and not by a class_path.
_PLACES = {
    "AttachFiles": "attach",
    "AuditPlan": "audit",
    "Constraint": "model.constraints.*",
    "ExportModel": "export",
    "LanguageModel": "model.lm",
    "Logs": "logs",
    "Relative": "model.constraints.*.epsilon",
    "RunPicture": "picture",
    "RunReport": "report",
    "Schedule": "model.scheduler",
    "Trainer": "trainer",
}


class _Node(NamedTuple):
    path: str
    class_path: str | None
    arguments: Mapping[str, Any]


def find_keys(settings: Mapping[str, Any], error: LitUnlearnError) -> list[str]:
    """Return the keys by which the argument that an error names can be set, without ``init_args`` as on the command line.

    Args:
        settings: The parsed configuration of one command.
        error: With ``owner`` and ``argument``; without an owner, the argument is one of the command's own.
    """
    if error.argument is None:
        return []
    if error.owner is None:
        return [error.argument] if error.argument in settings else []
    owner = error.owner if isinstance(error.owner, type) else type(error.owner)
    nodes = [node for node in _iterate_nodes(settings, "") if _is_built_from(owner, node)]
    # Two constraints differ by their names, which the objects know.
    named = [node for node in nodes if node.path.rpartition(".")[2] == getattr(error.owner, "name", None)]
    return [f"{node.path}.{error.argument}" for node in named or nodes if error.argument in node.arguments]


def _iterate_nodes(value: Any, path: str) -> Iterator[_Node]:
    if isinstance(value, Mapping):
        arguments = value.get("init_args") or {} if "class_path" in value else value
        yield _Node(path, value.get("class_path"), arguments)
        for name, child in arguments.items():
            yield from _iterate_nodes(child, f"{path}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for child in value:
            yield from _iterate_nodes(child, path)


def _is_built_from(owner: type, node: _Node) -> bool:
    if node.class_path is None:
        patterns = [_PLACES[base.__name__] for base in owner.__mro__ if base.__name__ in _PLACES]
        # A star of fnmatch also matches dots: the depth must be the same.
        depth = node.path.count(".")
        return any(fnmatchcase(node.path, pattern) and pattern.count(".") == depth for pattern in patterns)
    # Parsing has imported it, so this is a look-up.
    module, _, name = node.class_path.rpartition(".")
    built = getattr(importlib.import_module(module), name, None) if module else None
    # An owner may be the base class that checks an argument for all classes below it.
    return isinstance(built, type) and issubclass(built, owner)
