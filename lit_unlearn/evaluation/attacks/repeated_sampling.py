"""An attack that asks the same question again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lit_unlearn.models.sampling import Sampling

if TYPE_CHECKING:
    from lit_unlearn.evaluation.benchmark import Benchmark
    from lit_unlearn.evaluation.leakage import LeakBenchmark


@dataclass(frozen=True)
class RepeatedSampling:
    """An attack that samples several answers to every question, and keeps the one that reveals most.

    Args:
        samples: Number of answers to each question.
        temperature: As for `Sampling`, like the following.
        top_p: As there.
        seed: As there.

    Raises:
        ConfigError: If a number is out of range.
    """

    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "repeated_sampling"
    unit: ClassVar[str] = "samples"

    def __post_init__(self) -> None:
        self._sampling()

    @property
    def effort(self) -> int:
        """Number of samples."""
        return self.samples

    def change_benchmark(self, benchmark: Benchmark) -> LeakBenchmark:
        """Return the benchmark that samples answers to another benchmark's forget questions."""
        from lit_unlearn.evaluation.leakage import LeakBenchmark

        return LeakBenchmark(benchmark, self._sampling())

    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, samples=self.samples, seed=self.seed)
