"""What forgetting costs: one run per epsilon, each from the same model, as a table and a picture.

    python examples/epsilon_sweep.py --model runs/demo/target --output runs/examples/epsilon_sweep

Epsilon is a bound on the retain loss, here a multiple of what it was: the sweep is over what one is ready to pay, and the
weight λ that this takes is a result. Leaves ``sweep.csv``, ``sweep.png`` and ``sweep.svg``.
"""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    FictionalAuthors,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    Relative,
    Schedule,
)

COLUMNS = {
    "relative": "ε, relative",
    "epsilon": "ε",
    "retain_nll": "retain NLL",
    "multiplier": "λ at the end",
    "forget_probability": "forget prob.",
    "forget_margin": "forget margin",
}


def run(model: str, relative: float, epochs: int) -> dict[str, float]:
    """Unlearns with retain NLL ≤ (1 + relative) times what it was; returns what the run's best model measured."""
    L.seed_everything(0, verbose=False)
    module = LitUnlearn(
        LanguageModel(model),  # a new one for each run, or the second would go on where the first ended
        LogitMargin(),
        {"nll": Constraint(NLL(), Relative(relative), DualAscent(lr=2000, init=100), warmup_epochs=6)},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01),
        scheduler=Schedule("linear", warmup_epochs=1),
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=FictionalAuthors(20, 2, batch_size=5, retain_batch_size=20))
    values = module.best.values
    return {
        "relative": relative,
        "epsilon": module.constraints["nll"].epsilon,
        "retain_nll": values["retain/nll"],
        "multiplier": module.constraints["nll"].multiplier.value,
        "forget_probability": values["forget/probability"],
        "forget_margin": values["forget/margin"],
    }


def draw(points: list[dict[str, float]], folder: Path) -> None:
    """The trade-off, and the multiplier that each bound took."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    trade, dual = figure.subplots(1, 2)
    nll, margin, epsilon, multiplier = (
        [point[key] for point in points] for key in ("retain_nll", "forget_margin", "epsilon", "multiplier")
    )
    trade.semilogx(nll, margin, "o-", color="#D55E00")
    for x, y, bound in zip(nll, margin, epsilon, strict=True):
        trade.annotate(f"ε {bound:.2g}", (x, y), (5, 5), textcoords="offset points", fontsize="small")
    trade.margins(0.3)  # room for the names
    trade.set(xlabel="retain NLL, nats per token", ylabel="logit margin on the forget rows")
    dual.semilogx(epsilon, multiplier, "s-", color="#009E73")
    dual.set(xlabel="ε, nats per token", ylabel="multiplier λ at the end")
    for axes in (trade, dual):
        axes.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"sweep.{suffix}", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="the default is what `make demo` makes")
    parser.add_argument(
        "--relative", default=[0.1, 1, 4, 10, 30], type=float, nargs="+", help="1: twice the loss before"
    )
    parser.add_argument("--epochs", default=15, type=int, help="passes over the forget rows, per run")
    parser.add_argument(
        "--output", default="runs/examples/epsilon_sweep", type=Path, help="folder for table and pictures"
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    print("".join(f"{title:>14}" for title in COLUMNS.values()))
    points = []
    for relative in options.relative:
        point = run(options.model, relative, options.epochs)
        points.append(point)
        broken = "  BROKEN" if point["retain_nll"] > point["epsilon"] else ""
        print("".join(f"{point[key]:>14.4g}" for key in COLUMNS) + broken, flush=True)
    with (options.output / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(points)
    draw(points, options.output)


if __name__ == "__main__":
    main()
