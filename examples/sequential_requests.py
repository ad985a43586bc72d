"""Answer deletion requests one after the other, so that a later one does not bring back what an earlier one removed.

    python examples/sequential_requests.py --model runs/demo/target --output runs/examples/sequential_requests

Requests A, B and C are each to forget two authors, and none knows of those that come later: until then, their authors are part of
the retain set. The requests are answered twice. Once, each run starts from the model of the one before and has no regard to
what that removed. Once, each run has a further constraint per earlier request, which keeps the squared margin on its examples
below 1.2 times what its own run achieved. The bound on the retain NLL is measured once, before A, and used as a number from
then on: a relative epsilon would be measured again, and allow every request another half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from datasets import Dataset, concatenate_datasets

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


class Requests:
    """The rows of all requests, and what each run needs of them.

    Args:
        rows: Rows to forget, by the name of the request, in the order in which the requests come.
        retain: Rows that no request is about.
    """

    def __init__(self, rows: dict[str, Dataset], retain: Dataset) -> None:
        self.rows, self.retain = rows, retain

    def data_of(self, name: str) -> ForgetRetain:
        """Return the data of a request; the rows of the others are additional streams, by name."""
        others = {other: rows for other, rows in self.rows.items() if other != name}
        later = list(self.rows)[list(self.rows).index(name) + 1 :]
        retain = concatenate_datasets([self.retain, *(self.rows[other] for other in later)])
        # A stream is measured like the others, and trained on only where a constraint names it.
        return ForgetRetain(self.rows[name], retain, others, batch_size=5, retain_batch_size=20)


def keep_forgotten(name: str, achieved: float) -> Constraint:
    """Return the constraint that remembers an earlier request: its squared margin stays near what its run achieved."""
    return Constraint(LogitMargin(), 1.2 * achieved, DualAscent(lr=1, init=0), name)


def format_row(title: str, module: LitUnlearn, request: str, names: list[str]) -> str:
    """Format the values of the model that a run kept: probability and margin of every request's rows, and the retain NLL."""
    values = module.best.values
    cells = []
    for name in names:
        stream = "forget" if name == request else name
        cells.append(f"{values[f'{stream}/probability']:>12.5f}{values[f'{stream}/margin']:>7.2f}")
    return f"{title:<24}{''.join(cells)}{values['retain/nll']:>12.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
    parser.add_argument("--epochs", default=18, type=int, help="passes over the forget set, per request")
    parser.add_argument("--output", default="runs/examples/sequential_requests", type=Path, help="for the models")
    options = parser.parse_args()
    out, epochs = options.output, options.epochs

    authors = FictionalAuthors(20, 6).load()
    names = ["A", "B", "C"]
    rows = {}
    for number, name in enumerate(names):
        asked = {18 - 2 * number, 19 - 2 * number}
        rows[name] = authors["forget"].filter(lambda row, asked=asked: row["author"] in asked)
    requests = Requests(rows, authors["retain"])

    first = unlearn(options.model, requests.data_of("A"), {"nll": bound_retain_nll(Relative(0.5))}, epochs, out / "A")
    epsilon = first.constraints["nll"].epsilon
    table = [format_row("after A", first, "A", names)]

    model = out / "A"
    for name in names[1:]:
        run = unlearn(model, requests.data_of(name), {"nll": bound_retain_nll(epsilon)}, epochs, out / f"{name}_alone")
        model = out / f"{name}_alone"
        table.append(format_row(f"after {name}, alone", run, name, names))

    model, achieved = out / "A", {"A": first.best.values["forget/loss"]}
    for name in names[1:]:
        constraints = {"nll": bound_retain_nll(epsilon)}
        for earlier, value in achieved.items():
            constraints[f"forgotten_{earlier}"] = keep_forgotten(earlier, value)
        run = unlearn(model, requests.data_of(name), constraints, epochs, out / name)
        model, achieved[name] = out / name, run.best.values["forget/loss"]
        table.append(format_row(f"after {name}, remembering", run, name, names))

    heads = "".join(f"{f'{name}: prob.':>12}{'margin':>7}" for name in names)
    print(f"\n{'':<24}{heads}{'retain NLL':>12}", *table, sep="\n")
    bounds = ", ".join(f"{name}'s squared margin ≤ {1.2 * achieved[name]:.2f}" for name in names[:-1])
    print(f"retain NLL ≤ {epsilon:.5f}; {bounds}")


if __name__ == "__main__":
    main()
