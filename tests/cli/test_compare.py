"""Results side by side: the table, what is computed against the retain-only model, refusals, and the picture."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_unlearn import cli
from lit_unlearn.cli.cells import STATE_FILE
from lit_unlearn.cli.compare import group_by_seed, name_groups, shorten_names
from lit_unlearn.errors import DataError
from lit_unlearn.evaluation.qa import QABenchmark
from lit_unlearn.evaluation.results import Results
from lit_unlearn.evaluation.seeds import average_results, read_report, seeds_table
from lit_unlearn.plotting import draw_trade_off
from lit_unlearn.utils.io import write_json

KNOWS, KNOWS_NOT = [0.01 * n for n in range(1, 21)], [0.7 + 0.01 * n for n in range(1, 21)]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes small but complete results: truth ratios of the forget rows, Min-K of forget and holdout rows."""

    def make(
        name: str,
        ratios: list[float] = KNOWS_NOT,
        holdout: list[float] | None = None,
        suite: str = "tofu",
        rows: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **aggregate: float | None,
    ) -> str:
        examples = {
            "forget": [{"truth_ratio": r, "min_k": -r} for r in ratios],
            "retain": [{"probability": 0.9}],
            **({} if holdout is None else {"holdout": [{"min_k": value} for value in holdout]}),
        }
        texts = {stream: f"texts of {stream}" for stream in examples} | (rows or {})
        data = {
            stream: {"source": name, "rows": len(one), "texts": texts[stream], "tokens": "same"}
            for stream, one in examples.items()
        }
        values = {"forget/probability": 0.1, "retain/probability": 0.9, "model_utility": 0.6} | {
            key.replace("__", "/"): value for key, value in aggregate.items()
        }
        content = {
            "suite": suite,
            "settings": {"token_budget": len(name), "ratio": "geometric", **(settings or {})},
            "model": model or {},
            "data": data,
            "aggregate": values,
            "missing": {} if "forget_quality" in values else {"forget_quality": "no `retain_results` were given"},
            "examples": examples,
        }
        write_json(tmp_path / name, content)
        return str(tmp_path / name)

    return make


def compare(capsys: Any, *arguments: str) -> dict[str, list[str]]:
    """Every line of the table by its name, the header by the empty one; for warnings see ``said``."""
    cli.main(["compare", *arguments, "--format=csv"])
    captured = capsys.readouterr()
    lines = {line[0]: line[1:] for line in csv.reader(captured.out.splitlines())}
    return lines | {"said": captured.err.splitlines()}


def refused(capsys: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(["compare", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


# Matched damage ---------------------------------------------------------------------------------------------------------

KL = {"measure": "kl", "stream": "retain", "rows": 64, "rows_digest": "a", "limit": 0.01, "value": 0.0096}
MATCHED = {**KL, "reached": True, "step": 7}


def test_models_at_the_same_damage_are_compared(write: Any, capsys: Any) -> None:
    other = {**MATCHED, "value": 0.00999, "limit": 0.010001, "step": 30}
    files = [write("a.json", model={"damage": MATCHED}), write("b.json", model={"damage": other})]
    assert compare(capsys, "--matched", *files)["model_utility"] == ["0.6", "0.6"]
    # Only on request: tables of any models are made as before.
    assert compare(capsys, write("c.json"), *files)["model_utility"] == ["0.6"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "matched/kl.yaml"),
        ({"reached": False, "value": 0.004}, "ended at step 7"),
        ({"value": 0.008}, "more than 10 % off the limit"),
        ({"value": 0.0111}, "more than 10 % off the limit"),
        ({"measure": "nll"}, "measure: 'nll' here, 'kl' there"),
        ({"stream": "general", "rows_digest": "b"}, "stream: 'general' here, 'retain' there; rows_digest: "),
        ({"limit": 0.02, "value": 0.02}, "limit: 0.02 here, 0.01 there"),
    ],
)
def test_models_at_another_damage_are_refused(
    change: dict[str, Any] | None, message: str, write: Any, capsys: Any
) -> None:
    model = None if change is None else {"damage": {**MATCHED, **change}}
    said = refused(capsys, "--matched", write("a.json", model={"damage": MATCHED}), write("b.json", model=model))
    assert "b.json' cannot be compared at matched damage" in said
    assert message in said


# The table --------------------------------------------------------------------------------------------------------------


def test_text_is_aligned_and_shows_a_dash_for_what_is_missing(write: Any, capsys: Any) -> None:
    cli.main(["compare", write("target.json", forget__fluency_nll=None), write("other.json", extra=12345.678)])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "                    target      other",
        "-------------------------------------",
        "model_utility          0.6        0.6",
        "forget_quality           –          –",
        "extra                    –  1.235e+04",
        "forget/probability     0.1        0.1",
        "retain/probability     0.9        0.9",
        "forget/fluency_nll       –          –",
    ]


