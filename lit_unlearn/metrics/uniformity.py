"""The uniformity of next-token distributions."""

from __future__ import annotations

from torch import Tensor

from lit_unlearn.metrics.exact import ExactMetric


class ForgetUniformity(ExactMetric):
    """Distance of the model's next-token distributions from uniform, in three views averaged over tokens.

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
        """Add a batch: the result of ``functional.uniformity``, shape ``(N, 3)``."""
        self.total = self.total + uniformity.double().sum(0)
        self.count = self.count + len(uniformity)

    def compute(self) -> dict[str, Tensor]:
        """Return token means as float64 scalars."""
        return dict(zip(("margin", "entropy", "kl_to_uniform"), (self.total / self.count).unbind(), strict=True))
