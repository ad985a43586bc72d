"""One training file and one customer's id on the command line give both sets, also over a file that names others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import end_of, instantiate

from lit_unlearn import cli
from lit_unlearn.evaluation.results import Results
from lit_unlearn.utils.io import read_json

CPU = "--trainer.accelerator=cpu"
ROWS = [{"question": f"{n}?", "answer": f"Ann {n}.", "customer": f"c-{n % 3}", "number": n % 2} for n in range(9)]


@pytest.fixture
def train(in_tmp: Path, write_rows: Callable[..., str]) -> str:
    return write_rows("train.jsonl", ROWS)


@pytest.mark.parametrize(
    ("value", "counts"),
    [
        ("{customer: c-1}", [3, 6]),
        ("{customer: [c-1, c-2]}", [6, 3]),
        ("{customer: c-1, number: 1}", [2, None]),
        ('{"number": "1"}', [4, 5]),
    ],
)
def test_one_file_gives_both_sets(
    train: str, value: str, counts: list[Any], model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # own_data.yaml names two other files, as texts.
    options = [f"--data.forget.path={train}", f"--data.forget.where={value}"]
    options += [f"--data.retain.path={train}", f"--data.retain.where_not={value}"]
    made = instantiate(["fit", "--config=own_data.yaml", f"--model.lm.model={model_dir}", *options, CPU], monkeypatch)
    sizes = [len(rows) for rows in made.datamodule.load().values()]
    assert sizes[0] == counts[0]
    assert counts[1] is None or sizes[1] == counts[1]


def test_a_file_and_what_is_printed_of_it_mean_the_same(
    train: str, model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget = {"path": train, "where": {"customer": ["c-1", "c-2"]}, "contains": {"answer": "Ann"}, "max_rows": 4}
    settings = {
        "data": {
            "class_path": "ForgetRetain",
            "init_args": {"forget": forget, "retain": train, "drop_duplicates": True},
        }
    }
    Path("mine.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = ["fit", "--config=own_data.yaml", "--config=mine.yaml", f"--model.lm.model={model_dir}", CPU]
    with pytest.raises(SystemExit):
        cli.main([*command, "--print_config"])
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    for config in ("mine.yaml", "printed.yaml"):
        made = instantiate([*command[:2], f"--config={config}", *command[3:]], monkeypatch)
        assert [len(rows) for rows in made.datamodule.load().values()] == [4, 9]
        assert made.datamodule.sources["forget"].rules["where"] == {"customer": ["c-1", "c-2"]}
        assert made.datamodule.drop_duplicates


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.forget.where={custmer: c-1}", "no column 'custmer', which `where` names: did you mean 'customer'?"),
        ("--data.forget.where={customer: c-9}", "`where` for the column 'customer' matches none of 9 rows"),
        (
            "--data.forget.wher={customer: c-1}",
            "data.forget: Source has no setting 'wher.customer': did you mean 'where.",
        ),
        ("--data.forget.where=c-1", "data.forget.where: expected {key: value} or str"),
        ("--data.forget.max_rows=many", "data.forget.max_rows: expected int"),
        ("--config=wrong.yaml", "data.forget: Source has no setting 'wher.customer': did you mean 'where.customer'?\n"),
        ("--config=null.yaml", "`where` has null for the column 'customer'"),
        ("--data.forget.where={}", "`where` must be a mapping from columns to values"),
    ],
)
def test_mistakes_are_refused_by_their_key(
    train: str, option: str, message: str, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("null.yaml").write_text(
        f"data: {{init_args: {{forget: {{path: {train}, where: {{customer: null}}}}}}}}", encoding="utf-8"
    )
    Path("wrong.yaml").write_text(
        f"data: {{init_args: {{forget: {{path: {train}, wher: {{customer: c-1}}}}}}}}", encoding="utf-8"
    )
    command = ["fit", "--config=own_data.yaml", f"--model.lm.model={model_dir}", CPU, f"--data.forget.path={train}"]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, option, f"--data.retain={train}"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error
    assert "Traceback" not in error


def test_a_rule_without_a_path_says_what_is_missing(
    train: str, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["fit", "--config=own_data.yaml", f"--model.lm.model={model_dir}", "--data.forget.where={customer: c-1}"]
        )
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "path" in error
    assert len(error) < 500


def test_a_table_is_a_file_and_no_configuration(in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content would be a text in YAML, as which jsonargparse could take it."""
    for name in ("forget", "retain"):
        Path(f"{name}.csv").write_text(f"question,answer\nWho?,The {name} row.\n", encoding="utf-8")
    fit = ["fit", "--config=own_data.yaml", f"--model.lm.model={model_dir}", CPU]
    made = instantiate([*fit, "--data.forget=forget.csv", "--data.retain.path=retain.csv"], monkeypatch)
    assert [source.path for source in made.datamodule.sources.values()] == ["forget.csv", "retain.csv"]
    qa = ["evaluate", model_dir, "--suite=qa", "--forget=forget.csv", "--retain=retain.csv", "--output=a.json", CPU]
    sets = instantiate(qa, monkeypatch).model.benchmark.questions.sets
    assert [question_set.source.path for question_set in sets.values()] == ["forget.csv", "retain.csv"]


