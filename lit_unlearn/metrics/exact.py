"""The base of every metric here: float64 sums that no precision setting rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactMetric(Metric):
    """A metric whose states are float64 sums, added over processes and kept in float64.

    A Lightning module that is cast to bfloat16 casts the metrics inside it too; counts would then stop at 256. A
    non-finite value is kept, not dropped, so that it shows in the result. Subclasses replace their states instead of
    changing them in place, which is forbidden for those that were reset in a validation and are updated in a fit.

    Args:
        **sums: Names of the states and their shapes.
    """

    full_state_update = False

    def __init__(self, **sums: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in sums.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    # Called by Module.to, .half, .bfloat16: only the device may change.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        def move_only(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(move_only, exclude_state)
