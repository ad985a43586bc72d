"""Tables of the tiers on real models, from their results files: the goals as yes or no, and what is behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.markdown_blocks import markdown_table
from benchmarks.quality import smollm2, tofu_1b
from benchmarks.quality.collecting import Line, read_lines, select_lines
from benchmarks.quality.goals import (
    Goals,
    Parts,
    compute_parts,
    find_line,
    get_nll_share,
    get_relearned,
    get_tofu,
    get_value,
    judge,
)
from benchmarks.quality.measuring import RELEARNING
from benchmarks.quality.results_files import drop_failed
from lit_unlearn.evaluation.verdict import is_feasible
from lit_unlearn.metrics.intervals import seeds_interval

NOT_RUN = "not run yet"
GOALS = ("a", "b", "c", "d", "e")

Column = Callable[[Line, Parts], float | None]

COLUMNS: dict[str, Column] = {
    "Overall": lambda line, parts: parts.get("overall"),
    "Memorization": lambda line, parts: parts.get("memorization"),
    "Privacy": lambda line, parts: parts.get("privacy"),
    "Utility": lambda line, parts: parts.get("utility"),
    "forget quality": lambda line, parts: get_tofu(line, "forget_quality"),
    "truth ratio": lambda line, parts: get_tofu(line, "forget/truth_ratio"),
    "forget p": lambda line, parts: get_tofu(line, "forget/probability"),
    "extraction": lambda line, parts: get_tofu(line, "forget/extraction_strength"),
    "model utility": lambda line, parts: get_tofu(line, "model_utility"),
    "fluency": lambda line, parts: get_tofu(line, "forget/fluency_nll"),
    "repetition": lambda line, parts: get_tofu(line, "forget/repetition"),
    "retain NLL / ε": lambda line, parts: get_nll_share(line),
    "relearned p": lambda line, parts: get_relearned(line, RELEARNING[0]),
    "by LoRA": lambda line, parts: get_relearned(line, RELEARNING[1]),
    "4-bit p": lambda line, parts: get_value(line, "attack", "4 bits", "probability"),
    "leak@8": lambda line, parts: get_value(line, "attack", "sampled", "rougeL_recall"),
    "UDS": lambda line, parts: get_value(line, "depth", "unlearning_depth"),
    "s": lambda line, parts: get_value(line, "report", "seconds"),
    "MiB": lambda line, parts: get_value(line, "report", "peak_memory_mib"),
}


class TierResults(NamedTuple):
    """The results files of a tier: of its retain-only models, its target models, unlearned ones, and retain-only models of other seeds."""

    reference: list[Line]
    target: list[Line]
    unlearned: list[Line]
    ceiling: list[Line]

    @classmethod
    def read(cls, folder: Path, digest: str, stage: str = "final") -> TierResults:
        """Read what is there."""
        files = [folder / f"{name}.jsonl" for name in ("reference", "target", stage, "ceiling")]
        return cls(*[read_lines(file, digest) for file in files])

    def compute_parts(self, line: Line) -> Parts:
        """Compute the parts of Overall for a line."""
        return compute_parts(line, find_line(self.reference, line), find_line(self.target, line))

    def select(self, **labels: str) -> list[Line]:
        """Return the lines of unlearned models with these labels."""
        return select_lines(self.unlearned, **labels)


def make_blocks(results: Path) -> dict[str, str]:
    """Return the contents of the page's blocks, by name.

    Args:
        results: Folder of all results files.
    """
    blocks = {}
    for size, grid in smollm2.GRIDS.items():
        folder, digest = results / f"smollm2-{size}", smollm2.digest(size)
        authors = list(map(str, grid.selection.sizes))
        published = [name for name in smollm2.METHODS if name not in smollm2.OURS]
        tier = TierResults.read(folder, digest)
        blocks[f"smollm2-{size}"] = make_tier(tier, authors, published)
        matched = TierResults.read(folder, digest, "matched")
        # What depends on the first table says nothing where that is empty.
        has_run = bool(tier.unlearned)
        blocks[f"smollm2-{size}-ablation"] = make_ablation(folder, digest, str(grid.one_size)) if has_run else ""
        blocks[f"smollm2-{size}-matched"] = make_comparison(matched, str(grid.one_size)) if has_run else ""
    tier = TierResults.read(results / "tofu-1b", tofu_1b.digest())
    blocks["tofu-1b-grid"] = make_grid_table(tier)
    tables = make_tier(tier, [str(tofu_1b.AUTHORS)], list(tofu_1b.PUBLISHED), tofu_1b.PUBLISHED)
    blocks["tofu-1b"] = tables
    return blocks


def make_tier(
    tier: TierResults, sizes: Sequence[str], published: Sequence[str], elsewhere: Mapping[str, float] | None = None
) -> str:
    """Return the table of goals, and for each forget set that of all methods.

    Args:
        tier: The results.
        sizes: Forget sets, in authors.
        published: Names of the methods to exceed.
        elsewhere: Overall of methods whose models are not here.
    """
    if not tier.unlearned:
        return f"{NOT_RUN.capitalize()}."
    tables = [make_goals_table(tier, sizes, published, elsewhere or {})]
    for size in sizes:
        tables += [f"{size} of the authors forgotten:", make_comparison(tier, size)]
    lines = [*tier.reference, *tier.target, *tier.unlearned]
    commits = sorted({line["commit"] for line in lines})
    tables.append(f"Commits: {', '.join(commits)}.")
    return "\n\n".join(tables)


def make_goals_table(
    tier: TierResults, sizes: Sequence[str], published: Sequence[str], elsewhere: Mapping[str, float]
) -> str:
    """Show which goals each method reaches on each forget set and seed."""
    rows = []
    for size in sizes:
        seeds = {line["labels"]["seed"] for line in tier.select(size=size)}
        for seed in sorted(seeds, key=int):
            lines = tier.select(size=size, seed=seed)
            goals = judge_methods(tier, lines, published, elsewhere)
            overalls = compute_overalls(tier, lines)
            for method in list_methods(lines):
                reached = goals[method]
                if isinstance(reached, str):
                    cells = [reached, *[""] * len(GOALS)]
                else:
                    share = overalls[method] / overalls[""] if {method, ""} <= overalls.keys() else None
                    cells = [*map(format_goal, reached.values()), "–" if share is None else f"{share:.1%}"]
                rows.append([size, seed, method, *cells])
            if missing := [method for method in list_methods(tier.unlearned) if method not in goals]:
                rows.append([size, seed, ", ".join(missing), NOT_RUN, *[""] * len(GOALS)])
    return markdown_table(["authors", "seed", "method", *map("({})".format, GOALS), "Overall, share"], rows)


def judge_methods(
    tier: TierResults, lines: Sequence[Line], published: Sequence[str], elsewhere: Mapping[str, float]
) -> dict[str, Goals | str]:
    """Return the goals of each method on one forget set and seed, or why it failed.

    Args:
        tier: All results.
        lines: Of the methods, on this forget set and seed.
        published: As for `make_tier`.
        elsewhere: As for `make_tier`.
    """
    overalls = {**elsewhere, **compute_overalls(tier, lines)}
    reference = find_line(tier.reference, lines[0])
    goals: dict[str, Goals | str] = {}
    for line in lines:
        method = line["labels"]["method"]
        is_failed = "error" in line
        goals[method] = f"failed: {line['error']}" if is_failed else judge(line, reference, overalls, published)
    return goals


def compute_overalls(tier: TierResults, lines: Sequence[Line]) -> dict[str, float]:
    """Return Overall by method on one forget set and seed, as far as it was measured; the retain-only model's has the name ``""``."""
    succeeded = drop_failed(lines)
    reference = find_line(tier.reference, lines[0])
    overalls = {}
    for line in succeeded if reference is None else [reference, *succeeded]:
        # The retain-only model has no method's name.
        method = line["labels"].get("method", "")
        if (overall := tier.compute_parts(line).get("overall")) is not None:
            overalls[method] = overall
    return overalls


