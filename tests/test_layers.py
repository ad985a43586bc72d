"""Imports point down only, and slow packages are imported where they are used: proved from the syntax trees."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

import lit_unlearn

PACKAGE = Path(lit_unlearn.__file__).parent
HOMES = lit_unlearn._public_names()
LAYER = {
    "errors": -1,
    "utils": 0,
    "functional": 0,
    "models": 1,
    "objectives": 2,
    "dual": 2,
    "metrics": 2,
    "data": 3,
    "evaluation": 4,
    "prepare": 4,
    "training": 5,
    "plotting": 6,
    "export": 6,
    "callbacks": 7,
    "unlearning": 8,
    "cli": 9,
    "__main__": 10,
}
LOW_FILES = {
    "data.chat_template",
    "data.conversations",
    "data.encoding",
    "data.encoding_settings",
    "data.example",
    "data.special_tokens",
    "data.templates",
}  # they need a tokenizer alone, so that models can put questions
SIDEWAYS = {("dual", "objectives")}  # a constraint holds an objective
FORBIDDEN_PARTS = {"data": {"objectives"}}  # which lie below it
FORBIDDEN_PACKAGES = {
    "objectives": {"lightning", "pytorch_lightning", "transformers", "peft"},
    "dual": {"lightning", "pytorch_lightning", "transformers", "peft"},
}
KERNEL = "lit_unlearn.functional.margin_kernel"  # imports triton, and is itself imported where it is asked for
SLOW = {"datasets", "lm_eval", "matplotlib", "openai", "peft", "rouge_score", "tokenizers", "transformers"}

Scope = Literal["module", "function", "typing"]


class Import(NamedTuple):
    """One imported module, or name of one, and when it is imported."""

    name: str  # dotted and absolute
    scope: Scope
    line: int

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @property
    def part(self) -> str | None:
        """The part of lit_unlearn that it comes from; ``None`` for no part that there is."""
        inner = self.name.split(".")[1]
        return inner if inner in LAYER else HOMES.get(inner, ".").split(".")[1] or None

    @property
    def is_low(self) -> bool:
        """Whether it is one of the files that lower layers may use."""
        return any(self.name.removeprefix("lit_unlearn.").startswith(file) for file in LOW_FILES)

    @property
    def is_root(self) -> bool:
        """Whether it is the package's own ``__init__``, which imports nothing, or a dunder of it."""
        return self.name == "lit_unlearn" or self.name.startswith("lit_unlearn.__")


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def find_imports(node: ast.AST, file: tuple[str, ...], scope: Scope = "module") -> list[Import]:
    """Every import below a node.

    Args:
        node: Of the syntax tree.
        file: Parts of the module's dotted name, ``__init__`` included.
        scope: Where the node is executed.
    """
    if isinstance(node, ast.Import):
        return [Import(alias.name, scope, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = [*file[: len(file) - node.level]] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module == "lit_unlearn":  # the names may be parts of the package
            return [Import(f"{module}.{alias.name}", scope, node.lineno) for alias in node.names]
        return [Import(module, scope, node.lineno)]
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lit_unlearn":  # the package imports it lazily
        return [Import(f"lit_unlearn.{node.attr}", scope, node.lineno)]
    if isinstance(node, ast.If) and is_type_checking(node.test):
        typing = [found for child in node.body for found in find_imports(child, file, "typing")]
        return typing + [found for child in node.orelse for found in find_imports(child, file, scope)]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and scope == "module":
        scope = "function"
    return [found for child in ast.iter_child_nodes(node) for found in find_imports(child, file, scope)]


def violations(source: str, file: tuple[str, ...]) -> list[str]:
    """What is wrong with the imports of a file, one line each.

    Args:
        source: Its text.
        file: Parts of its dotted name, such as ``("lit_unlearn", "lm", "model")``.
    """
    part = file[1]
    wrong = []
    for found in find_imports(ast.parse(source), file):
        what = f"{'/'.join(file)}.py:{found.line} imports {found.name}"
        if found.package in SLOW and found.scope == "module":
            wrong.append(f"{what} at module level")
        if found.package in FORBIDDEN_PACKAGES.get(part, ()):
            wrong.append(f"{what}, which {part} must not know")
        kernels = {"triton"} if ".".join(file) == KERNEL else set()
        if part == "functional" and found.package not in {"torch", "lit_unlearn", *kernels, *sys.stdlib_module_names}:
            wrong.append(f"{what}, but functional imports torch alone")
        if found.name == KERNEL and found.scope == "module":
            wrong.append(f"{what} at module level")
        if part == "__init__" and found.scope != "typing" and found.package not in sys.stdlib_module_names:
            wrong.append(f"{what}, but the package's __init__ is lazy")
        if found.package == "lit_unlearn" and not found.is_root and part != "__init__":
            if found.part is None:
                wrong.append(f"{what}, which is in no layer")
            elif found.part in FORBIDDEN_PARTS.get(part, ()):
                wrong.append(f"{what}, which {part} must not know")
            elif found.is_low and LAYER[part] >= LAYER["models"]:
                continue
            elif found.part != part and LAYER[found.part] >= LAYER[part] and (part, found.part) not in SIDEWAYS:
                wrong.append(f"{what}, which is not below {part}")
    return wrong


def files() -> list[tuple[str, ...]]:
    """The dotted name of every file of the package, as parts."""
    return sorted(("lit_unlearn", *path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def source_of(file: tuple[str, ...]) -> str:
    return PACKAGE.joinpath(*file[1:]).with_suffix(".py").read_text(encoding="utf-8")


def test_every_part_has_a_layer():
    assert {file[1] for file in files()} == {"__init__", *LAYER}


@pytest.mark.parametrize("file", files(), ids="/".join)
def test_imports_point_down(file):
    assert violations(source_of(file), file) == []


def test_public_names_live_in_parts():
    assert {home.split(".")[1] for home in HOMES.values()} <= set(LAYER)


LM = ("lit_unlearn", "models", "language_model")
WRONG = [
    (LM, "from lit_unlearn.objectives import NLL", "objectives, which is not below models"),
    (LM, "import lit_unlearn.training.module", "training.module, which is not below models"),
    (LM, "from lit_unlearn import dual", "lit_unlearn.dual, which is not below models"),
    (LM, "from lit_unlearn import NLL", "lit_unlearn.NLL, which is not below models"),  # lazily from a part above
    (LM, "from ..data import tokens", "lit_unlearn.data, which is not below models"),
    (LM, "from .. import dual", "lit_unlearn.dual, which is not below models"),
    (LM, "import lit_unlearn\nprint(lit_unlearn.NLL.needs)", "lit_unlearn.NLL, which is not below models"),
    (LM, "import lit_unlearn\nlit_unlearn.metrics.base", "lit_unlearn.metrics, which is not below models"),
    (LM, "from lit_unlearn.elsewhere import x", "in no layer"),
    (LM, "def f():\n    from lit_unlearn.cli import main", "cli, which is not below models"),
    (LM, "if TYPE_CHECKING:\n    from lit_unlearn.training import LitUnlearn", "training, which is not below models"),
    (LM, "import transformers", "at module level"),
    (LM, "try:\n    from peft import LoraConfig\nexcept ImportError:\n    pass", "at module level"),
    (LM, "class A:\n    import datasets.io", "at module level"),
    (LM, "if not TYPE_CHECKING:\n    import tokenizers", "at module level"),
    (LM, "if TYPE_CHECKING:\n    pass\nelse:\n    import matplotlib", "at module level"),
    (("lit_unlearn", "evaluation", "suite"), "with x:\n    from rouge_score import rouge_scorer", "at module level"),
    (("lit_unlearn", "objectives", "forget"), "def f():\n    import lightning as L", "must not know"),
    (("lit_unlearn", "dual", "multiplier"), "if TYPE_CHECKING:\n    from transformers import X", "must not know"),
    (("lit_unlearn", "objectives", "base"), "from lit_unlearn.dual import Constraint", "not below objectives"),
    (("lit_unlearn", "metrics", "base"), "from lit_unlearn.objectives import NLL", "not below metrics"),
    (("lit_unlearn", "data", "base"), "from lit_unlearn.objectives.base import Objective", "must not know"),
    (("lit_unlearn", "functional", "margin"), "import numpy", "torch alone"),
    (("lit_unlearn", "functional", "margin"), "import triton", "torch alone"),
    (("lit_unlearn", "functional", "margin"), f"from {KERNEL} import find_largest", "at module level"),
    (("lit_unlearn", "functional", "margin"), "from lit_unlearn.models import locate", "not below functional"),
    (("lit_unlearn", "callbacks"), "from lit_unlearn.cli import main", "not below callbacks"),
    (("lit_unlearn", "__init__"), "import torch", "is lazy"),
    (("lit_unlearn", "__init__"), "from lit_unlearn.models import LanguageModel", "is lazy"),
]
RIGHT = [
    (
        LM,
        "import os\nimport torch\nfrom lit_unlearn import functional, __version__\nfrom lit_unlearn.models.tokens import X",
    ),
    (LM, "import os, lit_unlearn\nprint(lit_unlearn.__version__, lit_unlearn.functional)"),
    (LM, "from . import tokens\nfrom .tokens import locate\nfrom ..functional import margin"),
    (LM, "if TYPE_CHECKING:\n    from transformers import PreTrainedModel\ndef f():\n    import peft\n"),
    (LM, "class A:\n    def f(self):\n        if self.x:\n            import datasets"),
    (("lit_unlearn", "dual", "constraint"), "from lit_unlearn.objectives import Objective"),
    (("lit_unlearn", "functional", "margin"), "import math\nfrom torch.nn import functional as F"),
    (
        ("lit_unlearn", "cli", "trainer"),
        "import lightning\nfrom lit_unlearn.callbacks import X\nimport lit_unlearn.data",
    ),
    (("lit_unlearn", "__init__"), "import importlib\nif TYPE_CHECKING:\n    from lit_unlearn.models import X"),
]


@pytest.mark.parametrize(("file", "source", "message"), WRONG)
def test_checker_finds_what_is_wrong(file, source, message):
    (wrong,) = violations(source, file)
    assert message in wrong


@pytest.mark.parametrize(("file", "source"), RIGHT)
def test_checker_lets_pass_what_is_right(file, source):
    assert violations(source, file) == []
