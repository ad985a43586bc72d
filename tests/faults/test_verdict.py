"""Whether something was forgotten: one word, by a stated threshold, wherever a run tells of itself."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from command_line import ROOT, quick
from export.test_card import RECORD

from lit_unlearn import (
    NLL,
    Constraint,
    FixedMultiplier,
    ForgetRetain,
    LanguageModel,
    LitFinetune,
    LitUnlearn,
    LogitMargin,
    cli,
)
from lit_unlearn.callbacks import ExportModel, Report, RunReport
from lit_unlearn.errors import ConfigError, RequirementNotMet
from lit_unlearn.evaluation.tables import report_table
from lit_unlearn.evaluation.verdict import decide, explain_kept, explain_verdict, get_slack, is_feasible
from lit_unlearn.export.card import render_card

PROBABILITY = "forget/probability"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (0.9, 0.01, "forgotten"),
        (0.9, 0.2, "forgotten"),
        (0.9929, 0.9888, "not forgotten"),
        (0.21, 0.2001, "not forgotten"),
        (0.2, 0.0, "not decidable"),  # the model did not know the rows in this prompt
        (0.01, 0.9, "not decidable"),
        (0.9, math.nan, "not decidable"),
        (math.nan, 0.1, "not decidable"),
        (math.inf, 0.1, "not decidable"),
        (None, 0.1, "not decidable"),
        (0.9, None, "not decidable"),
    ],
)
def test_the_verdict_follows_from_two_numbers_and_a_threshold(before: Any, after: Any, verdict: str) -> None:
    values = [{} if value is None else {PROBABILITY: value} for value in (before, after)]
    assert decide(values[0], values[1], 0.2) == verdict
    text = explain_verdict(values[0], values[1], 0.2)
    assert text.startswith(f"{verdict}: ")
    assert "0.2" in text


def test_slack_is_derived() -> None:
    assert get_slack(0.25, 0.5) == 0.25
    assert get_slack(None, 0.5) is get_slack(0.5, None) is None
    assert is_feasible(0.5, 0.5)
    assert not any((is_feasible(0.51, 0.5), is_feasible(math.nan, 0.5), is_feasible(None, 0.5), is_feasible(0.5, None)))


def test_the_kept_model_is_explained() -> None:
    assert "step 15 of 20" in explain_kept(15, 20, "best", True)
    assert "lowest forget objective" in explain_kept(15, 20, "best", True)
    assert "lowest" not in explain_kept(15, 20, "best", False) + explain_kept(20, 20, "last", True)


# A run --------------------------------------------------------------------------------------------------------------------


def make(model: str, **settings: Any) -> LitUnlearn:
    bound = Constraint(NLL(), 99.0, FixedMultiplier(0.0))
    return LitUnlearn(
        LanguageModel(model), LogitMargin(), {"nll": bound}, lambda p: torch.optim.SGD(p, lr=1e-6), **settings
    )


def rows(folder: str, **settings: Any) -> ForgetRetain:
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", batch_size=5, **settings)


def fit(
    model: str, folder: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path, **settings: Any
) -> tuple[Report, dict[str, Any], str]:
    callbacks = [RunReport(str(tmp_path), **settings), ExportModel(str(tmp_path / "out"))]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(make(model), datamodule=rows(folder))
    return read(tmp_path)


def read(folder: Path) -> tuple[Report, dict[str, Any], str]:
    record = json.loads((folder / "out" / "unlearning.json").read_text("utf-8"))
    return Report.read(folder / "report.json"), record, (folder / "out" / "README.md").read_text("utf-8")


def test_report_record_card_and_terminal_say_the_same(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path, capsys: Any
) -> None:
    """A random model gives its answers a probability of 0.003."""
    report, record, card = fit(model_dir, rows_dir, make_trainer, tmp_path, max_forget_probability=1e-4)
    assert report.verdict == record["verdict"] == "not forgotten"
    assert report.max_forget_probability == record["max_forget_probability"] == 1e-4
    assert list(report.data) == ["forget", "retain"]
    for stream, description in report.data.items():
        assert description == {name: record["data"]["sets"][stream][name] for name in ("rows", "sha256")}
    printed = capsys.readouterr().out
    first_paragraphs = card.partition("## ")[0]
    for text in (printed, card, str(report)):
        assert "verdict: not forgotten" in text
        assert "kept: step 2 of 2" in text
        assert "retain answer probability 0.00" in text
    assert "Verdict: not forgotten" in first_paragraphs
    assert "0.0001" in first_paragraphs


def test_a_required_verdict_fails_the_run_after_everything_is_written(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    with pytest.raises(RequirementNotMet, match="not forgotten"):
        fit(model_dir, rows_dir, make_trainer, tmp_path, max_forget_probability=1e-4, require_forgotten=True)
    assert read(tmp_path)[0].verdict == "not forgotten"


def test_rows_that_the_model_does_not_know_are_not_met_with_a_higher_learning_rate(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """The threshold is above the probability before, as with the wrong template."""
    with (
        pytest.warns(UserWarning, match="in this prompt") as warned,
        pytest.raises(RequirementNotMet, match=r"not decidable.*`template`"),
    ):
        fit(model_dir, rows_dir, make_trainer, tmp_path, require_forgotten=True)
    texts = [str(warning.message) for warning in warned]
    assert any("`template`" in text for text in texts)
    assert not any("ten times" in text for text in texts)
    assert read(tmp_path)[1]["verdict"] == "not decidable"


def test_fine_tuning_has_no_verdict(
    model_dir: str, rows_dir: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = LitFinetune(LanguageModel(model_dir), lambda p: torch.optim.SGD(p, lr=0.01))
    callbacks = [RunReport(str(tmp_path), require_forgotten=True), ExportModel(str(tmp_path / "out"))]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=rows(rows_dir, train_on="all"))
    report, record, card = read(tmp_path)
    assert report.verdict is None
    assert "verdict" not in record
    assert "erdict" not in card + str(report)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_the_threshold_is_a_probability(threshold: float) -> None:
    with pytest.raises(ConfigError, match="max_forget_probability"):
        RunReport(max_forget_probability=threshold)


def test_the_users_own_data_and_the_demo_require_it_and_published_baselines_do_not() -> None:
    def report(name: str) -> Any:
        return yaml.safe_load((ROOT / "configs" / name).read_text("utf-8")).get("report", {})

    assert report("own_data.yaml") == {
        "require_feasible": True,
        "require_forgotten": True,
        "max_forget_probability": 0.2,
    }
    assert report("demo/unlearn.yaml")["max_forget_probability"] == 0.1
    assert report("demo/unlearn.yaml")["require_forgotten"]
    assert not any(report("method/npo.yaml").values())


# The card -------------------------------------------------------------------------------------------------------------------


def list_commands(text: str) -> list[str]:
    section = text.partition("## How to check this card")[2].partition("\n## ")[0].replace("\\\n", "")
    return [line for line in section.splitlines() if line.startswith("lit-unlearn ")]


def with_data(**data: Any) -> dict[str, Any]:
    return {**RECORD, "data": {**RECORD["data"], **data}}


def test_the_cards_commands_are_about_the_rows_that_were_deleted() -> None:
    own = list_commands(
        render_card(with_data(**{"class": "ForgetRetain", "answer_column": "it's", "question_column": "question"}))
    )
    assert len(own) == 3
    assert all("FORGET" in command and "RETAIN" in command and "DIR" in command for command in own)
    assert "--suite=qa" in own[1]
    assert "--suite=stress" in own[2]
    assert "--answer_column=it's" in shlex.split(own[1])
    assert not any("question_column" in command or "tofu" in command for command in own)

    tofu = list_commands(render_card(with_data(**{"class": "TOFU", "forget_split": "forget05"})))
    assert [["--suite=tofu" in c, "--forget_split=forget05" in c] for c in tofu[1:2]] == [[True, True]]
    muse = list_commands(render_card(with_data(**{"class": "MUSE", "corpus": "Books"})))
    assert "--suite=muse --corpus=Books" in muse[1]
    other = list_commands(render_card(with_data(**{"class": "FictionalAuthors"})))
    assert len(other) == 1  # no benchmark has these rows


def test_names_in_the_cards_commands_are_quoted() -> None:
    record = {**RECORD, "constraints": {"a b; rm -rf x": RECORD["constraints"]["nll"]}, "bounds": {}}
    command = list_commands(render_card(record))[0]
    assert "--model.constraints.a b; rm -rf x.epsilon=0.3" in shlex.split(command)


@pytest.mark.slow
def test_the_cards_commands_run_and_give_the_numbers_of_the_card(
    in_tmp: Path, model_dir: str, rows_dir: str, capsys: Any
) -> None:
    files = {name: f"{rows_dir}/{name}.jsonl" for name in ("forget", "retain")}
    cli.main(
        [
            *quick(model_dir),
            "--data=ForgetRetain",
            f"--data.forget={files['forget']}",
            f"--data.retain={files['retain']}",
            "--data.batch_size=5",
        ]
    )
    card = Path("out/README.md").read_text("utf-8")
    record = json.loads(Path("out/unlearning.json").read_text("utf-8"))
    Path("run.yaml").write_text(card.rpartition("```yaml\n")[2].removesuffix("```\n"), encoding="utf-8")
    commands = list_commands(card)
    assert len(commands) == 3
    for command in commands:
        for placeholder, name in {"FORGET": files["forget"], "RETAIN": files["retain"], "DIR": "out"}.items():
            command = command.replace(f"={placeholder}", f"={name}").replace(f" {placeholder} ", f" {name} ")
        extra = [] if " validate " in command else ["--trainer.accelerator=cpu", "--max_new_tokens=4"]
        if "stress" in command:
            extra += ['--relearn={"rows": 2, "steps": 1, "lr": 1e-5, "seed": 0}', "--bits=[8]"]
        capsys.readouterr()
        cli.main([*shlex.split(command)[1:], *extra])
        if " validate " in command:
            assert f"{record['after']['forget/nll']:.5f}"[:6] in capsys.readouterr().out
    results = json.loads(Path("qa.json").read_text("utf-8"))
    assert results["data"]["forget"]["rows"] == 10
    stressed = json.loads(Path("stress.json").read_text("utf-8"))
    assert "relearn/forget/probability" in stressed["aggregate"]


def test_an_older_report_is_still_a_table() -> None:
    older = {
        "steps": 2,
        "kept_step": 2,
        "before": {"forget/nll": 1.0},
        "after": {"forget/nll": 2.0},
        "constraints": {
            "nll": {"value": 0.5, "slack": 0.5, "epsilon": 1.0, "multiplier_before": 1.0, "multiplier_after": 2.0}
        },
    }
    assert "(feasible)" in report_table(older)
    assert "verdict" not in report_table(older)
