from __future__ import annotations

import json
import math
import re

import pytest

from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.tables import format_table, report_table
from lit_unlearn.utils.io import write_json


def make(slack):
    return {
        "steps": 120,
        "kept_step": 115,
        "before": {"forget/nll": 0.10001, "forget/margin": 21.5, "retain/nll": 0.2, "constraint/nll/value": 0.2},
        "after": {
            "forget/nll": 7.25,
            "forget/margin": 0.4,
            "retain/nll": 0.25,
            "retain/rouge": 0.5,
            "constraint/nll/value": 1,
        },
        "constraints": {
            "nll": {
                "value": 0.3 - slack,
                "slack": slack,
                "epsilon": 0.3,
                "multiplier_before": 100.0,
                "multiplier_after": 87.654,
            }
        },
    }


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_table_has_every_number_in_its_place():
    lines = report_table(make(0.05)).splitlines()
    assert cells(lines[1]) == ["step 115 of 120", "forget before", "forget after", "retain before", "retain after"]
    assert [cells(line) for line in lines[3:6]] == [
        ["NLL, nats per token", "0.1", "7.25", "0.2", "0.25"],
        ["logit margin", "21.5", "0.4", "–", "–"],
        ["rouge", "–", "–", "–", "0.5"],
    ]
    assert len({len(line) for line in lines[:7]}) == 1
    assert lines[0] == lines[2] == lines[6] == "-" * len(lines[0])


@pytest.mark.parametrize(
    ("slack", "verdict"),
    [(0.05, "feasible"), (0.0, "feasible"), (-0.05, "violated"), (-1e-12, "violated"), (math.nan, "violated")],
)
def test_verdict_of_every_constraint(slack, verdict):
    line = report_table(make(slack)).splitlines()[-1]
    assert line.startswith("constraint nll: ")
    assert f"({verdict})" in line
    for number in (f"{0.3 - slack:.4g}", "epsilon 0.3", f"slack {slack:.4g}", "λ 100 → 87.65"):
        assert number in line


def test_constraints_are_judged_one_by_one():
    report = make(0.1)
    report["constraints"]["news"] = make(-0.1)["constraints"]["nll"]
    first, second = report_table(report).splitlines()[-2:]
    assert first.startswith("constraint nll: 0.2 ≤ epsilon 0.3 (feasible)")
    assert second.startswith("constraint news: 0.4 > epsilon 0.3 (violated)")


def test_table_without_constraints_ends_with_the_rule():
    assert set(report_table({**make(0.1), "constraints": {}}).splitlines()[-1]) == {"-"}


def test_json_is_written_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "folder" / "report.json"
    for content in ({"λ": 1.5, "rows": [1, 2]}, make(0.1)):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("existed", [True, False])
def test_json_that_fails_halfway_leaves_everything_as_it_was(tmp_path, existed):
    path = tmp_path / "report.json"
    if existed:
        write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"long": list(range(10_000)), "bad": object()})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {"report.json": '{\n  "old": 1\n}'} if existed else {}
    )


def test_latex_has_rules_and_no_command_in_a_cell():
    lines = format_table([["forget_quality", 0.25], ["a & b", None]], ["", "pdu, 95%"], "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{lr}"
    assert lines[-1] == r"\end{tabular}"
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines if "&" in line]
    assert rows == [["", r"pdu, 95\% \\"], [r"forget\_quality", r"0.25 \\"], [r"a \& b", "– " + r"\\"]]


def test_an_unknown_style_is_refused():
    with pytest.raises(ConfigError, match="`style` must be text, ruled, markdown, csv or latex"):
        format_table([], [""], "html")
