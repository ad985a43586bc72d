"""`lit-unlearn audit`, `verify` and `ledger` as a user types them, and the policy that a fit names beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from audit_models import trained, write_policy, write_sets
from command_line import end_of, quick

from lit_unlearn import FictionalAuthors, cli
from lit_unlearn.cli.audit import build_parser
from lit_unlearn.cli.questions import find_sets
from lit_unlearn.export.ledger import append_entry
from lit_unlearn.export.published import publish_record
from lit_unlearn.utils.io import file_digest


def read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
    return content


@pytest.fixture
def options(in_tmp: Path) -> list[str]:
    sets = write_sets(in_tmp)
    return [f"--policy={write_policy(in_tmp)}", *(f"--{name}={file}" for name, file in sets.items())]


def test_fail_pass_and_not_decidable(
    options: list[str], tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, retain_only = trained(tokenizer_dir, "forget", "retain"), trained(tokenizer_dir, "retain")
    more = ["--request=c-17", "--ledger=ledger.jsonl"]
    assert end_of(["audit", target, *options, "--output=failed", *more]) == 1
    assert "forget_gap (fail), relearned_gap (fail), rounded_8bit_probability (fail)" in capsys.readouterr().err
    assert end_of(["audit", retain_only, *options, "--output=passed", *more]) == 0
    shown = capsys.readouterr()
    assert "verdict: pass" in shown.out
    assert "cannot pass" not in shown.err
    without_unseen = [option for option in options if not option.startswith("--holdout")]
    assert end_of(["audit", retain_only, *without_unseen, "--output=open"]) == 3
    assert "relearned_gap: not tested" in capsys.readouterr().out
    few = Path("few.jsonl")
    few.write_text("".join(Path("forget.jsonl").read_text("utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    assert end_of(["audit", retain_only, *options, f"--forget={few}", "--output=few"]) == 3
    assert "the audit cannot pass" in capsys.readouterr().err

    verdicts = [read(f"{name}/audit.json")["verdict"] for name in ("failed", "passed", "open")]
    assert verdicts == ["fail", "pass", "not decidable"]
    # What had texts of rows is gone.
    assert not list(Path().glob("*.partial"))
    assert end_of(["verify", "passed", f"--model={retain_only}", *options[1:3]]) == 0
    assert end_of(["verify", "passed", f"--model={target}"]) == 1
    capsys.readouterr()
    cli.main(["ledger", "ledger.jsonl", "--format=csv"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[7] for line in lines[1:]] == ["fail", "pass"]


def test_earlier_requests_are_audited_on_the_newest_model(
    options: list[str], tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ann's rows are the forget set; the model of the newest request, which was Bob's, must not know them either."""
    rows = next(option for option in options if option.startswith("--forget")).partition("=")[2]
    write_policy(Path.cwd(), requirements={"forget_gap": {"at_most": 0.35}}, attacks=None)
    others = [option for option in options if not option.startswith("--forget")]
    for name, sets, code in (("good", ("retain",), 3), ("bad", ("forget", "retain"), 1)):
        model = trained(tokenizer_dir, *sets)
        weights = {"model.safetensors": file_digest(Path(model, "model.safetensors"))}
        ledger = Path(f"{name}.jsonl")
        forget = {"rows": 8, "file_sha256": file_digest(Path(rows)), "loss": 5.0}
        entry = {"kind": "export", "created": "", "verdict": "forgotten", "method": None, "bounds": {}}
        append_entry(ledger, {**entry, "request": "ann", "forget": forget, "model": {"w.bin": "1"}, "parent": {}})
        bob = {"request": "bob", "forget": {"rows": 3, "file_sha256": "unknown"}}
        append_entry(ledger, {**entry, **bob, "model": weights, "parent": {"w.bin": "1"}})
        again = ["ledger", str(ledger), f"--audit={model}", *others, f"--output={name}", "--rows", rows]
        assert end_of(again) == code
        printed = capsys.readouterr()
        assert "no file among --rows" in printed.out  # Bob's rows are not given
        assert ("ann" if code == 1 else "bob") in printed.err.splitlines()[-1]
        assert read(f"{name}/ann/audit.json")["verdict"] == ("fail" if code == 1 else "pass")
        assert json.loads(ledger.read_text("utf-8").splitlines()[-1])["request"] == "ann"
        # What was audited before is not measured again, and ends in the same way.
        entries = ledger.read_text("utf-8")
        assert end_of(again) == code
        assert "audited on" in capsys.readouterr().out
        assert ledger.read_text("utf-8") == entries
    assert end_of(["ledger", "good.jsonl", "--remember=more.yaml", "--rows", rows]) == 2
    assert not Path("more.yaml").exists()
    Path("more.yaml").write_text("mine", encoding="utf-8")
    assert end_of(["ledger", "good.jsonl", "--remember=more.yaml", "--rows", rows]) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path("more.yaml").read_text("utf-8") == "mine"
    assert end_of(["ledger", "good.jsonl", f"--audit={trained(tokenizer_dir)}", *others, "--rows", rows]) == 2


