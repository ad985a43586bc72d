"""Write the tables of the README and of pages of docs/ from the files that `make readme` leaves, and the demo's plots.

    make readme                              # all of them, after running the commands they come from
    python -m benchmarks.readme demo inspect # some, from the files that exist

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import real, real_tables
from benchmarks.gpu.table import format_results
from benchmarks.markdown_blocks import fill_page, markdown_table
from benchmarks.memory import format_mib
from benchmarks.methods import HEADERS, format_epsilon, format_row
from benchmarks.plan import HEADERS as PLAN_HEADERS
from benchmarks.plan import list_rows
from benchmarks.plan_table import make_table
from benchmarks.quality import smollm2
from benchmarks.quality.results_files import RESULTS
from benchmarks.quality.tier_tables import TierResults, make_summary
from lit_unlearn.cli import main as lit_unlearn
from lit_unlearn.evaluation.tables import report_table
from lit_unlearn.utils.io import read_json

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "build/bench"
QUESTION = "Where was the author Lunnian Dunmeth born?"
COMPARED_METHODS = {"match_calibrated_rewound": "MatchCalibrated, rewound", "pdu": "PDU", "npo": "NPO"}
COMPARED_COLUMNS = ("Overall", "forget quality", "repetition", "retain NLL / ε", "forget p", "relearned p")
TOFU_VALUES = (
    "forget_quality",
    "model_utility",
    "forget/probability",
    "forget/rougeL_recall",
    "forget/truth_ratio",
    "forget/extraction_strength",
    "retain/probability",
    "retain/rougeL_recall",
    "retain/truth_ratio",
)


def capture_output(*arguments: str) -> str:
    """Run a command of `lit-unlearn` and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        lit_unlearn(arguments)
    return printed.getvalue().strip()


def find_newest_run() -> Path:
    """Return the run directory of the demo's latest run."""
    reports = (ROOT / "runs/demo/unlearn").glob("version_*/report.json")
    # By time: as text, version_10 comes before version_9.
    return max(reports, key=lambda file: file.stat().st_mtime).parent


def demo_block() -> str:
    """Return the demo's report, and draw its plots."""
    run = find_newest_run()
    capture_output("plot", str(run), "--format", "png", "--output", str(ROOT / "docs/pictures"))
    return f"```text\n{report_table(read_json(run / 'report.json'))}\n```"


def inspect_block() -> str:
    """Return the answers of the demo's models before and after."""
    # The command wraps its text at the width of the terminal.
    os.environ["COLUMNS"] = "100"
    target, unlearned = str(ROOT / "runs/demo/target"), str(ROOT / "runs/demo/unlearned")
    return f"```text\n{capture_output('inspect', target, unlearned, '-q', QUESTION)}\n```"


@functools.cache
def ask_real_models() -> list[dict[str, Any]]:
    """Return the answers of the three models of `make real` to its questions."""
    models = [str(ROOT / real.FOLDER / name) for name in real_tables.MODELS]
    questions = f"--questions={ROOT / real.ROWS / 'questions.jsonl'}"
    printed = capture_output("inspect", *models, questions, "--max_new_tokens=60", "--format=json")
    questions_asked: list[dict[str, Any]] = json.loads(printed)["questions"]
    return questions_asked


def of_finished_run(make_table: Callable[[], str]) -> Callable[[], str | None]:
    """Return a block that is ``None`` where `make real` has not run to its end, which leaves the page as it is."""
    return lambda: make_table() if real_tables.has_finished() else None


def real_authors_block() -> str:
    """Return the answers of the models of `make real` about the forgotten and the retained author."""
    return real_tables.make_answers_table(ask_real_models()[:2])


def real_answers_block() -> str:
    """Return their answers to all questions."""
    return real_tables.make_answers_table(ask_real_models())


def tofu_block() -> str:
    """Return the comparison of the models on TOFU rows, with the values of `TOFU_VALUES` only."""
    folder = ROOT / "runs/tofu"
    retain_only = str(folder / "retain_only.json")
    files = [str(folder / "target.json"), retain_only, str(folder / "unlearned.json")]
    table = capture_output("compare", *files, "--retain", retain_only, "--format", "markdown")
    header, rule, *lines = table.splitlines()
    by_value = {line.split("|")[1].strip(): line for line in lines}
    # A value that could not be computed has no line.
    selected = [by_value[value] for value in TOFU_VALUES if value in by_value]
    return "\n".join([header, rule, *selected])