def test_markdown_and_csv_hold_any_name(write: Any, capsys: Any) -> None:
    files = [write("a.json"), write("b.json")]
    cli.main(["compare", *files, "--format", "markdown", "--names", "a|b", 'c, "d"'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ['|  | a\\|b | c, "d" |', "|---|---|---|", "| model_utility | 0.6 | 0.6 |"]
    assert compare(capsys, *files, "--names", "a|b", 'c, "d"')[""] == ["a|b", 'c, "d"']


def test_names_are_the_shortest_ends_that_tell_files_apart() -> None:
    assert shorten_names([Path("runs/a.json"), Path("b.v2.json")]) == ["a", "b.v2"]
    same = [Path(f"{folder}/tofu.json") for folder in ("x/npo", "x/pdu", "y/pdu")]
    assert shorten_names(same) == ["npo/tofu", "x/pdu/tofu", "y/pdu/tofu"]
    assert shorten_names([Path("a.json"), Path("a.json"), Path("b.json")]) == ["a (1)", "a (2)", "b"]


def test_output_is_written_whole_or_not_at_all(write: Any, tmp_path: Path, capsys: Any) -> None:
    file, output = write("a.json"), tmp_path / "new" / "table.md"
    cli.main(["compare", file, "--format=markdown", f"--output={output}"])
    assert capsys.readouterr().out == ""
    before = output.read_text(encoding="utf-8")
    assert before.startswith("|  | a |\n")
    assert before.endswith("|\n")
    assert "may be a file of yours" in refused(capsys, file, f"--output={output}")
    assert "may be a file of yours" in refused(capsys, file, f"--output={file}")
    with pytest.raises(UnicodeEncodeError):  # in the middle of writing: half a surrogate pair is no UTF-8
        cli.main(["compare", file, f"--output={output}", "--overwrite", "--names", "\ud800"])
    assert output.read_text(encoding="utf-8") == before
    assert [path.name for path in output.parent.iterdir()] == ["table.md"]
    assert f"'{output.parent}' is a folder" in refused(capsys, file, f"--output={output.parent}")


# Against the retain-only model ------------------------------------------------------------------------------------------


def test_forget_quality_is_1_against_oneself_and_tiny_for_separated_samples(write: Any, capsys: Any) -> None:
    retain, target = write("retain.json"), write("target.json", KNOWS)
    before = Path(target).read_bytes()
    found = compare(capsys, target, retain, write("half.json", KNOWS[10:] + KNOWS_NOT[:10]), "--retain", retain)
    quality = [float(cell) for cell in found["forget_quality"]]
    assert found[""] == ["target", "retain", "half"]
    assert quality[0] == pytest.approx(2 / 137846528820, rel=1e-3)  # 2 of the C(40, 20) orders are as far apart
    assert quality[1] == 1
    assert quality[0] < quality[2] < 0.05
    assert found["said"] == []
    assert Path(target).read_bytes() == before
    outside = compare(capsys, target, "--retain", retain)  # the retain-only model need not be shown
    assert (outside[""], outside["forget_quality"]) == (["target"], found["forget_quality"][:1])


def test_privleak_needs_a_holdout_set_on_both_sides(write: Any, capsys: Any) -> None:
    retain = write("retain.json", [0.1, 0.4], holdout=[-0.2, -0.3])
    files = [write("target.json", [0.1, 0.2], holdout=[-0.3, -0.4]), retain]
    found = compare(capsys, *files, "--retain", retain)
    assert found["privleak"] == ["-100", "0"]  # of the retain-only model, 2 of 4 pairs are in order; of the target, all
    alone = write("alone.json", [0.1, 0.4])
    found = compare(capsys, files[0], "--retain", alone)
    assert "privleak" not in found
    assert "privleak of" in found["said"][0]
    assert "`retain_results` with a holdout set" in found["said"][0]
    member = write("member.json", [0.1, 0.4], holdout=[-0.5, -0.6])
    (said,) = compare(capsys, files[0], "--retain", member)["said"]
    assert "1 − AUC of the retain-only model" in said


def test_what_a_file_has_stays_with_a_word_about_it(write: Any, capsys: Any) -> None:
    retain = write("retain.json")
    files = [write("old.json", forget_quality=0.25), write("same.json", forget_quality=1.0), write("none.json")]
    found = compare(capsys, *files, "--retain", retain)
    assert found["forget_quality"] == ["0.25", "1", "1"]
    (said,) = found["said"]
    assert f"'{files[0]}' was compared with other retain-only results: its forget_quality stays" in said
    assert compare(capsys, *files)["forget_quality"] == ["0.25", "1", "–"]
    held = write("held.json", holdout=[-0.1], privleak=0.0)
    assert compare(capsys, held, "--retain", retain)["said"] == []  # for which --retain could not tell it
    twice = write("twice.json", [0.1, 0.4], holdout=[-0.2, -0.3], privleak=0.0)
    other = write("other.json", [0.1, 0.2], holdout=[-0.15, -0.3])
    (said,) = compare(capsys, twice, "--retain", other)["said"]
    assert "its privleak stays" in said


def test_results_without_rows_to_compare_are_said_to_gain_nothing(write: Any, capsys: Any) -> None:
    file = Path(write("a.json"))
    content = json.loads(file.read_text(encoding="utf-8"))
    content["examples"]["forget"] = [{"rougeL_f1": 0.5}]
    file.write_text(json.dumps(content), encoding="utf-8")
    (said,) = compare(capsys, str(file), "--retain", str(file))["said"]
    assert f"'{file}' has no truth ratios" in said


@pytest.mark.parametrize("retain", [True, False])
def test_results_of_other_suites_or_forget_rows_are_refused(retain: bool, write: Any, capsys: Any) -> None:
    file = write("a.json")
    others = {
        "benchmark: 'qa' here, 'tofu' there": write("suite.json", suite="qa"),
        "number of rows: 1 here, 20 there": write("rows.json", [0.5]),
        "questions and answers (another split?): 'forget01' here": write("texts.json", rows={"forget": "forget01"}),
    }
    for message, other in others.items():
        said = refused(capsys, file, other, *(["--retain", file] if retain else []))
        assert f"'{other}': the results of the {'retain-only' if retain else 'first'} model in '{file}'" in said
        assert message in said


def test_other_rows_elsewhere_and_other_settings_are_named(write: Any, capsys: Any) -> None:
    files = [
        write("retain.json"),
        write("a.json", holdout=[-0.1], settings={"ratio": "arithmetic"}),
        write("long.json", holdout=[-0.1], rows={"retain": "fewer", "holdout": "others"}),
    ]
    said = "lit-unlearn: warning: the results differ in {}: do not compare values that depend on that."
    found = compare(capsys, *files)["said"]
    assert found == [said.format("the 'retain' rows, the setting 'ratio', the 'holdout' rows")]
    assert compare(capsys, files[0], files[1])["said"] == [said.format("the setting 'ratio'")]
    assert compare(capsys, files[2], "--retain", files[0])["said"][-1] == said.format("the 'retain' rows")


def test_what_cannot_be_read_or_makes_no_sense_is_refused(write: Any, tmp_path: Path, capsys: Any) -> None:
    file = write("a.json")
    assert "there is no results file 'none.json'" in refused(capsys, "none.json")
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    assert "results file of `lit-unlearn test`" in refused(capsys, file, str(tmp_path / "report.json"))
    assert "2 results files need as many --names, not 1" in refused(capsys, file, file, "--names", "a")
    assert "--figure must end in .png or .svg, unlike 'x.pdf'" in refused(capsys, file, "--figure", "x.pdf")
    bad = write("bad.json", [float("nan")] * 20)
    assert f"'{bad}': `truth_ratio_unlearned` must be at or above 0" in refused(capsys, file, bad, "--retain", file)


def test_a_suite_really_run(tiny_lm: Any, write_rows: Any, tmp_path: Path, capsys: Any) -> None:
    def rows(stream: str, count: int) -> list[dict[str, Any]]:
        wrong = [f"{stream} is wrong", "and this, too"]
        answers = [f"{n} is {stream} " * (1 + n % 3) for n in range(count)]
        return [
            {"question": f"{stream} {n}?", "answer": answer, "perturbed_answer": wrong}
            for n, answer in enumerate(answers)
        ]

    sets = {name: write_rows(f"{name}.jsonl", rows(name, 6)) for name in ("forget", "retain", "holdout")}
    files = {name: str(tmp_path / f"{name}.json") for name in ("first", "second", "beside")}
    for seed, (name, file) in enumerate(files.items()):
        lm = tiny_lm(seed % 2)
        lm.load(torch.float32)
        beside = files["second"] if name == "beside" else None  # the first model again, with the second one's results
        write_json(Path(file), QABenchmark(**sets, max_new_tokens=4, retain_results=beside).run(lm).to_dict())
    missing, both = compare(capsys, files["first"]), compare(capsys, *files.values(), "--retain", files["second"])
    assert missing["forget_quality"] == missing["privleak"] == ["–"]
    assert both["said"] == []  # what is computed here and what the suite computed is the same
    assert both["forget_quality"][1] == "1"
    assert both["privleak"][1] == "0"
    assert both.pop("") == list(files)
    assert [line[0] for line in both.values() if line] == [line[2] for line in both.values() if line]
    figure = tmp_path / "picture.png"
    cli.main(["compare", *files.values(), "--figure", str(figure)])
    assert figure.read_bytes()[:8] == PNG


# Over seeds -------------------------------------------------------------------------------------------------------------


def over_seeds(write: Any, **values: list[float | None]) -> list[str]:
    """Writes results of seeds 0, 1, … whose model utility is given by method; ``None`` for a seed that has none."""
    return [
        write(f"method={method},seed={seed}/tofu.json", model_utility=utility)
        for method, utilities in values.items()
        for seed, utility in enumerate(utilities)
    ]


def test_files_that_differ_in_the_seed_alone_are_a_group(write: Any, capsys: Any) -> None:
    files = over_seeds(write, pdu=[0.5, 0.6, 0.7], npo=[0.4, 0.5, 0.8])
    cli.main(["compare", "--seeds", "--against=method=npo", *files])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ", 1)[1].split() == ["method=pdu", "(3", "seeds)", "p", "method=npo", "(3", "seeds)"]
    # 0.248 = 4.303 × 0.1 / √3, and t = 0.5 with two degrees of freedom.
    assert " ".join(lines[2].split()) == "model_utility 0.6 ± 0.25 0.67 0.5667 ± 0.52"
    assert [" ".join(line.split()) for line in lines if "retain/" in line] == ["retain/probability 0.9 ± 0 – 0.9 ± 0"]


def test_a_value_that_does_not_spread_over_seeds_has_no_p(write: Any, capsys: Any) -> None:
    files = over_seeds(write, pdu=[1.0, 1.0, 1.0], npo=[0.5, 0.5, 0.5])
    cli.main(["compare", "--seeds", "--against=method=npo", *files])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "model_utility" in line]
    assert " ".join(line.split()) == "model_utility 1 ± 0 – 0.5 ± 0"
    cli.main(["compare", "--seeds", "--against=method=npo", "--format=csv", *files])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["p"] for row in rows if row["value"] == "model_utility"} == {"–"}


