"""One unit of the sweep: a model taught or unlearned, measured, and its results file. Each runs in a process of its own."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import models
import protocol

from lit_unlearn.utils.io import write_json

WORK_FOLDER = "{work}"  # in settings: results name no place on a machine


@dataclass(frozen=True)
class Unit:
    """What decides a result.

    Args:
        stage: Folder of the results file: ``taught``, ``models``, ``tuning``, ``final``, or that of an experiment.
        label: Of the row in a table: a method, or a kind of model.
        size: Authors to forget.
        seed: Of the target model and of the run.
        settings: Command-line arguments over those of the protocol, ``None`` for a model that is not unlearned.
    """

    stage: str
    label: str
    size: int | None
    seed: int
    settings: tuple[str, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict, compare=False)  # for tables

    @property
    def file(self) -> str:
        return f"{self.stage}/{self.label}-{self.size or 'all'}-{self.seed}.json"


def run(unit: Unit, work: Path, results: Path) -> dict[str, Any]:
    """Does the unit's work and writes its file; what fails is a result, too."""
    started = time.monotonic()
    log = work / "log" / Path(unit.file).with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"unit": asdict(unit), "protocol": protocol.digest(), "commit": commit()}
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)  # this process is the unit's alone
        os.dup2(file.fileno(), 2)
        try:
            content |= WORK[unit.stage](unit, work) if unit.settings is None else unlearned(unit, work)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code in (None, 130):
                raise  # interrupted or terminated, not failed: no result
            content["error"] = re.sub(r"\s+", " ", str(error)).replace(str(work), WORK_FOLDER)[:300]
    content["total_seconds"] = time.monotonic() - started
    write_json(results / unit.file, rounded(content))
    return content


def taught(unit: Unit, work: Path) -> dict[str, Any]:
    """Teaches a model, unless it is there."""
    from lit_unlearn.cli import main

    folder = work / "models" / models.name(unit.size, unit.seed)
    if not (folder / "config.json").is_file():
        main(models.teach(unit.size, unit.seed, work))
    return {}


def measured(unit: Unit, work: Path) -> dict[str, Any]:
    """Measures a taught model: a target on every forget set, a retain-only model on its own, as the reference of others."""
    folder = work / "models" / models.name(unit.size, unit.seed)
    found: dict[str, Any] = {}
    for size in protocol.SIZES if unit.size is None else (unit.size,):
        reference = reference_file(work, size, unit.seed)
        one = measure(folder, size, unit.seed, work, None if unit.size else reference)
        if unit.size:
            keep_reference(one, reference)
        found[str(size)] = summary(one)
    return {"measured": found}


def unlearned(unit: Unit, work: Path) -> dict[str, Any]:
    """Unlearns from the target, measures what the run kept, and removes it."""
    from lit_unlearn.cli import main

    assert unit.size is not None
    folder = work / "runs" / Path(unit.file).with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    data = work / "data" / str(unit.size)
    how: dict[str, Any] = protocol.UNLEARN
    main(
        [
            "fit",
            f"--config={protocol.ROOT / 'configs/demo/unlearn.yaml'}",
            f"--config={protocol.ROOT / 'configs/method' / (unit.facts['method'] + '.yaml')}",
            f"--model.lm.model={work / 'models' / models.name(None, unit.seed)}",
            "--data.class_path=TOFU",
            f"--data.source={data}",
            "--data.forget_split=forget10",
            "--data.max_length=256",
            f"--data.batch_size={how['batch_size']}",
            f"--data.retain_batch_size={how['retain_batch_size']}",
            f"--data.seed={unit.seed}",
            f"--model.seed={unit.seed}",
            f"--seed_everything={unit.seed}",
            f"--model.optimizer.init_args.weight_decay={how['weight_decay']}",
            f"--trainer.max_epochs={how['epochs']}",
            f"--trainer.check_val_every_n_epoch={how['check_val_every_n_epoch']}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_checkpointing=false",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder / 'log'}",
            f"--report.dirpath={folder}",
            "--report.require_feasible=false",
            "--report.max_forget_probability=null",
            f"--export.dirpath={folder / 'model'}",
            *(setting.replace(WORK_FOLDER, str(work)) for setting in unit.settings or ()),
        ]
    )
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    seconds = float(re.findall(r"steps in ([\d.]+) s", log_text(work, unit))[-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = reference_file(work, unit.size, unit.seed)
    found = measure(
        folder / "model", unit.size, unit.seed, work, reference, whole=unit.stage not in ("tuning", "bounds")
    )
    shutil.rmtree(folder, ignore_errors=True)
    return {"report": report, "seconds": seconds, "peak_mib": peak, "measured": {str(unit.size): summary(found)}}


def log_text(work: Path, unit: Unit) -> str:
    return (work / "log" / Path(unit.file).with_suffix(".txt")).read_text(encoding="utf-8")


def measure(
    folder: Path, size: int, seed: int, work: Path, reference: Path | None, whole: bool = True
) -> dict[str, Any]:
    """TOFU's benchmark and the entropy of the forget answers; tuning and bounds are spared authors, facts and stresses.

    The stresses: the forget rows again after relearning, and with 4-bit weights.
    """
    import torch

    from lit_unlearn import LanguageModel, Relearn, StressBenchmark, TOFUBenchmark
    from lit_unlearn.data.encoding import encode_examples
    from lit_unlearn.evaluation.scoring import score_examples

    data = work / "data" / str(size)
    lm = LanguageModel(str(folder))
    lm.load(torch.float32)
    target = str(work / "models" / models.name(None, seed))
    settings: dict[str, Any] = {"max_length": 256, "max_new_tokens": 100}
    plain = TOFUBenchmark(
        "forget10",
        str(data if whole else data / "tuning"),
        protocol.EVAL_ROWS,
        retain_results=None if reference is None else str(reference),
        fluency_model=target,
        **settings,
    )
    with torch.no_grad():
        found = plain.run(lm)
        rows = models.read(data / "forget10.json")
        encoded = encode_examples(
            [(row["question"], row["answer"]) for row in rows], lm.tokenizer, name="forget", max_length=256
        )  # type: ignore[arg-type]
        scored = score_examples(lm, encoded)
        found["aggregate"]["forget/entropy"] = statistics.fmean(-float(one.mean.mean()) for one in scored)  # nats
        if whole:
            attack = Relearn(rows=size * models.ROWS // 10, steps=protocol.RELEARN_STEPS, lr=protocol.RELEARN_LR)
            alone = TOFUBenchmark("forget10", str(data / "alone"), **settings)
            stressed = StressBenchmark(alone, relearn=attack, bits=[4]).run(lm)
            found["aggregate"] |= {
                k: v for k, v in stressed["aggregate"].items() if k.startswith(("relearn/", "4bit/"))
            }
    return found


def keep_reference(found: dict[str, Any], file: Path) -> None:
    """Whole results of a retain-only model, with every row, for forget quality."""
    write_json(file, found)


def reference_file(work: Path, size: int, seed: int) -> Path:
    return work / "reference" / f"{models.name(size, seed)}.json"


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The values, and of the rows the truth ratios that forget quality is made from."""
    ratios = [row["truth_ratio"] for row in found["examples"]["forget"]]
    said = [row["generated"] for row in found["examples"]["forget"][:3]]
    return {"aggregate": found["aggregate"], "forget_truth_ratios": ratios, "said": said}


def rounded(value: Any) -> Any:
    """Four digits are enough, and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def commit() -> str:
    """Of the code that made a result; marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=protocol.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


WORK = {"taught": taught, "models": measured}  # of units that do not unlearn
