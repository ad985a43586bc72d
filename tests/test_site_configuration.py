"""The site's configuration reference, as text: the page lists every key that a configuration of this repository sets."""

from __future__ import annotations

import json
import re

import pytest
from command_line import ROOT

# Keys whose meaning is another library's.
OF_OTHERS = re.compile(
    r"(trainer|model\.init_args\.optimizer\.init_args|model\.init_args\.lm\.(config|adapter)"
    r"|data\.init_args\.chat\.args)\."
    r"|.*class_path$|seed_everything$|verbose$|ckpt_path$"
)


def test_the_configuration_has_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe", reason='pip install -e ".[docs]" is missing')
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    import generated

    listed = set(re.findall(r"^`([\w.]+)` \{ #", generated.build_configuration(generated.Sources()), re.MULTILINE))
    snapshot = json.loads((ROOT / "tests/snapshot.json").read_text("utf-8"))["config keys"]
    keys = {key for names in snapshot.values() for key in names if not OF_OTHERS.match(key)}
    # A benchmark that another one attacks or samples has the same keys.
    keys = {key.replace(".init_args", "").replace("model.benchmark.benchmark.", "model.benchmark.") for key in keys}
    # NAME stands for the names of the constraints, and an objective there has the keys that it has as `model.forget`.
    keys = {re.sub(r"constraints\.\w+\.", "constraints.NAME.", key) for key in keys}
    keys = {key.replace("constraints.NAME.objective.", "forget.") for key in keys}
    # The names of streams are the user's as well.
    keys = {re.sub(r"streams\.\w+$", "streams", key) for key in keys}
    assert keys <= listed, keys - listed