def test_csv_over_seeds_has_a_line_for_every_value_and_group(write: Any, capsys: Any) -> None:
    files = over_seeds(write, pdu=[0.5, 0.6, 0.7], npo=[0.4])
    cli.main(["compare", "--seeds", "--format=csv", "--names", "a", "b", "--against=a", *files])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    by_group = {row["group"]: row for row in rows if row["value"] == "model_utility"}
    assert list(by_group["a"].values()) == ["model_utility", "a", "3", "3", "0.6", "0.3516", "0.8484", "–"]
    # One seed has no interval, and nothing to pair.
    assert list(by_group["b"].values()) == ["model_utility", "b", "1", "1", "0.4", "–", "–", "–"]


def test_a_value_that_some_seeds_lack_says_so(write: Any, capsys: Any) -> None:
    files = over_seeds(write, pdu=[0.5, None, 0.7])
    cli.main(["compare", "--seeds", *files])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "model_utility" in line]
    assert line.endswith("0.6 ± 1.3 (2 of 3)")


@pytest.mark.parametrize(
    ("paths", "groups"),
    [
        (["method=pdu,seed=0/a.json", "method=pdu,seed=12/a.json"], {"method=pdu/a.json": [0, 12]}),
        (["seed=0,lr=0.1/a.json", "seed=0,lr=0.2/a.json"], {"lr=0.1/a.json": [0], "lr=0.2/a.json": [0]}),
        (["pdu-seed1.json", "pdu_seed_2.json"], {"pdu.json": [1, 2]}),
        (["seed=3/x/a.json"], {"x/a.json": [3]}),
        (["lr=0.1,seed=0.json"], {"lr=0.1.json": [0]}),
        (["data_seed=0,seed=1/a.json", "data_seed=0,seed=2/a.json"], {"data_seed=0/a.json": [1, 2]}),
        (
            ["seed=1,data_seed=0/a.json", "seed=1,data_seed=3/a.json"],
            {"data_seed=0/a.json": [1], "data_seed=3/a.json": [1]},
        ),
        (["run_seed_7/data_seed=0/seed=1/a.json"], {"run_seed_7/data_seed=0/a.json": [1]}),
    ],
)
def test_the_seed_is_found_in_any_part_of_a_path(paths: list[str], groups: dict[str, list[int]]) -> None:
    found = group_by_seed([Path(path) for path in paths])
    assert {path.as_posix(): list(seeds) for path, seeds in found.items()} == groups


