"""The goals of the comparisons on real models, and the tables that say what is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from quality_tiers import make_report, make_tofu_results

from benchmarks import readme
from benchmarks.markdown_blocks import fill_page
from benchmarks.quality import collecting, goals, smollm2, tier_tables
from benchmarks.quality.results_files import RESULTS, write_json_lines


def make_line(method: str | None = None, **values: Any) -> dict[str, Any]:
    labels = {"seed": "0", "size": "1"} | ({} if method is None else {"method": method})
    tofu = make_tofu_results(**values.pop("tofu", {}))
    probability = values.pop("relearned", 0.2)
    relearned = {label: {"probability": probability} for label in tier_tables.RELEARNING}
    line = {
        "cell": ",".join(f"{axis}={label}" for axis, label in labels.items()),
        "labels": labels,
        "protocol": smollm2.digest("10"),
        "commit": "abc",
        "report": make_report(values.pop("nll", 0.1)),
        "tofu": collecting._summarize_tofu(tofu),
        "attack": relearned,
        "depth": {"unlearning_depth": values.pop("uds", 0.9)},
    }
    return line | values


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "abcde"),
        ({"nll": 0.21}, "bcde"),
        ({"tofu": {"forget_quality": 0.05}}, "acde"),
        ({"tofu": {"forget_quality": 0.3, "forget__fluency_nll": 0.4}}, "abde"),
        ({"tofu": {"forget_quality": 0.3, "forget__repetition": 0.06}}, "abde"),
        ({"relearned": 0.41}, "abce"),
        ({"uds": 0.3}, "abcd"),
    ],
)
def test_each_goal_can_be_missed(changes: dict[str, Any], expected: str) -> None:
    values = {"tofu": {"forget_quality": 0.3}, "nll": 0.1, "uds": 0.99, **changes}
    # As many memories as the retain-only model, whose Privacy is 1.
    for_all = {f"attack_score/{name}".replace("/", "__"): 0.99 for name in ("min_k", "min_k_plus_plus", "loss", "zlib")}
    values["tofu"] = {**for_all, **values["tofu"]}
    line, reference = make_line("ours", **values), make_line()
    results = tier_tables.TierResults([reference], [make_line()], [line, make_line("theirs", uds=0.5)], [])
    reached = tier_tables.judge_methods(results, results.unlearned, ["theirs"], {})["ours"]
    assert "".join(name for name, value in reached.items() if value is True) == expected
    assert None not in reached.values()


def test_the_ablation_stands_beside_the_whole_method_on_its_seeds(in_tmp: Path) -> None:
    digest = smollm2.digest("10")
    assert tier_tables.make_ablation(Path(), digest, "1") == "Not run yet."
    other = make_line(smollm2.ABLATED)
    other["labels"] = {**other["labels"], "seed": "1"}
    write_json_lines(Path("reference.jsonl"), [make_line()])
    write_json_lines(Path("final.jsonl"), [make_line("pdu"), other, make_line(smollm2.ABLATED)])
    write_json_lines(Path("ablation.jsonl"), [make_line("without_rewind", uds=0.5)])
    table = tier_tables.make_ablation(Path(), digest, "1").splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == ["retain-only", "target", smollm2.ABLATED, "without_rewind"]
    # Of one seed, there is no interval.
    assert "±" not in table[4]


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    line = make_line("ours")
    for file in ("report", "attack", "tofu"):
        del line[file]
    assert goals.judge(line, make_line(), {}, ()) == dict.fromkeys("abcde")


@pytest.mark.parametrize(("overalls", "reached"), [({"": 0.9, "ours": 0.89}, None), ({"": 0.9, "ours": 0.8}, False)])
def test_the_best_of_one_is_not_known_to_be_the_best(overalls: dict[str, float], reached: bool | None) -> None:
    assert goals.judge(make_line("ours"), make_line(), overalls, ["theirs"])["e"] is reached


def test_overall_by_hand() -> None:
    line, reference, target = make_line("ours", uds=0.8), make_line(), make_line(tofu={"model_utility": 0.8})
    parts = goals.compute_parts(line, reference, target)
    # All answers are as fluent as the retain-only model's.
    utility, utility_target = 2 / (1 / 0.5 + 1), 2 / (1 / 0.8 + 1)
    assert parts["privacy"] == pytest.approx(0.8)
    assert parts["utility"] == pytest.approx(utility / utility_target)
    assert parts["overall"] == pytest.approx(3 / (1 / 0.6 + 1 / 0.8 + utility_target / utility))
    assert goals.compute_parts(reference, reference, target)["privacy"] == 1
    assert "overall" not in goals.compute_parts(line, None, target)


def test_the_rule_takes_most_goals_and_then_forget_quality() -> None:
    infeasible = make_line("ours", nll=0.3, tofu={"forget_quality": 0.9})
    better, worse = (make_line("ours", tofu={"forget_quality": quality}) for quality in (0.3, 0.2))
    assert goals.choose_run([infeasible, worse, better], [make_line()]) is better


def test_tables_keep_failures_and_say_what_was_not_run(in_tmp: Path) -> None:
    folder = Path("results/smollm2-10")
    failed = {**make_line("npo"), "error": "fit ended with exit code 1: it diverged"}
    write_json_lines(folder / "final.jsonl", [make_line("pdu", uds=0.7, tofu={"forget_quality": 0.3}), failed])
    write_json_lines(folder / "reference.jsonl", [make_line()])
    write_json_lines(folder / "target.jsonl", [make_line()])
    ceiling = make_line(uds=0.6)
    del ceiling["report"]
    write_json_lines(folder / "ceiling.jsonl", [ceiling])
    blocks = tier_tables.make_blocks(Path("results"))
    lines = blocks["smollm2-10"].splitlines()
    assert "| 1 | 0 | pdu | yes | yes | yes | yes | NO |" in lines
    assert any(line.startswith("| 1 | 0 | npo | failed: fit ended with exit code 1: it diverged |") for line in lines)
    assert any(line.startswith("| pdu | 1 of 1 | 0.7") for line in lines)
    assert any(line.startswith("| retain-only |") for line in lines)
    assert any(line.startswith("| retain-only, another seed | – | 0.7") for line in lines)
    assert lines.count("Not run yet.") == 1  # on 2 authors
    assert lines[-1] == "Commits: abc."
    assert blocks["smollm2-20"] == blocks["tofu-1b"] == "Not run yet."


def test_results_of_another_protocol_are_refused(in_tmp: Path) -> None:
    write_json_lines(Path("results/smollm2-10/final.jsonl"), [{**make_line("pdu"), "protocol": "another"}])
    with pytest.raises(ValueError, match="another protocol"):
        tier_tables.make_blocks(Path("results"))


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("docs/results.md", lambda: tier_tables.make_blocks(RESULTS)),
        ("README.md", lambda: {"comparison": readme.comparison_block()}),
    ],
    ids=["results", "readme"],
)
def test_the_pages_have_the_tables_of_the_kept_results(
    page: str, blocks: Callable[[], dict[str, str]], tmp_path: Path
) -> None:
    copy = tmp_path / "page.md"
    shutil.copy(ROOT / page, copy)
    fill_page(copy, blocks())
    assert copy.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")
