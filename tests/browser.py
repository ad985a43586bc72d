"""Pages in a headless browser, for several test files."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def measure_widths(frames: Sequence[tuple[str, int]], wrapper: Path, address: str = "") -> list[int]:
    """Return the widths that pages take, each in a frame of a given width: a window itself has a least width.

    Args:
        frames: For each, the attribute that names the page, such as `src="index.html"`, and the frame's width in pixels.
        wrapper: HTML file to write.
        address: Where the browser finds that file; by default as a file. A page in a file may not look into another one, so that pages named by
            `src` have to come from a server.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed to open the page in")
    tags = [f'<iframe width="{width}" height="800" {page}></iframe>' for page, width in frames]
    measure = "[...document.querySelectorAll('iframe')].map(frame => frame.contentDocument.documentElement.scrollWidth)"
    script = f"<script>onload = () => {{ document.title = 'widths ' + {measure}; }}</script>"
    wrapper.write_text(f"<!DOCTYPE html><style>iframe {{ border: 0 }}</style>{''.join(tags)}{script}", encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet.append("--hide-scrollbars")
    profile = wrapper.with_name("profile")
    command = [browser, *quiet, f"--user-data-dir={profile}", "--dump-dom", address or wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>widths ([\d,]+)</title>", done.stdout)
    assert title, done.stdout[-200:] + done.stderr[-500:]
    return [int(width) for width in title[1].split(",")]