def test_paths_without_a_seed_or_with_one_twice_are_refused() -> None:
    for path in ("seeded/a.json", "model.seed=3/a.json", "seed_everything/a.json"):
        with pytest.raises(DataError, match="no seed in its path"):
            group_by_seed([Path(path)])
    with pytest.raises(DataError, match="of the same seed"):
        group_by_seed([Path("a-seed=1.json"), Path("a,seed-1.json")])


def test_groups_are_called_by_what_differs() -> None:
    assert name_groups([Path("x/lr=0.1/a.json"), Path("x/lr=0.2/a.json")]) == ["lr=0.1", "lr=0.2"]
    assert name_groups([Path("x/pdu.json"), Path("x/npo.json")]) == ["pdu", "npo"]
    assert name_groups([Path("x/pdu/a.json")]) == ["a"]


def make_sweep(folder: Path) -> None:
    """Writes the cells of a sweep: two that are done, one that failed, and one that is interrupted."""
    ends = {
        "method=pdu,seed=0": ("done", None),
        "method=pdu,seed=1": ("failed", "fit ended with exit code 1: it diverged"),
        "method=npo,seed=0": ("done", None),
        "method=npo,seed=1": ("unfinished", None),
    }
    for name, (status, reason) in ends.items():
        report = {
            "verdict": "forgotten",
            "constraints": {"nll": {"value": 0.4 if "npo" in name else 0.2, "epsilon": 0.3}},
            "after": {"forget/probability": 0.01, "retain/nll": float("nan")},
            "seconds": 3.5,
            "peak_memory_mib": 100.0,
            "damage": None,
        }
        write_json(folder / name / "report.json", report)
        (folder / name / STATE_FILE).write_text(json.dumps({"status": status, "reason": reason}) + "\n", "utf-8")


