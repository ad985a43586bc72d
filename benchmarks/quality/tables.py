"""Write the tables of docs/results.md from the results files: ``python -m benchmarks.quality.tables``, or ``make results``."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.markdown_blocks import fill_page, markdown_table
from benchmarks.quality import protocol, tier_tables
from benchmarks.quality.bound_pictures import FIXED, RELATIVE_BOUNDS, read_series, relative_growth
from benchmarks.quality.results_files import RESULTS, Result, drop_failed, read_results, select_results
from benchmarks.quality.selection_rule import (
    RETAIN_ONLY,
    choose_settings,
    get_forget_quality,
    get_retain_nll,
    get_values,
    is_feasible,
    retain_utility,
)
from lit_unlearn.metrics import forget_quality
from lit_unlearn.utils.io import read_json

Column = Callable[[Result], float | None]
# Values by size of the forget set and seed.
References = Mapping[tuple[int, int], Mapping[str, float]]

MODEL_COLUMNS = {
    "truth ratio": "forget/truth_ratio",
    "probability": "forget/probability",
    "ROUGE": "forget/rougeL_recall",
    "NLL": "forget/nll",
    "entropy": "forget/entropy",
    "retain probability": "retain/probability",
    "forget quality": "forget_quality",
}


# Numbers -----------------------------------------------------------------------------------------------------------------


def format_spread(numbers: Iterable[float | None], digits: int = 3) -> str:
    """Format the mean ± standard deviation over seeds, without those that have no value; of a single seed, the number."""
    measured = [number for number in numbers if number is not None]
    if not measured:
        return "–"
    mean = format_number(statistics.fmean(measured), digits)
    return mean if len(measured) == 1 else f"{mean} ± {format_number(statistics.stdev(measured), 1)}"


def format_number(number: float, digits: int) -> str:
    """Format a number, without an exponent where it is large."""
    # "g" alone would write 1e+03 for a time of 1000 seconds.
    text = f"{number:.{digits}g}"
    return f"{number:.0f}" if "e+" in text else text


def measured_value(key: str) -> Column:
    """Make a column of a measured value."""
    return lambda result: get_values(result).get(key)


def difference_to_retain_only(key: str, references: References) -> Column:
    """Make a column of the signed difference from the retain-only model of the same forget set and seed."""

    def column(result: Result) -> float:
        reference = references[result["unit"]["size"], result["unit"]["seed"]]
        return get_values(result)[key] - reference[key]

    return column


def used_share_of_epsilon(result: Result) -> float | None:
    """Return retain NLL / ε, or ``None`` for a retain-only model, which has no constraint."""
    if "report" not in result:
        return None
    value, epsilon = get_retain_nll(result)
    return value / epsilon


def read_retain_only(results: Path) -> list[Result]:
    """Return the results of the retain-only models."""
    return select_results(read_results(results, "models"), label=RETAIN_ONLY)


def read_references(results: Path) -> References:
    """Return the values of the retain-only models."""
    references = {}
    for result in read_retain_only(results):
        references[result["unit"]["size"], result["unit"]["seed"]] = get_values(result)
    return references


# Tables ------------------------------------------------------------------------------------------------------------------


def make_line(results: Sequence[Result], label: str, columns: Mapping[str, Column]) -> list[str]:
    """Return a method's line: every column's spread over seeds. A method that failed keeps its line."""
    runs = select_results(results, label=label)
    succeeded = drop_failed(runs)
    if not succeeded:
        reason = f"failed: {runs[0]['error']}" if runs else "not run"
        return [label, reason, *[""] * (len(columns) - 1)]

    failures = len(runs) - len(succeeded)
    line = [f"{label} ({failures} failed)" if failures else label]
    for column in columns.values():
        line.append(format_spread(map(column, succeeded)))
    return line


def make_models_table(results: Path) -> str:
    """Show target models and retain-only models on the forget set."""
    models = read_results(results, "models")
    lines = []
    for label, size in itertools.product(("target", RETAIN_ONLY), protocol.SIZES):
        of_size = []
        for result in select_results(models, label=label):
            # A target model is measured on every forget set, a retain-only model on its own, a failed one on none.
            if str(size) in result.get("measured", {}):
                of_size.append(get_values(result, size))
        line = [label.replace("_", "-"), str(size)]
        for key in MODEL_COLUMNS.values():
            line.append(format_spread(values.get(key) for values in of_size))
        lines.append(line)
    return markdown_table(["model", "authors", *MODEL_COLUMNS], lines)


def make_ceiling_table(results: Path) -> str:
    """Show the forget quality of a retain-only model of one seed, judged by that of another.

    It is the most that perfect unlearning would reach.
    """
    models = read_retain_only(results)
    lines, width = [], 0
    for size in protocol.SIZES:
        of_size = sorted(select_results(models, size=size), key=lambda result: result["unit"]["seed"])
        qualities = []
        for pair in itertools.combinations(of_size, 2):
            first, second = (result["measured"][str(size)]["forget_truth_ratios"] for result in pair)
            qualities.append(f"{forget_quality(first, second):.3g}")
        lines.append([str(size), *(qualities or ["needs two seeds"])])
        width = max(width, len(lines[-1]))

    for line in lines:
        line += [""] * (width - len(line))
    return markdown_table(["authors", *(f"pair {number}" for number in range(1, width))], lines)


def make_tuning_table(results: Path) -> str:
    """Show the settings that the rule chose, and what the other choice would have been."""
    lines = []
    for method in protocol.MAIN:
        try:
            choice = choose_settings(method, results)
        except ValueError:
            # Not tuned yet.
            continue
        rule, harmonic = choice.by_rule, choice.by_harmonic_mean
        values = get_values(rule)
        alternative = f"{format_settings(harmonic)}: {get_forget_quality(harmonic):.2g}"
        lines.append(
            [
                method,
                "yes" if choice.feasible else "NO",
                format_settings(rule),
                f"{values['forget_quality']:.2g}",
                f"{values['forget/truth_ratio']:.3f}",
                f"{retain_utility(values):.3f}",
                "the same" if harmonic is rule else alternative,
            ]
        )
    header = ["method", "feasible", "chosen", "forget quality", "truth ratio", "retain utility", "by harmonic mean"]
    return markdown_table(header, lines)


def format_settings(result: Result) -> str:
    """Format the learning rate and the method's main parameter."""
    facts = result["unit"]["facts"]
    text = f"lr {facts['lr']:g}"
    for key, value in facts["main"].items():
        # The last part of the key is enough to tell a method's two values apart.
        text += f", {key.rpartition('.')[2]} {value:g}"
    return text


