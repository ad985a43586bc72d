"""`lit-unlearn evaluate` builds what the long form builds, and writes a results file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import end_of, instantiate

from lit_unlearn import cli
from lit_unlearn.evaluation.results import Results
from lit_unlearn.utils.io import write_json

ROWS = {"question": "Who?", "answer": "He.", "perturbed_answer": ["She.", "It."], "paraphrased_answer": "Him."}
CPU = "--trainer.accelerator=cpu"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            ["--suite=tofu", "--forget_split=forget05", "--max_rows=3", "--dtype=bfloat16", "--max_new_tokens", "7"],
            [
                "--config=eval/tofu.yaml",
                "--model.benchmark.forget_split=forget05",
                "--model.benchmark.max_rows=3",
                "--model.benchmark.max_new_tokens=7",
                "--trainer.precision=bf16-true",
            ],
        ),
        (
            ["--suite=muse", "--corpus=Books", "--model.lm.tokenizer=null"],
            ["--config=eval/muse.yaml", "--model.benchmark.corpus=Books", "--model.lm.tokenizer=null"],
        ),
        (
            ["--suite=lume", "--tasks=[Task2]", "--mmlu=0.5", "--max_rows=2"],
            [
                "--config=eval/lume.yaml",
                "--model.benchmark.tasks=[Task2]",
                "--model.benchmark.mmlu=0.5",
                "--model.benchmark.max_rows=2",
            ],
        ),
        (
            ["--suite=stress", "--k=0.3", "--bits=[4]"],
            ["--config=eval/stress.yaml", "--model.benchmark.benchmark.k=0.3", "--model.benchmark.bits=[4]"],
        ),
        (
            ["--suite=leak", "--max_rows=3", "--k=0.3", "--sampling.samples=9", "--attempts=[1,9]", "--texts=true"],
            [
                "--config=eval/leak.yaml",
                "--model.benchmark.benchmark.max_rows=3",
                "--model.benchmark.benchmark.k=0.3",
                "--model.benchmark.sampling.samples=9",
                "--model.benchmark.attempts=[1,9]",
                "--model.benchmark.texts=true",
            ],
        ),
    ],
)
def test_the_same_objects(
    short: list[str], long: list[str], in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = instantiate(["evaluate", model_dir, *short, "--output=a.json", CPU], monkeypatch)
    test = instantiate(["test", *long, f"--model.lm.model={model_dir}", "--model.results=a.json", CPU], monkeypatch)
    assert evaluate.config.test.model == test.config.test.model
    assert evaluate.config.test.trainer == test.config.test.trainer


def test_a_results_file(in_tmp: Path, model_dir: str, write_rows: Callable[..., str]) -> None:
    forget, retain = (write_rows(f"{name}.jsonl", [ROWS] * 3) for name in ("forget", "retain"))
    sets = [f"--forget={forget}", "--retain", retain, "--max_rows=2", "--max_new_tokens=2"]
    cli.main(["evaluate", model_dir, "--suite", "qa", *sets, "--output=new/a.json", CPU])
    results = Results.read("new/a.json")
    assert results.data["forget"]["rows"] == 2
    cli.main(["evaluate", model_dir, "--suite=qa", *sets, "--retain_results=new/a.json", "--output=b.json", CPU])
    assert Results.read("b.json").aggregate["forget_quality"] == 1
    # Its own earlier results are replaced, and no other file.
    cli.main(["evaluate", model_dir, "--suite=qa", *sets, "--output=b.json", CPU])
    before = Path(forget).read_text(encoding="utf-8")
    assert end_of(["evaluate", model_dir, "--suite=qa", *sets, f"--output={forget}", CPU]) == 2
    assert Path(forget).read_text(encoding="utf-8") == before


@pytest.fixture
def exported(model_dir: str, in_tmp: Path) -> str:
    """The model, as if it were exported from a run on other columns and in a prompt of its own."""
    shutil.copytree(model_dir, "exported")
    data = {"question_column": "asked", "answer_column": "said", "max_length": 64, "chat": {"system": "Be brief."}}
    write_json(Path("exported/unlearning.json"), {"data": data})
    return "exported"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--suite=qa", "--forget=f.jsonl", "--retain=r.jsonl"],
            {"chat.system": "Be brief.", "question_column": "asked", "answer_column": "said", "max_length": 64},
        ),
        (
            ["--suite=qa", "--forget=f.jsonl", "--retain=r.jsonl", "--template={question} {answer}", "--max_length=32"],
            {"chat": None, "question_column": "asked", "max_length": 32},
        ),
        # Its files are not the user's.
        (["--suite=tofu"], {"chat.system": "Be brief.", "question_column": "question", "max_length": 512}),
        (["--suite=tofu", "--chat.system=Be long."], {"chat.system": "Be long."}),
        # As the card of an export writes it.
        (
            ["--suite=tofu", '--chat={"system": "Be \'None\'.", "template": null, "args": {"a": null, "b": [true]}}'],
            {"chat.system": "Be 'None'.", "chat.template": None, "chat.args": {"a": None, "b": [True]}},
        ),
    ],
)
def test_an_export_is_asked_as_it_was_trained_unless_told_otherwise(
    given: list[str], expected: dict[str, Any], exported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("f.jsonl", "r.jsonl"):
        Path(name).write_text('{"asked": "Who?", "said": "He."}\n', encoding="utf-8")
    built = instantiate(["evaluate", exported, *given, "--output=a.json", CPU], monkeypatch)
    arguments = built.config.test.model.init_args.benchmark.init_args
    assert {name: arguments.get(name) for name in expected} == expected


def test_sampled_leakage_of_own_files(in_tmp: Path, model_dir: str, write_rows: Callable[..., str]) -> None:
    forget, retain = (write_rows(f"{name}.jsonl", [ROWS] * 3) for name in ("forget", "retain"))
    sets = [f"--forget={forget}", "--retain", retain, "--max_rows=2", "--max_new_tokens=2"]
    cli.main(
        [
            "evaluate",
            model_dir,
            "--suite=leak",
            *sets,
            "--sampling.samples=3",
            "--sampling.top_k=5",
            "--output=a.json",
            CPU,
        ]
    )
    results = Results.read("a.json")
    assert results.data["forget"]["rows"] == 2
    assert results.settings["leak"]["top_k"] == 5
    assert {"leak@1/exact", "leak@2/exact", "leak@3/exact"} <= results.aggregate.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite=tofu"], "output"),
        (["--suite=wmdp", "--output=a.json"], "wmdp"),
        (["--suite=qa", "--forget.path=a", "--output=a.json"], "--retain FILE"),
        (["--suite=qa", "--output=a.json"], "--forget FILE"),
        (["--suite=tofu", "--output=a.json", "--corpus=News"], "TOFUBenchmark has no setting 'corpus'"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, in_tmp: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", model_dir, *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
