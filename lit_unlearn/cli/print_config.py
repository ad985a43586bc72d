"""``--print_config`` for people: what decides first, without a line for everything that nobody set."""

from __future__ import annotations

from typing import Any

import yaml

_FIRST = ("model", "data", "trainer", "logs", "report", "picture", "export")
_NOT_SET = "# not set"


def readable(settings: dict[str, Any], changed: dict[str, Any], header: str) -> str:
    """YAML with every value in force; the names of what is null by default stand in one comment per section.

    A null that was written in place of another default stays, so that the text, read again, gives the same settings.

    Args:
        settings: The whole configuration.
        changed: The part of it that differs from the defaults.
        header: The first line.
    """
    ordered = {key: settings[key] for key in (*_FIRST, *settings) if key in settings}
    text = yaml.safe_dump(
        _without_unset(ordered, changed), sort_keys=False, allow_unicode=True, default_flow_style=False, width=10_000
    )
    return f"{header}\n" + text.replace(f"'{_NOT_SET}':", f"{_NOT_SET}:")


def _without_unset(settings: dict[str, Any], changed: Any) -> dict[str, Any]:
    changed = changed if isinstance(changed, dict) else {}
    unset = [key for key, value in settings.items() if value is None and key not in changed]
    kept = {
        key: _without_unset(value, changed.get(key)) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in unset
    }
    return {**kept, _NOT_SET: ", ".join(unset)} if unset else kept
