"""Measure peak memory: on a CPU of the process, on a GPU of PyTorch's allocator."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
STATUS_FILE = Path("/proc/self/status")


class PeakMemory:
    """Observer of the memory before step ``first``, and of its peak until the end of step ``last``, in bytes."""

    def __init__(self, first: int, last: int, device: str = "cpu") -> None:
        self._first, self._last = first, last
        self._meter = _GpuMeter() if device == "cuda" else _choose_cpu_meter()
        self.method: str = self._meter.name
        self.baseline: int | None = None
        self.peak: int | None = None

    def on_step_start(self, number: int) -> None:
        if number == self._first:
            gc.collect()
            self.baseline = self._meter.start()

    def on_step_end(self, number: int, losses: dict[str, float]) -> None:
        if number == self._last:
            self.peak = self._meter.stop()

    def extra_bytes(self, gradient_bytes: int) -> int | None:
        """Return the peak beyond the baseline (parameters, optimizer state, the rest of the process) and the gradients."""
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
    """The kernel's mark of the highest resident size; it is exact, and it can be reset to the present size."""

    # Not `ru_maxrss`: a child process inherits its parent's mark there, and it cannot be reset.
    name = "VmHWM, reset through clear_refs"

    def start(self) -> int:
        _return_free_memory()
        _reset_high_water_mark()
        return read_status("VmRSS")

    def stop(self) -> int:
        return read_status("VmHWM")


class _Sampler:
    """The resident size, read every millisecond, where the mark cannot be reset; it misses shorter peaks."""

    name = "VmRSS, sampled every millisecond"

    def start(self) -> int:
        _return_free_memory()
        self._highest = baseline = read_status("VmRSS")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self._thread.start()
        return baseline

    def _sample_until_stopped(self) -> None:
        while not self._stopped.wait(0.001):
            self._highest = max(self._highest, read_status("VmRSS"))

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._highest


class _NoMeter:
    name = "not measured: this system has no /proc/self/status"

    def start(self) -> None:
        return None

    def stop(self) -> None:
        return None


def _choose_cpu_meter() -> Any:
    if not STATUS_FILE.exists():
        return _NoMeter()
    try:
        _reset_high_water_mark()
    except OSError:
        # Some containers mount /proc read-only.
        return _Sampler()
    return _HighWaterMark()


def _reset_high_water_mark() -> None:
    # 5 is the kernel's code for "reset VmHWM", see `man 5 proc`.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_status(key: str) -> int:
    """Return a size that the kernel states of this process, such as ``VmRSS``, in bytes."""
    for line in STATUS_FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            # The kernel writes "kB" and means KiB.
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def return_freed_blocks_at_once() -> None:
    """Make malloc return freed blocks of 1 MiB and more to the system at once, instead of keeping them for later.

    The resident size is then the memory in use, and repeats within a few per cent. This costs time, so call it only in
    processes that measure memory. It has an effect with glibc only.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        # From malloc.h: larger blocks get a mapping of their own, which `free` removes.
        m_mmap_threshold = -3
        set_option(m_mmap_threshold, MIB)


def _return_free_memory() -> None:
    # glibc only; without it the baseline includes memory that is free but not returned.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def run_in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function that runs in a new process."""
    # "spawn": a forked process would start with its parent's memory, which its baseline would include.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def format_mib(size: int | None) -> str:
    """Format a number of bytes in MiB; ``None`` is a dash."""
    return "–" if size is None else f"{size / MIB:,.0f}"
