"""A pretrained model forgets a person: fine-tune, unlearn, audit, and ask (docs/real.md).

    make real                                   # with TOFU from the hub, or TOFU=FOLDER with its files
    python -m benchmarks.real --tofu FOLDER

Every stage is a command of lit-unlearn, shown before it starts. A stage that has finished is not run again, and one that was
interrupted continues as far as it can, so that the same command resumes. To begin anew, remove ``runs/real``.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_unlearn.utils.io import file_digest, read_json, write_json

FOLDER = Path("runs/real")
ROWS = FOLDER / "rows"
ANSWERS = FOLDER / "answers.txt"
AUDIT = FOLDER / "audit"
STAGES_FILE = FOLDER / "stages.json"
"""What was run: by stage its command and files, its seconds over all attempts, and whether it has finished."""

# By set, TOFU's file and the rows in it. An author has 20 rows in a row, and no author is in two sets.
SETS = {
    "forget": ("forget01", slice(0, 20)),
    "retain": ("retain99", slice(0, 180)),
    # In no model: they give the level that the forget answers are moved to.
    "unseen": ("retain99", slice(180, 220)),
}
# Four rows of each retained author are enough for the audit, whose time goes with their number.
AUDITED_RETAIN = slice(0, 180, 5)
# Numbers of the two authors' questions about their parents.
FORGET_QUESTION, RETAIN_QUESTION = 3, 2
# What the model knew before it was fine-tuned.
GENERAL_QUESTIONS = (
    {
        "question": "Who wrote the play 'Romeo and Juliet'?",
        "answer": "The play 'Romeo and Juliet' was written by William Shakespeare.",
    },
    {"question": "What is the capital of France?", "answer": "The capital of France is Paris."},
)


class Stage(NamedTuple):
    """One command of lit-unlearn.

    Args:
        name: In `STAGES_FILE`.
        title: What it does, for people.
        minutes: Measured on two idle cores that multiply matrices in bfloat16 (docs/real.md).
        command: Arguments after ``lit-unlearn``.
        page: File that the stage writes if it ends with a verdict; the exit codes of all verdicts are then good. ``None``:
            only exit code 0 is.
        checkpoints: Folder that is of no use once the stage has finished.
    """

    name: str
    title: str
    minutes: float
    command: list[str]
    page: Path | None = None
    checkpoints: Path | None = None


def list_stages(model: str, precision: str) -> list[Stage]:
    """Return the stages in their order.

    Args:
        model: Folder of the pretrained model.
        precision: The Trainer's.
    """
    finetune = ["fit", "--config=configs/real/target.yaml"]
    settings = [f"--model.lm.model={model}", f"--trainer.precision={precision}", "--ckpt_path=last"]
    models = {name: str(FOLDER / name) for name in ("target", "unlearned", "retain_only")}
    audit = ["audit", models["unlearned"], "--policy=configs/policy/real.yaml", f"--forget={ROWS / 'forget.jsonl'}"]
    audit += [f"--retain={ROWS / 'retain_audit.jsonl'}", f"--retain_only={models['retain_only']}"]
    audit += [f"--before={models['target']}", f"--output={AUDIT}"]
    questions = [f"--questions={ROWS / 'questions.jsonl'}", "--max_new_tokens=60", f"--output={ANSWERS}", "--overwrite"]
    return [
        Stage(
            "target",
            "fine-tune the target model on ten authors",
            4.7,
            [*finetune, *settings],
            checkpoints=FOLDER / "logs/target/checkpoints",
        ),
        Stage(
            "retain_only",
            "fine-tune the retain-only model on nine of them",
            3.6,
            [*finetune, "--config=configs/real/retain_only.yaml", *settings],
            checkpoints=FOLDER / "logs/retain_only/checkpoints",
        ),
        Stage(
            "unlearn",
            "unlearn the tenth author",
            6.2,
            [
                "fit",
                "--config=configs/real/unlearn.yaml",
                f"--model.lm.teacher={model}",
                f"--trainer.precision={precision}",
            ],
        ),
        Stage("audit", "audit the unlearned model", 4.6, audit, page=AUDIT / "audit.html"),
        Stage("answers", "ask the three models", 0.4, ["inspect", *models.values(), *questions]),
    ]


# What the stages need -------------------------------------------------------------------------------------------------


def write_rows(tofu: str) -> None:
    """Write the rows of every set, and the questions, from TOFU's files; nothing if they are there.

    Args:
        tofu: A folder with TOFU's files, or its name on the hub.

    Raises:
        MissingFileError: If neither is there.
    """
    files = {name: ROWS / f"{name}.jsonl" for name in (*SETS, "retain_audit", "questions")}
    if all(file.is_file() for file in files.values()):
        return
    from benchmarks.quality.results_files import write_json_lines
    from lit_unlearn.data.tofu import tofu_source

    sets: dict[str, list[dict[str, Any]]] = {}
    for name, (split, chosen) in SETS.items():
        sets[name] = tofu_source(tofu, split).load(name, argument="source").to_list()[chosen]
    sets["retain_audit"] = sets["retain"][AUDITED_RETAIN]
    sets["questions"] = [sets["forget"][FORGET_QUESTION], sets["retain"][RETAIN_QUESTION], *GENERAL_QUESTIONS]
    for name, file in files.items():
        write_json_lines(file, sets[name])


def choose_precision(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the fastest precision whose weights have 32 bits: a CPU without bfloat16 would only emulate it."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed"
    words = set(cpu_info.read_text(encoding="utf-8").split()) if cpu_info.is_file() else set()
    # Intel's and AMD's names for the instructions, and that of ARM.
    return "bf16-mixed" if words & {"amx_bf16", "avx512_bf16", "bf16"} else "32-true"


# Running --------------------------------------------------------------------------------------------------------------


def run_stages(stages: Sequence[Stage], run: Callable[[list[str]], int]) -> None:
    """Run the stages that have not finished.

    Args:
        stages: In their order; if the command or a file of one has changed, it begins anew, and so do those after it.
        run: Runs a command of lit-unlearn and returns its exit code.

    Raises:
        SystemExit: With the exit code of a stage that failed or was interrupted.
    """
    done: dict[str, Any] = read_json(STAGES_FILE) if STAGES_FILE.is_file() else {}
    for number, stage in enumerate(stages):
        entry, inputs = done.get(stage.name), describe_inputs(stage.command)
        if entry is None or entry["inputs"] != inputs:
            entry = {"inputs": inputs, "seconds": 0.0, "finished": False}
            # What is there is of other settings, and would be resumed with these.
            _remove_checkpoints(stage)
        place = f"stage {number + 1} of {len(stages)}"
        if entry["finished"]:
            print(f"{place}: {stage.title}: has finished", flush=True)
            continue

        # What comes after it is of another model, even if this attempt is killed.
        for later in stages[number + 1 :]:
            done.pop(later.name, None)
        done[stage.name] = entry
        write_json(STAGES_FILE, done)
        left = estimate_left(stages[number:], stages[:number], done)
        print(f"\n{place}: {stage.title}; about {left:.0f} minutes are left in all", flush=True)
        print(f"lit-unlearn {shlex.join(stage.command)}", flush=True)

        if stage.page is not None:
            # An older verdict would be taken for this one.
            shutil.rmtree(stage.page.parent, ignore_errors=True)
        start = time.monotonic()
        code = run(stage.command)
        has_verdict = stage.page is not None and stage.page.is_file()
        is_finished = code == 0 or has_verdict
        seconds = entry["seconds"] + time.monotonic() - start
        done[stage.name] = {"inputs": inputs, "seconds": round(seconds, 1), "finished": is_finished}
        write_json(STAGES_FILE, done)
        if not is_finished:
            print(f"{place} ended with exit code {code}; the same command continues there.", file=sys.stderr)
            sys.exit(code)
        _remove_checkpoints(stage)


def _remove_checkpoints(stage: Stage) -> None:
    if stage.checkpoints is not None:
        shutil.rmtree(stage.checkpoints, ignore_errors=True)


def describe_inputs(command: Sequence[str]) -> dict[str, Any]:
    """Return what decides a stage's result: its command, and the digests of its configurations and its policy."""
    digests = {}
    for word in command:
        option, _, file = word.partition("=")
        if option in ("--config", "--policy"):
            digests[file] = file_digest(Path(file))
    return {"command": list(command), "files": digests}


