"""Stress tests: each against the suite itself on a model changed by hand; on one process and on two.

``torchrun --nproc_per_node=2 test_stress.py FOLDER`` is what the latter run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import instantiate
from conftest import TINY
from evaluation.rows import FORGET, HOLDOUT, RETAIN, ks_p_value, loaded, taught, write, write_tofu

from lit_unlearn import (
    ForgetRetain,
    LanguageModel,
    LitEvaluate,
    LitFinetune,
    QABenchmark,
    Relearn,
    StressBenchmark,
    TOFUBenchmark,
)
from lit_unlearn.evaluation.attacks.copies import copy_model
from lit_unlearn.evaluation.attacks.relearning import relearn
from lit_unlearn.evaluation.attacks.rounding import load_quantized, round_weights
from lit_unlearn.models.loading import fingerprint
from lit_unlearn.utils.distributed import gather_objects, rank_and_world_size
from lit_unlearn.utils.io import read_json, write_json

ATTACK = Relearn(rows=2, steps=5, lr=3e-3, seed=1)
CHOSEN = ATTACK.choose(len(FORGET))
STRESSES = {"relearn": ATTACK, "bits": [8, 2], "paraphrased": True}
NAMES = ["relearn", "8bit", "2bit", "paraphrased"]
Results = dict[str, Any]


def write_files(folder: Path) -> dict[str, str]:
    """Files of a `QABenchmark`; forget and retain rows have a second question, holdout rows have none."""
    folder.mkdir(exist_ok=True)
    asked = [
        [{**row, "paraphrased_question": f"Say: {row['question'].lower()}"} for row in rows]
        for rows in (FORGET, RETAIN)
    ]
    sets = {"forget": asked[0], "retain": asked[1], "holdout": HOLDOUT}
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in sets.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_files(tmp_path / "rows")


@pytest.fixture
def lm(tokenizer_dir: str) -> LanguageModel:
    """Knows a part of the rows."""
    return loaded(taught(tokenizer_dir, 20), torch.float32)


def inner(files: dict[str, str], **settings: Any) -> QABenchmark:
    return QABenchmark(**files, **{"max_new_tokens": 4, **settings})


def under(results: Results, stress: str) -> Results:
    """What was found under one stress, by the suite's own names; without what only the stress has."""
    found = {}
    for part in ("aggregate", "missing", "data", "examples"):
        own = {name: value for name, value in results[part].items() if name.startswith(f"{stress}/")}
        found[part] = {name.removeprefix(f"{stress}/"): value for name, value in own.items()}
    groups = ("forget_relearned/", "forget_others/")
    found["aggregate"] = {name: value for name, value in found["aggregate"].items() if not name.startswith(groups)}
    for row in found["examples"]["forget"]:
        row.pop("relearned", None)
    return found


def by_hand(stress: str, lm: LanguageModel, suite: QABenchmark) -> LanguageModel:
    """The model under a stress."""
    other = copy_model(lm)
    if stress == "relearn":
        streams = suite.prepare(lm.tokenizer)
        rows = [streams["forget"].examples[i].sequences["answer"][0] for i in CHOSEN]
        list(relearn(other, rows, ATTACK, suite.token_budget))
    elif stress.endswith("bit"):
        round_weights(other.model, int(stress[0]))
    return other


# Values ---------------------------------------------------------------------------------------------------------------


