"""The slack of a constraint."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.metrics.exact import ExactMetric


class ConstraintSlack(ExactMetric):
    """Slack of a constraint, epsilon − value, with the value averaged exactly over everything seen.

    Args:
        epsilon: Upper bound, in the objective's unit; ``None`` while it is not measured yet.

    Example:
        >>> import torch
        >>> slack = ConstraintSlack(epsilon=0.5)
        >>> slack.update(total=torch.tensor(3.0), count=10)
        >>> {name: round(value.item(), 3) for name, value in slack.compute().items()}
        {'value': 0.3, 'violation': -0.2, 'slack': 0.2}
    """

    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, epsilon: float | None) -> None:
        super().__init__(total=(), count=())
        self.epsilon = epsilon

    def update(self, total: Tensor, count: int) -> None:
        """Add the sum of a batch's objective values, a scalar, and their number."""
        self.total = self.total + total.double()
        self.count = self.count + count

    def compute(self) -> dict[str, Tensor]:
        """Return ``value``, and where epsilon is known ``violation`` and ``slack``: float64 scalars."""
        value = self.total / self.count
        if self.epsilon is None:
            return {"value": value}
        return {"value": value, "violation": value - self.epsilon, "slack": self.epsilon - value}
