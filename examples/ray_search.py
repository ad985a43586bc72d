"""Search learning rates of the model and of λ with Ray Tune: two runs at a time, each in a process of its own.

    python examples/ray_search.py --model runs/demo/target --output runs/examples/ray_search

Needs ``pip install "ray[tune]"``. Ray is told not to send statistics of its use.
"""

import argparse
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
from ray import tune

from lit_unlearn import DualAscent, FictionalAuthors, Relative, unlearn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="runs/demo/target", type=os.path.abspath, help="default: from `make demo`")
parser.add_argument("--trials", default=4, type=int, help="runs in all")
parser.add_argument("--epochs", default=10, type=int, help="passes over the forget set, per run")
parser.add_argument("--output", default="runs/examples/ray_search", type=os.path.abspath, help="for models and runs")
options = parser.parse_args()
rows = FictionalAuthors(20, 2).load()


def run(drawn: dict[str, float]) -> dict[str, float]:
    settings = {"lr": drawn["lr"], "epsilon": Relative(4.0), "multiplier": DualAscent(lr=drawn["dual_lr"], init=100)}
    trainer = {"max_epochs": options.epochs, "accelerator": "cpu", "enable_progress_bar": False}
    output = f"{options.output}/{tune.get_context().get_trial_id()}"
    report = unlearn(options.model, rows["forget"], rows["retain"], output, **settings, **trainer)
    return {"probability": report.after["forget/probability"], "violation": -report.constraints["nll"]["slack"]}


ray.init(num_cpus=2, include_dashboard=False)  # one core per run
space = {"lr": tune.loguniform(1e-4, 1e-2), "dual_lr": tune.loguniform(50, 5000)}
storage = tune.RunConfig("ray", options.output, failure_config=tune.FailureConfig(fail_fast="raise"))
tuner = tune.Tuner(run, param_space=space, tune_config=tune.TuneConfig(num_samples=options.trials), run_config=storage)
for result in sorted(tuner.fit(), key=lambda result: (result.metrics["violation"] > 0, result.metrics["probability"])):
    print("{trial_id}: probability {probability:.4f}, violation {violation:.4g}, {config}".format(**result.metrics))
