"""The folder of an audit: what it says, what it never shows, and that changes of it are found."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from audit_models import SETS, benchmark, make_key, trained, write_policy, write_sets
from browser import measure_widths
from command_line import end_of

from lit_unlearn import LanguageModel
from lit_unlearn.cli import verify
from lit_unlearn.data.source import Source
from lit_unlearn.errors import ConfigError, MissingFileError, ModelError, RequirementNotMet
from lit_unlearn.evaluation.audit import judge
from lit_unlearn.evaluation.audit_policy import Policy, Requirement, read_policy
from lit_unlearn.evaluation.audit_run import measure_model
from lit_unlearn.evaluation.measures import Evidence
from lit_unlearn.export.audit_files import build_audit, describe_record, load_described, was_fixed_before, write_audit
from lit_unlearn.export.audit_page import render_page
from lit_unlearn.export.signature import load_signing_key
from lit_unlearn.export.verification import verify_folder

REQUIREMENTS: dict[str, Any] = {
    "forget_gap": {"at_most": 0.35},
    "membership_auc": {"at_least": 0.0, "at_most": 1.0, "required": False},
    "retain_nll_increase": {"at_most": 0.1, "required": False},
}


@pytest.fixture(scope="module")
def measured(tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The audit of a model that passes, with one requirement that could not be tested."""
    folder = tmp_path_factory.mktemp("audit")
    policy = read_policy(write_policy(folder, requirements=REQUIREMENTS, attacks=None))
    model = trained(tokenizer_dir, "retain")
    lm = LanguageModel(model)
    described = load_described(lm, "float32")
    evidence = Evidence()
    sets = write_sets(folder)
    measure_model(evidence, "model", lm, benchmark(**sets), policy)
    data = benchmark(**sets).describe_data(lm.tokenizer)
    for name, file in sets.items():
        data[name]["sha256"] = Source(file).digest()
    audit = build_audit(judge(policy, evidence), model=described, data=data, request="case <17>")
    return {"audit": audit, "sets": sets, "model": model}


@pytest.fixture
def folder(measured: dict[str, Any], tmp_path: Path) -> Path:
    write_audit(tmp_path / "audit", json.loads(json.dumps(measured["audit"])))
    return tmp_path / "audit"


def failures(checks: list[Any]) -> list[str]:
    return [check.subject for check in checks if check.matches is False]


# The page -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and the nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1:] == [tag]:
            self.open.pop()


def test_the_page_stands_alone(folder: Path) -> None:
    text = (folder / "audit.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []  # every element is closed where it should be
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "onclick", "onload"} & attributes.keys()
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "width=device-width" in text
    assert "@media print" in text


def test_the_page_says_how_it_ended_and_what_was_not_tested(folder: Path) -> None:
    text = (folder / "audit.html").read_text("utf-8")
    assert "✓ pass" in text
    assert "case &lt;17&gt;" in text  # a text of the user's is no HTML
    (gaps,) = re.findall(r"<h2>What was not tested</h2>(.*?)<h2>", text, re.DOTALL)
    assert "the model before unlearning was not given" in gaps
    assert "probability after relearning" in gaps.partition("does not ask for")[2]
    assert text.count("<svg") == 2  # one interval for each measure that has one
    assert "nothing shows that the thresholds were fixed before" in text
    audit = json.loads((folder / "audit.json").read_text("utf-8"))
    assert "names another policy" in render_page({**audit, "policy_fixed_before": False})


def test_neither_file_has_text_of_a_row_or_a_path(folder: Path, measured: dict[str, Any]) -> None:
    for name in ("audit.json", "audit.html"):
        text = (folder / name).read_text("utf-8")
        for rows in SETS.values():
            for row in rows:
                assert row["question"] not in text
                assert row["answer"] not in text
        for file in (measured["model"], *measured["sets"].values()):
            assert str(Path(file).parent) not in text


@pytest.mark.parametrize(("at_least", "at_most", "values"), [(None, -1.0, [3.0, 9.0]), (2.0, None, [5.0, 5.0])])
def test_intervals_beyond_zero_and_one_are_drawn_within_the_picture(
    at_least: float | None, at_most: float | None, values: list[float], measured: dict[str, Any]
) -> None:
    policy = Policy("p", (Requirement("forget_probability", at_most, at_least),), min_rows=2)
    rows = [{"probability": value} for value in values]
    result = judge(policy, Evidence(rows={"model": {"plain": {"forget": rows}}}))
    described = {key: measured["audit"][key] for key in ("model", "data")}
    page = Page(render_page(build_audit(result, **described)))
    for tag, attributes in page.tags:
        if tag in ("rect", "line", "circle"):
            places = [float(attributes[key] or 0) for key in ("x", "x1", "x2", "cx") if key in attributes]
            assert all(0 <= place <= 300 for place in places)
            assert float(attributes.get("width") or 0) >= 0


# Verifying ------------------------------------------------------------------------------------------------------------