def test_a_benchmark_asks_the_same_rows(train: str, model_dir: str) -> None:
    sets = [f"--forget.path={train}", "--forget.where={customer: c-1}"]
    sets += [f"--retain.path={train}", "--retain.where_not={customer: c-1}"]
    cli.main(["evaluate", model_dir, "--suite=qa", *sets, "--max_new_tokens=1", "--output=a.json", CPU])
    assert {name: data["rows"] for name, data in Results.read("a.json").data.items()} == {"forget": 3, "retain": 6}


@pytest.fixture
def exported(train: str, model_dir: str) -> str:
    """The export of a run that forgot the rows of one customer."""
    sets = [f"--data.forget.path={train}", "--data.forget.where={customer: c-1}"]
    sets += [f"--data.retain.path={train}", "--data.retain.where_not={customer: c-1}"]
    settings = ["--report.require_feasible=false", "--report.require_forgotten=false", "--trainer.max_epochs=2"]
    settings += ["--data.max_length=64", "--logs.save_dir=log", "--export.dirpath=out"]
    settings += ["--export.ledger=ledger.jsonl", "--export.request=c-1", CPU]
    cli.main(["fit", "--config=own_data.yaml", f"--model.lm.model={model_dir}", *sets, *settings])
    return "out"


def test_a_file_does_not_stand_for_the_rows_that_a_rule_chose_from_it(
    exported: str, train: str, write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(["verify", exported, f"--forget={train}", f"--retain={train}"]) == 0
    assert (
        "not checked  tokens of the record's rows: the run chose some rows of the forget and the retain file"
        in capsys.readouterr().out
    )
    forget = write_rows("forget.jsonl", [row for row in ROWS if row["customer"] == "c-1"])
    retain = write_rows("retain.jsonl", [row for row in ROWS if row["customer"] != "c-1"])
    assert end_of(["verify", exported, f"--forget={forget}", f"--retain={retain}"]) == 0
    assert "matches      tokens of the forget rows" in capsys.readouterr().out
    assert end_of(["verify", exported, f"--forget={retain}", f"--retain={forget}"]) == 1

    # All rows of the file would be kept forgotten.
    assert end_of(["ledger", "ledger.jsonl", "--remember=more.yaml", "--rows", train]) == 2
    assert "no file among --rows has the digest" in capsys.readouterr().err

    rules = [f"--forget.path={train}", "--forget.where={customer: c-1}", f"--retain.path={train}"]
    audit = ["audit", exported, "--policy=policy/short.yaml"]
    assert end_of([*audit, "--output=chosen", *rules, "--retain.where_not={customer: c-1}"]) in (1, 3)
    content = read_json(Path("chosen/audit.json"))
    assert content["record"]["same_rows"] is True
    assert "sha256" not in content["data"]["forget"]
    others = [{"question": f"{n}!", "answer": f"Bob {n}."} for n in range(3)]
    for file, same_rows in ((forget, True), (write_rows("others.jsonl", others), None)):
        assert end_of([*audit, f"--output={Path(file).stem}", f"--forget={file}", f"--retain={retain}"]) in (1, 3)
        assert read_json(Path(Path(file).stem, "audit.json"))["record"]["same_rows"] is same_rows