def format_goal(reached: bool | None) -> str:
    """Format whether a goal is reached; a dash where it was not measured."""
    return "–" if reached is None else "yes" if reached else "NO"


def make_comparison(tier: TierResults, size: str) -> str:
    """Show every method on one forget set, mean ± half the 95 % interval over seeds; what failed keeps its line."""
    if not tier.select(size=size):
        return f"{NOT_RUN.capitalize()}."
    groups = {
        "retain-only": select_lines(tier.reference, size=size),
        "target": select_lines(tier.target, size=size),
    }
    if ceiling := select_lines(tier.ceiling, size=size):
        groups["retain-only, another seed"] = ceiling
    for method in list_methods(tier.unlearned):
        groups[method] = tier.select(size=size, method=method)
    rows = [make_row(tier, name, lines) for name, lines in groups.items()]
    return markdown_table(["", "seeds", "holds", *COLUMNS], rows)


def make_ablation(folder: Path, digest: str, size: str) -> str:
    """Show the recommended method without each of its parts, on the seeds and the forget set that the stage has, and whole."""
    tier = TierResults.read(folder, digest, "ablation")
    seeds = {line["labels"]["seed"] for line in tier.unlearned}
    whole = []
    for line in select_lines(read_lines(folder / "final.jsonl", digest), size=size, method=smollm2.ABLATED):
        if line["labels"]["seed"] in seeds:
            whole.append(line)
    references = [line for line in tier.reference if line["labels"]["seed"] in seeds]
    targets = [line for line in tier.target if line["labels"]["seed"] in seeds]
    return make_comparison(TierResults(references, targets, [*whole, *tier.unlearned], []), size)