def test_both_exports_of_a_request_are_audited_and_remembered(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A customer asked twice, for the rows in a.jsonl and later for those in b.jsonl. What an audit measures is not tested here."""
    policy, sets = write_policy(in_tmp), write_sets(in_tmp)
    Path("model").mkdir()
    Path("model/w.bin").write_bytes(b"weights")
    digests = []
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text(f"{name}\n", encoding="utf-8")
        digests.append(file_digest(Path(f"{name}.jsonl")))
    models = [{"w.bin": "0"}, {"w.bin": "1"}, {"w.bin": file_digest(Path("model/w.bin"))}]
    for number, (digest, loss) in enumerate(zip(digests, (5.0, 2.0), strict=True)):
        forget = {"rows": 1, "file_sha256": digest, "loss": loss}
        export = {"kind": "export", "created": "", "request": "r1", "forget": forget, "verdict": "forgotten"}
        chained = {"method": "LogitMargin", "parent": models[number], "model": models[number + 1]}
        append_entry(Path("ledger.jsonl"), {**export, **chained})

    audited = []

    def pass_audit(arguments: list[str]) -> None:
        options = build_parser().parse_args(arguments)
        audited.append((options.request, options.forget, str(options.output)))
        forget = {"rows": 1, "file_sha256": file_digest(Path(options.forget))}
        entry = {"kind": "audit", "created": "", "request": options.request, "forget": forget, "verdict": "pass"}
        of_model = {"policy_sha256": file_digest(Path(policy)), "model": models[-1], "parent": {}}
        append_entry(options.ledger, {**entry, **of_model})

    monkeypatch.setattr("lit_unlearn.cli.audit.run", pass_audit)
    ledger = ["ledger", "ledger.jsonl", "--audit=model", f"--policy={policy}", f"--retain={sets['retain']}"]
    # The first file is no answer for the second one.
    assert end_of([*ledger, "--rows", "a.jsonl"]) == 3
    printed = capsys.readouterr()
    assert "not shown to hold on 'model': r1_2." in printed.err
    assert "passes" not in printed.out
    assert end_of([*ledger, "--rows", "a.jsonl", "b.jsonl"]) == 0
    assert audited == [("r1", "a.jsonl", "audits/r1"), ("r1", "b.jsonl", "audits/r1_2")]

    assert end_of(["ledger", "ledger.jsonl", "--remember=more.yaml", "--rows", "a.jsonl"]) == 2
    assert not Path("more.yaml").exists()
    assert end_of(["ledger", "ledger.jsonl", "--remember=more.yaml", "--rows", "a.jsonl", "b.jsonl"]) == 0
    assert "r1, r1_2" in capsys.readouterr().out
    constraints = yaml.safe_load(Path("more.yaml").read_text("utf-8"))["model"]["constraints"]
    assert {name: values.get("epsilon") for name, values in constraints.items()} == {
        "nll": None,
        "forgotten_r1": pytest.approx(6.0),
        "forgotten_r1_2": pytest.approx(2.4),
    }


def test_a_model_that_reads_other_tokens_is_refused_before_anything_is_measured(
    options: list[str], tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another prompt, a model hardly knows the rows: beside it, a damaged one would look whole."""
    before = Path(shutil.copytree(trained(tokenizer_dir, "forget", "retain"), "before"))
    (before / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}", encoding="utf-8"
    )
    model = trained(tokenizer_dir, "retain")
    assert end_of(["audit", model, *options, f"--retain_only={before}"]) == 2
    assert "reads the forget, retain, holdout rows as other tokens" in capsys.readouterr().err
    assert not Path("audit").exists()
    # With a prompt that is given, all are asked alike; the same model twice shows nothing.
    assert end_of(["audit", model, *options, "--template={question} {answer}", f"--retain_only={before}"]) in (0, 1, 3)
    assert end_of(["audit", model, *options, f"--retain_only={model}"]) == 2
    assert "has the same weights as" in capsys.readouterr().err


