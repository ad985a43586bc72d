"""Hooks of MkDocs: add the generated pages, and lead links to files outside of docs/ to pages that show them."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import generated
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

# Pages that GitHub shows from the root of the repository.
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
SECTIONS = ("method", "metric", "api")
SHOWN_FILES = "repository/"
"""Where pages are that show a file."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+")
_pages = generated.build_pages()


def on_config(config: Any) -> Any:
    """Put the generated pages of a section into the navigation, behind the section's index."""
    for entry in config.nav:
        for title, page in entry.items():
            section = page.partition("/")[0] if isinstance(page, str) else ""
            if section in SECTIONS:
                others = [path for path in _pages if path.startswith(f"{section}/") and path != page]
                entry[title] = [page, *({Path(path).stem: path} for path in others)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, those from the root of the repository, and a page per file that a page links to."""
    texts = {name: (generated.ROOT / source).read_text("utf-8") for name, source in FROM_ROOT.items()}
    for uri, text in {**texts, **_pages}.items():
        files.append(File.generated(config, uri, content=text))
    shown = set()
    for file in list(files.documentation_pages()):
        folder = _find_folder(file.src_uri)
        for target, _ in _LINK.findall(file.content_string):
            path = (folder / target).resolve()
            if _is_shown(path):
                shown.add(path)
    for path in sorted(shown):
        page = File.generated(config, _find_page(path), content=_show_file(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between the repository's folders into links between pages."""
    uri = page.file.src_uri
    folder = _find_folder(uri)

    def rewrite(match: re.Match[str]) -> str:
        path = (folder / match[1]).resolve()
        if path.is_file() and path.is_relative_to(generated.ROOT):
            return posixpath.relpath(_find_page(path), posixpath.dirname(uri) or ".") + (match[2] or "")
        return match[0]

    return _LINK.sub(rewrite, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let names in tables break behind their separators, and nowhere else: a column is as wide as its longest unbroken name."""

    def split(cell: re.Match[str]) -> str:
        return _CODE.sub(lambda code: re.sub(r"([_./:]+)(?=\w)", r"\1<wbr>", code[0]), cell[0])

    return _CELL.sub(split, html)


def _find_folder(uri: str) -> Path:
    """Return the folder that a page's links start from."""
    if uri in FROM_ROOT:
        return generated.ROOT
    if uri.startswith(SHOWN_FILES):
        return (generated.ROOT / uri.removeprefix(SHOWN_FILES)).parent
    return (generated.DOCS / uri).parent


def _is_shown(path: Path) -> bool:
    """Return whether a link leads to a file of the repository that is no page of its own."""
    return (
        path.is_relative_to(generated.ROOT)
        and not path.is_relative_to(generated.DOCS)
        and path.name not in FROM_ROOT.values()
    )


def _find_page(path: Path) -> str:
    """Return the page of a file of the repository."""
    if path.is_relative_to(generated.DOCS):
        return path.relative_to(generated.DOCS).as_posix()
    for page, source in FROM_ROOT.items():
        if path == generated.ROOT / source:
            return page
    return f"{SHOWN_FILES}{path.relative_to(generated.ROOT).as_posix()}.md"


def _show_file(path: Path) -> str:
    """Return a page that shows a file of the repository."""
    name = path.relative_to(generated.ROOT).as_posix()
    if not path.is_file():
        raise PluginError(f"a page links to '{name}', which is no file of the repository.")
    if path.suffix == ".ipynb":
        return _show_notebook(path)
    language = {".py": "python", ".jsonl": "json", ".yaml": "yaml"}.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n````{language}\n{path.read_text('utf-8')}\n````\n"


def _show_notebook(path: Path) -> str:
    """Return the page of a notebook: its text as it stands, and its code in blocks."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"
