"""Unlearning under constraints: forget pass, retain passes, primal step, dual step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_unlearn.dual import Constraint
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.suite import Suite
from lit_unlearn.metrics import ConstraintSlack
from lit_unlearn.models import Batch, LanguageModel, SupervisedTokens
from lit_unlearn.objectives import Objective
from lit_unlearn.training.evaluator import Consumer, Measurement
from lit_unlearn.training.forward_plan import Order, Term
from lit_unlearn.training.module import Schedule
from lit_unlearn.training.referring import LitReferring


class LitUnlearn(LitReferring):
    """Minimises a forgetting objective subject to constraints on retention, by primal-dual steps.

    Each optimizer step descends ``forget_weight · forget + Σ λ · constraint`` and then moves every multiplier λ once by
    what the same step measured. Entesari et al., "Constrained Entropic Unlearning", NeurIPS 2025 (arXiv 2506.05314).

    Training batches are ``{"forget": batch, "retain": batch, …}`` of ordinary Hugging Face batches, from
    ``ForgetRetain`` or from any loader; validation loaders are a dict with the same keys. On several processes, own
    loaders must hand each the same number of rows, as a ``DistributedSampler`` does, and take their own state along.

    Args:
        lm: The model to unlearn from.
        forget: What is minimised on the forget stream.
        constraints: The bounds, by name; logs call them ``constraint/<name>`` and ``multiplier/<name>``.
        optimizer: Builds the primal optimizer from the trainable parameters.
        scheduler: A `Schedule`, or a callable from optimizer to scheduler, stepped once per optimizer step.
        suite: What validation and test measure; ``None`` for an `AnswerSuite`.
        forget_weight: Factor of the forgetting objective, > 0.
        micro_batch_size: Rows per pass through the model, on average: the passes have about as many tokens. Smaller
            saves memory and gives the same gradients. ``None``: all.
        gradient_clip_val: Largest gradient norm; ``None`` for no clipping.
        seed: Of dropout.
        keep: The model a run ends with. ``"best"``: of those measured on whole streams after a step, the one with the
            lowest forget loss among the feasible, else the least violating one. ``"last"``: the last, as published
            baselines have it. What is in memory after the fit is the last model in any case: `ExportModel` writes the
            kept one.
        passes: ``"joint"``: rows of all streams go through the model together, which spares a second gradient of the
            embeddings; where they cannot be packed, as ``"sequential"``: one stream after the other, with the graph of
            one alive. The gradients are the same.
        benchmark: Run at a test, and every ``benchmark_every_n_epochs``; ``None`` for none.
        benchmark_every_n_epochs: Epochs between two runs of the benchmark, after the validation; its values are logged
            as ``val/<benchmark>/<value>``. ``None`` for none before the test.

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
        keep: Literal["best", "last"] = "best",
        passes: Order = "joint",
        benchmark: Benchmark | None = None,
        benchmark_every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(
            lm,
            optimizer,
            scheduler,
            suite,
            micro_batch_size,
            gradient_clip_val,
            seed,
            passes,
            benchmark,
            benchmark_every_n_epochs,
        )
        if not constraints:
            raise ValueError(
                "LitUnlearn: `constraints` is empty; give at least one, such as {'nll': Constraint(NLL(), 0.3, "
                "DualAscent(lr=5, init=100))} (a FixedMultiplier(0) switches it off and still reports it)."
            )
        if not (math.isfinite(forget_weight) and forget_weight > 0):
            raise ValueError(f"LitUnlearn: `forget_weight` must be finite and above 0, not {forget_weight!r}.")
        if keep not in ("best", "last"):
            raise ValueError(f"LitUnlearn: `keep` must be 'best' or 'last', not {keep!r}.")
        for name, constraint in constraints.items():
            constraint.name = name
        self.keep = keep
        self.forget = forget
        self.forget_weight = forget_weight
        self.constraints = constraints
        self._objectives = nn.ModuleDict({name: c.objective for name, c in constraints.items()})
        self._slack = nn.ModuleDict({name: ConstraintSlack(c.epsilon) for name, c in constraints.items()})
        self._forget_loss = ConstraintSlack(None)
        self.best: Measurement | None = None
        self._dual_epochs = 0  # epochs whose dual step was taken
        self._unseen_nll: float | None = None

    def terms(self) -> list[Term]:
        """The objectives with their present weights."""
        bounds = [Term(n, c.stream, c.objective, c.multiplier.value) for n, c in self.constraints.items()]
        return [Term("forget", "forget", self.forget, self.forget_weight), *bounds]

    def setup(self, stage: str) -> None:
        """As the base class does; a fit starts without a best measurement, unless a checkpoint brings one."""
        super().setup(stage)
        if stage == "fit":
            self.best, self._dual_epochs, self._unseen_nll = None, 0, None

    def on_train_start(self) -> None:
        """Measures the reference model's loss for what is relative to it, unless a checkpoint brought it.

        Raises:
            ValueError: If the rows that it is to be measured on are missing.
        """
        super().on_train_start()
        self._calibrate()
        for name, constraint in self.constraints.items():
            if constraint.is_relative and constraint.reference is None:
                constraint.set_reference(self._whole_value(name))
            rank_zero_info(f"constraint: {constraint}")

    def measure(self) -> dict[str, float]:
        """As the base class does; the forget objective is calibrated first, if it is to be."""
        self._calibrate()
        return super().measure()

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Tells the forget objective the model's NLL on rows that it never saw, once and before the first step."""
        stream = self.forget.unseen
        if stream is None or self._unseen_nll is not None:
            return
        for name, batch in self._evaluation_batches():
            if name == stream:
                self._evaluate(name, batch)
        self._unseen_nll = self._results().get(f"{stream}/nll")
        if self._unseen_nll is None:
            raise ValueError(
                f"{type(self.forget).__name__} needs the NLL of rows that the model has never seen, but there is no stream "
                f"'{stream}': name their file in `data.streams`, as {{{stream}: FILE}}."
            )
        self.forget.calibrate(self._unseen_nll)
        rank_zero_info(f"unseen: the model before unlearning has an NLL of {self._unseen_nll:.4g} on '{stream}'")

    def _whole_value(self, name: str) -> float:
        value = self.measure().get(f"constraint/{name}/value")
        if value is None:
            raise ValueError(
                f"constraint '{name}' is measured on its whole stream (for a relative epsilon, or `update_every: epoch`), "
                f"but there are no such rows: add a '{self.constraints[name].stream}' validation loader, or change that."
            )
        return value

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        """One primal step on the model, one dual step on every multiplier."""
        self._dual_step_of_epoch()
        sums = self._backward(self._with_reference_logp(batch), self.terms())
        forget, *values = (sums[:, 0] / sums[:, 1]).tolist()
        for constraint, value in zip(self.constraints.values(), values, strict=True):
            constraint.check(value)  # before the step: the weights are still good
        if not math.isfinite(forget):
            raise ValueError(
                f"the forget loss is {forget}; the step was not taken. Lower `model.optimizer.init_args.lr`, or look for rows "
                "without supervised tokens in the 'forget' stream."
            )
        stepped = self._step()
        self.log("forget/loss", forget)
        for (name, constraint), value in zip(self.constraints.items(), values, strict=True):
            violation = constraint.violation(value)
            self.log_dict({f"constraint/{name}/value": value, f"constraint/{name}/violation": violation})
            self.log(f"constraint/{name}/slack", -violation, prog_bar=True)
            self.log(f"multiplier/{name}", constraint.multiplier.value, prog_bar=True)  # the λ of this primal step
            if stepped and constraint.update_every == "step":  # equally on every process
                constraint.update(value, self.current_epoch)

    def _dual_step_of_epoch(self) -> None:
        """Dual steps of the epoch that ended before this step, from whole streams.

        Taken here and not when the epoch ends, so that a checkpoint made anywhere in between resumes alike.
        """
        if self._dual_epochs < self.current_epoch:
            best = self.best  # what is measured here is not exported, so it is not to be kept
            for name, constraint in self.constraints.items():
                if constraint.update_every == "epoch":
                    constraint.update(self._whole_value(name), self.current_epoch - 1)
            self.best, self._dual_epochs = best, self.current_epoch

    # Measuring --------------------------------------------------------------------------------------------------------

    def _consumers(self, stream: str) -> list[tuple[Objective, Consumer[Any]]]:
        meters = {"forget": self._forget_loss, **cast(dict[str, ConstraintSlack], dict(self._slack.items()))}
        metered = [(t.objective, _metered(meters[t.name], t.objective)) for t in self.terms() if t.stream == stream]
        return [*super()._consumers(stream), *metered]

    def _results(self) -> dict[str, float]:
        values = super()._results()
        for name, slack in cast(Iterable[tuple[str, ConstraintSlack]], self._slack.items()):
            slack.epsilon = self.constraints[name].epsilon
            if slack.update_called:
                values |= {f"constraint/{name}/{key}": value.item() for key, value in slack.compute().items()}
            slack.reset()
        if self._forget_loss.update_called:
            values["forget/loss"] = self._forget_loss.compute()["value"].item()
        self._forget_loss.reset()
        return values

    def _log_results(self, stage: str, values: dict[str, float]) -> None:
        """Logs ``feasible_forget`` as well: the forget loss where every constraint holds, infinite elsewhere.

        ``ModelCheckpoint(monitor="val/feasible_forget")`` then keeps the best feasible model.
        """
        if "forget/loss" in values and all(c.epsilon is not None for c in self.constraints.values()):
            feasible = self.excess(values) <= 0
            values = {**values, "feasible_forget": values["forget/loss"] if feasible else math.inf}
        super()._log_results(stage, values)

    # Which model to keep ----------------------------------------------------------------------------------------------

    def excess(self, values: dict[str, float]) -> float:
        """How far the worst constraint is from holding, as a fraction of its epsilon.

        Args:
            values: What `measure` gave; a constraint that it could not measure is left out.

        Returns:
            Largest violation / epsilon; 0 or less where all constraints hold, infinite where one is not finite.
        """
        ratios = [
            constraint.violation(values[f"constraint/{name}/value"]) / cast(float, constraint.epsilon)
            for name, constraint in self.constraints.items()
            if f"constraint/{name}/value" in values
        ]
        return max((math.inf if math.isnan(ratio) else ratio for ratio in ratios), default=0.0)

    @property
    def kept_step(self) -> int:
        """As in the base class; of the best model, once one was measured."""
        return self.best.step if self.best else self.global_step

    def _keep(self, values: dict[str, float]) -> None:
        super()._keep(values)
        better = self.keep == "last" or self.best is None or self._rank(values) <= self._rank(self.best.values)
        if self.global_step > 0 and better:
            self.best = Measurement(self.global_step, values)

    def _rank(self, values: dict[str, float]) -> tuple[float, float]:
        """Feasible models first, the most forgetful in front; then the others by their excess."""
        forget = values.get("forget/loss", 0.0)
        return max(0.0, self.excess(values)), math.inf if math.isnan(forget) else forget

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves λ, controllers, references and the best measurement, which no precision or sharding setting touches."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["constraints"] = {name: constraint.state_dict() for name, constraint in self.constraints.items()}
        best = self.best and self.best._asdict()
        checkpoint["run"] |= {"best": best, "dual_epochs": self._dual_epochs, "unseen_nll": self._unseen_nll}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` saved.

        Raises:
            KeyError: If the checkpoint was made with other constraints, of another kind of module, or with an objective
                that needed less of the model before unlearning.
        """
        if "constraints" not in checkpoint:
            raise KeyError(
                "the checkpoint is of no LitUnlearn run: it has no constraints. Start a new run from its exported model."
            )
        super().on_load_checkpoint(checkpoint)
        saved, run = checkpoint["constraints"], checkpoint["run"]
        if saved.keys() != self.constraints.keys():
            raise KeyError(
                f"the checkpoint has the constraints {sorted(saved)}, this run {sorted(self.constraints)}: give the same names "
                "to resume, or start a new run from the exported model."
            )
        for name, constraint in self.constraints.items():
            constraint.load_state_dict(saved[name])
        self.best, self._dual_epochs = run["best"] and Measurement(**run["best"]), run["dual_epochs"]
        self._unseen_nll = run.get("unseen_nll")
        if self._unseen_nll is not None:
            self.forget.calibrate(self._unseen_nll)


def _metered(meter: ConstraintSlack, objective: Objective) -> Consumer[None]:
    def consume(lm: LanguageModel, tokens: SupervisedTokens) -> None:
        meter.update(*objective(lm, tokens))

    return consume
