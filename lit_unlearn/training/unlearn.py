"""`LitUnlearn`: primal-dual steps for *minimise the forgetting loss subject to retention loss ≤ ε*."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.dual import Constraint
from lit_unlearn.errors import CheckpointError, ConfigError, DataError, DivergedError
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.suite import Suite
from lit_unlearn.models import Batch, LanguageModel
from lit_unlearn.models.teacher import move_to_teacher
from lit_unlearn.objectives import Objective
from lit_unlearn.training.evaluator import Measurement
from lit_unlearn.training.forward_plan import PassOrder, Term
from lit_unlearn.training.module import LitLanguageModel, Schedule
from lit_unlearn.training.robustness import Robustness
from lit_unlearn.utils.validation import check_choice, check_number, list_names


class LitUnlearn(LitLanguageModel):
    """Minimises a forgetting objective subject to constraints on retention, by primal-dual steps.

    Each optimizer step descends ``forget_weight · forget + Σ λ · constraint`` and then moves every multiplier λ once by
    what the same step measured. Entesari et al., "Constrained Entropic Unlearning", NeurIPS 2025 (arXiv 2506.05314).

    Training batches are ``{"forget": batch, "retain": batch, …}``: lists of examples from ``ForgetRetain``, or ordinary
    Hugging Face batches from any loader; validation loaders are a dict with the same keys. On several processes, your own
    loaders must hand each the same number of examples, as a ``DistributedSampler`` does, and save their own state.

    Args:
        lm: The model to unlearn from.
        forget: Objective that is minimised on the forget stream.
        constraints: The bounds, by name; logs call them ``constraint/<name>`` and ``multiplier/<name>``.
        optimizer: Builds the primal optimizer from the trainable parameters.
        scheduler: A `Schedule`, or a callable from optimizer to scheduler, stepped once per optimizer step.
        suite: What validation and test measure on the streams; ``None`` for an `AnswerSuite`.
        forget_weight: Factor of the forgetting objective, > 0.
        micro_batch_size: Examples per pass through the model, on average: the passes have about as many tokens. Smaller
            saves memory and gives the same gradients. ``None``: all.
        gradient_clip_val: Largest gradient norm; ``None`` for no clipping.
        seed: Of dropout.
        keep: The model that a run ends with. ``"best"``: of those measured on whole streams after a step, the one with
            the lowest forget loss among the feasible, else the least violating one. ``"last"``: the last, as in published
            baselines. In memory is the last model in any case: `ExportModel` writes the kept one.
        passes: ``"joint"``: examples of all streams go through the model together, which spares a second gradient of the
            embeddings; where they cannot be packed, as ``"sequential"``: one stream after the other, with the graph of
            one alive. The gradients are the same.
        benchmark: Benchmark with examples of its own, such as `TOFUBenchmark`, that a test runs; ``None`` for none.
        benchmark_every_n_epochs: Epochs between two runs of the benchmark in a fit, with the validation at their end; its
            values are logged as ``val/<benchmark>/<value>``. ``None`` for none before the test.
        robustness: Another way to compute the gradient of a step, such as `SharpnessAware`; ``None`` for the plain one.
        rewind: Share of the way to the weights of the model's ``teacher`` that is gone before the first step, from 0 (none) to below 1.
            What was measured before stays what values and bounds are relative to, so that the run begins above the bound and
            learns the retain set again, but not the forget set: less of it is left to be brought back by relearning.
            Mu and Klabjan (arXiv 2409.09778) rewind to an earlier checkpoint; between two models, the weights are
            interpolated as Wortsman et al., CVPR 2022 (arXiv 2109.01903), do for robustness.

    Raises:
        ConfigError: If there is no constraint, a name cannot be a key, or a number is out of range.
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
        passes: PassOrder = "joint",
        benchmark: Benchmark | None = None,
        benchmark_every_n_epochs: int | None = None,
        robustness: Robustness | None = None,
        rewind: float = 0.0,
    ) -> None:
        super().__init__(
            lm,
            optimizer,
            scheduler,
            suite,
            benchmark,
            benchmark_every_n_epochs,
            micro_batch_size,
            gradient_clip_val,
            seed,
            passes,
        )
        if not constraints:
            raise ConfigError(
                "LitUnlearn: `constraints` is empty; give at least one, such as {'nll': Constraint(NLL(), 0.3, "
                "DualAscent(lr=5, init=100))} (a FixedMultiplier(0) switches it off and still reports it).",
                owner=self,
                argument="constraints",
            )
        check_constraint_names(constraints)
        check_choice(("best", "last"), self, keep=keep)
        self.keep = keep
        self.forget = forget
        self.forget_weight = check_number(self, "forget_weight", forget_weight, above=0)
        self.constraints = constraints
        self.robustness = robustness
        self.rewind = check_number(self, "rewind", rewind, at_least=0, below=1)
        # Registered, so that objectives with buffers follow the model to its device.
        self._objectives = nn.ModuleDict({name: constraint.objective for name, constraint in constraints.items()})
        self.best: Measurement | None = None
        self._dual_epochs = 0  # epochs whose dual step was taken

    def terms(self) -> list[Term]:
        """Return the objectives with their present weights."""
        terms = [Term("forget", "forget", self.forget, self.forget_weight)]
        for name, constraint in self.constraints.items():
            terms.append(Term(name, constraint.stream, constraint.objective, constraint.multiplier.value))
        return terms

    @property
    def needs_teacher(self) -> bool:
        """True if an objective, or `rewind`, needs the teacher."""
        return self.rewind > 0 or super().needs_teacher

    # Training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        """Take one primal step on the model and one dual step on every multiplier."""
        self._take_dual_steps_of_epoch()

        terms = self.terms()
        if self.robustness is None:
            sums = self.primal_step.backward(self.plan_step(batch, terms), terms)
        else:
            sums = self.robustness.backward(self, batch, terms)

        step = self.primal_step.step(sums, terms)
        forget_loss, *values = step.losses
        self._log_step(forget_loss, values)
        if step.is_taken:  # a gradient scaler that skips the primal step skips the dual one
            self._take_dual_steps(values)

    def check_losses(self, losses: list[float]) -> None:
        """Refuse a step whose losses are not finite.

        Raises:
            DivergedError: With the loss.
        """
        forget_loss, *values = losses
        for constraint, value in zip(self.constraints.values(), values, strict=True):
            constraint.check(value)
        if not math.isfinite(forget_loss):
            raise DivergedError(
                f"the forget loss is {forget_loss}; the step was not taken. Lower the optimizer's learning rate, or look for "
                "examples without supervised tokens in the 'forget' stream."
            )

    def _log_step(self, forget_loss: float, values: list[float]) -> None:
        """Log what the step measured, and the λ that it used."""
        self.log_numbers({"forget/loss": forget_loss})
        for (name, constraint), value in zip(self.constraints.items(), values, strict=True):
            violation = constraint.violation(value)
            self.log_numbers({f"constraint/{name}/value": value, f"constraint/{name}/violation": violation})
            shown = {f"constraint/{name}/slack": -violation, f"multiplier/{name}": constraint.multiplier.value}
            self.log_numbers(shown, prog_bar=True)

    def _take_dual_steps(self, values: list[float]) -> None:
        """Move the multipliers by the step's values, which are the same on every process."""
        for constraint, value in zip(self.constraints.values(), values, strict=True):
            if constraint.update_every == "step":
                constraint.update(value, self.current_epoch)

    def _take_dual_steps_of_epoch(self) -> None:
        """Take the dual steps of the epoch that ended before this step, from whole streams.

        They are taken here and not when the epoch ends, so that a checkpoint made anywhere in between resumes alike.
        """
        if self._dual_epochs >= self.current_epoch:
            return
        best = self.best  # this measurement is of no exported model, so it must not decide which one is kept
        for name, constraint in self.constraints.items():
            if constraint.update_every == "epoch":
                constraint.update(self._measure_constraint(name), self.current_epoch - 1)
        self.best, self._dual_epochs = best, self.current_epoch

    def _measure_constraint(self, name: str) -> float:
        value = self.measure().get(f"constraint/{name}/value")
        if value is None:
            raise DataError(
                f"constraint '{name}' is measured on its whole stream (for a relative epsilon, or `update_every` 'epoch'), "
                f"but there are no such examples: add a '{self.constraints[name].stream}' validation loader, or change that."
            )
        return value

    # The reference model ------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Set up as the base class does; a fit starts without a best measurement, unless a checkpoint brings one.

        Raises:
            ConfigError: If a constraint is on a stream that the data module does not have.
        """
        super().setup(stage)
        self._check_streams()
        if stage == "fit":
            self.best, self._dual_epochs = None, 0
            if self.forget.level is not None:
                self.forget.level.measured = None

    def _check_streams(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        # Loaders of the user's are known only when they hand out a batch.
        if not isinstance(data, ForgetRetain):
            return
        for name, constraint in self.constraints.items():
            if constraint.stream not in data.examples:
                raise ConfigError(
                    f"constraint '{name}' is on the stream '{constraint.stream}', which the data do not have: "
                    f"{list_names(constraint.stream, data.examples)}. Name its file in the data's `streams`, or change `stream`.",
                    owner=constraint,
                    argument="stream",
                )

    def on_train_start(self) -> None:
        """Measure the reference model for what is relative to it, unless a checkpoint brought the values.

        Raises:
            DataError: If the examples that it is to be measured on are missing.
            ConfigError: If `robustness` cannot work with the model.
        """
        if self.robustness is not None:
            self.robustness.check(self.lm)
        super().on_train_start()
        self._set_forget_level()
        for name, constraint in self.constraints.items():
            if constraint.level is not None and constraint.level.measured is None:
                # All constraints are measured together, in one pass over the streams.
                constraint.level.set(self._measure_constraint(name))
            rank_zero_info(f"constraint {name}: {constraint}")
        # A run that is resumed has gone that way.
        if self.rewind and self.global_step == 0:
            move_to_teacher(self.lm, self.rewind)
            rank_zero_info(f"rewound: the weights are {self.rewind:.0%} of the way to those of the teacher")

    def measure(self) -> dict[str, float]:
        """Evaluate the current weights on every validation example; see `Evaluator.measure`."""
        self._set_forget_level()
        return super().measure()

    def _set_forget_level(self) -> None:
        """Measure the level that the forget objective aims at, once and before the first step."""
        level = self.forget.level
        if level is None or level.measured is not None:
            return
        measured = level.measure(partial(self.evaluator.measure_objective, stream=level.stream))
        if measured is None:
            raise DataError(
                f"{type(self.forget).__name__} needs examples that the model has never seen, but there is no stream "
                f"'{level.stream}': name their file in the data module's `streams`, as {{{level.stream}: FILE}}."
            )
        level.set(measured)
        rank_zero_info(f"level: {level.describe()}")

    # Measuring ----------------------------------------------------------------------------------------------------

    def name_means(self, means: dict[str, float]) -> dict[str, float]:
        """Return ``forget/loss``, and the value of every constraint that was measured."""
        # Not the slack: a resumed run may have another epsilon.
        values = {f"constraint/{name}/value": means[name] for name in self.constraints if name in means}
        if "forget" in means:
            values["forget/loss"] = means["forget"]
        return values

    def log_values(self, stage: str, values: dict[str, float]) -> None:
        """Log violation and slack as well, and ``feasible_forget``: the forget loss where all is feasible, else infinite.

        ``ModelCheckpoint(monitor="val/feasible_forget")`` then keeps the best feasible model.
        """
        values = dict(values)
        for name, constraint in self.constraints.items():
            value = values.get(f"constraint/{name}/value")
            if value is not None and constraint.epsilon is not None:
                violation = constraint.violation(value)
                values |= {f"constraint/{name}/violation": violation, f"constraint/{name}/slack": -violation}
        if "forget/loss" in values and all(c.epsilon is not None for c in self.constraints.values()):
            is_feasible = self.excess(values) <= 0
            values["feasible_forget"] = values["forget/loss"] if is_feasible else math.inf
        super().log_values(stage, values)

    # Which model to keep ------------------------------------------------------------------------------------------

    def excess(self, values: dict[str, float]) -> float:
        """Return the largest violation, as a fraction of its epsilon.

        Args:
            values: As `measure` gives them; a constraint that is not among them is left out.

        Returns:
            0 or less where all constraints are feasible, infinite where a value is not finite.
        """
        largest = -math.inf
        for name, constraint in self.constraints.items():
            value = values.get(f"constraint/{name}/value")
            if value is None:
                continue
            ratio = constraint.violation(value) / cast(float, constraint.epsilon)
            largest = max(largest, math.inf if math.isnan(ratio) else ratio)
        return 0.0 if largest == -math.inf else largest

    @property
    def kept_step(self) -> int:
        """Global step of the best model, once one was measured."""
        return self.best.step if self.best else self.global_step

    def remember(self, measurement: Measurement) -> None:
        """Keep what was measured on whole streams, and which model it recommends."""
        super().remember(measurement)
        if measurement.step == 0:
            return
        # Both are judged by the present epsilon.
        is_better = self.best is None or self._rank(measurement.values) <= self._rank(self.best.values)
        if self.keep == "last" or is_better:
            self.best = measurement

    def _rank(self, values: dict[str, float]) -> tuple[float, float]:
        """Return a key that sorts feasible models first, by their forget loss; then the others, by their excess."""
        forget_loss = values.get("forget/loss", 0.0)
        return max(0.0, self.excess(values)), math.inf if math.isnan(forget_loss) else forget_loss

    # Checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save λ, controllers, levels and the best measurement, which no precision or sharding setting touches."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["constraints"] = {name: constraint.state_dict() for name, constraint in self.constraints.items()}
        level = self.forget.level
        checkpoint["run"] |= {
            "best": self.best and self.best._asdict(),
            "dual_epochs": self._dual_epochs,
            "forget_level": level and level.measured,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` saved.

        Raises:
            CheckpointError: If the checkpoint was made with other constraints, of another kind of module, or with an
                objective that needed less of the reference model.
        """
        if "constraints" not in checkpoint:
            raise CheckpointError(
                "the checkpoint is of no LitUnlearn run: it has no constraints. Start a new run from its exported model."
            )
        super().on_load_checkpoint(checkpoint)
        saved, run = checkpoint["constraints"], checkpoint["run"]
        if saved.keys() != self.constraints.keys():
            raise CheckpointError(
                f"the checkpoint has the constraints {sorted(saved)}, this run {sorted(self.constraints)}: give the same names "
                "to resume, or start a new run from the exported model.",
                owner=self,
                argument="constraints",
            )
        for name, constraint in self.constraints.items():
            constraint.load_state_dict(saved[name])
        self.best, self._dual_epochs = run["best"] and Measurement(**run["best"]), run["dual_epochs"]
        if self.forget.level is not None:
            self.forget.level.measured = run.get("forget_level")


def check_constraint_names(names: Iterable[str]) -> None:
    """Refuse names that cannot be a key of the configuration, of the logs and of a module.

    Raises:
        ConfigError: With the name.
    """
    for name in names:
        # "forget" is the other term of the sum; `keys` and the like are methods of the container of the objectives.
        is_taken = name == "forget" or hasattr(nn.ModuleDict, name)
        if is_taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"the constraint's name {name!r} cannot be a key: use letters, digits, '_' and '-'"
                f"{', and another word than this one' if is_taken else ''}.",
                owner=LitUnlearn,
                argument="constraints",
            )
