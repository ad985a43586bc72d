"""What an operation allocates, as torch's own profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors alive at once during ``run()``, over what was alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()  # its own result counts
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del result
    return peak
