"""Stop every method at the same damage to what it should keep, so that methods can be compared there."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_unlearn.callbacks.run_state import get_constraints
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.example import Example
from lit_unlearn.data.streams import FiniteStream
from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.results import content_digest
from lit_unlearn.evaluation.verdict import describe_damage
from lit_unlearn.models.weights import local_part
from lit_unlearn.objectives import NLL, KLToReference, Objective
from lit_unlearn.training import LitUnlearn
from lit_unlearn.utils.validation import check_at_least, check_choice, check_integer, check_number, list_names

DamageMeasure = Literal["kl", "nll"]

_DEFAULT_KL = 0.01  # as RepSelect compares methods: arXiv 2606.17168
# A run ends within this share below its limit; each halving of the last step costs a measurement.
_PRECISION = 0.05
_MAX_HALVINGS = 12


class StopAtDamage(Callback):
    """End a fit where its damage to retained rows reaches a limit, so that methods are compared at equal damage.

    A method that forgets more because it destroys more is no better. The damage is measured on the same rows every few steps,
    without gradients, with the weights as an export has them. The step that exceeds the limit is shortened until the damage is
    just below it (at most, and within 5 %), and the fit ends with that model. The weights of the last model within the limit are
    kept in the host's memory for that. A run that ends earlier is recorded with
    ``reached`` false: it is at less damage, and ``lit-unlearn compare --matched`` refuses it.

    Report and record have ``damage``: ``measure``, ``stream``, ``rows``, ``rows_digest``, ``limit``, ``value``, ``reached`` and
    ``step``.

    Args:
        measure: ``"kl"``: KL(p_ref‖p) to the model before unlearning, which takes memory for a frozen copy of it unless there is
            an adapter. ``"nll"``: the NLL of the answers. ``None`` to switch this off.
        limit: In nats per token; ``None`` for 0.01 with ``"kl"`` and, with ``"nll"``, for the epsilon of the constraint on it.
        stream: Name of the rows: ``"retain"``, or one of the data's ``streams``, such as general text.
        rows: Number of rows, spread over the set; ``None`` for all.
        every_n_steps: Optimizer steps between two measurements; there is one at the end of every epoch as well.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        measure: DamageMeasure | None = None,
        limit: float | None = None,
        stream: str = "retain",
        rows: int | None = 64,
        every_n_steps: int = 1,
    ) -> None:
        if measure is not None:
            check_choice(get_args(DamageMeasure), self, measure=measure)
        if limit is not None:
            check_number(self, "limit", limit, above=0)
        if rows is not None:
            check_at_least(1, self, rows=rows)
        self.measure = measure
        self.limit = limit
        self.stream = stream
        self.rows = rows
        self.every_n_steps = check_integer(self, "every_n_steps", every_n_steps, at_least=1)
        self.damage: dict[str, Any] | None = None
        """The last measurement, as report and record have it."""
        self._objective: Objective = KLToReference() if measure == "kl" else NLL()
        self._batches: list[list[Example]] = []  # of this process
        self._description: dict[str, Any] = {}
        self._weights: list[Tensor] = []  # of the last model that was within the limit, on the CPU

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the rows, and keep the reference model if it will be compared with.

        Raises:
            ConfigError: If the run cannot end at a damage: it fine-tunes, keeps another model than the last one, averages weights,
                has no such rows, or no epsilon to take as the limit.
        """
        if self.measure is None or stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._check_run(trainer, pl_module, data)
        self.damage, self._weights = None, []
        examples = data.examples[self.stream]
        # Spread over the set, whose order often goes by topic or by author.
        stride = 1 if self.rows is None else -(-len(examples) // self.rows)
        chosen = examples[::stride]
        # Of several processes, each measures its share.
        batch_size = data.eval_batch_size * trainer.world_size
        place = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        self._batches = list(FiniteStream(chosen, batch_size, name=self.stream, seed=None, **place))
        digest = content_digest([example.digest() for example in chosen])
        self._description = {
            "measure": self.measure,
            "stream": self.stream,
            "rows": len(chosen),
            "rows_digest": digest,
        }
        if self.measure == "kl":
            cast(LitUnlearn, pl_module).reference_cache.keeps_model = True

    def _check_run(self, trainer: L.Trainer, module: L.LightningModule, data: object) -> None:
        if not isinstance(module, LitUnlearn) or not isinstance(data, ForgetRetain):
            raise ConfigError(
                f"only a run of LitUnlearn on the data of ForgetRetain ends at a damage, not one of {type(module).__name__} on "
                f"{type(data).__name__}: leave out `measure`.",
                owner=self,
                argument="measure",
            )
        if module.keep != "last":
            raise ConfigError(
                f"a run that ends at a damage keeps its last model, the one at the limit: set `keep` to 'last', not {module.keep!r}.",
                owner=module,
                argument="keep",
            )
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "the damage is measured on the weights of the step, but WeightAveraging exports averaged ones: leave one of both out.",
                owner=self,
                argument="measure",
            )
        if self.stream not in data.examples:
            raise ConfigError(
                f"the data have no rows '{self.stream}' to measure the damage on: {list_names(self.stream, data.examples)}. Name "
                "their file in the data's `streams`, or change `stream`.",
                owner=self,
                argument="stream",
            )
        if self.measure == "nll" and self.limit is None:
            self._find_epsilon(module)

    def _find_epsilon(self, module: LitUnlearn) -> float | None:
        """Return the epsilon of the constraint on the NLL of the rows; ``None`` while it is not measured yet."""
        for constraint in get_constraints(module).values():
            if isinstance(constraint.objective, NLL) and constraint.stream == self.stream:
                return constraint.epsilon
        raise ConfigError(
            f"there is no constraint on the NLL of '{self.stream}' whose epsilon could be the limit: set `limit`.",
            owner=self,
            argument="limit",
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take no step if the run that is resumed has reached its limit, and has no other one now."""
        if self.damage is not None and self.damage["reached"] and self.limit in (None, self.damage["limit"]):
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the model that the run starts with: the first step may exceed the limit.

        Raises:
            ConfigError: If it is above the limit already.
        """
        if self.measure is None or self._weights or not isinstance(pl_module, LitUnlearn):
            return
        value = self._measure(pl_module)
        limit = self._read_limit(pl_module)
        if not value <= limit:
            start = f"step {trainer.global_step}" if trainer.global_step else "the start"
            raise ConfigError(
                f"the damage must be at most `limit` ({limit:.4g} nats per token) to begin with, but is {value:.4g} at {start}: raise "
                "`limit`, or resume from an earlier checkpoint.",
                owner=self,
                argument="limit",
            )
        self._keep(trainer, pl_module, value, is_reached=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every `every_n_steps`, and end the fit if the damage is above the limit."""
        # Also before the checkpoint at the end of an epoch: a run that is resumed there starts within the limit.
        if trainer.global_step % self.every_n_steps == 0 or trainer.is_last_batch:
            self._check_damage(trainer, pl_module)
            if self.damage is not None:
                pl_module.log(f"damage/{self.measure}", self.damage["value"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the last model, and say so if the limit was not reached."""
        if self.damage is None:
            return
        if self.damage["step"] < trainer.global_step:
            self._check_damage(trainer, pl_module)
        if not self.damage["reached"]:
            rank_zero_warn(
                f"the run ended at step {trainer.global_step} before its damage reached the limit: {describe_damage(self.damage)}. It is "
                "at less damage than runs that reach it, and `lit-unlearn compare --matched` refuses it. Raise the Trainer's "
                "`max_epochs` or the optimizer's `lr`."
            )

    def _check_damage(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure the damage; above the limit, shorten the last step and end the fit. A collective call."""
        if not self._weights or not isinstance(module, LitUnlearn):
            return
        value = self._measure(module)
        # Not `>`: a model that diverged has no number.
        if value <= self._read_limit(module):
            self._keep(trainer, module, value, is_reached=False)
            return
        self._shorten_step(module)
        self._keep(trainer, module, self._measure(module), is_reached=True)
        trainer.should_stop = True
        rank_zero_info(f"stopped at step {trainer.global_step}: {describe_damage(self.damage or {})}")

    @torch.no_grad()
    def _shorten_step(self, module: LitUnlearn) -> None:
        """Go back along the way from the last model within the limit, until the damage is within it."""
        limit = self._read_limit(module)
        parameters = _trained(module)
        # Where a step is proportional to its learning rate, as those of SGD and AdamW are, this is the step of a smaller one.
        end = [parameter.to("cpu", copy=True) for parameter in parameters]
        within, beyond = 0.0, 1.0

        def go_to(share: float) -> None:
            for parameter, first, last in zip(parameters, self._weights, end, strict=True):
                # Exactly the first, also where the last is not finite.
                parameter.copy_(first if share == 0 else torch.lerp(first.double(), last.double(), share))

        for _ in range(_MAX_HALVINGS):
            middle = (within + beyond) / 2
            go_to(middle)
            value = self._measure(module)
            if not value <= limit:
                beyond = middle
                continue
            within = middle
            if value >= (1 - _PRECISION) * limit:
                break
        go_to(within)

    def _measure(self, module: LitUnlearn) -> float:
        return module.evaluator.measure_batches(self._objective, self.stream, self._batches)

    def _read_limit(self, module: LitUnlearn) -> float:
        if self.limit is not None:
            return self.limit
        if self.measure == "kl":
            return _DEFAULT_KL
        # Measured by now: the module does so before the first batch.
        return cast(float, self._find_epsilon(module))

    def _keep(self, trainer: L.Trainer, module: LitUnlearn, value: float, *, is_reached: bool) -> None:
        """Note the damage of the present weights, which are within the limit, and copy them."""
        self.damage = {
            **self._description,
            "limit": self._read_limit(module),
            "value": value,
            "reached": is_reached,
            "step": trainer.global_step,
        }
        parameters = _trained(module)
        if not self._weights:
            self._weights = [torch.empty_like(parameter, device="cpu") for parameter in parameters]
        for copy, parameter in zip(self._weights, parameters, strict=True):
            copy.copy_(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Return the last measurement."""
        return {"damage": self.damage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.damage = state_dict["damage"]


def find_damage(trainer: L.Trainer) -> dict[str, Any] | None:
    """Return the damage that a run has measured last; ``None`` if it measures none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopAtDamage):
            return callback.damage
    return None


def _trained(module: LitUnlearn) -> list[Tensor]:
    """Return the weights that steps change; of a sharded model, this process's shards."""
    weights = []
    for parameter in module.lm.parameters():
        if parameter.requires_grad:
            weights.append(local_part(parameter.detach()))
    return weights
