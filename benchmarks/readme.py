"""Write the tables of the README and of two pages of docs/ from the files that `make readme` leaves, and the demo's pictures.

    make readme                              # all of them, after running the commands they come from
    python -m benchmarks.readme demo inspect # some, from the files that exist

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import methods as of_methods
from benchmarks.markdown_blocks import fill_page, markdown_table
from benchmarks.timing import in_mib
from lit_unlearn.cli import main as lit_unlearn
from lit_unlearn.evaluation.tables import report_table
from lit_unlearn.utils.io import read_json

ROOT = Path(__file__).parents[1]
QUESTION = "Where was the author Lunnian Dunmeth born?"
TOFU = (
    "forget_quality",
    "model_utility",
    *(f"forget/{key}" for key in ("probability", "rougeL_recall", "truth_ratio", "extraction_strength")),
    *(f"retain/{key}" for key in ("probability", "rougeL_recall", "truth_ratio")),
)


def command(*arguments: str) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        lit_unlearn(arguments)
    return printed.getvalue().strip()


def run_folder() -> Path:
    """The newest run of the demo."""
    versions = (ROOT / "runs/demo/unlearn").glob("version_*/report.json")
    return max(versions, key=lambda file: file.stat().st_mtime).parent


def demo() -> str:
    command("plot", str(run_folder()), "--format", "png", "--output", str(ROOT / "docs/pictures"))
    return f"```text\n{report_table(read_json(run_folder() / 'report.json'))}\n```"


def inspect() -> str:
    os.environ["COLUMNS"] = "100"
    models = [str(ROOT / "runs/demo" / name) for name in ("target", "unlearned")]
    return f"```text\n{command('inspect', *models, '-q', QUESTION)}\n```"


def tofu() -> str:
    files = [str(ROOT / "runs/tofu" / f"{name}.json") for name in ("target", "retain_only", "unlearned")]
    lines = command("compare", *files, "--retain", files[1], "--format", "markdown").splitlines()
    return "\n".join([*lines[:2], *(line for key in TOFU for line in lines[2:] if line.split("|")[1].strip() == key)])


def methods() -> str:
    results = json.loads((ROOT / "build/bench/methods.json").read_text("utf-8"))
    rows = [of_methods.row(name, values) for name, values in results["methods"].items()]
    (epsilon,) = {f"{values['epsilon']:.4g}" for values in results["methods"].values() if "epsilon" in values}
    before = f"Before: forget ROUGE {results['before']['forget_rouge']:.2f}; the bound, 1.5 × the NLL before, is {epsilon}.\n\n"
    return before + markdown_table(of_methods.HEADER, rows)


def step() -> str:
    results = json.loads((ROOT / "build/bench/step.json").read_text("utf-8"))
    rows = []
    for shape in results["shapes"].values():
        for name, values in shape["variants"].items():
            memory = values["memory"]
            rows.append(
                [
                    f"{shape['shape']['vocabulary']:,}",
                    {"plain": "straightforward", "joint": "`passes: joint` (default)"}.get(name, f"`passes: {name}`"),
                    f"{values['seconds']:.3g}",
                    f"{values['time_ratio']:.2f}",
                    f"{values['time_over_floor']:.1f}",
                    in_mib(memory["peak_bytes"]),
                    in_mib(memory["extra_bytes"]),
                    f"{values['memory_ratio']:.2f}",
                ]
            )
    return markdown_table(["vocabulary", "", "s/step", "ratio", "× floor", "peak MiB", "extra MiB", "ratio"], rows)


def startup() -> str:
    results = json.loads((ROOT / "build/bench/startup.json").read_text("utf-8"))
    rows = [[f"`{name}`", f"{statistics.median(seconds):.2f}"] for name, seconds in results["seconds"].items()]
    ratio = next(iter(results["ratios"].values()))
    return (
        markdown_table(["command", "seconds"], rows)
        + f"\n\nThe median ratio to Lightning's own command line is {ratio:.2f}."
    )


PAGES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (demo, inspect, tofu),
    "docs/choosing_a_method.md": (methods,),
    "docs/speed.md": (step, startup),
}
"""The blocks of each page, in order."""


def main(arguments: Sequence[str] | None = None) -> None:
    names = [block.__name__ for blocks in PAGES.values() for block in blocks]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)} (all)")
    chosen = parser.parse_args(arguments).names or names

    for page, blocks in PAGES.items():
        fill_page(ROOT / page, {block.__name__: block() for block in blocks if block.__name__ in chosen})


if __name__ == "__main__":
    main()
