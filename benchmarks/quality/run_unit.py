"""Run one unit of the sweep in a process of its own: fine-tune, unlearn or measure a model.

    python -m benchmarks.quality.run_unit --unit JSON --work FOLDER --output FILE

`sweep` starts this, with stdout and stderr in a log file. An interrupted unit writes no output file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality import protocol, tofu_models
from benchmarks.quality.results_files import read_json_lines, unit_name
from lit_unlearn.utils.io import read_json, write_json

if TYPE_CHECKING:
    from lit_unlearn.evaluation.results import Results

# Stands for the sweep's folder in settings and errors: stored results must not depend on one machine's paths.
WORK_FOLDER = "{work}"
# Its units leave a model and no result.
FINETUNE_STAGE = "finetuned"
# Measured without real authors, world facts and stress, which take half the time.
SHORT_STAGES = ("tuning", "bounds")


@dataclass(frozen=True)
class Unit:
    """Everything that decides a result.

    Args:
        stage: ``finetuned``, or the name of a results file: ``models``, ``tuning``, ``final``, or that of an experiment.
        label: Label of the line in a table: a method, or a kind of model.
        size: Number of authors to forget; ``None`` for a target model.
        seed: Seed of the target model and of the run.
        settings: Command-line arguments on top of the protocol's; ``None`` for a model that is not unlearned.
        facts: The same settings as values, for tables.
    """

    stage: str
    label: str
    size: int | None
    seed: int
    settings: tuple[str, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The name of the unit in all stages, such as ``final/pdu-4-0``."""
        return f"{self.stage}/{unit_name(asdict(self))}"


def run_unit(unit: Unit, work: Path) -> dict[str, Any]:
    """Run a unit and return its result; an error is a result, too.

    Raises:
        SystemExit: If the run was interrupted or terminated, which says nothing about the method.
    """
    started = time.monotonic()
    content: dict[str, Any] = {"unit": asdict(unit), "protocol": protocol.digest(), "commit": describe_commit()}
    try:
        if unit.stage == FINETUNE_STAGE:
            finetune_model(unit, work)
        elif unit.settings is None:
            content |= measure_finetuned(unit, work)
        else:
            content |= unlearn_and_measure(unit, work)
    except (Exception, SystemExit) as error:
        # The command line ends with 130 after Ctrl-C; with any other code it has refused or failed.
        if isinstance(error, SystemExit) and error.code in (None, 130):
            raise
        message = re.sub(r"\s+", " ", str(error))
        content["error"] = message.replace(str(work), WORK_FOLDER)[:300]
    content["total_seconds"] = time.monotonic() - started
    return content


def finetune_model(unit: Unit, work: Path) -> None:
    """Fine-tune a target model or a retain-only model from random weights."""
    from lit_unlearn.cli import main

    main(tofu_models.finetune_arguments(unit.size, unit.seed, work))


def measure_finetuned(unit: Unit, work: Path) -> dict[str, Any]:
    """Measure a target model on every forget set, or a retain-only model on its own.

    The complete results of a retain-only model stay in the work folder: forget quality compares with all its examples.
    """
    folder = tofu_models.model_folder(unit.size, unit.seed, work)
    is_retain_only = unit.size is not None
    sizes = (unit.size,) if unit.size is not None else protocol.SIZES

    measured: dict[str, Any] = {}
    for size in sizes:
        reference = reference_file(size, unit.seed, work)
        results = measure_model(folder, size, unit.seed, work, retain_results=None if is_retain_only else reference)
        if is_retain_only:
            results.write(reference)
        measured[str(size)] = summarize_results(results)
    return {"measured": measured}


def unlearn_and_measure(unit: Unit, work: Path) -> dict[str, Any]:
    """Unlearn from the target model, measure the model that the run kept, and delete it."""
    from lit_unlearn.cli import main

    assert unit.size is not None
    folder = work / "runs" / unit.name
    # An interrupted run leaves it behind, and a run directory is not overwritten.
    shutil.rmtree(folder, ignore_errors=True)
    main(unlearn_arguments(unit, folder, work))

    report = read_json(folder / "report.json")
    results = measure_model(
        folder / "model",
        unit.size,
        unit.seed,
        work,
        retain_results=reference_file(unit.size, unit.seed, work),
        short=unit.stage in SHORT_STAGES,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "report": report,
        "seconds": report.pop("seconds"),
        "peak_mib": report.pop("peak_memory_mib"),
        "measured": {str(unit.size): summarize_results(results)},
    }


