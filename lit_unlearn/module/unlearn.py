"""Unlearning under constraints: forget pass, retain passes, primal step, dual step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_unlearn.dual import Constraint
from lit_unlearn.evaluation import Suite
from lit_unlearn.lm import LanguageModel
from lit_unlearn.metrics import ConstraintSlack
from lit_unlearn.module.base import Batch, LitLanguageModel, Schedule, Term
from lit_unlearn.objectives import Objective


class LitUnlearn(LitLanguageModel):
    """Minimises a forgetting objective subject to constraints on retention, by primal-dual steps.

    Each optimizer step descends ``forget_weight · forget + Σ λ · constraint`` and then moves every multiplier λ once by
    what the same step measured. Entesari et al., "Constrained Entropic Unlearning", NeurIPS 2025 (arXiv 2506.05314).

    Training batches are ``{"forget": batch, "retain": batch, …}`` of ordinary Hugging Face batches, from
    ``ForgetRetain`` or from any loader; validation loaders are a dict with the same keys.

    Args:
        lm: The model to unlearn from.
        forget: What is minimised on the forget stream.
        constraints: The bounds, by name; logs call them ``constraint/<name>`` and ``multiplier/<name>``.
        optimizer: Builds the primal optimizer from the trainable parameters.
        scheduler: A `Schedule`, or a callable from optimizer to scheduler, stepped once per optimizer step.
        suite: What validation and test measure; ``None`` for an `AnswerSuite`.
        forget_weight: Factor of the forgetting objective, > 0.
        micro_batch_size: Rows per forward pass; smaller saves memory and gives the same gradients. ``None``: all.
        gradient_clip_val: Largest gradient norm; ``None`` for no clipping.
        seed: Of dropout.

    Raises:
        ValueError: If there is no constraint or a number is out of range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        forget: Objective,
        constraints: dict[str, Constraint],
        optimizer: OptimizerCallable,
        scheduler: Schedule | LRSchedulerCallable | None = None,
        suite: Suite | None = None,
        forget_weight: float = 1.0,
        micro_batch_size: int | None = None,
        gradient_clip_val: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(lm, optimizer, scheduler, suite, micro_batch_size, gradient_clip_val, seed)
        if not constraints:
            raise ValueError(
                "LitUnlearn: `constraints` is empty; give at least one, such as {'nll': Constraint(NLL(), 0.3, "
                "DualAscent(lr=5, init=100))} (a FixedMultiplier(0) switches it off and still reports it)."
            )
        if not (math.isfinite(forget_weight) and forget_weight > 0):
            raise ValueError(f"LitUnlearn: `forget_weight` must be finite and above 0, not {forget_weight!r}.")
        for name, constraint in constraints.items():
            constraint.name = name
        self.forget = forget
        self.forget_weight = forget_weight
        self.constraints = constraints
        self._objectives = nn.ModuleDict({name: c.objective for name, c in constraints.items()})
        self._slack = nn.ModuleDict({name: ConstraintSlack(c.epsilon) for name, c in constraints.items()})

    def on_train_start(self) -> None:
        """Measures the reference model's loss for relative epsilons, unless a checkpoint brought it."""
        for name, constraint in self.constraints.items():
            if constraint.is_relative and constraint.reference is None:
                constraint.set_reference(self._reference_value(name, constraint))
            rank_zero_info(f"constraint: {constraint}")

    def _reference_value(self, name: str, constraint: Constraint) -> float:
        value = self.measure().get(f"constraint/{name}/value")
        if value is None:
            raise ValueError(
                f"constraint '{name}' has a relative epsilon, but there are no rows to measure it on: add a '{constraint.stream}' "
                "validation loader, or set an absolute epsilon."
            )
        return value

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        """One primal step on the model, one dual step on every multiplier."""
        terms = [Term("forget", "forget", self.forget, self.forget_weight)]
        terms += [Term(n, c.stream, c.objective, c.multiplier.value) for n, c in self.constraints.items()]
        sums = self._backward(batch, terms)
        forget, *values = (sums[:, 0] / sums[:, 1]).tolist()
        for constraint, value in zip(self.constraints.values(), values, strict=True):
            constraint.check(value)  # before the step: the weights are still good
        if not math.isfinite(forget):
            raise ValueError(
                f"the forget loss is {forget}; the step was not taken. Lower `model.optimizer.init_args.lr`, or look for rows "
                "without supervised tokens in the 'forget' stream."
            )
        self._step()
        self._dual_step(dict(zip(self.constraints, values, strict=True)))
        self.log("forget/loss", forget)

    def _dual_step(self, values: dict[str, float]) -> None:
        """Moves each multiplier once per optimizer step, equally on every process.

        Args:
            values: Every constraint's objective over the whole step.
        """
        for name, value in values.items():
            constraint = self.constraints[name]
            violation = constraint.violation(value)
            self.log_dict({f"constraint/{name}/value": value, f"constraint/{name}/violation": violation})
            self.log(f"constraint/{name}/slack", -violation, prog_bar=True)
            self.log(f"multiplier/{name}", constraint.multiplier.value, prog_bar=True)  # the λ of this primal step
            constraint.update(value, self.current_epoch)

    def _evaluate(self, stream: str, batch: Batch) -> None:
        super()._evaluate(stream, batch)
        for name, constraint in self.constraints.items():
            if constraint.stream == stream:
                objective = constraint.objective
                average = self.lm(batch, partial(objective, self.lm), objective.alignment)
                cast(ConstraintSlack, self._slack[name]).update(*average)

    def _results(self) -> dict[str, float]:
        values = super()._results()
        for name, slack in cast(Iterable[tuple[str, ConstraintSlack]], self._slack.items()):
            slack.epsilon = self.constraints[name].epsilon
            if slack.update_called:
                values |= {f"constraint/{name}/{key}": value.item() for key, value in slack.compute().items()}
            slack.reset()
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves λ and the measured references as plain numbers, which no precision or sharding setting touches."""
        checkpoint["constraints"] = {name: constraint.state_dict() for name, constraint in self.constraints.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` saved.

        Raises:
            KeyError: If the checkpoint was made with other constraints.
        """
        saved = checkpoint["constraints"]
        if saved.keys() != self.constraints.keys():
            raise KeyError(
                f"the checkpoint has the constraints {sorted(saved)}, this run {sorted(self.constraints)}: give the same names "
                "to resume, or start a new run from the exported model."
            )
        for name, constraint in self.constraints.items():
            constraint.load_state_dict(saved[name])
