"""The ledger: whole lines from many writers, changes that show, and the chain of models."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lit_unlearn.errors import ConfigError, DataError, MissingFileError
from lit_unlearn.export.ledger import (
    append_entry,
    build_constraints,
    check_ledger,
    describe_export,
    find_latest_audit,
    find_request_audit,
    format_ledger,
    label_exports,
    list_ancestors,
    list_requests,
    list_unaudited_requests,
    match_rows,
    read_ledger,
)
from lit_unlearn.utils.io import file_digest


def entry(model: str, parent: str | None = None, kind: str = "export", **more: Any) -> dict[str, Any]:
    weights = {"model.safetensors": model}
    parents = {} if parent is None else {"model.safetensors": parent}
    content = {"kind": kind, "created": "now", "request": model, "forget": {"rows": 3}, "verdict": "forgotten"}
    return {**content, "model": weights, "parent": parents, **more}


def test_lines_are_appended_and_chained(tmp_path: Path) -> None:
    file = tmp_path / "new" / "ledger.jsonl"
    for name in "abc":
        append_entry(file, entry(name))
    lines = file.read_text("utf-8").splitlines()
    entries = read_ledger(file)
    assert [json.loads(line) for line in lines] == entries
    assert entries[0]["previous"] is None
    assert len({written["previous"] for written in entries}) == 3
    # Nothing that is there is ever written again.
    before = file.read_bytes()
    append_entry(file, entry("d"))
    assert file.read_bytes().startswith(before)


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    names = [str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: append_entry(file, entry(name)), names))
    assert sorted(written["request"] for written in read_ledger(file)) == sorted(names)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0].replace("forgotten", "not forgotten"), *lines[1:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[0], *lines[1:]],
    ],
    ids=["changed", "removed", "exchanged", "added"],
)
def test_a_changed_ledger_is_refused(change: Any, tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    for name in "abc":
        append_entry(file, entry(name))
    file.write_text("\n".join(change(file.read_text("utf-8").splitlines())) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line [123]"):
        read_ledger(file)


def test_a_torn_line_stays_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    append_entry(file, entry("a"))
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"previous": "')
    assert [written["request"] for written in read_ledger(file)] == ["a"]
    append_entry(file, entry("b"))
    assert [written["request"] for written in read_ledger(file)] == ["a", "b"]
    assert len(file.read_text("utf-8").splitlines()) == 3
    with pytest.raises(MissingFileError):
        read_ledger(tmp_path / "nowhere")


def test_a_model_comes_from_the_entry_that_wrote_its_files() -> None:
    entries = [
        entry("first", "target"),
        entry("elsewhere", "unknown"),
        entry("second", "first"),
        entry("second", kind="audit", verdict="fail"),
        entry("second", kind="audit", verdict="pass"),
        entry("third", "second"),
    ]
    assert [ancestor["request"] for ancestor in list_ancestors(entries, entries[-1])] == ["second", "first"]
    assert list_ancestors(entries, entries[1]) == []
    latest = find_latest_audit(entries, entries[2])
    assert latest is not None
    assert latest["verdict"] == "pass"
    assert find_latest_audit(entries, entries[0]) is None


def test_earlier_requests_are_to_be_audited_on_the_newest_model() -> None:
    entries = [
        entry("1", "0", request="ann"),
        entry("1", kind="audit", request="ann"),
        entry("2", "1", request="bob"),
        entry("3", "2", request="carl"),
        entry("elsewhere", "0", request="dora"),
    ]
    # What was forgotten for Ann was so of an earlier model.
    assert list_unaudited_requests(entries, entries[3]) == ["ann", "bob", "carl"]
    entries += [entry("3", kind="audit", request=name) for name in ("carl", "ann")]
    assert list_unaudited_requests(entries, entries[3]) == ["bob"]


def test_an_audit_counts_for_a_request_if_it_was_of_its_rows() -> None:
    ann = entry("1", "0", request="ann", forget={"rows": 3, "file_sha256": "a"})
    by_rule = entry("2", "1", request="bob", forget={"rows": 4, "file_sha256": None})
    entries = [ann, by_rule]

    def add_audit(request: str, rows: int, file: str | None, verdict: str, policy: str) -> None:
        forget = {"rows": rows, "file_sha256": file}
        audited = {"request": request, "forget": forget, "verdict": verdict, "policy_sha256": policy}
        entries.append(entry("2", kind="audit", **audited))

    add_audit("ann", 3, "another file", "pass", "p")
    assert list_unaudited_requests(entries, by_rule) == ["ann", "bob"]
    add_audit("ann", 3, "a", "fail", "p")
    add_audit("bob", 4, "a file of their own", "pass", "p")
    assert list_unaudited_requests(entries, by_rule) == []
    found = find_request_audit(entries, by_rule, ann, "p")
    assert found is not None
    assert found["verdict"] == "fail"
    assert find_request_audit(entries, by_rule, ann, "another policy") is None


def test_constraints_remember_every_request_behind_the_newest_model(tmp_path: Path) -> None:
    files = []
    for name in ("ann", "bob", "other"):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text(name, encoding="utf-8")
    digests = [file_digest(Path(file)) for file in files]
    entries = [
        entry(
            "1",
            "0",
            request="ann c-17",
            forget={"file_sha256": digests[0], "loss": 5.0},
            method="LogitMargin",
            method_settings={"power": 2.0},
        ),
        entry("elsewhere", "0", request="dora", forget={"file_sha256": "unknown", "loss": 1.0}),
        entry("2", "1", request=None),
        entry("3", "2", request="bob", forget={"file_sha256": digests[1], "loss": 2.0}, method="LogitMargin"),
    ]
    requests = list_requests(entries, entries[-1])
    assert [written["request"] for written in requests] == ["ann c-17", "bob"]
    matches = match_rows(requests, files[::-1])
    assert matches == {"ann c-17": files[0], "bob": files[1]}
    content = build_constraints(requests, matches)
    constraints, streams = content["model"]["constraints"], content["data"]["init_args"]["streams"]
    assert list(constraints) == ["nll", "forgotten_ann_c_17", "forgotten_bob"]
    assert streams == {"forgotten_ann_c_17": {"path": files[0]}, "forgotten_bob": {"path": files[1]}}
    assert constraints["forgotten_ann_c_17"]["epsilon"] == pytest.approx(1.2 * 5)
    assert constraints["forgotten_ann_c_17"]["objective"] == {"class_path": "LogitMargin", "init_args": {"power": 2.0}}
    assert constraints["forgotten_bob"]["stream"] == "forgotten_bob"
    with pytest.raises(DataError, match="bob"):
        build_constraints(requests, match_rows(requests, files[:1]))
    with pytest.raises(DataError, match="'ann c-17' and 'ann-c 17'"):
        build_constraints([*requests, {**requests[0], "request": "ann-c 17"}], matches)
    entries[-1]["method"] = "NPO"
    with pytest.raises(DataError, match="NPO"):
        build_constraints(requests, matches)


def bounded(model: str, parent: str, request: str, loss: float, **forget: Any) -> dict[str, Any]:
    """Write an export whose objective can be remembered."""
    return entry(model, parent, request=request, forget={"rows": 3, "loss": loss, **forget}, method="LogitMargin")


def test_a_request_that_was_answered_twice_keeps_the_rows_of_both(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text(name, encoding="utf-8")
    digests = [file_digest(Path(file)) for file in files]
    entries = [
        bounded("1", "0", "r1", 5.0, file_sha256=digests[0]),
        bounded("2", "1", "r1", 2.0, file_sha256=digests[1]),
    ]
    requests = list_requests(entries, entries[-1])
    assert list_unaudited_requests(entries, entries[1]) == ["r1", "r1_2"]
    audited = entry("2", kind="audit", request="r1", forget={"rows": 3, "file_sha256": digests[1]})
    assert list_unaudited_requests([*entries, audited], entries[1]) == ["r1"]

    # The rows of one file never get the bound of the other's.
    assert match_rows(requests, files[:1]) == {"r1": files[0]}
    assert match_rows(requests, files[1:]) == {"r1_2": files[1]}
    with pytest.raises(DataError, match="'r1_2'"):
        build_constraints(requests, match_rows(requests, files[:1]))
    content = build_constraints(requests, match_rows(requests, files))
    constraints, streams = content["model"]["constraints"], content["data"]["init_args"]["streams"]
    assert streams == {"forgotten_r1": {"path": files[0]}, "forgotten_r1_2": {"path": files[1]}}
    assert constraints["forgotten_r1"]["epsilon"] == pytest.approx(1.2 * 5)
    assert constraints["forgotten_r1_2"]["epsilon"] == pytest.approx(1.2 * 2)
    assert constraints["forgotten_r1_2"]["stream"] == "forgotten_r1_2"


def test_the_newest_export_stands_for_others_of_the_same_rows() -> None:
    entries = [
        bounded("1", "0", "r1", 5.0, file_sha256="a"),
        bounded("2", "1", "r1", 2.0, file_sha256="a"),
        bounded("3", "2", "r2", 2.0, file_sha256="a"),
    ]
    assert list_requests(entries, entries[-1]) == entries[1:]


def test_the_number_of_an_export_is_not_another_request() -> None:
    exports = [{"request": request} for request in ("r1", "r1", "r1_2", "r1")]
    assert list(label_exports(exports)) == ["r1", "r1_3", "r1_2", "r1_4"]


def test_an_audit_of_rows_that_a_rule_chose_counts_for_one_export() -> None:
    """Two exports of a request have three rows each, and their audits say only how many rows and which texts these were."""
    entries = [
        bounded("1", "0", "r1", 5.0, tokens_sha256="s"),
        bounded("2", "1", "r1", 5.0, tokens_sha256="t"),
        bounded("3", "2", "r1", 5.0, file_sha256="a"),
    ]

    def add_audit(texts: str, file: str | None, verdict: str) -> None:
        forget = {"rows": 3, "texts": texts, "file_sha256": file}
        entries.append(entry("3", kind="audit", request="r1", forget=forget, verdict=verdict))

    newest = entries[2]
    add_audit("of the file", "a", "pass")
    assert list_unaudited_requests(entries, newest) == ["r1", "r1_2"]
    add_audit("first", None, "fail")
    add_audit("first", None, "pass")
    assert len(list_unaudited_requests(entries, newest)) == 1
    add_audit("second", None, "pass")
    assert list_unaudited_requests(entries, newest) == []
    verdicts = []
    for export in entries[:2]:
        audit = find_request_audit(entries, newest, export)
        assert audit is not None
        verdicts.append((audit["forget"]["texts"], audit["verdict"]))
    assert sorted(verdicts) == [("first", "pass"), ("second", "pass")]


def test_a_run_that_changed_nothing_is_not_its_own_ancestor() -> None:
    entries = [entry("same", "same"), entry("same", "same")]
    assert list_ancestors(entries, entries[0]) == []
    assert list_ancestors(entries, entries[1]) == [entries[0]]


def test_an_entry_has_counts_digests_and_numbers_alone() -> None:
    record = {
        "kind": "unlearned",
        "model": {"name": "/home/ann/model", "weights": {"model.safetensors": "p"}},
        "files": {"model.safetensors": "m", "adapter/adapter_model.safetensors": "a", "config.json": "c"},
        "data": {"sets": {"forget": {"rows": 7, "sha256": "t", "source": {"path": "ann.jsonl", "sha256": "f"}}}},
        "method": {"objective": "LogitMargin"},
        "constraints": {"nll": {"value": 0.1, "epsilon": 0.2, "slack": 0.1}},
        "verdict": "forgotten",
        "after": {"forget/loss": 2.5, "retain/nll": 0.1},
        "audit": {"policy_sha256": "s"},
    }
    written = describe_export(record, "c-17")
    assert written["forget"] == {"rows": 7, "tokens_sha256": "t", "file_sha256": "f", "loss": 2.5}
    assert written["model"] == {"model.safetensors": "m"}
    assert written["parent"] == {"model.safetensors": "p"}
    assert (written["request"], written["policy_sha256"]) == ("c-17", "s")
    assert "ann" not in json.dumps(written)
    table = format_ledger([written])
    assert "nll 0.1 ≤ 0.2" in table
    assert "c-17" in table


def test_another_file_is_no_ledger_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "forget.jsonl"
    file.write_text('{"question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no ledger"):
        append_entry(file, {"kind": "export"})
    with pytest.raises(DataError, match="no ledger"):
        read_ledger(file)
    with pytest.raises(DataError, match="no ledger"):
        check_ledger(file)
    assert file.read_text("utf-8") == '{"question": "Who?"}\n'


def test_a_ledger_is_checked_without_being_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        check_ledger(tmp_path)
    file = tmp_path / "new" / "ledger.jsonl"
    check_ledger(file)
    assert not file.parent.exists()
    append_entry(file, {"kind": "export"})
    check_ledger(file)


def test_a_line_that_this_package_did_not_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text('{"previous": null, "kind": "export", "request": 5}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1 of the ledger .* has no 'created'"):
        read_ledger(file)