def make_comparison_table(results: Path, stage: str, size: int) -> str:
    """Show every method on one forget set: forgetting, its cost, and the difference from the retain-only model."""
    runs = select_results(read_results(results, stage), size=size)
    if not runs:
        return "Not run yet."
    ideal = select_results(read_retain_only(results), size=size)
    references = read_references(results)
    columns: dict[str, Column] = {
        "forget quality": measured_value("forget_quality"),
        "truth ratio": measured_value("forget/truth_ratio"),
        "Δ": difference_to_retain_only("forget/truth_ratio", references),
        "forget p": measured_value("forget/probability"),
        "ROUGE": measured_value("forget/rougeL_recall"),
        "extraction": measured_value("forget/extraction_strength"),
        "Δ NLL": difference_to_retain_only("forget/nll", references),
        "Δ entropy": difference_to_retain_only("forget/entropy", references),
        "fluency": measured_value("forget/fluency_nll"),
        "retain NLL / ε": used_share_of_epsilon,
        "retain utility": lambda result: retain_utility(get_values(result)),
        "utility": measured_value("model_utility"),
        "relearnt p": measured_value("relearn/forget_others/probability"),
        "4-bit p": measured_value("4bit/forget/probability"),
        "s": lambda result: result.get("seconds"),
        "MiB": lambda result: result.get("peak_mib"),
    }

    labels = sorted({result["unit"]["label"] for result in runs})
    lines = []
    for label in [RETAIN_ONLY, *labels]:
        line = make_line([*ideal, *runs], label, columns)
        succeeded = drop_failed(select_results(runs, label=label))
        holds = "–" if label == RETAIN_ONLY else f"{sum(map(is_feasible, succeeded))} of {len(succeeded)}"
        # The mean of a p-value over seeds hides the seed that failed, so that the least stands beside it.
        least = f"{min(map(get_forget_quality, succeeded)):.2g}" if succeeded else "–"
        label_cell, quality, *cells = line
        lines.append([label_cell, holds, quality, least, *cells])

    first, *rest = columns
    return markdown_table(["", "holds", first, "least", *rest], lines)


