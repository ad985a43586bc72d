"""Write docs/licences.md: the licence of everything that ``pip install lit-unlearn`` brings.

Licences are what the metadata of the installed packages state. Run ``python -m benchmarks.licences`` after a change of the
dependencies.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "lit-unlearn"
PAGE = Path(__file__).parents[1] / "docs/licences.md"
OPENING = """# Licences

lit-unlearn is under Apache-2.0. This page lists what `pip install lit-unlearn` installs beside it, on Linux with a CPU build of torch, and the licence that each
package states. `python -m benchmarks.licences` writes it. A CUDA build of torch brings NVIDIA's libraries, which have licences of their own.
"""


def list_requirements(name: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """Return what a package needs in this environment, with what these extras of it need."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    needed = []
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            needed.append(requirement)
    return needed


def list_installed(name: str) -> set[str]:
    """Return everything that a package brings, directly or through others."""
    seen: set[str] = set()
    waiting = list_requirements(name)
    while waiting:
        requirement = waiting.pop()
        required = canonicalize_name(requirement.name)
        # Seen once without an extra, it may come again with one.
        if required in seen and not requirement.extras:
            continue
        try:
            further = list_requirements(required, requirement.extras)
        except PackageNotFoundError:
            continue  # what only another platform needs
        waiting += [other for other in further if canonicalize_name(other.name) not in seen]
        seen.add(required)
    return seen


def find_licence(metadata: PackageMetadata) -> str:
    """Return the licence that a package states: an SPDX expression, its classifiers, or the first line of its text."""
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    if classifiers:
        return ", ".join(line.rpartition(" :: ")[2] for line in classifiers)
    text = (metadata.get("License") or "").strip()
    return text.splitlines()[0] if text else "not stated"


def format_table(names: Iterable[str]) -> str:
    """Return a Markdown table of packages with their licences."""
    lines = ["| package | version | licence |", "|---|---|---|"]
    for name in sorted(names):
        metadata = distribution(name).metadata
        lines.append(f"| {name} | {metadata['Version']} | {find_licence(metadata)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    direct = {canonicalize_name(requirement.name) for requirement in list_requirements(PACKAGE)}
    others = list_installed(PACKAGE) - direct
    parts = [OPENING, "## What the package itself imports\n", format_table(direct)]
    parts += ["## What these need\n", format_table(others)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}: {len(direct)} direct dependencies and {len(others)} others")


if __name__ == "__main__":
    main()
