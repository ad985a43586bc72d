"""Show what forgetting costs: one run per epsilon, each from the same model, as a table and a picture.

    python examples/epsilon_sweep.py --model runs/demo/target --output runs/examples/epsilon_sweep

Epsilon is an upper bound of the retain NLL, given here relative to its value before unlearning. You choose how much retain
loss to allow, and the run finds the weight λ that this takes. Writes ``sweep.csv``, ``sweep.png`` and ``sweep.svg``.
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


def unlearn(model: str, relative: float, epochs: int) -> dict[str, float]:
    """Unlearn with retain NLL ≤ (1 + relative) times its value before; return what was measured on the best model."""
    L.seed_everything(0, verbose=False)
    module = LitUnlearn(
        LanguageModel(model),  # loaded anew for each run: a fit changes its weights
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


def draw_sweep(points: list[dict[str, float]], folder: Path) -> None:
    """Draw the trade-off, and the final multiplier for each epsilon."""
    nll = [point["retain_nll"] for point in points]
    margin = [point["forget_margin"] for point in points]
    epsilon = [point["epsilon"] for point in points]
    multiplier = [point["multiplier"] for point in points]

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    trade_off, dual = figure.subplots(1, 2)
    trade_off.semilogx(nll, margin, "o-", color="#D55E00")
    for x, y, bound in zip(nll, margin, epsilon, strict=True):
        trade_off.annotate(f"ε {bound:.2g}", (x, y), (5, 5), textcoords="offset points", fontsize="small")
    trade_off.margins(0.3)  # or labels of the outer points are cut off
    trade_off.set(xlabel="retain NLL, nats per token", ylabel="logit margin on the forget set")
    dual.semilogx(epsilon, multiplier, "s-", color="#009E73")
    dual.set(xlabel="ε, nats per token", ylabel="multiplier λ at the end")
    for axes in (trade_off, dual):
        axes.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"sweep.{suffix}", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
    parser.add_argument(
        "--relative", default=[0.1, 1, 4, 10, 30], type=float, nargs="+", help="1 allows twice the loss before"
    )
    parser.add_argument("--epochs", default=15, type=int, help="passes over the forget set, per run")
    parser.add_argument(
        "--output", default="runs/examples/epsilon_sweep", type=Path, help="folder for table and pictures"
    )
    options = parser.parse_args()
    # Lightning describes its hardware at every start, which would tear the table apart.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)

    print("".join(f"{title:>14}" for title in COLUMNS.values()))
    points = []
    for relative in options.relative:
        point = unlearn(options.model, relative, options.epochs)
        points.append(point)
        violated = "  violated" if point["retain_nll"] > point["epsilon"] else ""
        print("".join(f"{point[key]:>14.4g}" for key in COLUMNS) + violated, flush=True)

    with (options.output / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(points)
    draw_sweep(points, options.output)


if __name__ == "__main__":
    main()
