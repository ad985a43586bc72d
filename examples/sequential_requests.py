"""Answer deletion requests one after the other, so that the second does not bring back what the first removed.

    python examples/sequential_requests.py --model runs/demo/target --output runs/examples/sequential_requests

Request A is to forget two authors. Request B, later, is to forget two others. Request B is answered twice, both times from
the model that request A produced: once without any regard to A, and once with a further constraint, which keeps the squared
margin on A's examples below 1.2 times what A achieved. The bound on the retain NLL is measured once, before A, and used as a
number from then on: a relative epsilon would be measured again, and allow every request another half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from datasets import concatenate_datasets

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    ForgetRetain,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    Relative,
    Schedule,
)
from lit_unlearn.callbacks import ExportModel


def unlearn(
    model: str | Path, data: ForgetRetain, constraints: dict[str, Constraint], epochs: int, output: Path
) -> LitUnlearn:
    """Answer one request: export the best model to ``output``, return the module with what it measured."""
    L.seed_everything(0)
    module = LitUnlearn(
        LanguageModel(str(model)),
        LogitMargin(),
        constraints,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01),
        scheduler=Schedule("linear", warmup_epochs=1),
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=3,
        accelerator="cpu",
        logger=False,
        callbacks=[ExportModel(str(output))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def bound_retain_nll(epsilon: float | Relative) -> Constraint:
    """Return a new constraint: λ and a measured epsilon stay in the object, so every run needs its own."""
    return Constraint(NLL(), epsilon, DualAscent(lr=200, init=200), "retain", warmup_epochs=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
    parser.add_argument("--epochs", default=18, type=int, help="passes over the forget set, per request")
    parser.add_argument("--output", default="runs/examples/sequential_requests", type=Path, help="for the models")
    options = parser.parse_args()
    out, epochs = options.output, options.epochs

    authors = FictionalAuthors(20, 4).load()
    a = authors["forget"].filter(lambda row: row["author"] < 18)
    b = authors["forget"].filter(lambda row: row["author"] >= 18)
    all_but_a = concatenate_datasets([authors["retain"], b])
    # An additional stream is measured like the others, and trained on only where a constraint names it.
    data_a = ForgetRetain(a, all_but_a, {"b": b}, batch_size=5, retain_batch_size=20)
    data_b = ForgetRetain(b, authors["retain"], {"a": a}, batch_size=5, retain_batch_size=20)

    first = unlearn(options.model, data_a, {"nll": bound_retain_nll(Relative(0.5))}, epochs, out / "a")
    epsilon, achieved = first.constraints["nll"].epsilon, first.best.values["forget/loss"]
    alone = unlearn(out / "a", data_b, {"nll": bound_retain_nll(epsilon)}, epochs, out / "b_alone")
    keep_a = Constraint(LogitMargin(), 1.2 * achieved, DualAscent(lr=1, init=0), "a")
    both = unlearn(out / "a", data_b, {"nll": bound_retain_nll(epsilon), "forgotten": keep_a}, epochs, out / "b")

    print(f"\n{'':<24}{'A: probability':>15}{'margin':>8}{'B: probability':>16}{'margin':>8}{'retain NLL':>12}")
    stages = {
        "after A": (first, "forget", "b"),
        "after B": (alone, "a", "forget"),
        "after B, A bound": (both, "a", "forget"),
    }
    for title, (module, *streams) in stages.items():
        values = module.best.values
        pairs = [f"{values[f'{stream}/probability']:>15.5f}{values[f'{stream}/margin']:>8.2f}" for stream in streams]
        print(f"{title:<24}{' '.join(pairs)}{values['retain/nll']:>12.5f}")
    print(f"retain NLL ≤ {epsilon:.5f}; A's squared margin ≤ {keep_a.epsilon:.2f}, λ {keep_a.multiplier.value:.2f}")


if __name__ == "__main__":
    main()