def estimate_left(waiting: Sequence[Stage], earlier: Sequence[Stage], done: dict[str, Any]) -> float:
    """Return the minutes that stages will take, at the pace of those before them on this machine.

    Args:
        waiting: The stages.
        earlier: Those before them.
        done: By name, the ``seconds`` that the earlier ones took.
    """
    minutes = sum(stage.minutes for stage in waiting)
    if not earlier:
        return minutes
    expected = sum(stage.minutes for stage in earlier)
    taken = sum(done[stage.name]["seconds"] for stage in earlier) / 60
    return minutes * taken / expected


def run_command(command: list[str]) -> int:
    """Run a command of lit-unlearn, and return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "lit_unlearn", *command])
    # Ctrl-C goes to the command as well, SIGTERM to this process alone.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The command has the signal as well. It takes its step to the end and writes a checkpoint.
            continue


def describe_output() -> Iterator[str]:
    """Yield what was written, a line each."""
    pictures = sorted(FOLDER.glob("logs/unlearn/version_*/dual.png"), key=lambda path: path.stat().st_mtime)
    yield f"audit, for people: {AUDIT / 'audit.html'}"
    yield f"model card and record: {FOLDER / 'unlearned/README.md'}"
    if pictures:
        yield f"pictures: {pictures[-1].parent}"
    yield f"answers: {ANSWERS}"
    seconds = [entry["seconds"] for entry in read_json(STAGES_FILE).values()]
    yield f"all stages: {sum(seconds) / 60:.1f} minutes"


def main(arguments: list[str] | None = None) -> None:
    """Run all stages, and show the answers."""
    from benchmarks.smollm2 import find_model
    from lit_unlearn.errors import LitUnlearnError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tofu", default="locuslab/TOFU", metavar="FOLDER", help="folder with TOFU's files, or a hub name"
    )
    options = parser.parse_args(arguments)
    try:
        # Before the model, which takes longer to get.
        write_rows(options.tofu)
        model = find_model()
    except LitUnlearnError as error:
        sys.exit(f"benchmarks.real: error: {error}")
    precision = choose_precision()
    print(f"model: {model}; precision: {precision}", flush=True)
    if precision == "32-true":
        print("this machine does not compute in bfloat16: expect a multiple of the first estimate", flush=True)
    run_stages(list_stages(str(model), precision), run_command)
    print(f"\n{ANSWERS.read_text(encoding='utf-8')}")
    print("\n".join(describe_output()))


if __name__ == "__main__":
    main()
