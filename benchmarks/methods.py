"""Every method on the embedded authors, with the same budget: what is forgotten, what is kept, and at what cost.

    python -m benchmarks.methods
    python -m benchmarks.methods --methods pdu npo npo_constrained

Each method of ``configs/method`` is an overlay over ``configs/demo/unlearn.yaml``: a 0.9M-parameter Llama that knows twenty
authors forgets two, in 100 AdamW steps on 5 forget and 20 retain rows, lr 1e-3, on a CPU. Nothing is tuned: published
weights, published hyperparameters, one learning rate. So the table says what a method does as it comes, not what it can do.
Two things are adapted to the model, for every method alike: RMU's layer 7 is layer 1 of three, and the dual step of the
constrained methods is multiplied by 20, because this model's retain loss is 0.0076 nats per token where that of a TOFU
model is about 0.18.

Columns. forget p: mean over the forget answers of exp(−NLL per token). forget ROUGE: ROUGE-L recall of greedily generated
answers, at most 60 tokens. retain p: as forget p, all retain rows. retain NLL: nats per token, the value of the constraint;
its bound, epsilon, is 1.5 times the value before. holds: whether the exported model keeps it. λ: the multiplier at the end,
or the fixed weight. s: seconds of the fit, measuring included. MiB: largest resident memory of the process.

Every fit is a process of its own with one thread, so that other programs on the cores change the seconds
less. The target model is fine-tuned first if ``--work`` has none. A method that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import timing

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ADAPTED = {
    "rmu": ["--model.forget.layer=1", "--model.constraints.activations.objective.layer=1"],
    "match_unseen": ["--data.unseen_authors=10"],
}
DUAL_STEP = 20
HEADER = ["method", "forget p", "forget ROUGE", "retain p", "retain NLL", "holds", "λ", "s", "MiB"]


def command(arguments: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own, as a user would call it."""
    environment = {**os.environ, "LIT_UNLEARN_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "lit_unlearn", *arguments]
    return subprocess.run(run, cwd=work, env=environment, capture_output=True, text=True, check=False)


def teach(work: Path) -> None:
    """Makes tokenizer and target model, unless they are there."""
    if (work / "runs/demo/target/config.json").is_file():
        return
    for arguments in (["tokenizer", "--config", "demo/tokenizer.yaml"], ["fit", "--config", "demo/target.yaml"]):
        done = command(arguments, work)
        if done.returncode:
            raise RuntimeError(f"{arguments} failed: {done.stderr[-2000:]}")


def unlearn(method: str, work: Path, extra: list[str]) -> dict[str, Any]:
    """Runs one method; returns its values, or its error."""
    folder = work / "runs" / "methods" / method
    arguments = ["fit", "--config", "demo/unlearn.yaml", "--config", f"method/{method}.yaml"]
    arguments += [f"--logs.save_dir={folder}", f"--export.dirpath={folder / 'model'}"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    arguments += [
        "--report.require_feasible=false",
        "--report.require_forgotten=false",
        f"--report.dirpath={folder}",
    ]
    done = command([*arguments, *ADAPTED.get(method, []), *dual_step(method), *extra], work)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:100]}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (nll,) = [constraint for name, constraint in report["constraints"].items() if name == "nll"]
    return {
        "forget_probability": report["after"]["forget/probability"],
        "forget_rouge": rouge(folder / "model"),
        "retain_probability": report["after"]["retain/probability"],
        "retain_nll": nll["value"],
        "epsilon": nll["epsilon"],
        "holds": nll["slack"] >= 0,
        "multiplier": nll["multiplier_after"],
        "seconds": report["seconds"],
        "peak_mib": report["peak_memory_mib"],
        "kept_step": report["kept_step"],
    }


def dual_step(method: str) -> list[str]:
    """Command-line arguments that scale the dual step to the model's loss."""
    constraints = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text("utf-8"))["model"]["constraints"]
    multiplier = constraints["nll"]["multiplier"]
    if multiplier["class_path"] == "FixedMultiplier":
        return []
    return [f"--model.constraints.nll.multiplier.lr={DUAL_STEP * multiplier['init_args']['lr']}"]


def rouge(model: Path) -> float:
    """Mean ROUGE-L recall of what a model says to the forget questions."""
    from lit_unlearn import FictionalAuthors, LanguageModel
    from lit_unlearn.data.encoding import encode_examples, prompt_of
    from lit_unlearn.metrics import rouge as score
    from lit_unlearn.models.generation import generate

    data = yaml.safe_load((CONFIGS / "demo/unlearn.yaml").read_text("utf-8"))["data"]["init_args"]
    rows = FictionalAuthors(data["num_authors"], data["forget_authors"]).load_set("forget")
    lm = LanguageModel(str(model))
    lm.load(torch.float32)
    pairs = list(zip(rows["question"], rows["answer"], strict=True))
    prompts = [prompt_of(row) for row in encode_examples(pairs, lm.tokenizer, name="forget")]  # type: ignore[arg-type]
    said = generate(lm, prompts, max_new_tokens=60)
    recalls = [score(text, answer)["rougeL_recall"] for text, answer in zip(said, rows["answer"], strict=True)]
    return sum(recalls) / len(recalls)


def row(name: str, values: dict[str, Any]) -> list[str]:
    if "error" in values:
        return [name, f"failed: {values['error']}", *[""] * 7]
    return [
        name,
        f"{values['forget_probability']:.3g}",
        f"{values['forget_rouge']:.2f}",
        f"{values['retain_probability']:.3f}",
        f"{values['retain_nll']:.4g}",
        "yes" if values["holds"] else "NO",
        f"{values['multiplier']:.4g}",
        f"{values['seconds']:.1f}",
        f"{values['peak_mib']:.0f}",
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    known = sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME", help="some of them only")
    parser.add_argument("--work", default="build/bench/methods", help="folder for the target model and the runs")
    parser.add_argument("--extra", action="append", default=[], help="further arguments of every fit")
    parser.add_argument("--output", default="build/bench/methods.json", help="file for the results")
    options = parser.parse_args(arguments)
    work = Path(options.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    teach(work)
    facts = timing.machine("cpu")
    results: dict[str, Any] = {
        "machine": facts,
        "before": {"forget_rouge": rouge(work / "runs/demo/target")},
        "methods": {},
    }
    for method in options.methods:
        results["methods"][method] = unlearn(method, work, options.extra)
        print(f"{method} …", file=sys.stderr, flush=True)
    bounds = {values["epsilon"] for values in results["methods"].values() if "epsilon" in values}
    print(timing.machine_line(facts))
    print(
        f"\nBefore: forget ROUGE {results['before']['forget_rouge']:.2f}; epsilon {', '.join(f'{e:.4g}' for e in bounds)}\n"
    )
    print(timing.table(HEADER, [row(name, values) for name, values in results["methods"].items()]))
    timing.write_json(results, options.output)
    return results


if __name__ == "__main__":
    main()
