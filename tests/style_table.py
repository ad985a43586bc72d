"""Print measures of readability for folders: ``python tests/style_table.py [FOLDER …]`` (default: lit_unlearn benchmarks)."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

VAGUE = {
    "one",
    "ones",
    "found",
    "own",
    "said",
    "kept",
    "mine",
    "theirs",
    "whole",
    "other",
    "others",
    "part",
    "made",
    "asked",
    "right",
    "place",
    "much",
    "many",
    "few",
    "further",
    "wanted",
    "known",
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def measure(folder: Path) -> dict:
    total = dict(
        lines=0,
        code=0,
        comprehensions=0,
        nested=0,
        comments=0,
        trailing=0,
        functions=0,
        one_word=0,
        names=0,
        vague=0,
        docstrings=0,
        headless=0,
    )
    lengths = []
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        documented = set()
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)) and (doc := ast.get_docstring(node)):
                total["docstrings"] += 1
                total["headless"] += bool(re.match(r"(What|Whether|Which|How|Where|Who|Whose)\b", doc))
                documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            if isinstance(node, COMPREHENSIONS):
                total["comprehensions"] += 1
                inner = any(
                    isinstance(m, COMPREHENSIONS) for child in ast.iter_child_nodes(node) for m in ast.walk(child)
                )
                total["nested"] += inner or len(node.generators) > 1
            if isinstance(node, FUNCTIONS):
                total["functions"] += 1
                total["one_word"] += "_" not in node.name.strip("_") and not node.name.startswith("__")
                lengths.append(node.end_lineno - node.lineno + 1)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                total["names"] += 1
                total["vague"] += node.id in VAGUE
        lines = text.splitlines()
        total["lines"] += len(lines)
        total["code"] += sum(
            bool(line.strip()) and not line.strip().startswith("#") and i not in documented
            for i, line in enumerate(lines, 1)
        )
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                total["comments" if lines[token.start[0] - 1].strip().startswith("#") else "trailing"] += 1
    lengths.sort()
    hundred, count = 100 / max(1, total["code"]), max(1, len(lengths))
    return {
        "files, lines": f"{sum(1 for _ in folder.rglob('*.py'))}, {total['lines']}",
        "function median / p90 / longest": " / ".join(
            str(lengths[min(count - 1, int(p * count))]) for p in (0.5, 0.9, 1)
        )
        if lengths
        else "-",
        "comprehensions per 100 code lines (nested)": f"{total['comprehensions'] * hundred:.1f} ({total['nested'] * hundred:.2f})",
        "comment lines per 100 (own line + trailing)": f"{total['comments'] * hundred:.1f} + {total['trailing'] * hundred:.1f}",
        "one-word function names": f"{total['one_word'] / max(1, total['functions']):.0%}",
        "vague local names": f"{total['vague'] / max(1, total['names']):.1%}",
        "docstrings opening What/Whether/Which/How/Where/Who": f"{total['headless'] / max(1, total['docstrings']):.1%}",
    }


for name in sys.argv[1:] or ["lit_unlearn", "benchmarks"]:
    print(f"== {name}")
    for key, value in measure(Path(name)).items():
        print(f"   {key}: {value}")