def test_an_audit_is_verified_with_its_model_and_rows(folder: Path, measured: dict[str, Any]) -> None:
    checks = verify_folder(folder, measured["model"], measured["sets"])
    assert failures(checks) == []
    subjects = [check.subject for check in checks if check.matches]
    assert {"file audit.json", "file audit.html", "outcome of forget_gap", "verdict of the audit"} <= set(subjects)
    assert {"files of the audited model", "texts of the forget set", "tokens of the holdout set"} <= set(subjects)
    assert "file of the forget rows of the audit" in subjects
    assert failures(verify_folder(folder)) == []  # without them, what can be computed matches


def change_audit(folder: Path, change: Any) -> list[str]:
    """Write a changed audit as if it were one: page and list of digests are those of the change."""
    audit = json.loads((folder / "audit.json").read_text("utf-8"))
    change(audit)
    write_audit(folder, audit)
    return failures(verify_folder(folder))


def test_a_changed_audit_is_found(folder: Path) -> None:
    def change_value(audit: dict[str, Any]) -> None:
        audit["findings"][0]["high"] /= 2

    assert change_audit(folder, change_value) == ["outcome of forget_gap"]

    def change_verdict(audit: dict[str, Any]) -> None:
        audit["findings"][0]["high"] *= 2
        audit["verdict"] = "fail"

    assert change_audit(folder, change_verdict) == ["verdict of the audit"]

    def change_threshold(audit: dict[str, Any]) -> None:
        audit["verdict"] = "pass"
        audit["findings"][0]["at_most"] = 0.9

    assert "requirements of the audit" in change_audit(folder, change_threshold)

    def invent_pass(audit: dict[str, Any]) -> None:
        audit["findings"][0]["at_most"] = 0.35
        audit["findings"][2]["outcome"] = "pass"

    assert change_audit(folder, invent_pass) == ["outcome of retain_nll_increase"]


def test_thresholds_that_were_changed_throughout_are_found_by_policy_and_record(folder: Path, tmp_path: Path) -> None:
    policy = write_policy(tmp_path, requirements=REQUIREMENTS, attacks=None)
    content = read_policy(policy).describe()
    record = {"audit": {"policy_sha256": content.pop("sha256"), "policy": content}, "files": {}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unlearning.json").write_text(json.dumps(record), encoding="utf-8")

    def find() -> set[str]:
        checks = verify_folder(folder, str(tmp_path / "model"), policy=policy)
        return {check.subject for check in checks if check.matches is False and "policy" in check.subject}

    # The audit was made of a model without this record.
    untrue = "whether the policy was fixed before the run"
    assert find() == {untrue}
    assert change_audit(folder, lambda audit: audit.update(policy_fixed_before=True)) == []
    assert find() == set()
    (tmp_path / "model" / "unlearning.json").write_text(json.dumps({"files": {}}), encoding="utf-8")
    assert find() == {untrue}
    (tmp_path / "model" / "unlearning.json").write_text(json.dumps(record), encoding="utf-8")

    def change_threshold(audit: dict[str, Any]) -> None:
        audit["policy"]["requirements"][0]["at_most"] = audit["findings"][0]["at_most"] = 0.34

    # It is an audit that agrees with itself, and names the digest of the policy that it does not have.
    assert change_audit(folder, change_threshold) == []
    assert find() == {"policy of the audit", "policy that the record names"}


def test_files_that_are_replaced_while_they_are_loaded_are_not_described(
    tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter([{"model.safetensors": "before"}, {"model.safetensors": "after"}])
    monkeypatch.setattr("lit_unlearn.export.audit_files.digest_export", lambda folder: next(digests))
    with pytest.raises(ModelError, match="were replaced while they were loaded"):
        load_described(LanguageModel(trained(tokenizer_dir)), None)


def test_a_model_that_is_exported_anew_meanwhile_is_not_certified(
    in_tmp: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained(tokenizer_dir, "retain"), "model")

    def export_anew(*arguments: object) -> None:
        Path("model/unlearning.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr("lit_unlearn.cli.audit.measure_model", export_anew)
    policy = write_policy(in_tmp, requirements=REQUIREMENTS, attacks=None)
    sets = [f"--{name}={file}" for name, file in write_sets(in_tmp).items()]
    assert end_of(["audit", "model", f"--policy={policy}", *sets, "--output=audit"]) == 3
    assert "another model was exported to 'model' meanwhile" in capsys.readouterr().err
    assert not Path("audit").exists()


def test_changed_missing_and_added_files_are_found(folder: Path) -> None:
    page = folder / "audit.html"
    page.write_text(page.read_text("utf-8").replace("pass", "fail"), encoding="utf-8")
    (folder / "more.txt").write_text("added", encoding="utf-8")
    assert failures(verify_folder(folder)) == ["file audit.html", "file more.txt", "audit.html"]
    page.unlink()
    assert "file audit.html" in failures(verify_folder(folder))
    (folder / "files.sha256").unlink()
    assert "files.sha256" in failures(verify_folder(folder))


def test_other_rows_and_another_model_are_found(
    folder: Path, measured: dict[str, Any], tokenizer_dir: str, tmp_path: Path
) -> None:
    rows = Path(measured["sets"]["forget"]).read_text("utf-8").splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-1]), encoding="utf-8")
    sets = {**measured["sets"], "forget": str(tmp_path / "fewer.jsonl")}
    found = failures(verify_folder(folder, trained(tokenizer_dir), sets))
    assert {"files of the audited model", "rows of the forget set", "texts of the forget set"} <= set(found)
    assert "texts of the retain set" not in found