def test_every_stress_is_the_suite_on_a_changed_model(lm, files):
    results = StressBenchmark(inner(files), **STRESSES).run(lm).to_dict()
    plain = inner(files).run(lm).to_dict()
    assert list(results["examples"])[:3] == ["forget", "retain", "holdout"]
    assert {name.split("/")[0] for name in results["examples"] if "/" in name} == set(NAMES)
    assert results.keys() == plain.keys()
    assert results["suite"] == "qa"  # so that these results, too, can be compared with
    assert results["model"] == plain["model"]
    assert results["settings"] == {
        **plain["settings"],
        "stress": {
            "relearn": {"rows": 2, "steps": 5, "lr": 3e-3, "seed": 1},
            "8bit": {"bits": 8, "backend": "round"},
            "2bit": {"bits": 2, "backend": "round"},
            "paraphrased": {"question_column": "paraphrased_question"},
        },
    }
    for part in ("aggregate", "missing", "data", "examples"):
        assert {name: results[part][name] for name in plain[part]} == plain[part]
    for stress in NAMES[:3]:
        wanted = inner(files).run(by_hand(stress, lm, inner(files))).to_dict()
        found = under(results, stress)
        for part in ("aggregate", "data", "examples"):
            assert found[part] == wanted[part]
        assert found["aggregate"] != plain["aggregate"]
        assert found["missing"].keys() == wanted["missing"].keys()
    assert results["missing"]["2bit/forget_quality"] == plain["missing"]["forget_quality"]
    other = inner({**files, "holdout": None}, question_column="paraphrased_question").run(lm).to_dict()
    found = under(results, "paraphrased")
    assert found["examples"] == other["examples"]
    assert found["aggregate"] == other["aggregate"]
    assert found["data"] == other["data"]
    assert found["examples"]["forget"][0]["question"] == "Say: who wrote the letter?"
    json.dumps(results)


def test_relearning_brings_back_what_it_saw(lm, files):
    results = StressBenchmark(inner(files), Relearn(rows=2, steps=20, lr=3e-3, seed=1)).run(lm).to_dict()
    plain, rows = results["examples"]["forget"], results["examples"]["relearn/forget"]
    assert [row["relearned"] for row in rows] == [i in CHOSEN for i in range(len(FORGET))]
    assert all(rows[i]["probability"] > plain[i]["probability"] + 0.3 for i in CHOSEN)
    values = results["aggregate"]
    for name, relearned in {"forget_relearned": True, "forget_others": False}.items():
        part = [row for row in rows if row["relearned"] == relearned]
        for key in ("probability", "nll", "rougeL_recall", "extraction_strength"):
            assert values[f"relearn/{name}/{key}"] == pytest.approx(sum(row[key] for row in part) / len(part))
        ratios = [min(row["truth_ratio"], 1 / row["truth_ratio"]) for row in part]
        assert values[f"relearn/{name}/truth_ratio"] == pytest.approx(sum(ratios) / len(ratios))


def test_all_rows_relearned_leave_no_others(lm, files):
    values = StressBenchmark(inner(files), Relearn(len(FORGET), 1, 1e-3)).run(lm).to_dict()["aggregate"]
    assert values["relearn/forget_relearned/nll"] == values["relearn/forget/nll"]
    assert not any("forget_others" in name for name in values)


def test_tofu(lm, tmp_path):
    """Sets without paraphrased questions are left out; so is then the utility."""
    folder = write_tofu(tmp_path)
    file = Path(folder) / "forget01_perturbed.json"
    write(file, [{**json.loads(line), "paraphrased_question": "What?"} for line in file.read_text().splitlines()])
    suite = TOFUBenchmark("forget01", folder, max_new_tokens=4)
    results = StressBenchmark(suite, bits=[4], paraphrased=True).run(lm).to_dict()
    assert "4bit/model_utility" in results["aggregate"]
    assert [name for name in results["examples"] if "paraphrased" in name] == ["paraphrased/forget"]
    assert "real_authors/probability" in results["missing"]["paraphrased/model_utility"]
    assert suite.questions.question_column == "question"
    assert list(suite.questions.sets) == ["forget", "retain", "real_authors", "world_facts"]