def test_a_sweep_is_compared_by_its_reports_and_failures_stay_in(tmp_path: Path, capsys: Any) -> None:
    make_sweep(tmp_path / "sweep")
    cli.main(["compare", str(tmp_path / "sweep"), "--seeds", "--format=csv"])
    captured = capsys.readouterr()
    rows = list(csv.DictReader(captured.out.splitlines()))
    counts = {(row["group"], row["value"]): (row["seeds"], row["runs"], row["mean"]) for row in rows}
    assert counts["method=pdu", "feasible"] == ("1", "2", "1")
    assert counts["method=npo", "feasible"] == ("1", "2", "0")
    assert counts["method=npo", "forgotten"] == ("1", "2", "1")
    assert counts["method=npo", "seconds"] == ("1", "2", "3.5")
    # It is no number, and so it has no mean.
    assert counts["method=pdu", "retain/nll"] == ("0", "2", "–")
    assert "method=pdu,seed=1' has no results: failed, fit ended with exit code 1: it diverged" in captured.err
    assert "method=npo,seed=1' has no results: unfinished, not ended yet" in captured.err

    cli.main(["compare", str(tmp_path / "sweep")])
    header, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["method=npo,seed=0/report", "method=pdu,seed=0/report"]
    assert "no folder of a sweep" in refused(capsys, str(tmp_path))


