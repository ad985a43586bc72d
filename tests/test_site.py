"""The documentation site builds without a warning, has a page for everything, and fits phones and desks."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import measure_widths
from command_line import ROOT

import lit_unlearn
from lit_unlearn import metrics
from lit_unlearn.cli.methods import describe_method

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mkdocstrings_handlers") is None, reason='pip install -e ".[docs]" is missing'),
]
METHODS = sorted((ROOT / "configs/method").glob("*.yaml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read_text(page: Path) -> str:
    """Return what a page's article says, without its tags."""
    article = page.read_text("utf-8").partition("<article")[2].partition("</article>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "", article))


def test_every_public_name_has_a_page(site: Path) -> None:
    names = set(lit_unlearn.__all__) - {"__version__"}
    index = (site / "api/index.html").read_text("utf-8")
    for name in names:
        (link,) = set(re.findall(rf'href="([^"]*)">{name}</a></td>', index))
        assert name in read_text((site / "api" / link / "index.html").resolve())


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_every_method_has_a_page_that_says_what_the_command_says(site: Path, file: Path) -> None:
    text = read_text(site / "method" / file.stem / "index.html")
    method = describe_method(file)
    facts = dict(re.findall(r"^(formula|needs|retention|paper)\n(.*)$", text, re.MULTILINE))
    assert facts["formula"] == method["formula"].replace("`", "")
    assert facts["paper"] == method["paper"]
    assert facts["retention"] == "; ".join(method["retention"])
    assert facts["needs"] == (", ".join(method["needs"]) or "nothing")


@pytest.mark.parametrize("name", metrics.__all__)
def test_every_metric_has_a_page_that_says_how_to_read_it(site: Path, name: str) -> None:
    before, _, after = read_text(site / "metric" / name / "index.html").partition("How to read it")
    assert name in before
    assert name in after


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pages_fit_a_phone_and_a_desk(site: Path, address: str) -> None:
    pages = ["index.html", "choosing_a_method/", "method/npo/", "configuration/", "audit/", "api/LanguageModel/"]
    frames = [(f'src="{page}"', width) for page in pages for width in (390, 1280)]
    widths = measure_widths(frames, site / "wrapper.html", f"{address}/wrapper.html")
    assert widths == [width for _, width in frames]
