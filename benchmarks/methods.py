"""Run every method on the embedded authors with the same budget: forgetting, what is retained, and the cost.

    python -m benchmarks.methods
    python -m benchmarks.methods --methods pdu npo npo_constrained

Each method of ``configs/method`` is an overlay over ``configs/demo/unlearn.yaml``: a Llama of 0.9M parameters that was
fine-tuned on twenty authors forgets two, in 100 AdamW steps on 5 forget and 20 retain examples, lr 1e-3, on a CPU. Nothing
is tuned: published weights, published hyperparameters, one learning rate. So the table shows a method with its defaults,
not the best it can reach. Two things are adapted to the model, for every method alike: RMU's layer 7 is layer 1 of three,
and the dual step of the constrained methods is multiplied by 20, because this model's retain loss is 0.0076 nats per token
where that of a TOFU model is about 0.18. Methods that need a base model are left out: this model was trained from scratch.

Columns. forget p: mean over the forget answers of exp(−NLL per token). forget ROUGE: ROUGE-L recall of greedily generated
answers, at most 60 tokens. retain p: as forget p, over the whole retain set. retain NLL: nats per token, the value of the
constraint; its bound, epsilon, is 1.5 times the value before. holds: whether the exported model satisfies it. λ: the
multiplier at the end, or the fixed weight. s: seconds of the fit, including evaluation. MiB: largest resident memory of the
process.

Every fit runs in a process of its own with one thread, so that other programs on the cores change the seconds less. The
target model is fine-tuned first if ``--work`` has none. A method that fails gets a row with its error.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import describe_machine, format_machine
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.utils.io import read_json, write_json

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TARGET = Path("runs/demo/target")
ADAPTED = {
    "rmu": ["--model.forget.layer=1", "--model.constraints.activations.objective.layer=1"],
    "match_unseen": ["--data.unseen_authors=10"],
}
NEED_BASE_MODEL = ("altpo_constrained", "kl_to_teacher", "match_calibrated", "teacher_answers")
DUAL_STEP = 20
HEADERS = ["method", "forget p", "forget ROUGE", "retain p", "retain NLL", "holds", "λ", "s", "MiB"]


def run_command(arguments: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, as a user would."""
    # Not the user's cache, which may hold a method's reference values already and make its fit look faster.
    environment = {**os.environ, "LIT_UNLEARN_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_unlearn", *arguments]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)


def prepare_target(work: Path) -> None:
    """Train the tokenizer and fine-tune the target model, unless they exist."""
    if (work / TARGET / "config.json").is_file():
        return
    for arguments in (["tokenizer", "--config", "demo/tokenizer.yaml"], ["fit", "--config", "demo/target.yaml"]):
        done = run_command(arguments, work)
        if done.returncode:
            raise RuntimeError(f"{arguments} failed: {done.stderr[-2000:]}")


def run_method(method: str, work: Path, extra: list[str]) -> dict[str, Any]:
    """Run one method and return its values, or its error."""
    folder = work / "runs" / "methods" / method
    arguments = [
        "fit",
        "--config=demo/unlearn.yaml",
        f"--config=method/{method}.yaml",
        f"--logs.save_dir={folder}",
        f"--export.dirpath={folder / 'model'}",
        f"--report.dirpath={folder}",
        # A run that misses its constraint is a row of the table, not an error.
        "--report.require_feasible=false",
        "--report.require_forgotten=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
        *ADAPTED.get(method, []),
        *scale_dual_step(method),
        # Last, so that they override everything above.
        *extra,
    ]
    done = run_command(arguments, work)
    if done.returncode:
        # The last line of a traceback or of the command line's message has the reason.
        return {"error": done.stderr.strip().splitlines()[-1][:100]}
    report = read_json(folder / "report.json")
    nll = report["constraints"]["nll"]
    return {
        "forget_probability": report["after"]["forget/probability"],
        "forget_rouge": measure_rouge(folder / "model"),
        "retain_probability": report["after"]["retain/probability"],
        "retain_nll": nll["value"],
        "epsilon": nll["epsilon"],
        "holds": nll["slack"] >= 0,
        "multiplier": nll["multiplier_after"],
        "seconds": report["seconds"],
        "peak_mib": report["peak_memory_mib"],
        "kept_step": report["kept_step"],
    }


def scale_dual_step(method: str) -> list[str]:
    """Return command-line arguments that scale the dual step to the model's loss."""
    config = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text("utf-8"))
    multiplier = config["model"]["constraints"]["nll"]["multiplier"]
    if multiplier["class_path"] == "FixedMultiplier":
        return []
    return [f"--model.constraints.nll.multiplier.lr={DUAL_STEP * multiplier['init_args']['lr']}"]


def measure_rouge(model: Path) -> float:
    """Return the mean ROUGE-L recall of the answers that a model generates to the forget questions."""
    from lit_unlearn import FictionalAuthors, LanguageModel
    from lit_unlearn.data.encoding import encode_examples
    from lit_unlearn.data.example import prompt_of
    from lit_unlearn.metrics import rouge
    from lit_unlearn.models.generation import generate

    data = yaml.safe_load((CONFIGS / "demo/unlearn.yaml").read_text("utf-8"))["data"]["init_args"]
    rows = FictionalAuthors(data["num_authors"], data["forget_authors"]).load_set("forget")
    lm = LanguageModel(str(model))
    lm.load(torch.float32)
    pairs = list(zip(rows["question"], rows["answer"], strict=True))
    examples = encode_examples(pairs, lm.tokenizer, name="forget")  # type: ignore[arg-type]
    generated = generate(lm, [prompt_of(example) for example in examples], max_new_tokens=60)
    recalls = []
    for text, answer in zip(generated, rows["answer"], strict=True):
        recalls.append(rouge(text, answer)["rougeL_recall"])
    return statistics.fmean(recalls)


def format_row(name: str, values: dict[str, Any]) -> list[str]:
    """Format the values of one method as a row under `HEADERS`."""
    if "error" in values:
        return [name, f"failed: {values['error']}", *[""] * (len(HEADERS) - 2)]
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


def format_epsilon(methods: dict[str, dict[str, Any]]) -> str:
    """Format the bound on the retain NLL: one value, because all methods start from the same model."""
    bounds = {f"{values['epsilon']:.4g}" for values in methods.values() if "epsilon" in values}
    return ", ".join(sorted(bounds))


def main(arguments: list[str] | None = None) -> None:
    names = sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml"))
    names = [name for name in names if name not in NEED_BASE_MODEL]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME", help="some of them only")
    parser.add_argument("--work", default="build/bench/methods", help="folder for the target model and the runs")
    parser.add_argument("--extra", action="append", default=[], help="further arguments of every fit")
    parser.add_argument("--output", type=Path, default="build/bench/methods.json", help="file for the results")
    options = parser.parse_args(arguments)
    # Absolute, because the commands run inside it.
    work = Path(options.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare_target(work)
    facts = describe_machine("cpu")
    rouge_before = measure_rouge(work / TARGET)

    methods: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        methods[method] = run_method(method, work, options.extra)
        print(f"{method} …", file=sys.stderr, flush=True)

    print(format_machine(facts))
    print(f"\nBefore: forget ROUGE {rouge_before:.2f}; epsilon {format_epsilon(methods)}\n")
    print(format_table([format_row(name, values) for name, values in methods.items()], HEADERS))
    write_json(options.output, {"machine": facts, "before": {"forget_rouge": rouge_before}, "methods": methods})


if __name__ == "__main__":
    main()
