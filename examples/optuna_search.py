"""Search learning rates of the model and of λ with Optuna: forget most, with no bound violated.

    python examples/optuna_search.py --model runs/demo/target --output runs/examples/optuna_search

Needs ``pip install optuna``. Processes that are given the same ``--storage`` and ``--output`` share one search.
"""

import argparse

import optuna

from lit_unlearn import DualAscent, FictionalAuthors, Relative, unlearn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
parser.add_argument("--trials", default=4, type=int, help="runs of this process")
parser.add_argument("--epochs", default=10, type=int, help="passes over the forget set, per run")
parser.add_argument("--storage", help="such as sqlite:///search.db; by default the search is kept in memory")
parser.add_argument("--output", default="runs/examples/optuna_search", help="folder for models and runs")
options = parser.parse_args()
rows = FictionalAuthors(20, 2).load()


def run(trial: optuna.Trial) -> float:
    dual = DualAscent(lr=trial.suggest_float("dual_lr", 50, 5000, log=True), init=100)
    settings = {"lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True), "epsilon": Relative(4.0), "multiplier": dual}
    trainer = {"max_epochs": options.epochs, "accelerator": "cpu", "enable_progress_bar": False}
    output = f"{options.output}/trial_{trial.number}"
    report = unlearn(options.model, rows["forget"], rows["retain"], output, **settings, **trainer)
    trial.set_constraint("nll", -report.constraints["nll"]["slack"])  # above 0 where the bound is violated
    return report.after["forget/probability"]


study = optuna.create_study(study_name="search", storage=options.storage, load_if_exists=True)
study.optimize(run, n_trials=options.trials)
done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])  # others may run in another process
for trial in sorted(done, key=lambda trial: (trial.constraints["nll"] > 0, trial.value)):
    bound = f"violation {trial.constraints['nll']:.4g}"
    print(f"trial {trial.number}: probability {trial.value:.4f}, {bound}, {trial.params}")
