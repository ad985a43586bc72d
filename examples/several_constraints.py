"""Unlearn under several bounds at once: each has its own examples, its own epsilon and its own multiplier.

    python examples/several_constraints.py --model runs/demo/target --output runs/examples/several_constraints

``--data`` is a folder with ``forget.jsonl``, ``retain.jsonl``, ``core.jsonl`` (the examples that matter most) and
``general.jsonl`` (text that the model was not fine-tuned on). Without it, the embedded authors are used. There are three
constraints. The retain NLL may grow by half, and dual ascent moves its λ at every step. The NLL of the few core examples may
grow by a tenth; it is measured on all of them once per epoch, and a PI controller sets its λ. On the general examples, the
KL divergence from the reference model is bounded. The table at the end shows value, epsilon, slack and λ of each constraint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    ForgetRetain,
    KLToReference,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    PIMultiplier,
    Relative,
    Schedule,
)
from lit_unlearn.callbacks import ExportModel


def load_authors() -> dict[str, Any]:
    """Return two authors to forget, fourteen to retain, four that matter most, and five that the model has not seen."""
    known = FictionalAuthors(20, 2).load()
    return {
        "forget": known["forget"],
        "retain": known["retain"].filter(lambda row: row["author"] >= 4),
        "core": known["retain"].filter(lambda row: row["author"] < 4),
        "general": FictionalAuthors(6, 1, authors_seed=1).load_set("retain"),
    }


def build_constraints() -> dict[str, Constraint]:
    return {
        "retain": Constraint(NLL(), Relative(0.5), DualAscent(lr=200, init=100), "retain", warmup_epochs=2),
        # The core examples are few, so that a step sees only some of them: the whole stream gives an exact value.
        "core": Constraint(NLL(), Relative(0.1), PIMultiplier(lr=500, kp=2, init=50), "core", update_every="epoch"),
        # An absolute epsilon: the divergence from the reference model is 0 at the start, so nothing can be relative to it.
        "drift": Constraint(KLToReference(), 0.1, DualAscent(lr=10, init=5), "general"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
    parser.add_argument("--data", type=Path, help="folder with your own four files")
    parser.add_argument("--epochs", default=20, type=int, help="passes over the forget set")
    parser.add_argument("--output", default="runs/examples/several_constraints", type=Path, help="for the model")
    options = parser.parse_args()

    module = LitUnlearn(
        LanguageModel(options.model),
        forget=LogitMargin(),
        constraints=build_constraints(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        scheduler=Schedule("linear", warmup_epochs=1),
    )
    # A set is a file, a hub name, a `datasets.Dataset` or a list of dicts.
    if options.data is None:
        sets = load_authors()
    else:
        sets = {name: options.data / f"{name}.jsonl" for name in ("forget", "retain", "core", "general")}
    data = ForgetRetain(
        sets["forget"],
        sets["retain"],
        streams={"core": sets["core"], "general": sets["general"]},
        batch_size=5,
        retain_batch_size=10,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[ExportModel(str(options.output / "model"))],  # exports the best model, not the last
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)

    best = module.best
    probability = best.values["forget/probability"]
    print(f"\nstep {best.step} of {trainer.global_step}: answer probability on the forget set {probability:.4g}")
    print(f"{'constraint':<12}{'stream':<10}{'value':>10}{'epsilon':>10}{'slack':>10}{'λ':>10}")
    for name, constraint in module.constraints.items():
        value = best.values[f"constraint/{name}/value"]
        slack = -constraint.violation(value)
        numbers = (value, constraint.epsilon, slack, constraint.multiplier.value)
        print(f"{name:<12}{constraint.stream:<10}" + "".join(f"{number:>10.4g}" for number in numbers))


if __name__ == "__main__":
    main()
