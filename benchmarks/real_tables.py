"""The tables of docs/real.md and the README on `make real`, from what its latest run left in ``runs/real``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import real
from benchmarks.markdown_blocks import markdown_table
from lit_unlearn.utils.io import read_json

ROOT = Path(__file__).parents[1]
MODELS = ("target", "unlearned", "retain_only")
LOGS = {"target": "target", "unlearned": "unlearn", "retain_only": "retain_only"}
"""By model the folder of the logs of the fit that made it."""


def has_finished() -> bool:
    """Return whether every stage of `make real` has finished, so that there is something to show."""
    file = ROOT / real.STAGES_FILE
    if not file.is_file():
        return False
    stages = read_json(file)
    return all(stages.get(stage.name, {}).get("finished") for stage in real.list_stages(model="", precision=""))


def make_stages_table() -> str:
    """Return the minutes of every stage."""
    stages = read_json(ROOT / real.STAGES_FILE)
    rows = []
    for stage in real.list_stages(model="", precision=""):
        minutes = stages[stage.name]["seconds"] / 60
        rows.append([stage.title, f"`{stage.command[0]}`", f"{minutes:.1f}"])
    total = sum(entry["seconds"] for entry in stages.values()) / 60
    rows.append(["all", "", f"{total:.1f}"])
    return markdown_table(["stage", "command", "minutes"], rows)


def make_fits_table() -> str:
    """Return what the three fits reported of the models that they exported."""
    reports = {}
    for model, name in LOGS.items():
        runs = (ROOT / real.FOLDER / "logs" / name).glob("version_*/report.json")
        reports[model] = read_json(max(runs, key=lambda file: file.stat().st_mtime))
    epsilon = reports["unlearned"]["constraints"]["nll"]["epsilon"]
    values = {
        "forget NLL, nats per token": "forget/nll",
        "forget answer probability": "forget/probability",
        f"retain NLL, at most {epsilon:.3f}": "retain/nll",
    }
    rows = []
    for title, value in values.items():
        rows.append([title, *(f"{reports[model]['after'][value]:.3f}" for model in MODELS)])
    return markdown_table(["", *(model.replace("_", "-") for model in MODELS)], rows)


def make_audit_table() -> str:
    """Return the requirements of the audit's policy, with what was measured."""
    rows = []
    for finding in read_json(ROOT / real.AUDIT / "audit.json")["findings"]:
        interval = f"{format_signed(finding['low'])} to {format_signed(finding['high'])}"
        threshold, value = f"{finding['at_most']:g}", format_signed(finding["value"])
        rows.append([finding["title"], threshold, value, interval, finding["outcome"]])
    return markdown_table(["requirement", "at most", "value", "95 % interval", "outcome"], rows)


def format_signed(value: float) -> str:
    """Return a value with three decimals and, where it is negative, a minus sign."""
    return f"{value:.3f}".replace("-", "−")


def make_answers_table(questions: Sequence[dict[str, Any]]) -> str:
    """Return the answers of the three models.

    Args:
        questions: As ``lit-unlearn inspect --format json`` writes them.
    """
    rows = []
    for question in questions:
        cells = [question["question"]]
        for model in MODELS:
            reply = question["replies"][model]
            cells.append(f"{reply['said']['text'].strip()} ({reply['right']['probability']:.2f})")
        rows.append(cells)
    return markdown_table(["question", *(model.replace("_", "-") for model in MODELS)], rows)
