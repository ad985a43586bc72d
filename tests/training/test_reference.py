"""What objectives need of the model before unlearning: prepared once, kept, and never prepared for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from processes import runner
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_unlearn import (
    DPO,
    NLL,
    NPO,
    UNDIAL,
    WGA,
    ActivationMatch,
    Constraint,
    DualAscent,
    FixedMultiplier,
    ForgetRetain,
    IdkNLL,
    KLToReference,
    LanguageModel,
    LitUnlearn,
    Objective,
    SatImp,
)
from lit_unlearn.data.example import collate


def make(model: str, forget: Objective, retain: Objective | None = None, lr: float = 0.01, **lm: Any) -> LitUnlearn:
    bound = Constraint(NLL() if retain is None else retain, 5.0, DualAscent(lr=1.0, init=1.0))
    return LitUnlearn(LanguageModel(model, **lm), forget, {"bound": bound}, lambda p: torch.optim.SGD(p, lr=lr))


def rows(folder: str, **settings: Any) -> ForgetRetain:
    sizes = {"batch_size": 4, "retain_batch_size": 5, "eval_batch_size": 3}
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", **{**sizes, **settings})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_UNLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer], caplog: Any) -> Callable[..., str]:
    """Fits a step and returns what was said."""

    def run(module: LitUnlearn, data: Any = None, **settings: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            make_trainer(**{"max_steps": 1, **settings}).fit(module, datamodule=data)
        return str(caplog.text)

    return run


def test_log_probabilities_are_those_of_the_model_before(cache: Path, fit: Any, model_dir: str, rows_dir: str) -> None:
    module, data = make(model_dir, DPO()), rows(rows_dir)
    fit(module, data, max_steps=4)
    before = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    whole = [row for forget in data.examples["forget"] for row in (forget, forget.alternate) if row is not None]
    assert len(whole) == len(module.reference_cache.values) == 20
    for row in whole:
        batch = collate([row._replace(alternate=None)], 0)
        with torch.no_grad():
            logp = before(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        labels = batch["labels"][0, 1:]
        expected = sum(logp[place, label].item() for place, label in enumerate(labels) if label != -100)
        value = module.reference_cache.logp(row)
        assert value == pytest.approx(expected, rel=1e-5)


def test_what_one_run_measured_serves_the_next(cache: Path, fit: Any, model_dir: str, rows_dir: str) -> None:
    first, again, dpo = make(model_dir, NPO()), make(model_dir, NPO(beta=0.5)), make(model_dir, DPO())
    assert "log-probabilities of 10 answers, measured" in fit(first, rows(rows_dir))
    assert "log-probabilities of 10 answers, known from an earlier run" in fit(again, rows(rows_dir, batch_size=3))
    assert again.reference_cache.values == first.reference_cache.values
    assert "log-probabilities of 20 answers, measured" in fit(dpo, rows(rows_dir))  # the alternate answers are new
    assert "log-probabilities of 20 answers, known" in fit(make(model_dir, DPO()), rows(rows_dir))
    assert "log-probabilities of 10 answers, known" in fit(make(model_dir, NPO()), rows(rows_dir))
    assert len(list((cache / "reference_logp").iterdir())) == 1


@pytest.mark.parametrize("changed", ["model", "precision", "template", "answers", "tokenizer"])
def test_it_is_measured_again_when_anything_changes(
    changed: str, cache: Path, fit: Any, model_dir: str, rows_dir: str, tiny_lm: Any, tmp_path: Path, write_rows: Any
) -> None:
    fit(make(model_dir, NPO()), rows(rows_dir))
    module, data, settings = make(model_dir, NPO()), rows(rows_dir), {}
    if changed == "model":
        other = tiny_lm(seed=5)
        other.load(torch.float32)
        module = make(str(other.save(tmp_path / "other")), NPO())
    elif changed == "precision":
        settings = {"precision": "bf16-mixed"}
    elif changed == "template":
        data = rows(rows_dir, template="Q: {question} A: {answer}")
    elif changed == "answers":
        text = Path(rows_dir, "forget.jsonl").read_text("utf-8").splitlines()
        write_rows("forget.jsonl", [{**json.loads(line), "answer": f"{n}."} for n, line in enumerate(text)])
        write_rows(
            "retain.jsonl", [json.loads(line) for line in Path(rows_dir, "retain.jsonl").read_text().splitlines()]
        )
        data = rows(str(tmp_path))
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(model_dir, eos_token="<|pad|>").save_pretrained(tmp_path / "tokenizer")
        data = rows(rows_dir, tokenizer=str(tmp_path / "tokenizer"))
    assert "log-probabilities of 10 answers, measured" in fit(module, data, **settings)


def test_a_damaged_or_forbidden_cache_costs_a_measurement(
    cache: Path, fit: Any, model_dir: str, rows_dir: str, recwarn: pytest.WarningsRecorder
) -> None:
    fit(make(model_dir, NPO()), rows(rows_dir))
    (file,) = (cache / "reference_logp").iterdir()
    file.write_text(file.read_text("utf-8")[:-20], encoding="utf-8")
    assert "measured" in fit(make(model_dir, NPO()), rows(rows_dir))
    assert any("cannot be read and is measured again" in str(warning.message) for warning in recwarn)
    assert "known from an earlier run" in fit(make(model_dir, NPO()), rows(rows_dir))
    file.unlink()
    (cache / "reference_logp").rmdir()
    (cache / "reference_logp").touch()  # a file where the folder should be
    assert "measured" in fit(make(model_dir, NPO()), rows(rows_dir))
    assert any("cannot be kept for later runs" in str(warning.message) for warning in recwarn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [{"forget": "npo"}, {"forget": "dpo", "general": "kl"}, {"forget": "rmu", "general": "activations"}]
)
def test_resuming_refers_to_the_model_before_unlearning(
    method: Any, models: dict[str, str], rows_dir: str, tmp_path: Path
) -> None:
    """Bit for bit, although nothing is left on disk but the checkpoint, which holds no copy of the model."""
    settings = {"model": models["dropout"], "data": rows_dir, "optimizer": "adamw", "forget_weight": 0.1, **method}
    whole = runner.run({**settings, "checkpoints": "steps"}, tmp_path / "whole", devices=1)
    checkpoint = tmp_path / "whole" / "4.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert not any("frozen" in name for name in saved["state_dict"])
    assert ("reference_logp" in saved["run"]) == (method["forget"] != "rmu")
    resumed = runner.run({**settings, "seed": 1, "ckpt_path": str(checkpoint)}, tmp_path / "resumed", devices=1)
    assert not (tmp_path / "resumed" / "reference_logp").exists()  # nothing was measured from the changed model
    assert [step["logged"] for step in resumed["steps"]] == [step["logged"] for step in whole["steps"][4:]]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


def test_a_checkpoint_of_another_objective_is_refused(
    make_trainer: Any, model_dir: str, rows_dir: str, tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.fit(make(model_dir, WGA()), datamodule=rows(rows_dir))
    trainer.save_checkpoint(tmp_path / "wga.ckpt")
    with pytest.raises(ValueError, match="has no log-probabilities of the reference model"):
        make_trainer(max_steps=2).fit(
            make(model_dir, NPO()), datamodule=rows(rows_dir), ckpt_path=tmp_path / "wga.ckpt"
        )


@pytest.mark.parametrize("objective", [WGA(), SatImp(), IdkNLL(), NPO(), DPO()], ids=lambda o: type(o).__name__)
def test_no_copy_and_no_pass_for_an_objective_that_needs_none(
    objective: Objective, fit: Any, model_dir: str, rows_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NPO and DPO need the reference model before the first step only."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a copy of the model was made, or the reference model run")

    monkeypatch.setattr(LanguageModel, "_reference_model", refuse)
    monkeypatch.setattr(LanguageModel, "keep_reference", refuse)
    module = make(model_dir, objective)
    fit(module, rows(rows_dir))
    assert module.lm.frozen is None


@pytest.mark.parametrize("adapter", [None, {"r": 4}])
def test_the_copy_is_made_once_and_only_without_an_adapter(
    adapter: Any, fit: Any, make_trainer: Any, model_dir: str, rows_dir: str
) -> None:
    module, data = (
        make(model_dir, UNDIAL(), KLToReference(), lr=20.0 if adapter else 1.0, adapter=adapter),
        rows(rows_dir),
    )
    fit(module, data, max_steps=3)
    results = make_trainer().validate(module, datamodule=data, verbose=False)
    values = {name: value for result in results for name, value in result.items()}
    assert values["val/constraint/bound/value"] > 1e-6  # still against the model before, not the one just trained
    assert (module.lm.frozen is None) == (adapter is not None)
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    if module.lm.frozen is not None:
        assert all(torch.equal(module.lm.frozen.state_dict()[name], value) for name, value in before.items())
        assert not any(parameter.requires_grad for parameter in module.lm.frozen.parameters())


def test_the_reference_model_sees_only_rows_that_need_it(
    fit: Any, model_dir: str, rows_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = make(model_dir, UNDIAL()), []
    run = LanguageModel._run_trunk

    def spy(self: LanguageModel, model: Any, inputs: Any, layers: Any) -> Any:
        if model is self.frozen:
            seen.append(inputs["input_ids"].numel())
        return run(self, model, inputs, layers)

    monkeypatch.setattr(LanguageModel, "_run_trunk", spy)
    data = rows(rows_dir, batch_size=10, eval_batch_size=10)
    fit(module, data)
    forget = sum(len(row.input_ids) for row in data.examples["forget"])
    assert seen
    # With the tails of packed rows, which are shorter than any example.
    assert all(forget <= tokens < 1.05 * forget for tokens in seen)


def test_own_loaders(make_trainer: Any, model_dir: str, tokenizer: Any, cache: Path) -> None:
    def loader(batches: list[Any]) -> DataLoader[Any]:
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def batch(*texts: str) -> dict[str, Any]:
        padded = tokenizer(list(texts), return_tensors="pt", padding=True)
        labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "labels": labels}

    forget = [batch("one is a number", "two"), batch("three is more")]
    retain, refusals = [batch("four", "five")] * 2, [batch("no", "no idea at all"), batch("never")]
    validation = {"forget": loader(forget), "retain": loader(retain)}

    def run(objective: Objective, forget: list[Any], validation: Any = validation, steps: int = 2) -> LitUnlearn:
        module = make(model_dir, objective)
        streams = {"forget": loader(forget), "retain": loader(retain)}
        make_trainer(max_steps=steps, max_epochs=1).fit(module, streams, validation)
        return module

    npo = run(NPO(), forget)
    assert len(npo.reference_cache.values) == 3
    paired = [{**rows, "alternate": other} for rows, other in zip(forget, refusals, strict=True)]
    dpo = run(DPO(), paired, {"forget": loader(paired), "retain": loader(retain)})
    assert len(dpo.reference_cache.values) == 6
    given = [{**rows, "reference_logp": torch.full((len(rows["labels"]),), -50.0)} for rows in forget]
    own = run(NPO(), given, {"forget": loader(given), "retain": loader(retain)}, steps=1)
    assert own.reference_cache.values == {}
    with pytest.raises(ValueError, match="has no log-probability under the reference model"):
        run(NPO(), [batch("unheard of")])
    with pytest.raises(ValueError, match="reads alternate answers of the 'forget' examples, but the batch has none"):
        run(DPO(), forget)
    packed = {key: value for key, value in batch("six seven").items() if key != "attention_mask"}
    packed["position_ids"] = torch.arange(packed["labels"].shape[1])[None]
    with pytest.raises(
        ValueError, match=r"'forget' \(NPO\) needs to know the examples of the 'forget' batch one by one"
    ):
        run(NPO(), [packed], {"forget": loader([packed]), "retain": loader(retain)})


def test_unmet_needs_are_listed_together(fit: Any, model_dir: str, rows_dir: str) -> None:
    module = make(model_dir, NPO(), IdkNLL())
    bound = Constraint(ActivationMatch(layer=9), 1.0, FixedMultiplier(1))
    bound.name = "deep"
    module.constraints["deep"] = bound
    with pytest.raises(ValueError, match="the objectives need what is not there") as error:
        fit(module, rows(rows_dir))
    first, second = str(error.value).splitlines()[1:]
    assert first.startswith(
        "- bound (IdkNLL) reads alternate answers, which the data module has for its forget set alone"
    )
    assert second.startswith(
        "- deep (ActivationMatch) reads the output of layer 9, but those of this model's layers that can be read are 0 to 0"
    )
