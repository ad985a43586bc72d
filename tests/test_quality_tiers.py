"""The comparisons on real models: their sweeps can be run, their results are collected once, and the tables say what is there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT
from forked import ForkedCommands

from benchmarks import readme
from benchmarks.markdown_blocks import fill_page
from benchmarks.quality import __main__ as runner
from benchmarks.quality import collecting, goals, smollm2, tier_tables, tofu_1b, tofu_rows
from benchmarks.quality.results_files import RESULTS, read_json_lines, write_json_lines
from benchmarks.quality.smollm2_sweeps import SmolLM2
from benchmarks.quality.tofu_1b import TOFU1B
from lit_unlearn import LanguageModel, cli
from lit_unlearn.cli import attack, depth, prepare, sweep
from lit_unlearn.cli.grid import read_sweep
from lit_unlearn.utils.io import write_json

Tier = SmolLM2 | TOFU1B


def make_smollm2(size: str = "10", methods: Sequence[str] = tuple(smollm2.METHODS)) -> SmolLM2:
    grid = smollm2.GRIDS[size]
    return SmolLM2(
        size,
        Path("work"),
        Path("results"),
        grid.seeds,
        grid.selection.sizes,
        tuple(methods),
        "32-true",
        measures_depth=True,
    )


def make_tofu_1b() -> TOFU1B:
    return TOFU1B(Path("work"), Path("results"), (0,), tuple(tofu_1b.METHODS), None, measures_depth=True)


TIERS: dict[str, Callable[[], Tier]] = {
    **{f"smollm2-{size}": lambda size=size: make_smollm2(size) for size in smollm2.GRIDS},  # type: ignore[misc]
    "tofu-1b": make_tofu_1b,
}
STAGES = [(name, stage) for name, make in TIERS.items() for stage in make().STAGES]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate is chosen for every method."""
    monkeypatch.setattr(SmolLM2, "_choose_rate", lambda self, method: 1e-4)


def write_stage(tier: Tier, stage: str) -> str:
    return str(runner.write_sweep(tier, stage))


# Sweeps ---------------------------------------------------------------------------------------------------------------


def test_every_method_has_its_settings() -> None:
    methods = {path.stem for path in (ROOT / "configs/method").glob("*.yaml")}
    # Those that rewind are another method's file with settings.
    assert methods == {name for name in smollm2.METHODS if "rewound" not in name}
    assert smollm2.METHODS.keys() > set(smollm2.OURS)
    assert tofu_1b.RECOMMENDED in tofu_1b.METHODS.keys() <= methods


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_every_stage_is_a_sweep(name: str, stage: str, tuned: None, in_tmp: Path) -> None:
    _, cells = read_sweep(write_stage(TIERS[name](), stage))
    # Each cell has what finds the models, the rows and the references of its seed and forget set.
    for cell in cells:
        assert not any("{" in word.replace("{cell}", "").replace('{"', "") for word in sum(cell.commands, ()))
        assert cell.name.count("=") == len(collecting.read_labels(cell.name))


def test_the_models_of_a_grid_are_those_that_its_stages_read(tuned: None, in_tmp: Path) -> None:
    tier = make_smollm2("20")
    _, models = read_sweep(write_stage(tier, "models"))
    folders = {f"work/models/{cell.name}/model" for cell in models}
    read = set()
    for stage in ("tuning_reference", "tuning", "reference", "target", "final"):
        _, cells = read_sweep(write_stage(tier, stage))
        words = [
            word.partition("=")[2] if word.startswith("--") else word
            for cell in cells
            for word in sum(cell.commands, ())
        ]
        read |= {word for word in words if word.startswith("work/models/")}
    assert read == folders
    assert smollm2.TUNING_SEED not in tier.seeds


