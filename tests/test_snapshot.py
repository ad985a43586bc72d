"""Public names, YAML keys, log names and keys of files change on purpose only: see `snapshot.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import snapshot

SAVED = json.loads(snapshot.FILE.read_text(encoding="utf-8"))


def test_names_and_keys_are_those_of_the_snapshot(model_dir: str, tmp_path: Path) -> None:
    names = snapshot.collect(model_dir, tmp_path)
    for part, found in names.items():
        assert found == SAVED[part], f"{part} changed: if that is meant, run `python tests/snapshot.py`"


@pytest.mark.slow
@pytest.mark.parametrize("file", snapshot.config_files(), ids=lambda file: file.stem)
def test_configuration_keys_are_those_of_the_snapshot(file: Path) -> None:
    name = file.relative_to(snapshot.ROOT).as_posix()
    expected = [*SAVED["config keys"]["every configuration"], *SAVED["config keys"][name]]
    assert snapshot.config_keys(file) == sorted(expected)