def test_an_adapter_is_merged(lm, files, tokenizer_dir, tmp_path):
    """Under stress, it is the exported model that is measured."""
    adapted = LanguageModel(taught(tokenizer_dir, 20), adapter={"r": 4})
    adapted.load(torch.float32)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    results = StressBenchmark(inner(files), **STRESSES).run(adapted).to_dict()
    exported = (
        StressBenchmark(inner(files), **STRESSES)
        .run(loaded(str(adapted.save(tmp_path / "out")), torch.float32))
        .to_dict()
    )
    for stress in NAMES[:3]:
        assert under(results, stress) == under(exported, stress)
    for name in ("forget/nll", "paraphrased/forget/nll"):
        assert results["aggregate"][name] == pytest.approx(exported["aggregate"][name], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_arithmetic_around_it_is_that_of_measuring_alone(dtype, inference, lm, files):
    """Autocast keeps casts of weights, and Lightning tests in inference mode: neither reaches the changed weights."""
    lm.model.to(dtype)
    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        results = StressBenchmark(inner(files), **STRESSES).run(lm).to_dict()
    for stress in NAMES[:3]:
        other = by_hand(stress, lm, inner(files))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = inner(files).run(other).to_dict()
        assert under(results, stress)["examples"] == wanted["examples"]


def test_bitsandbytes(files, tokenizer_dir):
    pytest.importorskip("bitsandbytes", reason="rounding as models are deployed needs bitsandbytes")
    torch.manual_seed(0)
    lm = LanguageModel(config={**TINY, "hidden_size": 64, "intermediate_size": 128}, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    results = StressBenchmark(inner(files), bits=[8, 4], backend="bitsandbytes").run(lm).to_dict()
    for bits in (8, 4):
        wanted = inner(files).run(load_quantized(lm, bits)).to_dict()
        assert under(results, f"{bits}bit")["examples"] == wanted["examples"]
        assert results["aggregate"][f"{bits}bit/forget/nll"] != results["aggregate"]["forget/nll"]
    assert results["settings"]["stress"]["4bit"] == {"bits": 4, "backend": "bitsandbytes"}


# The model afterwards -------------------------------------------------------------------------------------------------


class Broken(QABenchmark):
    """Fails after so many rows."""

    left = 10**9

    def measure(self, *args: Any) -> Any:
        Broken.left -= 1
        if Broken.left < 0:
            raise RuntimeError("broken")
        return super().measure(*args)


@pytest.mark.parametrize("adapter", [None, {"r": 4, "lora_dropout": 0.5}], ids=["whole", "lora"])
@pytest.mark.parametrize("rows", [10**9, 5, 14, 20, 30, 40, 50, 58])
def test_the_model_is_left_as_it_was(rows, adapter, files, tokenizer_dir, monkeypatch):
    """Also where the suite fails, in the midst of every stress: there are 12 rows, and 8 with a second question."""
    lm = LanguageModel(taught(tokenizer_dir, 20), adapter=adapter)
    lm.load(torch.bfloat16)
    frozen = next(iter(lm.parameters())).requires_grad_(False)
    trainable = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    trainable[0].grad = torch.ones_like(trainable[0])
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    parameters, random = list(lm.parameters()), torch.random.get_rng_state()
    monkeypatch.setattr(Broken, "left", rows)
    suite = Broken(**files, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="broken") if rows < 4 * 12 + 8 else contextlib.nullcontext():
        StressBenchmark(suite, **STRESSES).run(lm).to_dict()
    assert all(a is b for a, b in zip(lm.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert not frozen.requires_grad
    assert [parameter for parameter in lm.parameters() if parameter.requires_grad] == trainable
    assert torch.equal(trainable[0].grad, torch.ones_like(trainable[0]))
    assert all(parameter.grad is None for parameter in trainable[1:])
    assert all(module.training for module in lm.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_fit_goes_on_as_if_there_had_been_no_stress(files, tokenizer_dir, make_trainer):
    weights = []
    for every in (None, 1):
        L.seed_everything(0, verbose=False)
        lm = LanguageModel(taught(tokenizer_dir, 20))
        suite = StressBenchmark(inner(files), **STRESSES)
        module = LitFinetune(lm, lambda p: torch.optim.AdamW(p, 1e-3), benchmark=suite, benchmark_every_n_epochs=every)
        data = ForgetRetain(files["forget"], files["retain"], batch_size=2)
        trainer = make_trainer(max_epochs=2)
        trainer.fit(module, datamodule=data)
        weights.append({name: value.clone() for name, value in lm.state_dict().items()})
    assert "val/stress/relearn/forget_others/nll" in trainer.callback_metrics
    assert all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())


# Interrupted, compared ------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on(lm, files, tmp_path, monkeypatch):
    suite = Broken(**files, max_new_tokens=2)
    wanted = StressBenchmark(suite, **STRESSES).run(lm).to_dict()
    folder = tmp_path / "partial"
    monkeypatch.setattr(Broken, "left", 12 + 12 + 7)  # within the second stress
    with pytest.raises(RuntimeError, match="broken"):
        StressBenchmark(suite, **STRESSES).run(lm, folder).to_dict()
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.json")) == [
        *("8bit/forget.json", "plain/forget.json", "plain/holdout.json", "plain/retain.json"),
        *("relearn/forget.json", "relearn/holdout.json", "relearn/retain.json"),
    ]
    monkeypatch.setattr(Broken, "left", 7 + 12 + 8)  # what is left
    assert StressBenchmark(suite, **STRESSES).run(lm, folder).to_dict() == wanted
    assert Broken.left == 0


def test_retain_results_count_under_the_same_stress_only(lm, files, tokenizer_dir, tmp_path):
    retain_only = loaded(taught(tokenizer_dir, 0, 3), torch.float32)
    theirs = StressBenchmark(inner(files), **STRESSES).run(retain_only).to_dict()
    write_json(tmp_path / "stressed.json", theirs)
    mine = StressBenchmark(inner(files, retain_results=str(tmp_path / "stressed.json")), **STRESSES).run(lm).to_dict()
    for prefix in ("", *(f"{name}/" for name in NAMES)):
        ratios = [[row["truth_ratio"] for row in one["examples"][f"{prefix}forget"]] for one in (mine, theirs)]
        assert mine["aggregate"][f"{prefix}forget_quality"] == pytest.approx(ks_p_value(*ratios))
        assert (f"{prefix}privleak" in mine["aggregate"]) == (prefix != "paraphrased/")
    other = {**STRESSES, "relearn": Relearn(rows=2, steps=6, lr=3e-3, seed=1)}
    mine = StressBenchmark(inner(files, retain_results=str(tmp_path / "stressed.json")), **other).run(lm).to_dict()
    assert [name for name in mine["missing"] if "quality" in name] == ["relearn/forget_quality"]
    write_json(tmp_path / "plain.json", inner(files).run(retain_only).to_dict())
    mine = StressBenchmark(inner(files, retain_results=str(tmp_path / "plain.json")), **STRESSES).run(lm).to_dict()
    assert [name for name in mine["missing"] if "quality" in name] == [f"{name}/forget_quality" for name in NAMES]
    assert "forget_quality" in mine["aggregate"]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": [1]}, r"`bits`.*got 'round' and \[1\]"),
        ({"bits": [4, 16]}, r"got 'round' and \[4, 16\]"),
        ({"bits": [2], "backend": "bitsandbytes"}, r"got 'bitsandbytes' and \[2\]"),
        ({"backend": "bits"}, r"got 'bits' and \[\]"),
    ],
)
def test_refused_at_once(settings, message, files):
    with pytest.raises(ValueError, match=message):
        StressBenchmark(inner(files), **settings)


def test_bitsandbytes_is_asked_for(files, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`backend` .*pip install bitsandbytes"):
        StressBenchmark(inner(files), bits=[4], backend="bitsandbytes")


def test_refused_before_anything_is_measured(lm, files, tmp_path):
    with pytest.raises(ValueError, match=r"`rows`.* 6.* 5 "):
        StressBenchmark(inner(files), Relearn(6, 1, 1.0)).prepare(lm.tokenizer)
    plain = write(tmp_path / "plain.jsonl", FORGET)
    with pytest.raises(ValueError, match=r"'paraphrased_question'.*`paraphrased`"):
        StressBenchmark(inner({**files, "forget": plain}), paraphrased=True).prepare(lm.tokenizer)
    lm.model.is_quantized = True
    for settings in ({"bits": [4]}, {"relearn": ATTACK}):
        with pytest.raises(ValueError, match=r"quantised.*`relearn`.*`bits`"):
            StressBenchmark(inner(files), **settings).run(lm).to_dict()
    assert "paraphrased/forget/nll" in StressBenchmark(inner(files), paraphrased=True).run(lm).to_dict()["aggregate"]


# The command ----------------------------------------------------------------------------------------------------------


def test_the_config(in_tmp, monkeypatch, model_dir, tmp_path):
    write_tofu(tmp_path)
    arguments = [f"--model.lm.model={model_dir}", f"--model.benchmark.benchmark.source={tmp_path}"]
    arguments += ["--model.benchmark.benchmark.forget_split=forget01", "--trainer.accelerator=cpu"]
    made = instantiate(["test", "--config", "eval/stress.yaml", *arguments], monkeypatch)
    suite = made.model.benchmark
    assert isinstance(suite, StressBenchmark)
    assert isinstance(suite.benchmark, TOFUBenchmark)
    assert list(suite.stresses) == ["relearn", "8bit", "4bit", "paraphrased"]
    assert suite.relearn == Relearn(rows=20, steps=20, lr=1e-5, seed=0)
    off = "{benchmark: {init_args: {relearn: null, bits: [], paraphrased: false}}}"
    Path("off.yaml").write_text(f"model: {{init_args: {off}}}", encoding="utf-8")
    made = instantiate(["test", "--config", "eval/stress.yaml", "--config", "off.yaml", *arguments], monkeypatch)
    assert made.model.benchmark.stresses == {}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_lightning_runs_it(precision, files, tokenizer_dir, make_trainer, tmp_path, capsys):
    file = tmp_path / "results.json"
    suite = StressBenchmark(inner(files), **STRESSES)
    module = LitEvaluate(LanguageModel(taught(tokenizer_dir, 20)), suite, results=str(file))
    (logged,) = make_trainer(precision=precision).test(module, verbose=False)
    results = read_json(file)
    assert logged["test/stress/relearn/forget_relearned/nll"] == pytest.approx(
        results["aggregate"]["relearn/forget_relearned/nll"], rel=1e-6
    )
    assert results["aggregate"]["relearn/forget_relearned/nll"] < results["aggregate"]["forget/nll"]
    assert "relearn/forget_others/probability" in capsys.readouterr().out
    assert not file.with_suffix(".partial").exists()


# Two processes --------------------------------------------------------------------------------------------------------


def measured(model: str, files: dict[str, str], folder: Path) -> Results:
    """What a process finds, and the digests of the weights that it measured."""
    suite = StressBenchmark(inner(files), **STRESSES)
    lm = loaded(model, torch.float32)
    results = suite.run(lm, folder).to_dict()
    keys = {stress: read_json(folder / stress / "forget.json")["key"] for stress in ("plain", *NAMES)}
    drifting = copy.deepcopy(lm)
    if rank_and_world_size()[0] == 1:
        with torch.no_grad():
            for parameter in drifting.parameters():
                parameter *= 1 + 1e-6
    apart = gather_objects(fingerprint(drifting.model))
    row = suite.benchmark.prepare(lm.tokenizer)["forget"].examples[0].sequences["answer"][0]
    list(relearn(drifting, [row], ATTACK, 8192))
    return {"results": results, "keys": keys, "apart": apart, "together": gather_objects(fingerprint(drifting.model))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    settings = read_json(folder / "settings.json")
    found = measured(settings["model"], settings["files"], folder / "partial")
    write_json(folder / f"rank{rank_and_world_size()[0]}.json", {**found, "world_size": rank_and_world_size()[1]})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(files, tokenizer_dir, tmp_path):
    model = taught(tokenizer_dir, 20)
    alone = measured(model, files, tmp_path / "alone")
    write_json(tmp_path / "settings.json", {"model": model, "files": files})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (read_json(tmp_path / f"rank{rank}.json") for rank in (0, 1))
    assert first["world_size"] == second["world_size"] == 2  # never silently in one process
    assert first["results"] == second["results"]
    assert first["keys"] == alone["keys"]  # the very same weights under every stress
    assert len(set(first["keys"].values())) == 5
    assert len(set(first["apart"])) == 2
    assert len(set(first["together"])) == 1  # processes that compute a little differently go on with the first one's
    assert first["together"][0] == alone["together"][0]
    for name, rows in alone["results"]["examples"].items():
        for row, found in zip(rows, first["results"]["examples"][name], strict=True):
            assert found == {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in row.items()}
    assert first["results"]["aggregate"] == pytest.approx(alone["results"]["aggregate"], rel=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
