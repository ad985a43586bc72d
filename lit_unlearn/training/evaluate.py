"""Measuring a model with a benchmark, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.partial_files import remove_partials
from lit_unlearn.evaluation.results import is_results_file, results_table
from lit_unlearn.models import LanguageModel
from lit_unlearn.training.agreement import check_processes_agree, describe_benchmark
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.training.strategies import shard
from lit_unlearn.training.weights import check_tensors, load_for_trainer
from lit_unlearn.utils.io import check_output_file, expand_home


class LitEvaluate(L.LightningModule):
    """Runs a benchmark on any model: ``lit-unlearn test`` with a directory, a hub name or, with ``--ckpt_path``, a checkpoint.

    The examples are the benchmark's; there is no data module.

    Args:
        lm: The model to measure.
        benchmark: The benchmark.
        results: File for the results; ``None`` for one in the run's folder. The same command with the same file resumes
            an evaluation that was interrupted.

    Example:
        >>> module = LitEvaluate(LanguageModel("out"), QABenchmark("forget.jsonl", "retain.jsonl"))  # doctest: +SKIP
        >>> L.Trainer().test(module)  # doctest: +SKIP
    """

    def __init__(self, lm: LanguageModel, benchmark: Benchmark, results: str | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.benchmark = benchmark
        self.results = None if results is None else expand_home(results)

    def setup(self, stage: str) -> None:
        """Read the benchmark's rows, before the model is loaded.

        Raises:
            ConfigError: If the results file cannot be written.
            OccupiedError: If it would replace a file that is no results file.
            DataError: If rows cannot be used.
        """
        if self.results is not None:
            check_output_file(Path(self.results), owner=self, argument="results", is_ours=is_results_file)
        prepare_benchmark(self, self.benchmark, self.lm)

    def configure_model(self) -> None:
        """Load the model in the dtype that the Trainer's precision calls for."""
        load_for_trainer(self.lm, self._trainer)
        # The frozen weights of an adapted model are not in its checkpoints.
        self.strict_loading = not self.lm.has_adapter
        if self.device_mesh is not None:
            strategy = self.trainer.strategy
            shard(self.lm, self.device_mesh, strategy.root_device, getattr(strategy, "cpu_offload", False))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has all weights that it must have.

        Raises:
            CheckpointError: If some are missing.
        """
        check_tensors(checkpoint, self, self.lm)

    def test_dataloader(self) -> list[str]:
        """Return the benchmark's name as the only batch: a benchmark divides its examples among the processes itself."""
        return [self.benchmark.name]

    def test_step(self, batch: str, batch_idx: int) -> None:
        """Run the benchmark, write its results and log its values."""
        file = None if self.results is None else Path(self.results)
        log_benchmark(self, run_benchmark(self, self.benchmark, self.lm, "test", file))


def prepare_benchmark(module: L.LightningModule, benchmark: Benchmark, lm: LanguageModel) -> None:
    """Read the benchmark's rows, so that an error in them shows before a run begins.

    Raises:
        DataError: If the processes have read other rows.
    """
    check_processes_agree(describe_benchmark(benchmark.prepare(lm.tokenizer)))


@torch.no_grad()
def run_benchmark(
    module: L.LightningModule, benchmark: Benchmark, lm: LanguageModel, stage: str, file: Path | None = None
) -> dict[str, float]:
    """Run a benchmark within a Trainer: a results file and, at a test, a table.

    Args:
        module: Its Trainer is used.
        benchmark: The benchmark.
        lm: The module's model.
        stage: ``"test"``, or ``"val"`` for a run during a fit, which cannot be resumed.
        file: File for the results; ``None`` for one in the run's folder. A dry run writes none.

    Returns:
        The values by the names that they are logged by.
    """
    trainer = module.trainer
    is_test = stage == "test"
    if is_dry_run(trainer):
        file = None
    elif file is None:
        name = f"{benchmark.name}.json" if is_test else f"{benchmark.name}-step={module.global_step}.json"
        file = find_run_folder(trainer) / name
    partial_dir = None if file is None or not is_test else file.with_suffix(".partial")

    started = time.monotonic()
    description: dict[str, Any] = {}
    # Of a checkpoint, or of a module that trains, the weights are others than those of the files.
    is_of_files = isinstance(module, LitEvaluate) and not trainer.ckpt_path
    if trainer.is_global_zero and is_of_files and lm.files is not None:
        # Before it is measured: another model may be exported to its folder meanwhile.
        description = lm.files.describe_export()
    with trainer.precision_plugin.val_step_context():
        results = benchmark.run(lm, partial_dir)
    if trainer.is_global_zero:
        results.model.update(description)
        if file is not None:
            results.write(file)
        if partial_dir is not None:
            remove_partials(partial_dir)
        if is_test:
            print(results_table([results], [str(lm.name)]))
    if is_test:
        for name, reason in results.missing.items():
            rank_zero_info(f"{name} is missing: {reason}")
    rank_zero_info(f"results: {file or 'not written'} ({benchmark.name}, {time.monotonic() - started:.0f} s)")

    return {f"{stage}/{benchmark.name}/{name}": value for name, value in results.aggregate.items()}


def log_benchmark(module: L.LightningModule, values: dict[str, float]) -> None:
    """Log what `run_benchmark` returned."""
    # The batch size weighs means over several batches, of which there is one. Every process logs, so that a checkpoint of
    # any may follow a value.
    module.log_dict(values, batch_size=1, rank_zero_only=False)