def unlearn_arguments(unit: Unit, folder: Path, work: Path) -> list[str]:
    """Return the command line of an unlearning run.

    Args:
        unit: The unit; its settings come last, so that they override the protocol's.
        folder: Run directory, for the log, the report and the export.
        work: Folder of the sweep.
    """
    protocol_settings: dict[str, Any] = protocol.UNLEARN
    arguments = [
        "fit",
        f"--config={protocol.ROOT / 'configs/demo/unlearn.yaml'}",
        f"--config={protocol.ROOT / 'configs/method' / (unit.facts['method'] + '.yaml')}",
        f"--model.lm.model={tofu_models.model_folder(None, unit.seed, work)}",
        "--data.class_path=TOFU",
        f"--data.source={work / 'data' / str(unit.size)}",
        "--data.forget_split=forget10",
        "--data.max_length=256",
        f"--data.batch_size={protocol_settings['batch_size']}",
        f"--data.retain_batch_size={protocol_settings['retain_batch_size']}",
        f"--data.seed={unit.seed}",
        f"--model.seed={unit.seed}",
        f"--seed_everything={unit.seed}",
        f"--model.optimizer.init_args.weight_decay={protocol_settings['weight_decay']}",
        f"--trainer.max_epochs={protocol_settings['epochs']}",
        f"--trainer.check_val_every_n_epoch={protocol_settings['check_val_every_n_epoch']}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_checkpointing=false",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder / 'log'}",
        f"--report.dirpath={folder}",
        # A run that misses its constraint is a result of the comparison, not an error.
        "--report.require_feasible=false",
        "--report.require_forgotten=false",
        f"--export.dirpath={folder / 'model'}",
    ]
    for setting in unit.settings or ():
        arguments.append(setting.replace(WORK_FOLDER, str(work)))
    return arguments


def measure_model(
    folder: Path, size: int, seed: int, work: Path, retain_results: Path | None, short: bool = False
) -> Results:
    """Run TOFU's benchmark, measure the entropy of the forget answers, and repeat the forget set under stress.

    The two stresses are relearning on a tenth of the forget set, and weights rounded to 4 bits.

    Args:
        folder: Exported model.
        size: Number of authors to forget.
        seed: Seed of the target model, which judges fluency.
        work: Folder of the sweep.
        retain_results: Results file of the retain-only model, for forget quality.
        short: Whether to leave out real authors, world facts and stress.
    """
    import torch

    from lit_unlearn import LanguageModel, Relearn, StressBenchmark, TOFUBenchmark

    data = work / "data" / str(size)
    lm = LanguageModel(str(folder))
    lm.load(torch.float32)
    lengths: dict[str, Any] = {"max_length": 256, "max_new_tokens": 100}
    benchmark = TOFUBenchmark(
        "forget10",
        str(data / "tuning" if short else data),
        protocol.EVAL_ROWS,
        retain_results=None if retain_results is None else str(retain_results),
        fluency_model=str(tofu_models.model_folder(None, seed, work)),
        **lengths,
    )
    with torch.no_grad():
        results = benchmark.run(lm)
        results.aggregate["forget/entropy"] = measure_entropy(lm, data / "forget10.json")

    if not short:
        relearn = Relearn(
            rows=size * tofu_models.ROWS_PER_AUTHOR // 10, steps=protocol.RELEARN_STEPS, lr=protocol.RELEARN_LR
        )
        forget_only = TOFUBenchmark("forget10", str(data / "alone"), **lengths)
        stressed = StressBenchmark(forget_only, relearn=relearn, bits=[4]).run(lm)
        for key, value in stressed.aggregate.items():
            if key.startswith(("relearn/", "4bit/")):
                results.aggregate[key] = value
    return results


def measure_entropy(lm: Any, forget_file: Path) -> float:
    """Return the mean entropy of the next-token distributions over the forget answers, in nats."""
    from lit_unlearn.data.encoding import encode_examples
    from lit_unlearn.evaluation.scoring import score_examples

    pairs = []
    for row in read_json_lines(forget_file):
        pairs.append((row["question"], row["answer"]))
    examples = encode_examples(pairs, lm.tokenizer, name="forget", max_length=256)
    scores = score_examples(lm, examples)
    # `mean` is the log-probability that the distribution expects, of each token: minus the entropy.
    return statistics.fmean(-float(score.mean.mean()) for score in scores)


def reference_file(size: int, seed: int, work: Path) -> Path:
    """Return the path of a retain-only model's complete results."""
    return work / "reference" / f"{tofu_models.model_name(size, seed)}.json"


def summarize_results(results: Results) -> dict[str, Any]:
    """Return the aggregate values, the truth ratios that forget quality is computed from, and three generated answers."""
    forget = results.examples["forget"]
    # Not the complete results with every example: a unit is one line of a file in the repository.
    return {
        "aggregate": results.aggregate,
        "forget_truth_ratios": [example["truth_ratio"] for example in forget],
        "said": [example["generated"] for example in forget[:3]],
    }


def describe_commit() -> str:
    """Return the commit of the code that makes a result, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, cwd=protocol.ROOT, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the unit that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", type=json.loads, required=True, help="fields of a Unit, as JSON")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--output", type=Path, required=True, help="file for the result")
    options = parser.parse_args(arguments)

    import torch

    # Units run side by side, one per core: their seconds are comparable only with one thread each.
    torch.set_num_threads(1)

    settings = options.unit.pop("settings")
    unit = Unit(**options.unit, settings=None if settings is None else tuple(settings))
    write_json(options.output, run_unit(unit, options.work))


if __name__ == "__main__":
    main()