def test_a_signed_audit_is_of_its_signer(folder: Path, measured: dict[str, Any], tmp_path: Path) -> None:
    digits = make_key(tmp_path / "key.pem")
    assert failures(verify_folder(folder, public_key=digits)) == ["signature of audit.json"]  # it has none
    audit = json.loads((folder / "audit.json").read_text("utf-8"))
    write_audit(folder, audit, load_signing_key(tmp_path / "key.pem"))
    assert failures(verify_folder(folder, public_key=digits)) == []
    assert failures(verify_folder(folder, public_key="0" * 64)) == ["signature of audit.json"]
    signature = (folder / "audit.json.sig").read_text("utf-8")
    audit["request"] = "case 18"
    write_audit(folder, audit)
    (folder / "audit.json.sig").write_text(signature, encoding="utf-8")
    assert "signature of audit.json" in failures(verify_folder(folder, public_key=digits))


def test_what_only_an_audit_has_is_not_checked_of_an_export(measured: dict[str, Any], tmp_path: Path) -> None:
    checks = verify_folder(
        Path(measured["model"]), public_key=make_key(tmp_path / "key.pem"), policy="policy/default.yaml"
    )
    assert [check.subject for check in checks if check.matches is None][-2:] == ["policy", "signature"]


def test_one_byte_of_a_signed_audit_is_found_by_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_key(tmp_path / "key.pem")
    write_audit(folder, json.loads((folder / "audit.json").read_text("utf-8")), load_signing_key(tmp_path / "key.pem"))
    arguments = [str(folder), f"--public_key={tmp_path / 'key.pub'}"]
    verify.run(arguments)
    assert "DIFFERS" not in capsys.readouterr().out
    content = (folder / "audit.json").read_bytes()
    # A digit of a number, a letter of a key, and a byte that is no text.
    for place, byte in ((b'"high": 0.', b"0"), (b'"verdi', b"k"), (b'"creat', b"\xff")):
        start = content.index(place) + len(place)
        (folder / "audit.json").write_bytes(content[:start] + byte + content[start + 1 :])
        with pytest.raises(RequirementNotMet, match=r"file audit\.json.*signature of audit\.json"):
            verify.run(arguments)


def test_a_folder_with_nothing_to_verify_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit\.json"):
        verify_folder(tmp_path)
    with pytest.raises(MissingFileError):
        verify_folder(tmp_path / "nowhere")


WHOLE = {"path": "rows.jsonl", "max_rows": None, "sha256": "of the file"}


@pytest.mark.parametrize(
    ("source", "tokens", "file", "expected", "says"),
    [
        (WHOLE, "of the tokens", "of another file", True, "are those that the record"),
        (WHOLE, "in another prompt", "of the file", True, "are those that the record"),
        (WHOLE, "of other tokens", "of another file", False, "from another file than the one"),
        (WHOLE, "of other tokens", None, None, "is not shown"),
        # The run read some rows of the file, and the audit all of them.
        ({**WHOLE, "where": {"customer": ["c-17"]}}, "of other tokens", "of the file", None, "is not shown"),
        ({**WHOLE, "max_rows": 20}, "of other tokens", "of the file", None, "is not shown"),
        # The same rows, written into a file of their own.
        (
            {**WHOLE, "where": {"customer": ["c-17"]}},
            "of the tokens",
            "of another file",
            True,
            "are those that the record",
        ),
    ],
)
def test_the_rows_of_the_audit_are_compared_with_those_of_the_deletion(
    source: dict[str, Any],
    tokens: str,
    file: str | None,
    expected: bool | None,
    says: str,
    measured: dict[str, Any],
    tmp_path: Path,
) -> None:
    forget = {"source": source, "rows": 4, "sha256": "of the tokens"}
    record = {"kind": "unlearning", "data": {"sets": {"forget": forget}}, "model": {"name": "target", "weights": {}}}
    (tmp_path / "unlearning.json").write_text(json.dumps(record), encoding="utf-8")
    described = describe_record(str(tmp_path), tokens, file)
    assert described is not None
    assert described["same_rows"] is expected
    assert says in render_page({**measured["audit"], "record": described})


def test_a_policy_is_fixed_if_the_record_names_it() -> None:
    assert was_fixed_before({"audit": {"policy_sha256": "a"}}, "a") is True
    assert was_fixed_before({"audit": {"policy_sha256": "a"}}, "b") is False
    assert was_fixed_before({}, "a") is was_fixed_before(None, "a") is None


# In a browser ---------------------------------------------------------------------------------------------------------


def test_the_page_fits_a_phone_and_a_desk(folder: Path, tmp_path: Path) -> None:
    page = html.escape((folder / "audit.html").read_text("utf-8"))
    frames = [(f'srcdoc="{page}"', width) for width in (390, 1280)]
    assert measure_widths(frames, tmp_path / "wrapper.html") == [390, 1280]
