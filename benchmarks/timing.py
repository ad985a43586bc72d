"""Clocks, peak memory, the speed of matrix products, the machine, and tables."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times every step but the first ``skip``, and keeps the losses of all."""

    def __init__(self, device: str = "cpu", skip: int = 1) -> None:
        self.losses: list[dict[str, float]] = []
        self._device, self._skip = device, skip
        self._starts: list[float] = []
        self._ends: list[float] = []

    def step_starts(self, number: int) -> None:
        synchronize(self._device)
        self._starts.append(time.perf_counter())

    def step_ends(self, number: int, losses: dict[str, float]) -> None:
        synchronize(self._device)
        self._ends.append(time.perf_counter())
        self.losses.append(losses)

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [end - start for start, end in zip(self._starts, self._ends, strict=True)][self._skip :]

    @property
    def pauses(self) -> list[float]:
        """Seconds from the end of a step to the start of the next: the training loop and the loader."""
        return [start - end for end, start in zip(self._ends, self._starts[1:], strict=False)][self._skip :]


class PeakMemory:
    """Resident (GPU: allocated) bytes before step ``first``, and their peak until the end of step ``last``."""

    def __init__(self, first: int, last: int, device: str = "cpu") -> None:
        self._first, self._last = first, last
        self._meter = _GpuMeter() if device == "cuda" else _cpu_meter()
        self.baseline: int | None = None
        self.peak: int | None = None

    @property
    def method(self) -> str:
        return self._meter.name

    def step_starts(self, number: int) -> None:
        if number == self._first:
            gc.collect()
            self.baseline = self._meter.start()

    def step_ends(self, number: int, losses: dict[str, float]) -> None:
        if number == self._last:
            self.peak = self._meter.stop()

    def extra(self, gradient_bytes: int) -> int | None:
        """Peak beyond what was there before (parameters, optimizer state, the rest of the process) and the gradients."""
        if self.peak is None or self.baseline is None:
            return None
        return self.peak - self.baseline - gradient_bytes


class _GpuMeter:
    name = "torch.cuda.max_memory_allocated"

    def start(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated()


class _HighWaterMark:
    """The kernel's own mark, which can be lowered to the present: exact, and unlike ``ru_maxrss`` not a parent's."""

    name = "VmHWM, reset through clear_refs"

    def start(self) -> int:
        _return_free_memory()
        _reset_mark()
        return _status("VmRSS")

    def stop(self) -> int:
        return _status("VmHWM")


class _Samples:
    """Where the mark cannot be reset: the resident size every millisecond, so that shorter peaks are missed."""

    name = "VmRSS, sampled every millisecond"

    def start(self) -> int:
        _return_free_memory()
        self._highest = baseline = _status("VmRSS")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return baseline

    def _sample(self) -> None:
        while not self._stopped.wait(0.001):
            self._highest = max(self._highest, _status("VmRSS"))

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._highest


class _Nothing:
    name = "not measured: this system has no /proc/self/status"

    def start(self) -> None:
        return None

    def stop(self) -> None:
        return None


def _cpu_meter() -> Any:
    if not Path("/proc/self/status").exists():
        return _Nothing()
    try:
        _reset_mark()
    except OSError:
        return _Samples()
    return _HighWaterMark()


def _reset_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure_what_is_used() -> None:
    """From now on malloc gives freed blocks of 1 MiB and more back at once, in place of keeping them for later.

    Resident memory is then what is in use, and repeats within a few per cent. For processes that measure memory only:
    it costs time. glibc alone has it; elsewhere nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        m_mmap_threshold = -3
        set_option(m_mmap_threshold, MIB)


def _return_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others do without
    if trim is not None:
        trim(0)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def matmul_rate(rows: int, inner: int, columns: int, device: str, dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP per second of ``(rows, inner) × (inner, columns)``, the best of a few, after one that does not count."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype)
    output = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right.T, out=output)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * rows * inner * columns / min(seconds[1:])


def alternate(rounds: int, turns: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each turn returns in each round; they take turns, so that a busy machine slows them alike."""
    values: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            values[name].append(turns[name]())
    return values


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine."""
    import lightning
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )

    return "\n".join([line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def in_mib(size: int | None) -> str:
    return "–" if size is None else f"{size / MIB:,.0f}"


def machine_line(facts: dict[str, Any]) -> str:
    where = facts["cpu"] if facts["device"] == "cpu" else f"{facts['device']}, {facts['cpu']}"
    packages = ", ".join(f"{name} {facts[name]}" for name in ("torch", "lightning", "transformers"))
    load = "unknown" if facts["load"] is None else f"{facts['load']:.1f}"
    return f"{where}, {facts['threads']} threads, {packages}\nload before: {load} on {facts['cores']} cores"


def write_json(results: dict[str, Any], path: str) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
