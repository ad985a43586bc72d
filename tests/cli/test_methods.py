"""Every published method as a configuration file: complete, without traces of another one, and running."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT, instantiate, quick
from jsonargparse import Namespace
from transformers import AutoModelForCausalLM

from lit_unlearn import Constraint, cli, dual, objectives

FILES = sorted((ROOT / "configs" / "method").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
SHALLOW = ["--model.forget.layer=0", "--model.constraints.activations.objective.layer=0"]  # the tiny model has two
ALTERNATE = ["--data.alternate_column=perturbed_answer"]  # the embedded authors have no file of made ones
OWN = {
    "rmu": SHALLOW,
    "match_unseen": ["--data.unseen_authors=2"],
    "match_calibrated": ["--data.unseen_authors=2", "--model.lm.teacher={model_dir}"],
    "kl_to_teacher": ["--model.lm.teacher={model_dir}"],
    # Above what the tiny model has, so that there is something to forget.
    "nll_floor": ["--model.forget.init_args.floor=9", "--model.constraints.floor.objective.init_args.floor=9"],
    "teacher_answers": ALTERNATE,
    "altpo_constrained": ALTERNATE,
}
# Constrained methods whose name does not say so.
CONSTRAINED = {"pdu", "match_unseen", "match_calibrated", "kl_to_teacher", "teacher_answers", "nll_floor"}
COLUMNS = {"dpo": "perturbed_answer", "teacher_answers": "alternate", "altpo_constrained": "alternate"}
LORA = {"model": {"lm": {"adapter": {"r": 4, "lora_dropout": 0.1}, "activation_checkpointing": True}}}


def read(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "method" / f"{name}.yaml").read_text("utf-8"))
    return settings


def arguments(kind: type) -> set[str]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def method(model_dir: str, *names: str, extra: tuple[str, ...] = ()) -> list[str]:
    own = [argument.format(model_dir=model_dir) for argument in OWN.get(names[-1], [])]
    command, base, *rest = quick(model_dir, *own, *extra)
    return [command, base, *(f"--config=method/{name}.yaml" for name in names), *rest]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_sets_every_key(name: str) -> None:
    settings = read(name)
    is_published = settings["model"]["keep"] == "last"
    assert settings.keys() == {"model", "data", *(["report"] if is_published else [])}
    # An overlay over own_data.yaml, which fails a run that misses what it requires.
    assert not any(settings.get("report", {}).values())
    assert settings["model"].keys() == {"forget", "forget_weight", "constraints", "keep"}
    assert settings["data"] == {"init_args": {"alternate_column": COLUMNS.get(name)}}
    families = [settings["model"]["forget"]]
    for constraint in settings["model"]["constraints"].values():
        assert constraint.keys() == arguments(Constraint)
        families += [constraint["objective"], constraint["multiplier"]]
    for family in families:
        kind = getattr(objectives, family["class_path"], None) or getattr(dual, family["class_path"])
        assert family.get("init_args", {}).keys() == arguments(kind), family["class_path"]


@pytest.mark.parametrize("name", NAMES)
def test_a_constrained_method_keeps_the_best_model_and_a_published_one_the_last(name: str) -> None:
    model = read(name)["model"]
    constrained = name in CONSTRAINED or name.endswith("_constrained")
    kinds = {constraint["multiplier"]["class_path"] for constraint in model["constraints"].values()}
    # The one whose constraint is on the forget side minimises the retain NLL.
    minimised = {"FixedMultiplier"} if name == "nll_floor" else set()
    assert kinds == {"DualAscent" if constrained else "FixedMultiplier"} | minimised
    assert model["keep"] == ("best" if constrained else "last")
    assert "nll" in model["constraints"]  # every method is judged by it


def list_keys(settings: dict[str, Any], path: str = "") -> set[str]:
    keys = set()
    for key, value in settings.items():
        keys |= {f"{path}.{key}", *(list_keys(value, f"{path}.{key}") if isinstance(value, dict) else ())}
    return keys


def choose_others(name: str) -> list[str]:
    """Return the method before this one, and before it those that set every key which any other method sets.

    Reading all of them would take minutes. Only the last one's forget objective could be left behind, so its arguments count
    nowhere else: a file with another class replaces them as a whole.
    """
    keys = {}
    for other in NAMES:
        if other != name:
            keys[other] = {key for key in list_keys(read(other)) if not key.startswith(".model.forget.init_args.")}
    chosen, missing = [NAMES[NAMES.index(name) - 1]], set().union(*keys.values())
    missing -= keys[chosen[0]]
    while missing:
        chosen.insert(0, max(keys, key=lambda other: len(keys[other] & missing)))
        missing -= keys[chosen[0]]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_other_methods_is_left_behind(
    name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, model_dir: str
) -> None:
    others = choose_others(name)
    alone, after = (
        instantiate(method(model_dir, *names), monkeypatch).config["fit"] for names in ([name], [*others, name])
    )
    assert plain(after.model) == plain(alone.model)
    assert plain(after.data) == plain(alone.data)


def plain(settings: Any) -> Any:
    if isinstance(settings, (Namespace, dict)):
        return {key: plain(value) for key, value in dict(settings).items()}
    return [plain(value) for value in settings] if isinstance(settings, list) else str(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs(name: str, in_tmp: Path, model_dir: str) -> None:
    cli.main(method(model_dir, name, extra=("--trainer.max_steps=3", "--trainer.logger=false")))
    (report,) = [json.loads(file.read_text("utf-8")) for file in in_tmp.rglob("report.json")]
    assert report["steps"] == 3
    assert report["after"]["forget/loss"] != report["before"]["forget/loss"]
    assert report["constraints"].keys() == read(name)["model"]["constraints"].keys()
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model_dir, "out"))
    assert before.keys() == after.keys()  # no copy of the reference model in the export


@pytest.mark.slow
@pytest.mark.parametrize("option", ["sam", "projection"])
def test_robustness_options_are_added_to_any_method(option: str, in_tmp: Path, model_dir: str) -> None:
    cli.main(method(model_dir, "npo", f"robust/{option}", extra=("--trainer.max_steps=3", "--trainer.logger=false")))
    record = json.loads(Path("out/unlearning.json").read_text("utf-8"))
    settings = record["config"]["model"]["init_args"]
    assert settings["robustness"]["class_path"].rpartition(".")[2] in ("SharpnessAware", "GradientProjection")
    assert settings["forget"]["class_path"].endswith("NPO")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["npo", "dpo", "undial", "jensun", "rmu"])
def test_reference_based_methods_run_with_an_adapter(name: str, in_tmp: Path, model_dir: str) -> None:
    Path("lora.yaml").write_text(yaml.safe_dump(LORA), encoding="utf-8")
    command, *rest = method(model_dir, name, extra=("--trainer.max_steps=3", "--trainer.logger=false"))
    cli.main([command, rest[0], "--config=lora.yaml", *rest[1:]])
    (report,) = [json.loads(file.read_text("utf-8")) for file in in_tmp.rglob("report.json")]
    for constraint in {"jsd", "activations"} & report["constraints"].keys():  # the reference model is where it starts
        assert report["before"][f"constraint/{constraint}/value"] == pytest.approx(0, abs=1e-9)


def test_the_published_numbers() -> None:
    model = {name: read(name)["model"] for name in NAMES}
    init = {name: settings["forget"].get("init_args") for name, settings in model.items()}
    weight = {name: settings["forget_weight"] for name, settings in model.items()}
    assert init["npo"] == init["dpo"] == {"beta": 0.1}
    assert init["simnpo"] == {"beta": 4.5, "delta": 0}
    assert init["satimp"] == {"beta1": 5, "beta2": 1}
    assert (init["undial"], init["wga"], init["ceu"]) == ({"beta": 10}, {"beta": 1}, {"skip": 1})
    assert {name: w for name, w in weight.items() if w != 1} == {"simnpo": 0.125, "satimp": 0.1, "kl_to_uniform": 0.1}


def test_methods_lists_them(capsys: Any) -> None:
    cli.main(["methods", "--json"])
    listed = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert list(listed) == NAMES
    assert all(method["formula"] and method["paper"] for method in listed.values())
    assert listed["npo"]["needs"] == ["reference_logp"]
    assert listed["rmu"]["needs"] == ["activations", "reference"]
    assert listed["rmu"]["retention"] == ["ActivationMatch with fixed weight 1", "NLL only reported"]
    assert listed["pdu"]["retention"] == ["NLL ≤ epsilon (DualAscent)"]
    for method in listed.values():
        assert cli.find_configs([f"--config={method['config']}"]) == [f"--config={ROOT / 'configs' / method['config']}"]
    cli.main(["methods"])
    text = capsys.readouterr().out
    assert all(f"--config method/{name}.yaml" in text for name in NAMES)


def test_unmet_needs_are_said_together(in_tmp: Path, model_dir: str, capsys: Any) -> None:
    command, *rest = method(model_dir, "rmu")
    deep = [argument for argument in rest if argument not in SHALLOW]
    with pytest.raises(SystemExit) as end:
        cli.main([command, *deep])
    said = str(end.value)
    assert "the objectives need what is not there" in said
    assert (
        "forget (RMU) reads the output of layer 7, but those of this model's layers that can be read are 0 to 0" in said
    )
    assert "activations (ActivationMatch) reads the output of layer 7" in said
