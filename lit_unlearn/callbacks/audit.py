"""The policy by which a run will be audited, fixed before its first step."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_unlearn.errors import arguments_of
from lit_unlearn.evaluation.audit_policy import Policy, read_policy


class AuditPlan(Callback):
    """Name the policy of the audit in the record, so that thresholds cannot be chosen after the results are known.

    The record gets the digest of the file and all thresholds before the first step; they stay when the run is resumed.
    ``lit-unlearn audit`` says on its page whether it had the same policy.

    Args:
        policy: A YAML file, or the name of a packaged one such as ``policy/default.yaml``; ``None`` for none.

    Raises:
        MissingFileError: If there is no such file.
        ConfigError: If it is no policy.
    """

    def __init__(self, policy: str | None = None) -> None:
        self.policy: Policy | None = None
        if policy is not None:
            with arguments_of(self):
                self.policy = read_policy(policy)


def describe_plan(trainer: L.Trainer) -> dict[str, Any] | None:
    """Return the policy that a run names, as its record has it; ``None`` if it names none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AuditPlan) and callback.policy is not None:
            content = callback.policy.describe()
            return {"policy_sha256": content.pop("sha256"), "policy": content}
    return None