def test_results_in_a_folder_of_a_cell_are_those_of_the_cell(tmp_path: Path, capsys: Any) -> None:
    make_sweep(tmp_path / "sweep")
    for cell in (tmp_path / "sweep").iterdir():
        (cell / "eval").mkdir()
        (cell / "report.json").rename(cell / "eval" / "report.json")
    # As after a crash between the lock and the first line.
    (tmp_path / "sweep/method=dpo,seed=0").mkdir()
    (tmp_path / "sweep/method=dpo,seed=0" / STATE_FILE).touch()
    cli.main(["compare", str(tmp_path / "sweep"), "--results=eval/report.json", "--format=csv"])
    captured = capsys.readouterr()
    header, *_ = csv.reader(captured.out.splitlines())
    assert header == ["", "method=npo,seed=0/eval/report", "method=pdu,seed=0/eval/report"]
    assert "method=dpo,seed=0' has no results: waiting, not ended yet" in captured.err
    assert captured.err.count("has no results") == 3


def test_a_group_without_any_result_stays_in_the_table() -> None:
    groups = {"pdu": {0: Results("a", {}, {"x": 0.5}, {})}, "rmu": {0: None, 1: None}}
    assert seeds_table(groups).splitlines()[0].split("  ")[-1] == "rmu (0 of 2 seeds)"
    assert average_results(groups["pdu"]).aggregate == {"x": 0.5}


def test_a_report_of_fine_tuning_by_an_earlier_version() -> None:
    """It has neither constraints nor a verdict, and no seconds; the table has its rows in one order."""
    results = read_report({"verdict": None, "constraints": {}, "after": {"forget/nll": 2.0}})
    assert results.aggregate == {"forget/nll": 2.0}
    assert list(results.missing) == ["feasible", "forgotten", "seconds", "peak_memory_mib"]


