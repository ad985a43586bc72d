"""Time steps and functions so that the numbers can be compared on a machine that does other work as well."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: str) -> None:
    """Wait until a GPU has finished: when a function returns, its kernels are only queued."""
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Observer that times every step except the first ``skip``, and records the losses of all steps."""

    def __init__(self, device: str = "cpu", skip: int = 1) -> None:
        self.losses: list[dict[str, float]] = []
        self._device, self._skip = device, skip
        self._starts: list[float] = []
        self._ends: list[float] = []

    def on_step_start(self, number: int) -> None:
        synchronize(self._device)
        self._starts.append(time.perf_counter())

    def on_step_end(self, number: int, losses: dict[str, float]) -> None:
        synchronize(self._device)
        self._ends.append(time.perf_counter())
        self.losses.append(losses)

    def step_seconds(self) -> list[float]:
        """Return the seconds of each step."""
        durations = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
        return durations[self._skip :]

    def pause_seconds(self) -> list[float]:
        """Return the seconds between the end of a step and the start of the next: training loop and loader."""
        # Not strict: nothing starts after the last end.
        pauses = [start - end for end, start in zip(self._ends, self._starts[1:], strict=False)]
        return pauses[self._skip :]


def measure_matmul_rate(
    rows: int, inner: int, columns: int, device: str, dtype: torch.dtype, repeats: int = 3
) -> float:
    """Measure the FLOP per second of a matrix product ``(rows, inner) × (inner, columns)``, the best of ``repeats``."""
    matrix = torch.randn(rows, inner, device=device, dtype=dtype)
    # Stored as (columns, inner), as the weight of a linear layer is.
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    output = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, weight.T, out=output)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    # The first product also warms up the library.
    return 2.0 * rows * inner * columns / min(seconds[1:])


def take_turns(rounds: int, turns: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call every turn once per round and return the values of each, so that a busy machine slows all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for _ in range(rounds):
        for name in names:
            values[name].append(turns[name]())
        # The order reverses with every round: in a fixed order, a drift in load would always favour the same turn.
        names.reverse()
    return values


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    # Not the ratio of medians: what slows a whole round cancels within it.
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
