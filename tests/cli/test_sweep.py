"""Sweeps: the cells of a grid, and that each runs once, to its end, whatever comes in between."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT
from forked import ForkedCommands

from lit_unlearn import cli
from lit_unlearn.cli import sweep
from lit_unlearn.cli.cells import STATE_FILE, Processes, read_state, run_cell, run_cells
from lit_unlearn.cli.grid import Cell, read_sweep
from lit_unlearn.errors import ConfigError, LitUnlearnError
from lit_unlearn.utils.folders import lock_file, replace_folder
from lit_unlearn.utils.io import write_json

SWEEP: dict[str, Any] = {
    "output": "sweep",
    "config": "demo/unlearn.yaml",
    "settings": {"trainer.max_epochs": 2},
    "grid": {"seed": [0, 1], "method": ["pdu", "npo"]},
}
NAMES = ["seed=0,method=pdu", "seed=0,method=npo", "seed=1,method=pdu", "seed=1,method=npo"]
REPORT = {
    "verdict": "forgotten",
    "seconds": 2.0,
    "peak_memory_mib": 100.0,
    "constraints": {"nll": {"value": 0.2, "epsilon": 0.3}},
    "after": {"forget/probability": 0.01, "retain/probability": 0.9},
    "damage": None,
}


def write_sweep(**changes: Any) -> str:
    """Write the file of a sweep, and return its name."""
    Path("sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False), encoding="utf-8")
    return "sweep.yaml"


class FakeCommands:
    """Stands for the processes of a sweep.

    Args:
        ends: By a part of a command, how it ends: exit code and what it prints. All others end well.
        report: What a fit writes; ``None`` for nothing, as a dry run does.
        verdict: What an audit writes; ``None`` for one that crashes before.
    """

    def __init__(
        self,
        ends: dict[str, tuple[int, str]] | None = None,
        report: dict[str, Any] | None = REPORT,
        verdict: str | None = None,
    ) -> None:
        self.ends = ends or {}
        self.report = report
        self.verdict = verdict
        self.ran: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path, held: int) -> int:
        command = " ".join(arguments)
        self.ran.append(command)
        if arguments[0] == "audit" and self.verdict is not None:
            write_json(log.parent / "audit" / "audit.json", {"verdict": self.verdict})
        for part, (code, printed) in self.ends.items():
            if part in command:
                with log.open("a", encoding="utf-8") as file:
                    file.write(printed)
                return code
        if arguments[0] == "fit" and self.report is not None:
            write_json(log.parent / "report.json", self.report)
        return 0

    def stop(self) -> None:
        pass

    def starts(self) -> list[str]:
        """What ran: the name of the command, and the cell that it was of."""
        return [command.split()[0] + next(" " + name for name in NAMES if name in command) for command in self.ran]


@pytest.fixture
def run(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCommands]:
    """Runs a sweep whose commands are not started, and returns what it would have run."""

    def run_sweep(*options: str, commands: FakeCommands | None = None, fails: bool = False) -> FakeCommands:
        fake = commands or FakeCommands()
        monkeypatch.setattr(sweep, "Processes", lambda jobs: fake)
        if fails:
            with pytest.raises(SystemExit) as end:
                cli.main(["sweep", "sweep.yaml", *options])
            assert end.value.code == 1
        else:
            cli.main(["sweep", "sweep.yaml", *options])
        return fake

    return run_sweep


# The grid ---------------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_cell(in_tmp: Path) -> None:
    output, cells = read_sweep(write_sweep())
    assert output == Path("sweep")
    assert [cell.name for cell in cells] == NAMES
    fit = cells[3].commands[0]
    assert fit[:3] == ("fit", "--config=demo/unlearn.yaml", "--config=method/npo.yaml")
    assert {"--seed_everything=1", "--model.seed=1", "--data.seed=1", "--trainer.max_epochs=2"} <= set(fit)
    # A run that misses its bound is a row. The folders of the cell come last, so that nothing replaces them.
    assert "--report.require_feasible=false" in fit
    assert fit[-2:] == ("--export.dirpath={cell}/model", "--ckpt_path=last")


def test_any_key_is_an_axis_and_labels_set_several(in_tmp: Path) -> None:
    Path("mine.yaml").touch()
    grid = {
        "method": {"slow": {"config": ["method/pdu.yaml", "mine.yaml"], "model.optimizer.lr": 1e-4}, "npo": None},
        "model.constraints.nll.epsilon.relative": [0.1, "1e-1"],
        "model.keep": ["last"],
    }
    settings = {"model.optimizer.lr": 1, "report.require_feasible": True, "model.lm.model": "targets/{method}"}
    _, cells = read_sweep(write_sweep(grid=grid, settings=settings, matched="kl"))
    assert [cell.name for cell in cells] == [
        f"method={method},relative={relative},keep=last" for method in ("slow", "npo") for relative in ("0.1", "1e-1")
    ]
    configs = [argument for argument in cells[0].commands[0] if argument.startswith("--config=")]
    # That of the damage comes after the method's, whose `keep` it replaces.
    names = ["demo/unlearn.yaml", "method/pdu.yaml", "mine.yaml", "method/matched/kl.yaml"]
    assert configs == [f"--config={name}" for name in names]
    # The more special setting wins.
    assert "--model.optimizer.lr=0.0001" in cells[0].commands[0]
    assert "--model.optimizer.lr=1" in cells[2].commands[0]
    assert "--report.require_feasible=true" in cells[0].commands[0]
    assert "--model.constraints.nll.epsilon.relative=1e-1" in cells[1].commands[0]
    assert "--model.lm.model=targets/slow" in cells[0].commands[0]
    assert all(cell.is_matched for cell in cells)


def test_commands_after_the_fit_name_the_cell_and_its_labels(in_tmp: Path) -> None:
    after = "evaluate {cell}/model --suite=tofu --retain_results 'retain only/{seed}.json' --template='{question}'"
    _, cells = read_sweep(write_sweep(after=after))
    assert cells[2].commands[1] == (
        *("evaluate", "{cell}/model", "--suite=tofu", "--retain_results"),
        *("retain only/1.json", "--template={question}"),
    )


def test_without_a_fit_cells_only_measure(run: Any) -> None:
    write_sweep(fit=False, config=None, settings=None, after=["data models/{seed}/{method}", "export {cell}/x"])
    first = run("--only", NAMES[1], commands=FakeCommands({"export": (143, "")}), fails=True)
    assert first.ran == ["data models/0/npo", f"export sweep/{NAMES[1]}/x"]
    assert run("--only", NAMES[1]).starts() == [f"export {NAMES[1]}"]
    state = read_state(Path("sweep", NAMES[1]))
    assert (state.status, len(state.commands), state.digests) == ("done", 2, {})
    # As after a fit, what has ended stays what it was.
    write_sweep(fit=False, config=None, settings=None, after=["data other/{seed}", "export {cell}/x"])
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", "sweep.yaml"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gird": {}}, "'gird': did you mean 'grid'"),
        ({"output": None}, "`output`"),
        ({"keep": "some"}, "`keep` must be all, model, results, not 'some'"),
        ({"fit": "no"}, "`fit` must be true or false, not 'no'"),
        ({"fit": False}, "`config` is of a fit"),
        ({"fit": False, "config": None, "settings": None}, "`after` must have a command"),
        ({"grid": {}}, "`grid` must have an entry"),
        ({"grid": {"seed": 3}}, "axis 'seed' must be a list"),
        ({"grid": {"seed": [1, 1]}}, "'1' twice"),
        ({"grid": {"data.source": ["a/b"]}}, "'a/b' of the axis 'data.source' cannot name a folder"),
        ({"grid": {"a.lr": [1], "b.lr": [2]}}, "'b.lr' cannot be called 'lr'"),
        ({"grid": {"method": {"pdu": 3}}}, "'pdu' of the axis 'method' must be settings"),
        ({"settings": {"export.dirpath": "x"}}, "`export.dirpath` cannot be set"),
        ({"settings": ["x"]}, "`settings` must be keys"),
        ({"after": ["evalute x"]}, "did you mean 'evaluate'"),
        ({"after": ["evaluate 'x"]}, "check its quotes"),
        ({"after": ["audit {cell}/model --policy p"]}, "add `--output {cell}/audit`"),
        ({"grid": {"method": ["pduu"]}}, "did you mean 'method/pdu.yaml'"),
        ({"config": "nowhere.yaml"}, "no configuration file 'nowhere.yaml'"),
        ({"matched": "kll"}, "no configuration file 'method/matched/kll.yaml'"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(changes: dict[str, Any], message: str, in_tmp: Path) -> None:
    with pytest.raises(LitUnlearnError, match=message.replace("(", r"\(")) as refusal:
        read_sweep(write_sweep(**changes))
    assert refusal.value.exit_code == 2


def test_the_packaged_sweep_can_be_read() -> None:
    _, cells = read_sweep("sweep/demo.yaml")
    assert len(cells) == 9
    assert [command[0] for command in cells[0].commands] == ["fit", "audit"]
    assert read_sweep(str(ROOT / "configs/sweep/demo.yaml"))[1] == cells


# Running ----------------------------------------------------------------------------------------------------------------


def test_every_cell_runs_once_and_its_table_says_what_came_of_it(run: Any, capsys: Any) -> None:
    write_sweep(after=["data {cell}/model", "export {cell}/model"])
    first = run()
    assert first.starts() == [f"{command} {name}" for name in NAMES for command in ("fit", "data", "export")]
    assert f"--export.dirpath=sweep/{NAMES[0]}/model" in first.ran[0]
    assert first.ran[1] == f"data sweep/{NAMES[0]}/model"
    assert run().ran == []
    capsys.readouterr()

    run("--list", "--format=csv")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["cell"] for row in rows] == NAMES
    assert [rows[0][key] for key in ("state", "verdict", "forget p", "constraints", "audit", "reason")] == [
        *("done", "forgotten", "0.01", "feasible", "–", "–"),
    ]


def test_only_some_cells_and_another_folder(run: Any) -> None:
    write_sweep()
    assert run("--only", "*pdu", "seed=1,*", "--output=elsewhere").starts() == [
        f"fit {name}" for name in NAMES if name != NAMES[1]
    ]
    assert not Path("sweep").exists()
    with pytest.raises(ConfigError, match="no cell is called 'dpo'"):
        sweep.select_cells([Cell("pdu", ())], ["dpo"])


def test_a_failed_cell_is_a_row_with_its_reason_and_the_others_run(run: Any, capsys: Any) -> None:
    write_sweep(after="data {cell}/model")
    printed = "epoch 1\nlit-unlearn: error: `lr` is too high\n  set in the configuration: `model`\n"
    failing = FakeCommands({"fit --config=demo/unlearn.yaml --config=method/npo.yaml": (1, printed)})
    assert run(commands=failing, fails=True).starts() == [
        *(f"fit {NAMES[0]}", f"data {NAMES[0]}", f"fit {NAMES[1]}"),
        *(f"fit {NAMES[2]}", f"data {NAMES[2]}", f"fit {NAMES[3]}"),
    ]
    captured = capsys.readouterr()
    assert f"2 of 4 cells failed or were interrupted: {NAMES[1]}, {NAMES[3]}" in captured.err
    assert read_state(Path("sweep", NAMES[1])).reason == "fit ended with exit code 1: `lr` is too high"
    assert captured.out.count("fit ended with exit code 1: `lr` is too high") == 4  # as it ends, and in the table

    # It is a result: not tried again, unless asked to.
    assert run(fails=True).ran == []
    assert run("--retry").starts() == [f"{name} {cell}" for cell in (NAMES[1], NAMES[3]) for name in ("fit", "data")]


def test_without_an_error_of_ours_the_reason_is_the_last_line_of_the_failed_command(run: Any) -> None:
    write_sweep(after="data {cell}/model")
    traceback = f"Traceback\n  File\nKeyError: 'sweep/{NAMES[0]}'\n\n"
    run("--only", NAMES[0], commands=FakeCommands({"data sweep": (1, traceback)}), fails=True)
    assert read_state(Path("sweep", NAMES[0])).reason == "data ended with exit code 1: KeyError: '{cell}'"
    # What was printed before the command is not its reason.
    run("--only", NAMES[0], "--retry", commands=FakeCommands({"data sweep": (1, "")}), fails=True)
    assert read_state(Path("sweep", NAMES[0])).reason == "data ended with exit code 1: nothing was printed"


@pytest.mark.parametrize("code", [130, 138, 143, -9])
def test_an_interrupted_cell_continues_with_the_command_that_did_not_end(code: int, run: Any) -> None:
    write_sweep(after=["data {cell}/model", "export {cell}/model"])
    # Not ended well: a script that waits for all cells must not go on.
    run("--only", NAMES[0], commands=FakeCommands({"data sweep": (code, "")}), fails=True)
    state = read_state(Path("sweep", NAMES[0]))
    assert (state.status, len(state.seconds)) == ("unfinished", 1)
    assert run("--only", NAMES[0]).starts() == [f"data {NAMES[0]}", f"export {NAMES[0]}"]
    assert read_state(Path("sweep", NAMES[0])).status == "done"


def test_a_sweep_that_was_killed_continues_after_its_last_whole_line(run: Any) -> None:
    write_sweep(after="data {cell}/model")
    run("--only", NAMES[0], commands=FakeCommands({"data sweep": (143, "")}), fails=True)
    file = Path("sweep", NAMES[0], STATE_FILE)
    with file.open("ab") as history:
        history.write(b'{"status": "done", "rea')
    assert run("--only", NAMES[0]).starts() == [f"data {NAMES[0]}"]
    assert read_state(file.parent).status == "done"


def test_a_cell_is_not_continued_with_another_fit(run: Any, capsys: Any) -> None:
    write_sweep()
    run("--only", NAMES[0], commands=FakeCommands({"fit": (143, "")}), fails=True)
    write_sweep(settings={"trainer.max_epochs": 3})
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", "sweep.yaml"])
    assert end.value.code == 2
    assert "--trainer.max_epochs=2 then, --trainer.max_epochs=3 now" in capsys.readouterr().err
    # Nothing else was begun.
    assert [path.name for path in Path("sweep").iterdir()] == [NAMES[0]]


def test_a_cell_is_not_continued_with_an_edited_configuration(run: Any) -> None:
    Path("mine.yaml").write_text("trainer: {max_epochs: 2}\n", encoding="utf-8")
    write_sweep(config=["demo/unlearn.yaml", "mine.yaml"])
    run("--only", NAMES[0], commands=FakeCommands({"fit": (2, "")}), fails=True)
    # Nothing had started.
    Path("mine.yaml").write_text("trainer: {max_epochs: 3}\n", encoding="utf-8")
    run("--only", NAMES[0], "--retry")
    Path("mine.yaml").write_text("# A comment is no setting.\ntrainer: {max_epochs: 3}\n", encoding="utf-8")
    run("--only", NAMES[0], "--retry")
    Path("mine.yaml").write_text("trainer: {max_epochs: 4}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"'mine\.yaml' had another content"):
        cli.main(["sweep", "sweep.yaml", "--only", NAMES[0]])


@pytest.mark.parametrize("option", ["--policy mine.yaml", "--policy=mine.yaml", "-c mine.yaml"])
def test_an_audit_that_has_ended_keeps_its_policy(run: Any, option: str) -> None:
    policy = Path("mine.yaml")
    policy.write_text("min_rows: 10\n", encoding="utf-8")
    write_sweep(after=f"audit {{cell}}/model {option} --output {{cell}}/audit")
    run("--only", NAMES[0], commands=FakeCommands({"audit": (2, "")}), fails=True)
    # The audit had not ended: its policy may be corrected.
    policy.write_text("min_rows: 20\n", encoding="utf-8")
    run("--only", NAMES[0], "--retry")
    policy.write_text("min_rows: 30\n", encoding="utf-8")
    # The cells that have not begun are refused as well, or the table would mix two policies.
    with pytest.raises(SystemExit, match=r"'mine\.yaml' had another content"):
        cli.main(["sweep", "sweep.yaml"])
    policy.unlink()
    with pytest.raises(SystemExit, match=r"no configuration file 'mine\.yaml'"):
        cli.main(["sweep", "sweep.yaml"])
    # Without the command, its file does not matter.
    write_sweep(after=None)
    run("--only", NAMES[0])


def test_a_configuration_may_be_yaml_itself(in_tmp: Path, capsys: Any) -> None:
    attack = "attack {cell}/model --output {cell}/attack --config '{attacks: {prefix: {}}, max_new_tokens: 20}'"
    _, cells = read_sweep(write_sweep(after=attack))
    assert "{attacks: {prefix: {}}, max_new_tokens: 20}" in cells[0].digests
    with pytest.raises(SystemExit, match="a sweep must be a YAML file"):
        cli.main(["sweep", "{output: sweep, grid: {seed: [0]}}"])


def test_what_did_not_start_or_only_measures_may_be_corrected(run: Any) -> None:
    write_sweep(settings={"trainer.max_epoch": 2})
    run("--only", NAMES[0], commands=FakeCommands({"fit": (2, "lit-unlearn: error: no setting")}), fails=True)
    write_sweep(after="data {cell}/modle")
    run("--only", NAMES[0], "--retry", commands=FakeCommands({"data sweep": (2, "")}), fails=True)
    write_sweep(after="data {cell}/model")
    assert run("--only", NAMES[0], "--retry").starts() == [f"data {NAMES[0]}"]
    # A further measurement of a cell that was done.
    write_sweep(after=["data {cell}/model", "export {cell}/model"])
    assert run("--only", NAMES[0]).starts() == [f"export {NAMES[0]}"]


def test_settings_of_a_fit_that_has_left_a_checkpoint_are_not_corrected(run: Any) -> None:
    """Exit code 2 says that nothing was started; but an export may be refused after the last step."""
    write_sweep()
    Path("sweep", NAMES[0], "fit/checkpoints").mkdir(parents=True)
    run("--only", NAMES[0], commands=FakeCommands({"fit": (2, "")}), fails=True)
    write_sweep(settings={"trainer.max_epochs": 3})
    with pytest.raises(SystemExit, match="begun with another `fit`"):
        cli.main(["sweep", "sweep.yaml", "--only", NAMES[0], "--retry"])


@pytest.mark.parametrize(
    ("code", "verdict", "status"),
    # The last has passed, and its ledger could not be written.
    [(1, "fail", "done"), (3, "not decidable", "done"), (1, None, "failed"), (1, "pass", "failed")],
)
def test_an_audit_that_does_not_pass_is_a_result(
    code: int, verdict: str | None, status: str, run: Any, capsys: Any
) -> None:
    write_sweep(after="audit {cell}/model --output={cell}/audit")
    # Of another audit: no verdict of one that ends with an error.
    write_json(Path("sweep", NAMES[0], "first", "audit.json"), {"verdict": "pass"})
    fake = FakeCommands({"audit": (code, "")}, verdict=verdict)
    run("--only", NAMES[0], commands=fake, fails=status == "failed")
    assert read_state(Path("sweep", NAMES[0])).status == status
    assert verdict is None or f"{verdict}, pass" in capsys.readouterr().out


def test_a_matched_run_without_a_report_is_a_failed_cell(run: Any) -> None:
    write_sweep(matched="kl", settings={"trainer.fast_dev_run": True})
    commands = FakeCommands(report=None)
    run("--only", NAMES[0], commands=commands, fails=True)
    assert read_state(Path("sweep", NAMES[0])).reason == "not at matched damage: the fit left no report.json"


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_matched_run_that_ends_before_the_limit_is_a_failed_cell(is_reached: bool, run: Any) -> None:
    write_sweep(matched="kl", after="data {cell}/model")
    value = 0.0098 if is_reached else 0.002
    damage = {"measure": "kl", "stream": "retain", "rows": 8, "limit": 0.01, "value": value, "reached": is_reached}
    fake = FakeCommands(report={**REPORT, "damage": {**damage, "step": 7}})
    ran = run("--only", NAMES[0], commands=fake, fails=not is_reached).starts()
    assert ran == [f"fit {NAMES[0]}", f"data {NAMES[0]}"][: 1 + is_reached]
    reason = read_state(Path("sweep", NAMES[0])).reason
    assert reason is None if is_reached else reason.startswith("not at matched damage: its run ended at step 7")


@pytest.mark.parametrize("has_results", [False, True])
@pytest.mark.parametrize("keep", ["all", "model", "results"])
def test_weights_stay_as_the_file_says(keep: str, has_results: bool, run: Any) -> None:
    write_sweep(keep=keep)
    folder = Path("sweep", NAMES[0])
    for name in ("fit/checkpoints/last-step=2.ckpt", "fit/version_0/metrics.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    with replace_folder(folder / "model") as staging:
        for name in ("unlearning.json", "model.safetensors"):
            (staging / name).write_text(name)
    # What a command of `after` has written there is no part of the export.
    if has_results:
        (folder / "model/qa.json").write_text("results")
    run("--only", NAMES[0])
    assert (folder / "fit/checkpoints").exists() == (keep == "all")
    assert (folder / "model/model.safetensors").exists() == (keep != "results")
    assert (folder / "model").exists() == (keep != "results" or has_results)
    assert (folder / "model/qa.json").exists() == has_results
    record = folder / ("unlearning.json" if keep == "results" else "model/unlearning.json")
    assert record.read_text() == "unlearning.json"
    assert (folder / "fit/version_0/metrics.csv").exists()


# Several processes ------------------------------------------------------------------------------------------------------


def test_a_cell_that_another_process_holds_is_left_to_it(run: Any, capsys: Any) -> None:
    write_sweep()
    with lock_file(Path("sweep", NAMES[1], STATE_FILE)) as held:
        assert held is not None
        assert run().starts() == [f"fit {name}" for name in NAMES if name != NAMES[1]]
        assert f"{NAMES[1]} is held by another process" in capsys.readouterr().out
    assert run().starts() == [f"fit {NAMES[1]}"]


def test_sweeps_at_the_same_time_run_every_cell_once(in_tmp: Path) -> None:
    output, cells = read_sweep(write_sweep())
    fake = FakeCommands()
    fakes: Any = fake

    def run_all() -> None:
        for _ in run_cells(cells, output, 2, fakes):
            pass

    threads = [threading.Thread(target=run_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fake.starts()) == sorted(f"fit {name}" for name in NAMES)


def test_a_lock_lasts_as_long_as_the_command_that_inherits_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / STATE_FILE
    with lock_file(file) as held:
        assert held is not None
        child = subprocess.Popen(["sleep", "60"], pass_fds=(held,))
    try:
        # As after `kill -9` of the sweep alone: its fit still writes to the cell.
        with lock_file(file) as held:
            assert held is None
    finally:
        child.kill()
        child.wait()
    with lock_file(file) as held:
        assert held is not None


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("lit_unlearn.utils.folders.fcntl.flock", refuse)
    with pytest.raises(ConfigError, match="has no locks"), lock_file(tmp_path / STATE_FILE):
        pass


def test_commands_run_in_processes_that_are_asked_to_stop(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(jobs=2)
    with lock_file(in_tmp / STATE_FILE) as held:
        assert held is not None
        assert processes(["--version"], Path("log.txt"), held) == 0
        assert Path("log.txt").read_text().startswith("lit-unlearn 0")

        Path("sleeper").write_text("#!/bin/sh\nexec sleep 60\n")
        Path("sleeper").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(in_tmp / "sleeper"))
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(processes(["fit"], Path("log.txt"), held)))
        thread.start()
        while thread.is_alive() and not processes._running:
            time.sleep(0.01)
        processes.stop()
        thread.join(timeout=30)
        assert codes == [-15]
        # Nothing is started any more.
        assert processes(["fit"], Path("log.txt"), held) == 130


def test_an_interrupted_sweep_stops_what_runs_and_begins_nothing_more(in_tmp: Path) -> None:
    output, cells = read_sweep(write_sweep())
    release, second_began = threading.Event(), threading.Event()

    class SecondWaits(FakeCommands):
        def __call__(self, arguments: Sequence[str], log: Path, held: int) -> int:
            code = super().__call__(arguments, log, held)
            if len(self.ran) == 1:
                return code
            second_began.set()
            release.wait(30)
            return 143

        def stop(self) -> None:
            release.set()

    fake: Any = SecondWaits()
    ended = run_cells(cells, output, 1, fake)
    next(ended)
    assert second_began.wait(30)
    # As `closing` does it when the loop around it is interrupted.
    ended.close()
    assert fake.starts() == [f"fit {name}" for name in NAMES[:2]]
    assert [read_state(output / name).status for name in NAMES] == ["done", "unfinished", "waiting", "waiting"]


def test_one_cell_runs_to_its_end_without_a_sweep(in_tmp: Path) -> None:
    cell = Cell("a", (("fit", "--x={cell}/y"), ("data", "{cell}")))
    fake = FakeCommands()
    state = run_cell(cell, Path("a"), fake)
    assert state is not None
    assert (state.status, fake.ran) == ("done", ["fit --x=a/y", "data a"])
    # The same on every machine, wherever the folder is.
    assert state.commands == [["fit", "--x={cell}/y"], ["data", "{cell}"]]


# Real cells -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_real_cells(
    in_tmp: Path, model_dir: str, rows_dir: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model.lm.model": model_dir,
        "data.num_authors": 3,
        "data.forget_authors": 1,
        "data.max_length": 200,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
    }
    measure = f"evaluate {{cell}}/model --suite qa --forget {rows_dir}/forget.jsonl --retain {rows_dir}/retain.jsonl"
    after = f"{measure} --output {{cell}}/qa.json --max_new_tokens=4 --trainer.accelerator=cpu"
    sweep_of_fits = {"settings": settings, "grid": {"method": ["pdu"], "seed": [0, 1]}, "keep": "model"}
    write_sweep(**sweep_of_fits)
    cli.main(["sweep", "sweep.yaml", "--only", "*seed=0", "--jobs=2"])

    # One fit was a process that imported everything, as sweeps start it; all other commands start at once.
    # The one that measures is added to a cell that is done.
    monkeypatch.setattr(sweep, "Processes", lambda jobs: ForkedCommands())
    write_sweep(**sweep_of_fits, after=after)
    cli.main(["sweep", "sweep.yaml"])
    for seed in (0, 1):
        folder = Path("sweep", f"method=pdu,seed={seed}")
        assert read_state(folder).status == "done", (folder / "log.txt").read_text()
        record = json.loads((folder / "model/unlearning.json").read_text(encoding="utf-8"))
        assert record["data"]["seed"] == seed
        assert (folder / "report.json").is_file()
        assert list(folder.glob("fit/version_0/metrics.csv"))
        assert not (folder / "fit/checkpoints").exists()
    capsys.readouterr()

    cli.main(["compare", "sweep", "--seeds", "--format=csv"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {(row["group"], row["seeds"]) for row in rows} == {("report", "2")}
    cli.main(["compare", "sweep", "--results=qa.json", "--format=csv"])
    header, *_ = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["", "method=pdu,seed=0/qa", "method=pdu,seed=1/qa"]

    # As after a kill before the end of the fit was noted: it is run again, over its own export.
    state = Path("sweep", "method=pdu,seed=0", STATE_FILE)
    lines = state.read_text(encoding="utf-8").splitlines(keepends=True)
    state.write_text("".join(lines[:2]), encoding="utf-8")
    shutil.rmtree("sweep/method=pdu,seed=1")
    cli.main(["sweep", "sweep.yaml", "--only", "*seed=0"])
    assert read_state(state.parent).status == "done"
