"""Deletion requests that arrive one after the other: what the first took out must not come back with the second.

    python examples/sequential_requests.py --model runs/demo/target --output runs/examples/sequential_requests

Request A is to forget two authors, request B, later, two others. B is answered twice from the model that A left: as if A had
never been, and with a further constraint that keeps the squared margin on A's rows below 1.2 times what A achieved. The bound
on the rows to keep is measured once, before A, and carried on as a number: a relative one would allow each request another
half.
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


def write_rows(folder: Path) -> dict[str, str]:
    """Writes the files of both requests, of what is kept at first (all but A) and after both (all but A and B)."""
    folder.mkdir(parents=True, exist_ok=True)
    authors = FictionalAuthors(20, 4).load()
    a = authors["forget"].filter(lambda row: row["author"] < 18)
    b = authors["forget"].filter(lambda row: row["author"] >= 18)
    sets = {"a": a, "b": b, "all_but_a": concatenate_datasets([authors["retain"], b]), "rest": authors["retain"]}
    for name, rows in sets.items():
        rows.to_json(folder / f"{name}.jsonl")
    return {name: str(folder / f"{name}.jsonl") for name in sets}


def unlearn(
    model: str | Path, data: ForgetRetain, constraints: dict[str, Constraint], epochs: int, output: Path
) -> LitUnlearn:
    """Answers one request: ``output`` has the model that the run keeps, ``best.values`` what it measured."""
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


def keep(epsilon: float | Relative) -> Constraint:
    return Constraint(NLL(), epsilon, DualAscent(lr=200, init=200), "retain", warmup_epochs=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="the default is what `make demo` makes")
    parser.add_argument("--epochs", default=18, type=int, help="passes over the forget rows, per request")
    parser.add_argument("--output", default="runs/examples/sequential_requests", type=Path, help="for rows and models")
    options = parser.parse_args()
    out, epochs, rows = options.output, options.epochs, write_rows(options.output / "rows")

    # A further stream is measured like the others, and trained on only where a constraint names it.
    data_a = ForgetRetain(rows["a"], rows["all_but_a"], {"b": rows["b"]}, batch_size=5, retain_batch_size=20)
    data_b = ForgetRetain(rows["b"], rows["rest"], {"a": rows["a"]}, batch_size=5, retain_batch_size=20)
    first = unlearn(options.model, data_a, {"nll": keep(Relative(0.5))}, epochs, out / "a")
    bound, achieved = first.constraints["nll"].epsilon, first.best.values["forget/loss"]
    alone = unlearn(out / "a", data_b, {"nll": keep(bound)}, epochs, out / "b_alone")
    forgotten = Constraint(LogitMargin(), 1.2 * achieved, DualAscent(lr=1, init=0), "a")
    both = unlearn(out / "a", data_b, {"nll": keep(bound), "forgotten": forgotten}, epochs, out / "b")

    print(f"\n{'':<24}{'A: probability':>15}{'margin':>8}{'B: probability':>16}{'margin':>8}{'kept NLL':>10}")
    stages = {
        "after A": (first, "forget", "b"),
        "after B": (alone, "a", "forget"),
        "after B, A bound": (both, "a", "forget"),
    }
    for title, (module, *streams) in stages.items():
        values = module.best.values
        pairs = [f"{values[f'{stream}/probability']:>15.5f}{values[f'{stream}/margin']:>8.2f}" for stream in streams]
        print(f"{title:<24}{' '.join(pairs)}{values['retain/nll']:>10.5f}")
    print(f"kept NLL ≤ {bound:.5f}; A's squared margin ≤ {forgotten.epsilon:.2f}, λ {forgotten.multiplier.value:.2f}")


if __name__ == "__main__":
    main()