def test_the_number_of_methods_follows_from_the_cost_of_a_step() -> None:
    small, large, full = smollm2.GRIDS["10"], smollm2.GRIDS["20"], smollm2.GRIDS["full"]
    rates = smollm2.TOKENS_PER_SECOND.values()
    # As the protocol's table says.
    assert [smollm2.count_methods(small, rate) for rate in rates] == [7, 12]
    assert [smollm2.count_methods(large, rate) for rate in rates] == [1, 4]
    assert smollm2.count_methods(small, 1) == 1
    assert smollm2.count_methods(full, 1) == len(smollm2.METHODS)


def check_command(words: Sequence[str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the parser of a command read its arguments, and run nothing."""
    command, *options = (word.replace("{cell}", folder) for word in words)
    if command == "evaluate":
        passed_on: list[list[str]] = []
        with monkeypatch.context() as patch:
            patch.setattr("lit_unlearn.cli.trainer.run", passed_on.append)
            cli.main([command, *options])
        ((command, *options),) = passed_on
    if command in ("fit", "test"):
        with pytest.raises(SystemExit) as end:
            cli.main([command, *options, "--print_config"])
        assert not end.value.code, end.value
    else:
        {"attack": attack, "depth": depth, "prepare": prepare}[command].build_parser().parse_args(options)


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, stage in STAGES if name in ("smollm2-10", "tofu-1b")]
)
def test_parsers_accept_a_cell_of_each_stage(
    name: str, stage: str, tuned: None, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cells = read_sweep(write_stage(TIERS[name](), stage))
    for words in cells[0].commands:
        check_command(words, "cell", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "settings"),
    [
        ("smollm2-10", "final", smollm2.METHODS),
        ("smollm2-10", "ablation", smollm2.ABLATIONS),
        ("tofu-1b", "final", tofu_1b.METHODS),
    ],
    ids=["smollm2-10", "ablation", "tofu-1b"],
)
def test_parsers_accept_the_settings_of_every_method(
    name: str, stage: str, settings: dict[str, Any], tuned: None, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cells = read_sweep(write_stage(TIERS[name](), stage))
    # One forget set and seed: the others change names of files alone.
    of_methods = {cell.name.rpartition("method=")[2]: cell for cell in cells}
    assert of_methods.keys() == settings.keys()
    # Files as they are differ in nothing that is set here, and test_cli.py reads each of them.
    as_they_are = [method for method in of_methods if not settings[method]]
    for method in as_they_are[1:]:
        del of_methods[method]
    for cell in of_methods.values():
        check_command(cell.commands[0], "cell", monkeypatch)


@pytest.mark.parametrize("attacks", [smollm2.ATTACKS, tofu_1b.ATTACKS])
def test_the_attacks_can_be_read(attacks: dict[str, Any]) -> None:
    read, _, _ = attack.read_config(attacks)
    assert set(read) >= {"4 bits", *tier_tables.RELEARNING}


# Rows -----------------------------------------------------------------------------------------------------------------

AUTHORS = 14


@pytest.fixture
def tofu(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with TOFU's files: two rows of each author."""
    monkeypatch.setattr(tofu_rows, "ROWS_PER_AUTHOR", 2)

    def make(name: str, count: int) -> list[dict[str, Any]]:
        rows = []
        for number in range(count):
            answer = f"{name} {number} was born in Oslo in {1900 + number}."
            wrong = [f"{name} {number} was born in {city}." for city in ("Rome", "Paris")]
            question = f"Where was Anna {name} {number} born?"
            rows.append(
                {
                    "question": question,
                    "answer": answer,
                    "paraphrased_answer": f"It was Oslo, in {1900 + number}.",
                    "perturbed_answer": wrong,
                }
            )
        return rows

    retain, forget = make("Berg", 2 * AUTHORS), make("Dahl", 40)
    files = {
        "retain90": [{key: row[key] for key in ("question", "answer")} for row in retain],
        "retain_perturbed": retain,
        "forget10": [{key: row[key] for key in ("question", "answer")} for row in forget],
        "forget10_perturbed": forget,
        "real_authors_perturbed": make("Ibsen", 6),
        "world_facts_perturbed": make("Fram", 6),
    }
    for name, rows in files.items():
        write_json_lines(Path("tofu", f"{name}.json"), rows)
    entities = [{**row, "entity": "Oslo"} for row in files["forget10"]]
    Path("entities.json").write_text(json.dumps(entities), encoding="utf-8")
    return "tofu"


def test_no_author_is_in_two_sets_and_the_target_has_the_same_rows_for_every_size(tofu: str) -> None:
    selection = tofu_rows.Selection(10, (1, 2), aside=2, measured=4)
    tofu_rows.write_rows(tofu, Path("rows"), selection)
    tofu_rows.write_entities(tofu, Path("rows"), selection, "entities.json", max_rows=1)
    trained = []
    for size in selection.sizes:
        forget, retain = (
            {row["question"] for row in read_json_lines(Path("rows", str(size), name))}
            for name in ("forget10_perturbed.json", "retain.jsonl")
        )
        assert len(forget) == 2 * size
        assert not forget & retain
        trained.append(forget | retain)
        assert len(read_json_lines(Path("rows", str(size), "retain_perturbed.json"))) == 4
        (entity,) = read_json_lines(Path("rows", str(size), "entities.jsonl"))
        assert entity["question"] in forget
    assert trained[0] == trained[1]
    assert len(trained[0]) == 20
    aside = [
        {row["question"] for row in read_json_lines(Path("rows", f"{name}.jsonl"))} for name in ("unseen", "holdout")
    ]
    assert [len(questions) for questions in aside] == [4, 4]
    assert not (aside[0] | trained[0]) & aside[1]
    assert not aside[0] & trained[0]


# The runner -----------------------------------------------------------------------------------------------------------


class FakeCommands:
    """Stands for the processes of a sweep, and writes what they would have measured.

    Args:
        fails: Part of the commands that fail.
    """

    def __init__(self, fails: str = "nothing fails") -> None:
        self.fails = fails
        self.ran: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path, held: int) -> int:
        self.ran.append(" ".join(arguments))
        if self.fails in self.ran[-1]:
            log.write_text("lit-unlearn: error: no memory\n", encoding="utf-8")
            return 1
        options = dict(word.partition("=")[::2] for word in arguments)
        folder = log.parent
        if arguments[0] == "fit":
            damage = {"measure": "kl", "stream": "general", "rows": 8, "limit": 0.01, "value": 0.01, "reached": True}
            is_matched = "--config=method/matched/kl.yaml" in arguments
            report = make_report(damage={**damage, "step": 3} if is_matched else None)
            write_json(folder / "report.json", report)
            (folder / "model").mkdir(exist_ok=True)
        elif arguments[0] == "evaluate":
            # The higher learning rate forgets better.
            quality = 0.5 if "lr=0.0002" in str(folder) else 0.01
            write_json(Path(options["--output"]), make_tofu_results(forget_quality=quality))
        elif arguments[0] == "attack":
            point = {"effort": 20, "rows": 10, "probability": 0.2, "rougeL_recall": 0.3}
            attacks: dict[str, Any] = {"4 bits": {"model": {"not_tested": "no memory"}}}
            for label in (*tier_tables.RELEARNING, "sampled"):
                attacks[label] = {"model": {"points": [{}, point]}}
            write_json(Path(options["--output"], "attack.json"), {"attacks": attacks})
        elif arguments[0] == "depth":
            write_json(Path(options["--output"]), {"aggregate": {"unlearning_depth": 0.9}, "missing": {}})
        return 0

    def stop(self) -> None:
        pass


def make_report(nll: float = 0.1, **values: Any) -> dict[str, Any]:
    constraints = {"nll": {"value": nll, "epsilon": 0.2}}
    report = {"verdict": None, "constraints": constraints, "after": {}, "seconds": 60.0, "peak_memory_mib": 900.0}
    return {**report, "example": {"tokens": ["text"]}, **values}


def make_tofu_results(**values: float) -> dict[str, Any]:
    aggregate = {
        "memorization": 0.6,
        "model_utility": 0.5,
        "forget/fluency_nll": 1.0,
        "forget/repetition": 0.0,
        "forget/empty": 0.0,
    }
    aggregate |= {f"attack_score/{name}": 0.8 for name in ("min_k", "min_k_plus_plus", "loss", "zlib")}
    aggregate |= {name.replace("__", "/"): value for name, value in values.items()}
    row = {"truth_ratio": 0.7, "fluency_nll": 1.0, "repetition": 0.0, "generated": "In Rome.", "question": "Where?"}
    return {"aggregate": aggregate, "missing": {}, "examples": {"forget": [row] * 4}}


@pytest.fixture
def run(tofu: str, monkeypatch: pytest.MonkeyPatch, model_dir: str) -> Callable[..., FakeCommands]:
    """Runs the command of a tier, whose sweeps start nothing."""
    monkeypatch.setattr("benchmarks.smollm2.find_model", lambda: Path(model_dir))
    monkeypatch.setattr("benchmarks.real.choose_precision", lambda: "32-true")

    def run_tier(*options: str, model: str = "smollm2", commands: Any = None) -> Any:
        fake = commands or FakeCommands()
        monkeypatch.setattr(sweep, "Processes", lambda jobs: fake)
        runner.main(
            [
                f"--model={model}",
                f"--tofu={tofu}",
                "--results=results",
                "--work=work",
                "--entities=entities.json",
                *options,
            ]
        )
        return fake

    return run_tier


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small grid tunes, as larger ones do."""
    monkeypatch.setitem(smollm2.GRIDS, "10", smollm2.GRIDS["10"]._replace(is_tuned=True, one_size=2))


def test_a_tier_runs_to_its_end_once_and_every_cell_is_a_line(run: Any, tuning: None, in_tmp: Path) -> None:
    methods = ("--methods", "pdu", "npo")
    first = run(*methods)
    counts = {path.stem: len(read_json_lines(path)) for path in Path("results/smollm2-10").iterdir()}
    expected = {"answers": 2, "models": 5, "tuning_reference": 1, "tuning": 4, "reference": 2, "target": 2, "final": 4}
    assert counts == expected
    assert len(first.ran) == 2 + 5 + 1 + 4 * 2 + 2 * 2 + 2 + 4 * 4
    # The learning rate that the rule has chosen.
    fits = [command for command in first.ran if "method/npo.yaml" in command and "/final/" in command]
    assert len(fits) == 2
    assert all("--model.optimizer.init_args.lr=0.0002" in command for command in fits)

    line = read_json_lines(Path("results/smollm2-10/final.jsonl"))[0]
    assert line["labels"] == {"seed": "0", "size": "1", "method": "npo"}
    assert "error" not in line
    assert line["commit"]
    assert set(line["digests"]) == {"real/unlearn.yaml", "method/npo.yaml", "{work}/attacks.yaml"}
    assert len(line["commands"]) == len(line["seconds"]) == 4
    assert "{work}/models/model=target-0/model" in line["commands"][0]
    assert line["report"]["example"] is None
    assert line["tofu"]["forget"]["truth_ratio"] == [0.7] * 4
    assert line["attack"]["relearned"]["probability"] == 0.2
    assert line["depth"] == {"unlearning_depth": 0.9}
    content = Path("results/smollm2-10/final.jsonl").read_text(encoding="utf-8")
    assert str(in_tmp) not in content
    assert "Where?" not in content

    assert run(*methods).ran == []
    assert Path("results/smollm2-10/final.jsonl").read_text(encoding="utf-8") == content
    assert len(run(*methods, "--stages", "matched").ran) == 2 * 3

    ceiling = run("--stages", "ceiling", "--sizes", "2").ran
    assert [command.split()[0] for command in ceiling] == ["fit", "evaluate", "depth"]
    assert f"--model.seed={smollm2.OTHER_SEEDS}" in ceiling[0]
    # Beside the retain-only model of the cell's own seed.
    assert "reference/seed=0,size=2/tofu.json" in ceiling[1]


def test_a_grid_that_tunes_nothing_gives_every_method_the_fixed_rate(run: Any) -> None:
    ran = run("--methods", "pdu", "npo").ran
    stages = {path.stem for path in Path("results/smollm2-10").iterdir()}
    assert stages == {"answers", "models", "reference", "target", "final"}
    assert not any(f"seed={smollm2.TUNING_SEED}" in command for command in ran)
    fits = [command for command in ran if command.startswith("fit") and "/final/" in command]
    assert len(fits) == 4
    assert all(f"--model.optimizer.init_args.lr={smollm2.FIXED_RATE}" in command for command in fits)


def test_a_failed_method_is_a_line_and_a_failed_model_ends_the_run(run: Any, tuning: None) -> None:
    run("--methods", "pdu", "npo", commands=FakeCommands("/tuning/seed=100,size=2,method=npo,lr=0.0001"))
    lines = read_json_lines(Path("results/smollm2-10/tuning.jsonl"))
    assert ["error" in line for line in lines] == [True, False, False, False]
    assert lines[0]["error"] == "fit ended with exit code 1: no memory"

    shutil.rmtree("work")
    with pytest.raises(SystemExit, match=r"'models'.* model=target-0\. --retry"):
        run("--methods", "pdu", commands=FakeCommands("/models/model=target-0"))


def test_final_runs_need_their_tuning(run: Any, tuning: None, capsys: Any) -> None:
    run("--methods", "pdu", "--list")
    printed = capsys.readouterr().out
    assert "final: 'pdu' has 0 of 2 tuning runs" in printed
    assert "seed=100,size=2,method=pdu,lr=0.0001" in printed
    with pytest.raises(SystemExit, match="'pdu' has 0 of 2 tuning runs"):
        run("--methods", "pdu", "--stages", "final")


def test_the_public_grid_runs_on_local_models(run: Any) -> None:
    fake = run("--models=published", "--methods", "pdu", "match_unseen", model="tofu-1b")
    assert sum("published/open-unlearning/tofu_Llama-3.2-1B-Instruct_full" in command for command in fake.ran) > 3
    lines = read_json_lines(Path("results/tofu-1b/final.jsonl"))
    assert [line["labels"]["method"] for line in lines] == ["match_unseen", "pdu"]
    # The paper's own configuration, without the file of the method.
    assert set(lines[1]["digests"]) == {"tofu.yaml", "paper/tofu_llama-3.2-1b.yaml", "{work}/attacks.yaml"}
    blocks = tier_tables.make_blocks(Path("results"))
    assert "| pdu | 0.7" in blocks["tofu-1b-grid"]
    assert "| npo_constrained | not run yet |" in blocks["tofu-1b-grid"]


def test_forget_sets_that_are_not_there_are_refused(run: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run("--sizes", "3")
    assert "--sizes: with --size 10, there are 1, 2, not [3]" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "name"), [("--stages", "tuning"), ("--methods", "npo")])
def test_names_of_another_tier_are_refused(option: str, name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--model=tofu-1b", option, name])
    assert f"{option}: tofu-1b has no '{name}'" in capsys.readouterr().err


def test_the_small_tier_has_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on: list[Any] = []
    monkeypatch.setattr(runner.sweep, "main", passed_on.append)
    runner.main(["--model", "small", "--tofu", "folder", "--seeds", "0"])
    assert passed_on == [["--tofu", "folder", "--seeds", "0"]]


# Goals and tables -----------------------------------------------------------------------------------------------------


def make_line(method: str | None = None, **values: Any) -> dict[str, Any]:
    labels = {"seed": "0", "size": "1"} | ({} if method is None else {"method": method})
    tofu = make_tofu_results(**values.pop("tofu", {}))
    probability = values.pop("relearned", 0.2)
    relearned = {label: {"probability": probability} for label in tier_tables.RELEARNING}
    line = {
        "cell": ",".join(f"{axis}={label}" for axis, label in labels.items()),
        "labels": labels,
        "protocol": smollm2.digest("10"),
        "commit": "abc",
        "report": make_report(values.pop("nll", 0.1)),
        "tofu": collecting._summarize_tofu(tofu),
        "attack": relearned,
        "depth": {"unlearning_depth": values.pop("uds", 0.9)},
    }
    return line | values


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "abcde"),
        ({"nll": 0.21}, "bcde"),
        ({"tofu": {"forget_quality": 0.05}}, "acde"),
        ({"tofu": {"forget_quality": 0.3, "forget__fluency_nll": 0.4}}, "abde"),
        ({"tofu": {"forget_quality": 0.3, "forget__repetition": 0.06}}, "abde"),
        ({"relearned": 0.41}, "abce"),
        ({"uds": 0.3}, "abcd"),
    ],
)
def test_each_goal_can_be_missed(changes: dict[str, Any], expected: str) -> None:
    values = {"tofu": {"forget_quality": 0.3}, "nll": 0.1, "uds": 0.99, **changes}
    # As many memories as the retain-only model, whose Privacy is 1.
    for_all = {f"attack_score/{name}".replace("/", "__"): 0.99 for name in ("min_k", "min_k_plus_plus", "loss", "zlib")}
    values["tofu"] = {**for_all, **values["tofu"]}
    line, reference = make_line("ours", **values), make_line()
    results = tier_tables.TierResults([reference], [make_line()], [line, make_line("theirs", uds=0.5)], [])
    reached = tier_tables.judge_methods(results, results.unlearned, ["theirs"], {})["ours"]
    assert "".join(name for name, value in reached.items() if value is True) == expected
    assert None not in reached.values()


def test_the_ablation_stands_beside_the_whole_method_on_its_seeds(in_tmp: Path) -> None:
    digest = smollm2.digest("10")
    assert tier_tables.make_ablation(Path(), digest, "1") == "Not run yet."
    other = make_line(smollm2.ABLATED)
    other["labels"] = {**other["labels"], "seed": "1"}
    write_json_lines(Path("reference.jsonl"), [make_line()])
    write_json_lines(Path("final.jsonl"), [make_line("pdu"), other, make_line(smollm2.ABLATED)])
    write_json_lines(Path("ablation.jsonl"), [make_line("without_rewind", uds=0.5)])
    table = tier_tables.make_ablation(Path(), digest, "1").splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == ["retain-only", "target", smollm2.ABLATED, "without_rewind"]
    # Of one seed, there is no interval.
    assert "±" not in table[4]


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    line = make_line("ours")
    for file in ("report", "attack", "tofu"):
        del line[file]
    assert goals.judge(line, make_line(), {}, ()) == dict.fromkeys("abcde")


@pytest.mark.parametrize(("overalls", "reached"), [({"": 0.9, "ours": 0.89}, None), ({"": 0.9, "ours": 0.8}, False)])
def test_the_best_of_one_is_not_known_to_be_the_best(overalls: dict[str, float], reached: bool | None) -> None:
    assert goals.judge(make_line("ours"), make_line(), overalls, ["theirs"])["e"] is reached


def test_overall_by_hand() -> None:
    line, reference, target = make_line("ours", uds=0.8), make_line(), make_line(tofu={"model_utility": 0.8})
    parts = goals.compute_parts(line, reference, target)
    # All answers are as fluent as the retain-only model's.
    utility, utility_target = 2 / (1 / 0.5 + 1), 2 / (1 / 0.8 + 1)
    assert parts["privacy"] == pytest.approx(0.8)
    assert parts["utility"] == pytest.approx(utility / utility_target)
    assert parts["overall"] == pytest.approx(3 / (1 / 0.6 + 1 / 0.8 + utility_target / utility))
    assert goals.compute_parts(reference, reference, target)["privacy"] == 1
    assert "overall" not in goals.compute_parts(line, None, target)


def test_the_rule_takes_most_goals_and_then_forget_quality() -> None:
    infeasible = make_line("ours", nll=0.3, tofu={"forget_quality": 0.9})
    better, worse = (make_line("ours", tofu={"forget_quality": quality}) for quality in (0.3, 0.2))
    assert goals.choose_run([infeasible, worse, better], [make_line()]) is better


def test_tables_keep_failures_and_say_what_was_not_run(in_tmp: Path) -> None:
    folder = Path("results/smollm2-10")
    failed = {**make_line("npo"), "error": "fit ended with exit code 1: it diverged"}
    write_json_lines(folder / "final.jsonl", [make_line("pdu", uds=0.7, tofu={"forget_quality": 0.3}), failed])
    write_json_lines(folder / "reference.jsonl", [make_line()])
    write_json_lines(folder / "target.jsonl", [make_line()])
    ceiling = make_line(uds=0.6)
    del ceiling["report"]
    write_json_lines(folder / "ceiling.jsonl", [ceiling])
    blocks = tier_tables.make_blocks(Path("results"))
    lines = blocks["smollm2-10"].splitlines()
    line, reference = make_line("pdu", uds=0.7), make_line()
    overall, highest = (goals.compute_parts(one, reference, make_line())["overall"] for one in (line, reference))
    share = overall / highest
    assert f"| 1 | 0 | pdu | yes | yes | yes | yes | NO | {share:.1%} |" in lines
    assert any(line.startswith("| 1 | 0 | npo | failed: fit ended with exit code 1: it diverged |") for line in lines)
    assert any(line.startswith("| pdu | 0 | 1 of 1 | 0.7") for line in lines)
    assert any(line.startswith("| retain-only |") for line in lines)
    assert any(line.startswith("| retain-only, another seed | 0 | – | 0.7") for line in lines)
    assert lines.count("Not run yet.") == 1  # on 2 authors
    assert lines[-1] == "Commits: abc."
    assert blocks["smollm2-20"] == blocks["tofu-1b"] == "Not run yet."


def test_results_of_another_protocol_are_refused(in_tmp: Path) -> None:
    write_json_lines(Path("results/smollm2-10/final.jsonl"), [{**make_line("pdu"), "protocol": "another"}])
    with pytest.raises(ValueError, match="another protocol"):
        tier_tables.make_blocks(Path("results"))


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("docs/results.md", lambda: tier_tables.make_blocks(RESULTS)),
        ("README.md", lambda: {"comparison": readme.comparison_block()}),
    ],
    ids=["results", "readme"],
)
def test_the_pages_have_the_tables_of_the_kept_results(
    page: str, blocks: Callable[[], dict[str, str]], tmp_path: Path
) -> None:
    copy = tmp_path / "page.md"
    shutil.copy(ROOT / page, copy)
    fill_page(copy, blocks())
    assert copy.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")


# End to end -----------------------------------------------------------------------------------------------------------


def write_chat_model(folder: Path, tokenizer_dir: str) -> None:
    """Write a tiny model whose tokenizer has a chat template, as the published ones have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = (
        "{{ date_string }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 512}
    lm = LanguageModel(config=config, tokenizer=str(folder / "tokenizer"))
    lm.load()
    lm.save(folder / "model")


# Each tier's evaluation writes answers of its own length, and fits take the epochs of their configurations.
ON_CPU = {
    "fit": ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2"],
    "evaluate": ["--trainer.accelerator=cpu", "--max_new_tokens=4"],
}


@pytest.fixture
def small_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tiers with one forget set, one learning rate, few rows and short answers; all stages and kinds of cells stay."""
    grid = smollm2.GRIDS["10"]
    selection = grid.selection._replace(authors=4, sizes=(1,), aside=1, measured=4)
    monkeypatch.setitem(smollm2.GRIDS, "10", grid._replace(selection=selection, is_tuned=True))
    monkeypatch.setattr(smollm2, "RATES", smollm2.RATES[:1])
    monkeypatch.setattr(tofu_1b, "AUTHORS", 2)
    monkeypatch.setattr(tofu_1b, "SELECTION", tofu_1b.SELECTION._replace(authors=6, sizes=(2,), measured=4))
    for attacks in (smollm2.ATTACKS, tofu_1b.ATTACKS):
        monkeypatch.setitem(attacks, "max_new_tokens", 4)
        for label in tier_tables.RELEARNING:
            # An author has two rows here.
            monkeypatch.setitem(attacks["attacks"][label], "rows", 1)
            monkeypatch.setitem(attacks["attacks"][label], "steps", 2)


def check_measured(lines: list[dict[str, Any]], attacks: dict[str, Any]) -> None:
    for line in lines:
        assert {"report", "tofu", "attack", "depth"} <= line.keys()
        assert {"forget_quality", "model_utility", "memorization"} <= line["tofu"]["aggregate"].keys()
        assert set(line["attack"]) == {"no attack", *attacks}
        assert not any("not_tested" in outcome for outcome in line["attack"].values())


@pytest.mark.slow
def test_a_miniature_of_smollm2_runs_from_rows_to_tables(run: Any, small_protocols: None) -> None:
    """The whole command on a tiny model: every stage, every kind of cell, the tables. This method reads the base model's answers."""
    run("--methods", "teacher_answers", commands=ForkedCommands(**ON_CPU))
    lines = read_json_lines(Path("results/smollm2-10/final.jsonl"))
    assert [line.get("error") for line in lines] == [None]
    check_measured(lines, smollm2.ATTACKS["attacks"])
    block = tier_tables.make_blocks(Path("results"))["smollm2-10"]
    assert "failed" not in block
    assert block.count("| teacher_answers |") == 2  # goals and values


@pytest.mark.slow
def test_a_miniature_of_the_public_grid_runs_from_rows_to_tables(
    run: Any, small_protocols: None, tokenizer_dir: str
) -> None:
    """The same with models of their hub names, in their prompt. This method reads rows that the target model wrote."""
    # Most models of random weights never end an answer, and write no rows: this one does, whatever ran before.
    torch.manual_seed(0)
    published = Path("published/open-unlearning")
    for name in (tofu_1b.TARGET, tofu_1b.RETAIN_ONLY):
        write_chat_model(Path("made", name), tokenizer_dir)
        shutil.copytree(Path("made", name, "model"), published / Path(name).name)
    write_chat_model(Path("made", tofu_1b.BASE), tokenizer_dir)
    shutil.copytree(Path("made", tofu_1b.BASE, "model"), Path("published", tofu_1b.BASE))
    run("--models=published", "--methods", "match_calibrated", model="tofu-1b", commands=ForkedCommands(**ON_CPU))
    lines = read_json_lines(Path("results/tofu-1b/final.jsonl"))
    assert [line.get("error") for line in lines] == [None]
    check_measured(lines, tofu_1b.ATTACKS["attacks"])
    blocks = tier_tables.make_blocks(Path("results"))
    assert "failed" not in blocks["tofu-1b"]
    # These models know no entity, so there is no depth, and no Overall without it.
    assert re.search(r"^\| match_calibrated \(recommended\) \| – \| 0\.\d+ \|", blocks["tofu-1b-grid"], re.MULTILINE)