def test_a_retain_only_model_is_compared_on_the_same_rows(options: list[str], tokenizer_dir: str) -> None:
    target, retain_only = trained(tokenizer_dir, "forget", "retain"), trained(tokenizer_dir, "retain")
    assert end_of(["audit", target, *options, f"--retain_only={retain_only}", "--output=paired"]) == 1
    audit = read("paired/audit.json")
    finding = audit["findings"][0]
    assert "same rows" in finding["sample"]["basis"]
    assert audit["compared_with"]["retain_only"]["name"] == Path(retain_only).name


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--policy=nowhere.yaml"], "policy"),
        (["--retain="], "retain"),
        (["--before=somewhere"], "before"),
        (["--output=."], "working directory"),
        (["--tempalte=x"], "template"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_is_loaded(
    change: list[str], word: str, options: list[str], model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if change == ["--retain="]:
        options, change = [option for option in options if not option.startswith("--retain")], []
    assert end_of(["audit", model_dir, *options, *change]) == 2
    assert word in capsys.readouterr().err


def test_a_fit_fixes_the_policy_and_the_audit_of_its_model_says_so(
    in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded authors need no files: the record says which ones they were."""
    policy = write_policy(in_tmp, requirements={"forget_gap": {"at_most": 0.35}}, attacks=None)
    more = ["--trainer.max_epochs=1", "--export.ledger=ledger.jsonl", "--export.request=c-17"]
    cli.main(quick(model_dir, f"--audit.policy={policy}", *more))
    record = read("out/unlearning.json")
    assert record["audit"]["policy_sha256"] == file_digest(Path(policy))
    assert record["audit"]["policy"]["requirements"][0]["at_most"] == 0.35
    assert record["audit"]["policy_sha256"] in Path("out/README.md").read_text("utf-8")
    assert end_of(["verify", "out"]) == 0

    end_of(["audit", "out", f"--policy={policy}", "--ledger=ledger.jsonl"])
    audit = read("audit/audit.json")
    assert audit["policy_fixed_before"] is True
    assert audit["record"]["method"]["objective"] == "LogitMargin"
    # By their tokens: the embedded authors are in no file.
    assert audit["record"]["same_rows"] is True
    assert {name: values["rows"] for name, values in audit["data"].items()} == {
        "forget": 10,
        "retain": 20,
        "holdout": 10,
    }

    capsys.readouterr()
    cli.main(["ledger", "ledger.jsonl"])
    printed = capsys.readouterr().out
    assert "c-17" in printed
    assert f"audit: {audit['verdict']}" in printed  # of the very files that the fit exported


def test_a_policy_that_does_not_exist_stops_a_fit_before_it_begins(
    in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(quick(model_dir, "--audit.policy=nowhere.yaml")) == 2
    assert "`audit.policy`" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_canaries_of_the_embedded_authors_are_found_as_well() -> None:
    arguments = {"num_authors": 3, "forget_authors": 1, "authors_seed": 5, "canaries": 2}
    config = {"data": {"class_path": "lit_unlearn.FictionalAuthors", "init_args": arguments}}
    record = publish_record({"data": {"class": "FictionalAuthors", "sets": {}}, "config": config})
    options = build_parser().parse_args(["MODEL", "--policy=policy/short.yaml"])
    sources = find_sets(options, record)
    data = FictionalAuthors(**arguments, unseen_authors=1)
    expected = {**data.sources, **data.canary_sources}
    expected["holdout"] = expected.pop("unseen")
    assert {name: source.rows for name, source in sources.items()} == {
        name: source.rows for name, source in expected.items()
    }
    assert set(sources) == {"forget", "retain", "holdout", "canaries", "canary_references"}
