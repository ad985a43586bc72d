"""An extension of griffe for docstrings that say "Example", where griffe's Google parser expects "Examples"."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Let griffe show examples as code, not as quoted text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of every docstring that has one."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