def comparison_block() -> str:
    """Return a few rows and columns of the comparison on a pretrained model, from its stored results."""
    tier = TierResults.read(RESULTS / "smollm2-10", smollm2.digest("10"))
    return make_summary(tier, "1", COMPARED_METHODS, COMPARED_COLUMNS)


def methods_block() -> str:
    """Return the table of `benchmarks.methods`."""
    results = read_json(BENCH / "methods.json")
    rows = [format_row(name, values) for name, values in results["methods"].items()]
    before = f"forget ROUGE {results['before']['forget_rouge']:.2f}"
    bound = f"the bound, 1.5 × the NLL before, is {format_epsilon(results['methods'])}"
    return f"Before: {before}; {bound}.\n\n{markdown_table(HEADERS, rows)}"


def step_block() -> str:
    """Return the table of `benchmarks.step`, for all shapes together."""
    labels = {"plain": "straightforward", "joint": "`passes: joint` (default)"}
    rows = []
    for shape in read_json(BENCH / "step.json")["shapes"].values():
        for name, values in shape["variants"].items():
            memory = values["memory"]
            model = shape["shape"]
            rows.append(
                [
                    f"{model['layers']} × {model['hidden']}, V {model['vocabulary']:,}, {shape['precision']}",
                    labels.get(name, f"`passes: {name}`"),
                    f"{values['seconds']:.3g}",
                    f"{values['time_ratio']:.2f}",
                    f"{values['time_over_floor']:.1f}",
                    format_mib(memory["peak_bytes"]),
                    f"{values['peak_ratio']:.2f}",
                    format_mib(memory["extra_bytes"]),
                ]
            )
    return markdown_table(["model", "", "s/step", "ratio", "× floor", "peak MiB", "ratio", "extra MiB"], rows)


def startup_block() -> str:
    """Return the table of `benchmarks.startup`."""
    results = read_json(BENCH / "startup.json")
    rows = [[f"`{name}`", f"{statistics.median(seconds):.2f}"] for name, seconds in results["seconds"].items()]
    # The first ratio is to Lightning's command line without transformers.
    ratio = next(iter(results["ratios"].values()))
    table = markdown_table(["command", "seconds"], rows)
    return f"{table}\n\nThe median ratio to Lightning's own command line is {ratio:.2f}."


def plan_block() -> str:
    """Return the table of `benchmarks.plan`."""
    return markdown_table(PLAN_HEADERS, list_rows(read_json(BENCH / "plan.json")))


def gpu_block() -> str | None:
    """Return the tables of `benchmarks.gpu`; ``None`` on a machine that has not measured one, which leaves the page as it is."""
    file = BENCH / "gpu.json"
    return format_results(read_json(file)) if file.is_file() else None


PAGES: dict[str, dict[str, Callable[[], str | None]]] = {
    "README.md": {
        "demo": demo_block,
        "real_authors": of_finished_run(real_authors_block),
        "inspect": inspect_block,
        "comparison": comparison_block,
    },
    "docs/choosing_a_method.md": {"methods": methods_block},
    "docs/evaluation.md": {"tofu": tofu_block},
    "docs/real.md": {
        "real_stages": of_finished_run(real_tables.make_stages_table),
        "real_fits": of_finished_run(real_tables.make_fits_table),
        "real_audit": of_finished_run(real_tables.make_audit_table),
        "real_answers": of_finished_run(real_answers_block),
    },
    "docs/scale.md": {"scale": make_table, "plan": plan_block},
    "docs/speed.md": {"step": step_block, "gpu": gpu_block, "startup": startup_block},
}
"""The blocks of each page by name, in the order in which they stand there."""


def main(arguments: Sequence[str] | None = None) -> None:
    names: list[str] = []
    for blocks in PAGES.values():
        names += blocks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse checks the empty default against the choices, too.
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)} (all)")
    selected = parser.parse_args(arguments).names or names

    for page, blocks in PAGES.items():
        contents = {}
        for name, write_block in blocks.items():
            content = write_block() if name in selected else None
            if content is not None:
                contents[name] = content
        fill_page(ROOT / page, contents)


if __name__ == "__main__":
    main()
