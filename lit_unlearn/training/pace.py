"""Progress of a long pass over many batches: a line now and then."""

from __future__ import annotations

import time

from lightning.pytorch.utilities import rank_zero_info

SECONDS_PER_LINE = 15.0


class Pace:
    """Say how far a pass is, once it has taken long enough for somebody to wonder.

    Args:
        what: What is being done, as in "validation".
        total: Number of batches; ``None`` if it is not known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def count_batch(self) -> None:
        """Count one batch; write a line if the last one is some time ago."""
        self._done += 1
        now = time.monotonic()
        if now - self._last_line < SECONDS_PER_LINE or self._done == self._total:
            return
        self._last_line = now
        if self._total is None:
            rank_zero_info(f"{self._what}: {self._done} batches")
            return
        left = (now - self._start) / self._done * (self._total - self._done)
        rank_zero_info(f"{self._what}: {self._done} of {self._total} batches, about {format_seconds(left)} left")


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it.

    Example:
        >>> format_seconds(59), format_seconds(200), format_seconds(7500)
        ('59 s', '3 min', '2 h 5 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