def make_summary(tier: TierResults, size: str, methods: Mapping[str, str], columns: Sequence[str]) -> str:
    """Show a few methods and columns on one forget set, with the value of every seed.

    Args:
        tier: The results.
        size: Forget set, in authors.
        methods: What to show each method as.
        columns: Of `COLUMNS`.
    """
    groups = {"retain-only model": tier.reference}
    for method, title in methods.items():
        groups[title] = tier.select(method=method)

    rows = []
    for title, lines in groups.items():
        of_size = drop_failed(select_lines(lines, size=size))
        by_seed = sorted(of_size, key=lambda line: int(line["labels"]["seed"]))
        parts = list(map(tier.compute_parts, by_seed))
        row = [title, ", ".join(line["labels"]["seed"] for line in by_seed) or NOT_RUN]
        for column in columns:
            values = list(map(COLUMNS[column], by_seed, parts))
            row.append(", ".join("–" if value is None else f"{value:.2g}" for value in values))
        rows.append(row)
    return markdown_table(["", "seeds", *columns], rows)


def make_row(tier: TierResults, name: str, lines: Sequence[Line]) -> list[str]:
    """Return the row of a method, or of a kind of model, on one forget set.

    Args:
        tier: All results.
        name: To show.
        lines: By seed.
    """
    # Published models have no seed.
    labels = [line["labels"]["seed"] for line in lines if "seed" in line["labels"]]
    seeds = ", ".join(sorted(labels, key=int))
    succeeded = drop_failed(lines)
    if not succeeded:
        reason = f"failed: {lines[0]['error']}" if lines else NOT_RUN
        return [name, seeds, reason, *[""] * len(COLUMNS)]

    failures = len(lines) - len(succeeded)
    shares = list(map(get_nll_share, succeeded))
    # A model that was fine-tuned has no bound to hold.
    has_bound = any(share is not None for share in shares)
    holds = sum(is_feasible(share, 1.0) for share in shares)
    label = f"{name} ({failures} failed)" if failures else name
    row = [label, seeds, f"{holds} of {len(shares)}" if has_bound else "–"]
    parts = list(map(tier.compute_parts, succeeded))
    for column in COLUMNS.values():
        row.append(format_mean(map(column, succeeded, parts)))
    return row


def make_grid_table(tier: TierResults) -> str:
    """Show the public grid's best row of each method, and ours beside them."""
    rows = [["retain-only", f"{tofu_1b.PUBLISHED_RETAIN_ONLY:.3f}", "", "", "", "grid"]]
    for name, overall in tofu_1b.PUBLISHED.items():
        rows.append([name, f"{overall:.3f}", "", "", "", "grid"])
    for method in tofu_1b.METHODS:
        label = f"{method} (recommended)" if method == tofu_1b.RECOMMENDED else method
        lines = drop_failed(tier.select(method=method))
        values = []
        for name in ("Overall", "Memorization", "Privacy", "Utility"):
            values.append(format_mean(map(COLUMNS[name], lines, map(tier.compute_parts, lines))))
        rows.append([label, *values, "ours"] if lines else [label, NOT_RUN, "", "", "", "ours"])
    return markdown_table(["method", "Overall", "Memorization", "Privacy", "Utility", "source"], rows)


def list_methods(lines: Iterable[Line]) -> list[str]:
    """Return the methods of lines in the order of the protocols, the recommended one first."""
    present = [line["labels"]["method"] for line in lines]
    order = {**smollm2.METHODS, **smollm2.ABLATIONS, **tofu_1b.METHODS}
    return [name for name in order if name in present]


def format_mean(numbers: Iterable[float | None]) -> str:
    """Format the mean over seeds ± half of Student's 95 % interval; of one seed, the number; a dash where there is none."""
    measured = [number for number in numbers if number is not None]
    if not measured:
        return "–"
    mean, low, high = seeds_interval(measured, 0.95)
    text = f"{mean:.3g}" if abs(mean) < 1000 else f"{mean:.0f}"
    return f"{text} ± {(high - low) / 2:.2g}" if math.isfinite(low) else text
