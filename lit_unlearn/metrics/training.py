"""What a run is judged by while it trains: does the constraint hold, and is the forget set flat?"""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.metrics.base import ExactMetric


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
        """Adds one batch.

        Args:
            total: Sum of the objective, a scalar.
            count: Number of values summed.
        """
        self.total = self.total + total.double()
        self.count = self.count + count

    def compute(self) -> dict[str, Tensor]:
        """``value``, and where epsilon is known ``violation`` and ``slack``: float64 scalars."""
        value = self.total / self.count
        if self.epsilon is None:
            return {"value": value}
        return {"value": value, "violation": value - self.epsilon, "slack": self.epsilon - value}


class ForgetUniformity(ExactMetric):
    """How close the model's next-token distributions are to uniform, in three views averaged over tokens.

    ``margin`` (largest minus mean logit) bounds the other two: log V − H ≤ margin and KL(U‖p) ≤ margin; ``entropy``
    is H / log V, 1 at uniform; ``kl_to_uniform`` is KL(U‖p) in nats. Entesari et al. (arXiv 2506.05314).

    Example:
        >>> import torch
        >>> from lit_unlearn.functional import uniformity
        >>> metric = ForgetUniformity()
        >>> metric.update(uniformity(torch.zeros(4, 10)))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'margin': 0.0, 'entropy': 1.0, 'kl_to_uniform': 0.0}
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(total=(3,), count=())

    def update(self, uniformity: Tensor) -> None:
        """Adds one batch.

        Args:
            uniformity: What ``functional.uniformity`` gives, shape ``(N, 3)``.
        """
        self.total = self.total + uniformity.double().sum(0)
        self.count = self.count + len(uniformity)

    def compute(self) -> dict[str, Tensor]:
        """Token means as float64 scalars."""
        return dict(zip(("margin", "entropy", "kl_to_uniform"), (self.total / self.count).unbind(), strict=True))
