"""The kernels of one step by time, and the time in which none of them runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronize


class Interval(NamedTuple):
    """A kernel of a GPU, or an operator of a CPU without those that it calls, with its microseconds of start and end."""

    name: str
    start: float
    end: float


class ProfiledStep:
    """Observer that profiles one step."""

    def __init__(self, number: int, device: str) -> None:
        self._number, self._device = number, device
        activities = [ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def on_step_start(self, number: int) -> None:
        if number == self._number:
            synchronize(self._device)
            self._profile.start()

    def on_step_end(self, number: int, losses: dict[str, float]) -> None:
        if number == self._number:
            synchronize(self._device)
            self._profile.stop()

    def summarize(self) -> dict[str, Any]:
        """Return what `summarize` makes of the step's kernels."""
        intervals = []
        for event in self._profile.events():
            start, end = event.time_range.start, event.time_range.end
            if self._device != "cuda":
                # Where its own work lies between those calls is not known, and of no use here.
                intervals.append(Interval(event.name, start, start + event.self_cpu_time_total))
            # Annotations of ranges are events of the device, too.
            elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                intervals.append(Interval(event.name, start, end))
        return summarize(intervals)


def summarize(intervals: Sequence[Interval], top: int = 15) -> dict[str, Any]:
    """Return the kernels that take the most time, and the gaps between all of them.

    Args:
        intervals: Of one step; they may overlap.
        top: Number of names.

    Raises:
        ValueError: If there is none.
    """
    if not intervals:
        raise ValueError("the profile has no kernels: check that CUPTI may be used, which some containers forbid.")
    ordered = sorted(intervals, key=lambda interval: interval.start)
    start = end = ordered[0].start
    busy = largest_gap = 0.0
    times: dict[str, list[float]] = defaultdict(list)
    for interval in ordered:
        times[interval.name].append(interval.end - interval.start)
        largest_gap = max(largest_gap, interval.start - end)
        busy += max(0.0, interval.end - max(interval.start, end))
        end = max(end, interval.end)

    total = sum(map(sum, times.values()))
    rows = []
    for name, values in sorted(times.items(), key=lambda item: -sum(item[1]))[:top]:
        rows.append({"name": name, "calls": len(values), "ms": sum(values) / 1e3, "share": sum(values) / total})
    span = end - start
    return {
        "span_ms": span / 1e3,
        "busy_ms": busy / 1e3,
        "idle_share": 1 - busy / span,
        "largest_gap_ms": largest_gap / 1e3,
        "kernels": len(intervals),
        "top": rows,
    }