def make_unseen_line(results: Path) -> str:
    """Show the NLL of examples that the target models were not fine-tuned on, before unlearning."""
    levels = {}
    for result in drop_failed(read_results(results, "calibrated")):
        before = result["report"]["before"]
        # All runs of a seed start from the same target model, so that one of them is enough.
        if "unseen/nll" in before:
            levels[result["unit"]["seed"]] = before["unseen/nll"]
    return f"NLL of the targets on rows of ten other authors: {format_spread(list(levels.values()))} nats per token."


def make_steps_table(results: Path) -> str:
    """Show the number of steps that each flattening loss needs to reach an entropy."""
    gradients = read_json(results / "gradients.json")
    lines = []
    for name, counts in gradients["steps"].items():
        line = [name]
        for count in counts:
            line.append("over 2000" if count is None else str(count))
        lines.append(line)
    return markdown_table(["to H / log V =", *map("{:g}".format, gradients["levels"])], lines)


def make_bounds_table(results: Path) -> str:
    """Show the retain NLL at the end of a run over each bound: PDU by first λ and step size, and fixed weights."""
    lines = []
    for name, runs in read_series(results).items():
        if name == FIXED:
            # A fixed weight has no bound: the one run is judged by all of them.
            for run in runs:
                growth = dict.fromkeys(protocol.BOUNDS, relative_growth(run))
                lines.append(make_bounds_line(f"fixed weight {run['unit']['facts']['weight']:g}", growth))
        else:
            growth = {}
            for run in runs:
                growth[run["unit"]["facts"]["bound"]] = relative_growth(run)
            lines.append(make_bounds_line(name, growth))
    return markdown_table(["bound / before:", *map("{:g}".format, RELATIVE_BOUNDS), "held"], lines)


def make_bounds_line(name: str, growth: Mapping[float, float]) -> list[str]:
    """Return the share of every bound that the retain NLL reached, and how often that is at most 1."""
    cells, satisfied = [], 0
    for bound in protocol.BOUNDS:
        if bound not in growth:
            cells.append("failed")
            continue
        share = growth[bound] / (1 + bound)
        cells.append(f"{share:.2f}")
        satisfied += share <= 1
    return [name, *cells, f"{satisfied} of {len(protocol.BOUNDS)}"]


def make_progress_line(results: Path) -> str:
    """Show the number of units of each stage that have a result."""
    planned = {
        "models": len(protocol.SEEDS) * (1 + len(protocol.SIZES)),
        "tuning": 4 * len(protocol.MAIN),
        "final": len(protocol.MAIN) * len(protocol.SIZES) * len(protocol.SEEDS),
        "calibrated": len(protocol.MATCHED) * len(protocol.SIZES) * len(protocol.SEEDS),
        "bounds": len(protocol.BOUNDS) * len(protocol.FIRST) * len(protocol.DUAL_RATES) + len(protocol.WEIGHTS),
    }
    progress = []
    for stage, count in planned.items():
        finished = read_results(results, stage)
        if stage == "calibrated":
            # The gates have results, but their code is gone: they are no longer part of the plan.
            finished = [result for result in finished if result["unit"]["label"].startswith("match_")]
        progress.append(f"{stage} {len(finished)} of {count}")
    return "; ".join(progress) + "."


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the blocks of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--page", type=Path, default=protocol.ROOT / "docs/results.md", help="page to fill")
    options = parser.parse_args(arguments)
    results: Path = options.results
    contents = {
        "progress": make_progress_line(results),
        "models": make_models_table(results),
        "ceiling": make_ceiling_table(results),
        "steps": make_steps_table(results),
        "tuned": make_tuning_table(results),
        "held": make_bounds_table(results),
        "unseen": make_unseen_line(results),
    }
    for size in protocol.SIZES:
        contents[f"final{size}"] = make_comparison_table(results, "final", size)
        contents[f"calibrated{size}"] = make_comparison_table(results, "calibrated", size)
    fill_page(options.page, contents | tier_tables.make_blocks(results))


if __name__ == "__main__":
    main()
