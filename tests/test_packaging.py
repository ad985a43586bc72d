"""What is installed with the package is what it imports, under licences that are listed."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import distribution, packages_distributions

from command_line import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import licences

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_USERS = ("judge", "gguf", "sign", "neighbours")
"""The extras for users of the package; the others are for those who change it."""
NOT_IMPORTED = {"wandb", "mlflow-skinny", "optuna"}
"""Of these extras: Lightning's loggers import them, or an example does."""


def read_names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def find_imported_packages() -> set[str]:
    modules = set()
    for path in (ROOT / "lit_unlearn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(str(node.module).partition(".")[0])
    packages = packages_distributions()
    others = modules - sys.stdlib_module_names - {"lit_unlearn"}
    # One that is not installed, as `neighbours` may be, has the name of its module.
    return {canonicalize_name(packages.get(module, [module])[0]) for module in others}


def test_what_is_installed_is_what_is_imported() -> None:
    required = read_names(PROJECT["dependencies"])
    optional = read_names([text for extra in OF_USERS for text in PROJECT["optional-dependencies"][extra]])
    # torch brings triton, where it computes on a GPU.
    imported = find_imported_packages() - {"triton"}
    assert imported - required == optional - NOT_IMPORTED
    # Lightning's logger imports it; everything else is there because a file of the package names it.
    assert required - imported == {"tensorboard"}


def test_every_dependency_is_listed_with_the_licence_that_it_states() -> None:
    """`python -m benchmarks.licences` writes the page anew."""
    rows = re.findall(r"^\| ([\w.-]+) \| [\w.+]+ \| (.+) \|$", licences.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = dict(rows)
    assert "not stated" not in listed.values()
    for name in read_names(PROJECT["dependencies"]):
        assert listed[name] == licences.find_licence(distribution(name).metadata), name


def test_what_a_package_brings_is_followed_to_its_end() -> None:
    installed = licences.list_installed("jsonargparse")
    assert "pyyaml" in installed
    assert "docstring-parser" not in installed  # of an extra of it
    assert "docstring-parser" in licences.list_installed(licences.PACKAGE)  # which this package asks for
