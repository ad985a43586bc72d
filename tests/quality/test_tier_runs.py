"""The command of the comparisons on real models: every cell is run once, and is a line of the results."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import ForkedCommands
from quality_tiers import FakeCommands, make_runner, write_tofu

from benchmarks.quality import __main__ as runner
from benchmarks.quality import smollm2, tier_tables, tofu_1b
from benchmarks.quality.results_files import read_json_lines
from lit_unlearn import LanguageModel

tofu, run = pytest.fixture(write_tofu), pytest.fixture(make_runner)


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
    assert set(line["digests"]) == {"real/unlearn.yaml", "method/npo.yaml"}
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
    assert set(lines[1]["digests"]) == {"tofu.yaml", "paper/tofu_llama-3.2-1b.yaml"}
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
