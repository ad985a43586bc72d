"""Measuring a model with a benchmark, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.models import LanguageModel
from lit_unlearn.training.evaluator import LitMeasured


class LitEvaluate(LitMeasured):
    """Runs a benchmark on any model: ``lit-unlearn test`` with a directory, a hub name or, with ``--ckpt_path``, a checkpoint.

    The rows are the suite's; there is no data module.

    Args:
        lm: The model to measure.
        suite: The benchmark.
        results: File for the results; ``None`` for one in the logger's folder. Where an evaluation was interrupted, the
            same command with the same file goes on.
    """

    def __init__(self, lm: LanguageModel, suite: Benchmark, results: str | None = None) -> None:
        super().__init__(lm, suite)
        self.results = results

    def test_dataloader(self) -> list[int]:
        """One item, because a test loop needs something to go through; no DataLoader, which would be sampled."""
        return [0]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing: the benchmark is run when the loop ends."""

    def _results_file(self, name: str) -> Path:
        return super()._results_file(name) if self.results is None else Path(self.results)
