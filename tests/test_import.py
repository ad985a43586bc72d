"""`import lit_unlearn` is quick, and every public name is there when asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import lit_unlearn

SLOW = {"torch", "lightning", "transformers", "torchmetrics", "datasets", "peft", "matplotlib", "jsonargparse", "numpy"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_import_is_quick():
    """Asking for the version or listing the names imports nothing slow."""
    modules = modules_after("import lit_unlearn\nassert lit_unlearn.__version__\nassert 'NLL' in dir(lit_unlearn)")
    assert "lit_unlearn" in modules
    assert not modules & SLOW


@pytest.mark.slow
def test_first_use_imports_what_it_needs():
    """The same look, at a name that does need torch; its layer needs no Lightning and no transformers."""
    modules = modules_after("from lit_unlearn import NLL, DualAscent")
    assert "torch" in modules
    assert not modules & {"lightning", "transformers", "datasets", "peft", "torchmetrics", "matplotlib"}


def test_every_public_name_resolves():
    assert len(lit_unlearn.__all__) == len(set(lit_unlearn.__all__))
    for name in lit_unlearn.__all__:
        value = getattr(lit_unlearn, name)
        assert name == "__version__" or value.__name__ == name
    assert dir(lit_unlearn) == sorted(lit_unlearn.__all__)


def test_version_is_a_version():
    assert [part.isdigit() for part in lit_unlearn.__version__.split(".")] == [True, True, True]


@pytest.mark.parametrize("name", ["LitUnlern", "_private", "torch"])
def test_unknown_name(name):
    with pytest.raises(AttributeError, match=f"module 'lit_unlearn' has no attribute '{name}'"):
        getattr(lit_unlearn, name)
    assert not hasattr(lit_unlearn, name)
