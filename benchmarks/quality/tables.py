"""Writes the tables of docs/results.md from the results files: `make results`."""

from __future__ import annotations

import argparse
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bounds
import protocol
from blocks import fill, markdown
from choose import RETAIN_ONLY, chosen, feasible, read, retain_nll, retain_utility, values

from lit_unlearn.metrics import forget_quality
from lit_unlearn.utils.io import read_json

Result = dict[str, Any]
Column = Callable[[Result], float | None]


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; of one, the number."""
    if not numbers:
        return "–"
    mean = short(statistics.fmean(numbers), digits)
    return mean if len(numbers) == 1 else f"{mean} ± {short(statistics.stdev(numbers), 1)}"


def short(number: float, digits: int) -> str:
    """Without an exponent where it is large."""
    text = f"{number:.{digits}g}"
    return f"{number:.0f}" if "e+" in text else text


def reference(results: Path) -> dict[tuple[int, int], Mapping[str, float]]:
    """What the retain-only models measured, by forget set and seed."""
    found = [one for one in read(results, "models") if one["unit"]["label"] == RETAIN_ONLY]
    return {(one["unit"]["size"], one["unit"]["seed"]): values(one) for one in found}


def measured(key: str) -> Column:
    return lambda result: values(result).get(key)


def difference(key: str, references: Mapping[tuple[int, int], Mapping[str, float]]) -> Column:
    """Signed, to the retain-only model of the same forget set and seed."""
    return lambda result: values(result)[key] - references[result["unit"]["size"], result["unit"]["seed"]][key]


def rows(results: Sequence[Result], columns: Mapping[str, Column], labels: Sequence[str]) -> list[list[str]]:
    """A line per label: every column's spread over seeds; failures keep their line."""
    lines = []
    for label in labels:
        mine = [one for one in results if one["unit"]["label"] == label]
        done = [one for one in mine if "error" not in one]
        if not done:
            lines.append([label, f"failed: {mine[0]['error']}" if mine else "not run", *[""] * (len(columns) - 1)])
            continue
        cells = [[value for one in done if (value := column(one)) is not None] for column in columns.values()]
        failed = f" ({len(mine) - len(done)} failed)" if len(done) < len(mine) else ""
        lines.append([label + failed, *map(spread, cells)])
    return lines


def models(results: Path) -> str:
    """Targets and retain-only models on the forget rows."""
    keys = {
        "truth ratio": "forget/truth_ratio",
        "probability": "forget/probability",
        "ROUGE": "forget/rougeL_recall",
        "NLL": "forget/nll",
        "entropy": "forget/entropy",
        "retain probability": "retain/probability",
        "forget quality": "forget_quality",
    }
    lines = []
    for label in ("target", RETAIN_ONLY):
        for size in protocol.SIZES:
            found = [one for one in read(results, "models") if one["unit"]["label"] == label]
            of_size = [values(one, size) for one in found if str(size) in one.get("measured", {})]
            cells = [[one[key] for one in of_size if one.get(key) is not None] for key in keys.values()]
            lines.append([label.replace("_", "-"), str(size), *map(spread, cells)])
    return markdown(["model", "authors", *keys], lines)


def ceiling(results: Path) -> str:
    """Forget quality of a retain-only model of one seed, judged by that of another: what perfect unlearning would reach."""
    ratios = {
        (one["unit"]["size"], one["unit"]["seed"]): next(iter(one["measured"].values()))["forget_truth_ratios"]
        for one in read(results, "models")
        if one["unit"]["label"] == RETAIN_ONLY
    }
    lines = []
    for size in protocol.SIZES:
        seeds = [seed for of, seed in ratios if of == size]
        pairs = [(a, b) for a in seeds for b in seeds if a < b]
        found = [forget_quality(ratios[size, a], ratios[size, b]) for a, b in pairs]
        lines.append([str(size), *(f"{one:.3g}" for one in found)] if found else [str(size), "needs two seeds"])
    width = max(map(len, lines))
    return markdown(
        ["authors", *[f"pair {n}" for n in range(1, width)]], [line + [""] * (width - len(line)) for line in lines]
    )


def tuned(results: Path) -> str:
    """The settings that the rule chose, and what the other choice would have been."""
    lines = []
    for method in protocol.MAIN:
        try:
            picked = chosen(method, results)
        except (ValueError, StopIteration):
            continue
        best, other = picked["rule"], picked["harmonic"]
        lines.append(
            [
                method,
                "yes" if picked["feasible"] else "NO",
                _settings(best),
                f"{values(best)['forget_quality']:.2g}",
                f"{values(best)['forget/truth_ratio']:.3f}",
                f"{retain_utility(values(best)):.3f}",
                "the same" if other is best else f"{_settings(other)}: {values(other)['forget_quality']:.2g}",
            ]
        )
    head = ["method", "feasible", "chosen", "forget quality", "truth ratio", "retain utility", "by harmonic mean"]
    return markdown(head, lines)


def _settings(result: Result) -> str:
    facts = result["unit"]["facts"]
    main = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in facts["main"].items())
    return f"lr {facts['lr']:g}, {main}"


