"""A fit that ends at a limit of damage: the exported model is just below it, whatever the method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from transformers import AutoModelForCausalLM

from lit_unlearn import (
    NLL,
    NPO,
    Constraint,
    DualAscent,
    FictionalAuthors,
    FixedMultiplier,
    GradAscent,
    LanguageModel,
    LitEvaluate,
    LitUnlearn,
    Objective,
    QABenchmark,
    Relative,
)
from lit_unlearn.callbacks import ExportModel, Report, RunReport, StopAtDamage
from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.results import Results
from lit_unlearn.export.checkpoint import export_checkpoint
from lit_unlearn.utils.io import file_digest

ROWS = 6


def make_data(**settings: Any) -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, eval_batch_size=8, max_length=200, **settings)


class Runs:
    """Fits of one tiny model in one folder."""

    def __init__(self, model: str, folder: Path, make_trainer: Callable[..., L.Trainer]) -> None:
        self.model, self.out, self.report, self._make_trainer = (
            model,
            folder / "out",
            folder / "report.json",
            make_trainer,
        )

    def make_module(
        self, forget: Objective | None = None, constraint: Constraint | None = None, lr: float = 0.01, **settings: Any
    ) -> LitUnlearn:
        unbounded = Constraint(NLL(), Relative(0.5), FixedMultiplier(0.0))  # as published: only reported
        return LitUnlearn(
            LanguageModel(self.model),
            forget or GradAscent(),
            {"nll": constraint or unbounded},
            lambda parameters: torch.optim.AdamW(parameters, lr=lr),
            **{"keep": "last", **settings},
        )

    def fit(
        self, stop: StopAtDamage, module: LitUnlearn, epochs: int = 4, ckpt_path: Path | None = None, **settings: Any
    ) -> L.Trainer:
        export = ExportModel(self.out, dtype=settings.pop("dtype", None))
        callbacks = [stop, RunReport(str(self.report.parent)), export, *settings.pop("callbacks", [])]
        trainer = self._make_trainer(max_epochs=epochs, callbacks=callbacks, **settings)
        trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path)
        return trainer

    def read_damage(self) -> dict[str, Any]:
        """Return what the record says, which is what the report says."""
        damage = json.loads((self.out / "unlearning.json").read_text())["damage"]
        assert damage == Report.read(self.report).damage
        return damage

    def measure(self, measure: str, rows: int | None) -> float:
        """Measure the exported model on every so many-th retain row, token by token."""
        data = make_data(tokenizer=self.model)
        data.setup("fit")
        examples = data.examples["retain"]
        stride = 1 if rows is None else -(-len(examples) // rows)
        models = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in (self.out, self.model)]
        values = []
        for example in examples[::stride]:
            ids = torch.tensor([example.input_ids])
            with torch.no_grad():
                logp, reference = (model(ids).logits[0].log_softmax(-1) for model in models)
            for position, label in enumerate(example.labels[1:]):
                if label != -100 and measure == "kl":
                    values.append((reference[position].exp() * (reference[position] - logp[position])).sum())
                elif label != -100:
                    values.append(-logp[position, label])
        return float(torch.stack(values).mean())


@pytest.fixture
def runs(model_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]) -> Runs:
    return Runs(model_dir, tmp_path, make_trainer)


@pytest.mark.parametrize("every", [1, 3])
def test_a_method_without_a_constraint_ends_just_below_the_limit(runs: Runs, every: int) -> None:
    trainer = runs.fit(StopAtDamage("kl", 0.01, rows=ROWS, every_n_steps=every), runs.make_module(), epochs=20)
    damage = runs.read_damage()
    assert damage["reached"]
    assert damage["limit"] == 0.01
    assert 0.0095 <= damage["value"] <= 0.01
    assert damage["value"] == pytest.approx(runs.measure("kl", ROWS), rel=1e-3)
    assert damage["step"] == trainer.global_step < 40
    record = json.loads((runs.out / "unlearning.json").read_text())
    assert record["step"] == record["steps"] == damage["step"]
    assert (
        f"damage: KL to the reference model {damage['value']:.4g} (limit 0.01" in (runs.out / "README.md").read_text()
    )


def test_a_constrained_method_ends_at_epsilon_of_all_rows(runs: Runs) -> None:
    constraint = Constraint(NLL(), Relative(0.01), DualAscent(lr=0.01, init=0.01))
    runs.fit(StopAtDamage("nll", rows=None), runs.make_module(NPO(), constraint), epochs=20)
    damage = runs.read_damage()
    assert damage["reached"]
    assert damage["limit"] == pytest.approx(constraint.epsilon)
    assert 0.95 * damage["limit"] <= damage["value"] <= damage["limit"]
    assert damage["value"] == pytest.approx(runs.measure("nll", None), rel=1e-5)
    # The constraint is measured on the same rows.
    assert damage["value"] == pytest.approx(Report.read(runs.report).constraints["nll"]["value"], rel=1e-5)


def test_a_step_that_is_far_too_long_is_shortened(runs: Runs) -> None:
    """Also of an adapter: what is measured is the model that it is merged into, rounded as the export is."""
    module = runs.make_module(lr=1.0)
    module.lm = LanguageModel(
        runs.model, adapter={"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "up_proj"]}
    )
    runs.fit(StopAtDamage("kl", rows=ROWS), module, dtype="bfloat16")
    damage = runs.read_damage()
    assert damage["reached"]
    assert 0.0095 <= damage["value"] <= 0.01
    assert damage["value"] == pytest.approx(runs.measure("kl", ROWS), rel=1e-3)


def test_results_of_the_export_have_its_digests_and_damage(
    runs: Runs, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    runs.fit(StopAtDamage("kl", rows=ROWS), runs.make_module(lr=1.0), epochs=1)
    forget, retain = ([{"question": f"{name}?", "answer": "Yes."}] for name in ("forget", "retain"))
    benchmark = QABenchmark(forget, retain, max_new_tokens=1)
    weights = runs.out / "model.safetensors"
    for is_changed in (False, True):
        if is_changed:
            # The record is of other weights then.
            weights.write_bytes((Path(runs.model) / weights.name).read_bytes())
        file = tmp_path / f"{is_changed}.json"
        make_trainer().test(LitEvaluate(LanguageModel(str(runs.out)), benchmark, str(file)), verbose=False)
        model = Results.read(file).model
        assert model.get("damage") == (None if is_changed else runs.read_damage())
        assert model.get("files") == (None if is_changed else {weights.name: file_digest(weights)})


def test_a_run_that_ends_earlier_says_so(runs: Runs) -> None:
    with pytest.warns(UserWarning, match="before its damage reached the limit"):
        runs.fit(StopAtDamage("kl", 5.0, rows=ROWS, every_n_steps=100), runs.make_module(), epochs=-1, max_steps=3)
    damage = runs.read_damage()
    assert (damage["reached"], damage["step"]) == (False, 3)
    assert damage["value"] == pytest.approx(runs.measure("kl", ROWS), rel=1e-3)


def test_an_interrupted_run_ends_where_it_would_have(runs: Runs, tmp_path: Path) -> None:
    halfway = ModelCheckpoint(tmp_path, "halfway", every_n_train_steps=2, save_top_k=1, monitor="grad_norm")
    stop, module = StopAtDamage("kl", rows=ROWS), runs.make_module(lr=0.003)
    trainer = runs.fit(stop, module, 20, callbacks=[halfway], enable_checkpointing=True)
    expected = runs.read_damage()
    assert expected["reached"]
    assert expected["step"] > 2
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    runs.fit(StopAtDamage("kl", rows=ROWS), runs.make_module(lr=0.003), 20, tmp_path / "halfway.ckpt")
    assert runs.read_damage() == expected

    # Of a run that has reached its limit, nothing is left to do, and its checkpoint is the model.
    again = runs.fit(StopAtDamage("kl", rows=ROWS), runs.make_module(lr=0.003), 20, tmp_path / "end.ckpt")
    assert again.global_step == expected["step"]
    assert runs.read_damage() == expected
    record = export_checkpoint(tmp_path / "end.ckpt", tmp_path / "later", base_model=runs.model)
    assert record["damage"] == expected


def test_what_cannot_end_at_a_damage_is_refused(runs: Runs) -> None:
    cases = [
        (StopAtDamage("kl"), runs.make_module(keep="best"), "set `keep` to 'last'"),
        (StopAtDamage("kl", stream="general"), runs.make_module(), "no rows 'general'"),
        (StopAtDamage("nll", stream="forget"), runs.make_module(), "set `limit`"),
        (StopAtDamage("nll", 0.1, rows=ROWS), runs.make_module(), "to begin with"),
    ]
    for stop, module, message in cases:
        with pytest.raises(ConfigError, match=message):
            runs.fit(stop, module)
    with pytest.raises(ConfigError, match="WeightAveraging"):
        runs.fit(StopAtDamage("kl"), runs.make_module(), callbacks=[WeightAveraging()])
    with pytest.raises(ConfigError, match="`measure`"):
        StopAtDamage("retain")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`every_n_steps`"):
        StopAtDamage("kl", every_n_steps=0)