def write_report(folder: Path, name: str, tokens: str | None = "s", rows: int = 4, **content: Any) -> str:
    """Write the report of a fit on ``rows`` forget rows of the digest ``tokens``; without one, that of an earlier version."""
    report = {"verdict": "forgotten", "constraints": {}, "after": {"forget/nll": 2.0}, "max_forget_probability": 0.2}
    if tokens is not None:
        report["data"] = {"forget": {"rows": rows, "sha256": tokens}, "retain": {"rows": 9, "sha256": "r"}}
    write_json(folder / name / "report.json", {**report, **content})
    return str(folder / name / "report.json")


def test_reports_of_fits_on_other_forget_rows_are_refused(tmp_path: Path, capsys: Any) -> None:
    file = write_report(tmp_path, "a")
    assert compare(capsys, file, write_report(tmp_path, "same"))["said"] == []
    assert "tokens (other rows, " in refused(capsys, file, write_report(tmp_path, "other", "t"))
    assert "number of rows: 5 here, 4 there" in refused(capsys, file, write_report(tmp_path, "more", "t", rows=5))
    retain = {"forget": {"rows": 4, "sha256": "s"}, "retain": {"rows": 8, "sha256": "q"}}
    (said,) = compare(capsys, file, write_report(tmp_path, "retain", data=retain))["said"]
    assert "the results differ in the 'retain' rows" in said


def test_reports_with_another_threshold_are_named(tmp_path: Path, capsys: Any) -> None:
    files = [write_report(tmp_path, "a"), write_report(tmp_path, "b", max_forget_probability=0.5)]
    (said,) = compare(capsys, *files)["said"]
    assert "the setting 'max_forget_probability'" in said
    # Fine-tuning has no verdict that a threshold could decide.
    fine_tuned = write_report(tmp_path, "c", verdict=None, max_forget_probability=0.5)
    assert compare(capsys, files[0], fine_tuned)["said"] == []


def test_reports_of_earlier_versions_are_compared(tmp_path: Path, capsys: Any) -> None:
    old = [write_report(tmp_path, "old", None), write_report(tmp_path, "older", None)]
    assert compare(capsys, *old)["said"] == []
    # Beside one that says which rows it is of, nothing shows that it is of the same.
    new = [write_report(tmp_path, "new"), write_report(tmp_path, "other", "t")]
    for files in ([old[0], new[0]], [new[0], old[0]]):
        (said,) = compare(capsys, *files)["said"]
        assert f"'{old[0]}' is a report that does not say which rows" in said
    assert "tokens (other rows, " in refused(capsys, old[0], *new)


def test_seeds_are_matched_each_among_themselves(write: Any, capsys: Any) -> None:
    # An epsilon that is relative differs between target models, and so between seeds.
    limits = {0: 0.01, 1: 0.02}
    files = []
    for method in ("pdu", "npo"):
        for seed, limit in limits.items():
            damage = {**MATCHED, "limit": limit, "value": 0.98 * limit}
            files.append(write(f"method={method},seed={seed}/a.json", model={"damage": damage}))
    cli.main(["compare", "--seeds", "--matched", *files])
    assert "method=pdu (2 seeds)" in capsys.readouterr().out
    assert "limit: 0.02 here, 0.01 there" in refused(capsys, "--matched", *files)


def test_options_of_groups_are_checked(write: Any, capsys: Any) -> None:
    files = over_seeds(write, pdu=[0.5, 0.6], npo=[0.4, 0.5])
    assert "2 groups of seeds need as many --names, not 1" in refused(capsys, "--seeds", *files, "--names", "a")
    assert "must differ" in refused(capsys, "--seeds", *files, "--names", "a", "a")
    assert "add --seeds" in refused(capsys, *files, "--against=method=pdu")
    assert "no group 'pdu': there are 'method=pdu'" in refused(capsys, "--seeds", *files, "--against=pdu")
    assert "`confidence`" in refused(capsys, "--seeds", *files, "--confidence=95")


# The picture ------------------------------------------------------------------------------------------------------------


