"""Several bounds at once: each with its own rows, its own epsilon and its own multiplier.

    python examples/several_constraints.py --model runs/demo/target --output runs/examples/several_constraints

``--data`` is a folder with ``forget.jsonl``, ``retain.jsonl``, ``core.jsonl`` (what must be kept best) and ``general.jsonl``
(text that the model was never taught); without it, the files are written from the embedded authors. The retain rows' NLL may
grow by half, and dual ascent moves its λ at every step. That of the few core rows may grow by a tenth, measured on all of
them once per epoch, with a PI controller. On the general rows the model may not move: a bound on the KL divergence from what it
was. The table at the end says what became of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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


def write_rows(folder: Path) -> None:
    """Two authors to forget, fourteen to keep, four that matter most, and five that the model has never read about."""
    folder.mkdir(parents=True, exist_ok=True)
    taught = FictionalAuthors(20, 2).load()
    sets = {
        "forget": taught["forget"],
        "retain": taught["retain"].filter(lambda row: row["author"] >= 4),
        "core": taught["retain"].filter(lambda row: row["author"] < 4),
        "general": FictionalAuthors(6, 1, authors_seed=1).load_set("retain"),
    }
    for name, rows in sets.items():
        rows.to_json(folder / f"{name}.jsonl")


def constraints() -> dict[str, Constraint]:
    return {
        "retain": Constraint(NLL(), Relative(0.5), DualAscent(lr=200, init=100), "retain", warmup_epochs=2),
        "core": Constraint(NLL(), Relative(0.1), PIMultiplier(lr=500, kp=2, init=50), "core", update_every="epoch"),
        "drift": Constraint(KLToReference(), 0.1, DualAscent(lr=10, init=5), "general"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="the default is what `make demo` makes")
    parser.add_argument("--data", type=Path, help="folder with your own four files")
    parser.add_argument("--epochs", default=20, type=int, help="passes over the forget rows")
    parser.add_argument(
        "--output", default="runs/examples/several_constraints", type=Path, help="for the model (and rows)"
    )
    options = parser.parse_args()
    folder = options.data or options.output / "data"
    if options.data is None:
        write_rows(folder)

    module = LitUnlearn(
        LanguageModel(options.model),
        forget=LogitMargin(),
        constraints=constraints(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        scheduler=Schedule("linear", warmup_epochs=1),
    )
    data = ForgetRetain(
        str(folder / "forget.jsonl"),
        str(folder / "retain.jsonl"),
        streams={name: str(folder / f"{name}.jsonl") for name in ("core", "general")},
        batch_size=5,
        retain_batch_size=10,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[ExportModel(str(options.output / "model"))],  # of the best step, not the last
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)

    kept = module.best
    probability = kept.values["forget/probability"]
    print(f"\nstep {kept.step} of {trainer.global_step}: answer probability on the forget rows {probability:.4g}")
    print(f"{'constraint':<12}{'stream':<10}{'value':>10}{'epsilon':>10}{'slack':>10}{'λ':>10}")
    for name, constraint in module.constraints.items():
        value, slack = (kept.values[f"constraint/{name}/{key}"] for key in ("value", "slack"))
        numbers = (value, constraint.epsilon, slack, constraint.multiplier.value)
        print(f"{name:<12}{constraint.stream:<10}" + "".join(f"{number:>10.4g}" for number in numbers))


if __name__ == "__main__":
    main()