def comparison(results: Path, stage: str, size: int) -> str:
    """Every method on one forget set: forgetting, what it cost, and how it differs from the retain-only model."""
    found = [one for one in read(results, stage) if one["unit"]["size"] == size]
    references = reference(results)
    ideal = [
        one for one in read(results, "models") if (one["unit"]["label"], one["unit"]["size"]) == (RETAIN_ONLY, size)
    ]
    columns: dict[str, Column] = {
        "forget quality": measured("forget_quality"),
        "truth ratio": measured("forget/truth_ratio"),
        "Δ": difference("forget/truth_ratio", references),
        "forget p": measured("forget/probability"),
        "ROUGE": measured("forget/rougeL_recall"),
        "extraction": measured("forget/extraction_strength"),
        "Δ NLL": difference("forget/nll", references),
        "Δ entropy": difference("forget/entropy", references),
        "fluency": measured("forget/fluency_nll"),
        "retain NLL / ε": lambda one: operator.truediv(*retain_nll(one)) if "report" in one else None,
        "retain utility": lambda one: retain_utility(values(one)),
        "utility": measured("model_utility"),
        "relearnt p": measured("relearn/forget_others/probability"),
        "4-bit p": measured("4bit/forget/probability"),
        "s": lambda one: one.get("seconds"),
        "MiB": lambda one: one.get("peak_mib"),
    }
    labels = sorted({one["unit"]["label"] for one in found})
    lines = rows([*ideal, *found], columns, [RETAIN_ONLY, *labels])
    for line, label in zip(lines, [RETAIN_ONLY, *labels], strict=True):
        mine = [one for one in found if one["unit"]["label"] == label and "error" not in one]
        line.insert(1, "–" if label == RETAIN_ONLY else f"{sum(map(feasible, mine))} of {len(mine)}")
        worst = [values(one)["forget_quality"] for one in mine]
        line.insert(3, f"{min(worst):.2g}" if worst else "–")
    return markdown(["", "holds", next(iter(columns)), "least", *list(columns)[1:]], lines) if found else "Not run yet."


def unseen(results: Path) -> str:
    """The NLL of rows that the targets were not taught, before unlearning."""
    levels = {
        one["unit"]["seed"]: one["report"]["before"]["unseen/nll"]
        for one in read(results, "calibrated")
        if "error" not in one and "unseen/nll" in one["report"]["before"]
    }
    return f"NLL of the targets on rows of ten other authors: {spread(list(levels.values()))} nats per token."


def steps(results: Path) -> str:
    """How many steps each flattening loss needs to an entropy."""
    found = read_json(results / "gradients.json")
    lines = [
        [name, *("over 2000" if count is None else str(count) for count in counts)]
        for name, counts in found["steps"].items()
    ]
    return markdown(["to H / log V =", *(f"{level:g}" for level in found["levels"])], lines)


def held(results: Path) -> str:
    """The retain NLL at the end of a run over each bound: PDU by its start and step size, and fixed weights."""
    lines = []
    for name, runs in bounds.series(results).items():
        if name == "fixed":
            for run in runs:
                ends = dict.fromkeys(protocol.BOUNDS, bounds.growth(run))
                lines.append(_held(f"fixed weight {run['unit']['facts']['weight']:g}", ends))
        else:
            lines.append(_held(name, {run["unit"]["facts"]["bound"]: bounds.growth(run) for run in runs}))
    return markdown(["bound / before:", *(f"{1 + bound:g}" for bound in protocol.BOUNDS), "held"], lines)


def _held(name: str, ends: Mapping[float, float]) -> list[str]:
    shares = {bound: end / (1 + bound) for bound, end in ends.items()}
    cells = [f"{shares[bound]:.2f}" if bound in shares else "failed" for bound in protocol.BOUNDS]
    return [name, *cells, f"{sum(share <= 1 for share in shares.values())} of {len(cells)}"]


def progress(results: Path) -> str:
    """What has been run."""
    whole = {
        "models": len(protocol.SEEDS) * (1 + len(protocol.SIZES)),
        "tuning": 4 * len(protocol.MAIN),
        "final": len(protocol.MAIN) * len(protocol.SIZES) * len(protocol.SEEDS),
        "calibrated": len(protocol.MATCHED) * len(protocol.SIZES) * len(protocol.SEEDS),
        "bounds": len(protocol.BOUNDS) * len(protocol.FIRST) * len(protocol.DUAL_RATES) + len(protocol.WEIGHTS),
    }
    files = {
        stage: "match_*.json" if stage == "calibrated" else "*.json" for stage in whole
    }  # gates cannot be run any more
    done = {stage: len(list((results / stage).glob(pattern))) for stage, pattern in files.items()}
    return "; ".join(f"{stage} {done[stage]} of {count}" for stage, count in whole.items()) + "."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--page", type=Path, default=protocol.ROOT / "docs/results.md")
    options = parser.parse_args(arguments)
    blocks = {"progress": progress, "models": models, "ceiling": ceiling, "steps": steps, "tuned": tuned}
    blocks |= {"held": held, "unseen": unseen}
    contents = {name: block(options.results) for name, block in blocks.items()}
    for size in protocol.SIZES:
        contents[f"final{size}"] = comparison(options.results, "final", size)
        contents[f"calibrated{size}"] = comparison(options.results, "calibrated", size)
    fill(options.page, contents)


if __name__ == "__main__":
    main()