def test_pictures_are_images_with_every_name(write: Any, tmp_path: Path) -> None:
    files = [write("retain.json"), write("target.json", KNOWS, model_utility=0.7)]
    for suffix in ("png", "svg"):
        cli.main(["compare", *files, "--retain", files[0], "--figure", str(tmp_path / "new" / f"picture.{suffix}")])
    content = (tmp_path / "new" / "picture.png").read_bytes()
    assert content[:8] == PNG
    assert struct.unpack(">II", content[16:24]) == (1050, 750)
    text = (tmp_path / "new" / "picture.svg").read_text(encoding="utf-8")
    for label in ("retain", "target", "model utility", "forget quality, p-value (1: like the retain-only model)"):
        assert f"<!-- {label} -->" in text
    cli.main(["compare", *files, "--figure", str(tmp_path / "picture.svg")])  # without --retain: no forget quality
    text = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert "<!-- 1 − answer probability on the forget set -->" in text
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_value_that_not_every_model_has_is_not_drawn(write: Any, tmp_path: Path, capsys: Any) -> None:
    files = [write("a.json", forget_quality=0.5), write("b.json", model_utility=None)]
    target = tmp_path / "picture.svg"
    cli.main(["compare", *files, "--figure", str(target)])
    text = target.read_text(encoding="utf-8")
    assert "<!-- 1 − answer probability on the forget set -->" in text
    assert "<!-- answer probability on the retain set -->" in text
    target.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"'model_utility' or 'retain/probability' of every model.* c\."):
        cli.main(["compare", *files, write("c.json", retain__probability=None), "--figure", str(target)])
    assert "forget_quality" in capsys.readouterr().out  # the table needs no picture
    assert not target.exists()


def results_of(*points: tuple[float, float]) -> list[Results]:
    return [Results("tofu", {}, {"forget_quality": x, "model_utility": y}, {}) for x, y in points]


def drawn(results: list[Results], names: list[str], target: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure, once it is drawn."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **kw: (save(self, *rest, **kw), figures.append(self)))
    draw_trade_off(results, names, target)
    figures[0].canvas.draw()  # sizes in pixels are those of the last drawing, which was of another resolution
    return figures[0]


def test_labels_keep_off_each_other_and_off_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(0.9, 0.6), (1.0, 0.6), (0.8, 0.601), (0.9, 0.604), (0.7, 0.597), (1e-9, 0.0), (0.0, 0.3), (1e-200, 0.3)]
    names = ["retain-only", "pdu", "npo", "gradient_difference", "a_$x$", "ga", "target", "dpo"]
    figure = drawn(results_of(*points), names, tmp_path / "picture.png", monkeypatch)
    (axes,) = figure.axes
    labels = {label.get_text(): label for label in axes.texts if label.get_text()}
    assert list(labels) == names
    boxes = [label.get_window_extent() for label in labels.values()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    places = axes.transData.transform([line.get_xydata()[0] for line in axes.lines])
    assert not any(box.contains(*place) for box in boxes for place in places)
    assert all(axes.bbox.contains(*corner) for corner in [*places, *(c for box in boxes for c in (box.min, box.max))])
    looks = [(line.get_color(), line.get_marker()) for line in axes.lines]
    assert len({marker for _, marker in looks}) == len(names)  # told apart in black and white
    assert axes.get_xlabel().endswith("; below 1e-30 drawn there)")


@pytest.mark.parametrize("points", [[(1.0, 0.6)], [(0.45, 0.6), (1.0, 0.6)], [(0.0, 0.0)], [(1e-239, 1.0), (1.0, 0.0)]])
def test_axes_hold_any_values(points: Any, tmp_path: Path, recwarn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model {n}" for n in range(len(points))]
    figure = drawn(results_of(*points), names, tmp_path / "picture.svg", monkeypatch)
    (axes,) = figure.axes
    ticks = axes.get_xticks()
    assert max(ticks) == 1
    assert len(ticks) <= 10
    assert [str(warning.message) for warning in recwarn] == []
