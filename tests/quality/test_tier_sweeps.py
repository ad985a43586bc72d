"""The comparisons on real models: their sweeps can be run, on rows that are in one set only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT
from quality_tiers import TIERS, Tier, make_smollm2, write_tofu

from benchmarks.quality import collecting, smollm2, tier_tables, tofu_1b, tofu_rows
from benchmarks.quality.results_files import read_json_lines
from benchmarks.quality.smollm2_sweeps import SmolLM2
from lit_unlearn import cli
from lit_unlearn.cli import attack, depth, prepare
from lit_unlearn.cli.grid import read_sweep

tofu = pytest.fixture(write_tofu)
STAGES = [(name, stage) for name, make in TIERS.items() for stage in make().STAGES]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate is chosen for every method."""
    monkeypatch.setattr(SmolLM2, "_choose_rate", lambda self, method: 1e-4)


def write_stage(tier: Tier, stage: str) -> str:
    Path("stage.yaml").write_text(yaml.safe_dump(tier.build(stage), sort_keys=False), encoding="utf-8")
    return "stage.yaml"


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
