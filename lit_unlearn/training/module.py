"""The base of both LightningModules that train: it has a model, a primal step, an evaluator and a reference cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.errors import CheckpointError, ConfigError
from lit_unlearn.evaluation.benchmark import Benchmark
from lit_unlearn.evaluation.suite import AnswerSuite, Suite
from lit_unlearn.models import Batch, LanguageModel
from lit_unlearn.training.agreement import check_processes_agree, describe_setup, describe_start
from lit_unlearn.training.evaluate import log_benchmark
from lit_unlearn.training.evaluator import Evaluator, Measurement
from lit_unlearn.training.forward_plan import ForwardPass, PassOrder, Term, build_forward_plan
from lit_unlearn.training.optimizer_settings import SharedFactory, apply_settings, count_steps
from lit_unlearn.training.primal_step import PrimalStep
from lit_unlearn.training.reference_cache import ReferenceCache
from lit_unlearn.training.strategies import check_strategy, guard_checkpoint_loading, shard
from lit_unlearn.training.trainer_checks import (
    check_callbacks,
    check_lengths,
    check_limits,
    check_progress,
    prepare_loaders,
)
from lit_unlearn.training.weights import check_base, check_tensors, load_for_trainer, saved_tensor_names
from lit_unlearn.utils.validation import check_choice, check_integer, check_number

# Lightning warns that only one of module and data module can transfer batches. Here it is the module, for any data module.
warnings.filterwarnings("ignore", ".*overridden `transfer_batch_to_device` in `LightningModule`")
# The reference model and the teacher are.
warnings.filterwarnings("ignore", r".*Found \d+ module\(s\) in eval mode at the start of training")


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule of transformers, stepped once per optimizer step, with its lengths taken from the Trainer.

    Args:
        name: As for ``transformers.get_scheduler``: ``"linear"``, ``"cosine"``, ``"constant_with_warmup"``, …
        warmup_epochs: Passes over the forget set in which the rate rises from 0; fractions are allowed.

    Raises:
        ConfigError: If ``warmup_epochs`` is negative or not finite.
    """

    name: str
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "warmup_epochs", self.warmup_epochs, at_least=0)


class LitLanguageModel(L.LightningModule):
    """A language model that is trained by weighted objectives on named streams, and measured on them.

    One ``training_step`` is one optimizer step over the whole batch of this process.

    Args:
        lm: The model.
        optimizer: Builds the optimizer from the trainable parameters.
        scheduler: A `Schedule`, or a callable from optimizer to scheduler; ``None`` for a constant rate.
        suite: What validation and test measure; ``None`` for an `AnswerSuite`.
        benchmark: What a test runs as well; ``None`` for none.
        benchmark_every_n_epochs: Epochs between two runs of the benchmark in a fit; ``None`` for none.
        micro_batch_size: Examples per pass through the model; ``None`` for all.
        gradient_clip_val: Largest gradient norm; ``None`` for no clipping.
        seed: Of dropout.
        passes: Whether streams share passes, see `LitUnlearn`.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        lm: LanguageModel,
        optimizer: OptimizerCallable,
        scheduler: Schedule | LRSchedulerCallable | None,
        suite: Suite | None,
        benchmark: Benchmark | None,
        benchmark_every_n_epochs: int | None,
        micro_batch_size: int | None,
        gradient_clip_val: float | None,
        seed: int,
        passes: PassOrder = "joint",
    ) -> None:
        super().__init__()
        if micro_batch_size is not None:
            check_integer(self, "micro_batch_size", micro_batch_size, at_least=1)
        if gradient_clip_val is not None:
            check_number(self, "gradient_clip_val", gradient_clip_val, above=0)
        check_choice(get_args(PassOrder), self, passes=passes)
        self.automatic_optimization = False
        self.lm = lm
        self.suite = AnswerSuite() if suite is None else suite
        self.benchmark = benchmark
        self.micro_batch_size = micro_batch_size
        self.passes = passes
        self.gradient_clip_val = gradient_clip_val
        self.seed = seed
        self.primal_step = PrimalStep(self)
        self.evaluator = Evaluator(self, benchmark_every_n_epochs)
        self.reference_cache = ReferenceCache(self)
        self._optimizer = SharedFactory(optimizer)
        self._scheduler = (
            scheduler if scheduler is None or isinstance(scheduler, Schedule) else SharedFactory(scheduler)
        )
        self._settings: list[dict[str, Any]] = []  # of the optimizer, as configured
        self._saved_settings: list[dict[str, Any]] = []  # the same in the checkpoint that is resumed
        self._values_to_log: dict[str, float] = {}
        self._benchmark_values_to_log: dict[str, float] = {}

    @property
    def attached_trainer(self) -> L.Trainer | None:
        """The Trainer; ``None`` while there is none, where ``trainer`` raises."""
        return self._trainer

    def terms(self) -> list[Term]:
        """Return the objectives with their present weights; they are measured in validation, too."""
        return []

    @property
    def needs_teacher(self) -> bool:
        """True if an objective needs the model's teacher."""
        return any("teacher" in term.objective.needs for term in self.terms())

    # Loading ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what would take wrong steps or none, and processes that have read other rows; forget an earlier run.

        Raises:
            ConfigError: See `check_strategy`, `check_callbacks` and `check_limits`.
            DataError: See `check_processes_agree`.
        """
        strategy = self.trainer.strategy
        check_strategy(type(strategy).__name__)
        guard_checkpoint_loading(strategy)
        if getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise ConfigError(
                "DDPStrategy(static_graph=True) is refused: a step has several backward passes. Leave it out."
            )
        if stage == "fit":
            check_callbacks(map(type, self.trainer.callbacks))  # type: ignore[attr-defined]
            check_limits(self.trainer)
        check_processes_agree(describe_setup(self))
        self.evaluator.setup(stage)

    def configure_model(self) -> None:
        """Load the model, and shard it where that is asked for.

        Raises:
            DataError: If an example is longer than the positions that the model has learned.
        """
        load_for_trainer(self.lm, self._trainer)
        if self._trainer is not None:
            check_lengths(self.lm.causal_lm, self.trainer.datamodule)  # type: ignore[attr-defined]
        self.lm.base_checksum()
        self.reference_cache.prepare()
        # Checkpoints leave out frozen models.
        self.strict_loading = not self.lm.has_adapter and self.lm.frozen is None and self.lm.teacher is None
        if self.device_mesh is not None:
            self._check_export_of_shards()
            strategy = self.trainer.strategy
            shard(self.lm, self.device_mesh, strategy.root_device, getattr(strategy, "cpu_offload", False))

    def _check_export_of_shards(self) -> None:
        """Take float32 for the export of a sharded model with an adapter, which could not be measured rounded.

        Raises:
            ConfigError: If another dtype was asked for.
        """
        dtype = self.evaluator.export_dtype
        if not self.lm.has_adapter or not self.lm.is_rounded_by(dtype):
            return
        if dtype is not None:
            raise ConfigError(
                "a sharded model with an adapter can only be measured as it is, before it is merged and rounded: leave out the "
                "`dtype` of ExportModel (export.dtype), or set it to float32."
            )
        self.evaluator.export_dtype = torch.float32
        rank_zero_info("export: weights in float32, because a sharded model with an adapter cannot be measured rounded")

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trainable parameters, and its schedule.

        Raises:
            ConfigError: If they refuse their arguments, the limits do not fit the loaders, or a schedule has no end.
        """
        parameters = [parameter for parameter in self.lm.parameters() if parameter.requires_grad]
        optimizer = self.build_optimizer(parameters)
        self._settings = []
        for group in optimizer.param_groups:
            self._settings.append({key: value for key, value in group.items() if key != "params"})

        schedule = self._scheduler
        # Loaders of the user's may have a state, which Lightning restores only after this.
        if isinstance(schedule, Schedule) or isinstance(self.trainer.datamodule, ForgetRetain):  # type: ignore[attr-defined]
            prepare_loaders(self.trainer)
        if schedule is None:
            return optimizer
        if isinstance(schedule, Schedule):
            total, warmup = count_steps(schedule.name, schedule.warmup_epochs, self.trainer)

            from transformers import get_scheduler

            return [optimizer], [
                self._build("scheduler", lambda: get_scheduler(schedule.name, optimizer, warmup, total))
            ]
        return [optimizer], [self._build("scheduler", lambda: schedule(optimizer))]

    def build_optimizer(self, parameters: list[torch.nn.Parameter]) -> Any:
        """Return a new optimizer over some parameters.

        Raises:
            ConfigError: If it refuses its settings.
        """
        return self._build("optimizer", lambda: self._optimizer(parameters))

    def _build(self, argument: str, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except ValueError as error:
            # A rate below 0, no number, or a name that is unknown. Other exceptions are bugs of a class of the user's.
            message = f"the {argument} refuses its settings: {error}. Check `{argument}`."
            raise ConfigError(message, owner=self, argument=argument) from error

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch on the CPU: it is packed there, and each pass goes to the device when it is run."""
        return batch

    # Training -----------------------------------------------------------------------------------------------------

    def plan_step(self, batch: Mapping[str, Batch], terms: list[Term]) -> list[ForwardPass]:
        """Return the passes of one optimizer step."""
        lm, logp = self.lm, self.reference_cache.logp
        return build_forward_plan(batch, terms, lm.packs, self.micro_batch_size, self.passes, logp, lm.shares_prefix)

    def on_train_start(self) -> None:
        """Let changed optimizer settings win over those that came with the checkpoint."""
        # On a single device losses may add to the head's gradient directly, which saves a buffer of its size.
        self.lm.accumulate_head = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.processed == epochs.started:
            # Lightning does not count the epoch that begins after the last step of one.
            loop.reset_restart_stage()
        for i, (new, old) in enumerate(zip(self._settings, self._saved_settings, strict=False)):
            apply_settings(self.trainer, i, new, old)
        self._saved_settings = []
        check_processes_agree(describe_start(self, self._settings))
        self._announce_rounding()
        self.reference_cache.measure()

    def _announce_rounding(self) -> None:
        dtype = self.evaluator.export_dtype or self.lm.files_dtype
        if self.lm.is_rounded_by(dtype):
            kind = str(dtype).removeprefix("torch.")
            merged = ", merged with the adapter" if self.lm.has_adapter else ""
            rank_zero_info(
                f"export: weights in {kind}{merged}; what is measured are the weights rounded like this. "
                "`dtype='float32'` of ExportModel (export.dtype) keeps all digits, at twice the size"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure and clip the gradient here, where a gradient scaler has unscaled it."""
        self.log_numbers({"grad_norm": self.primal_step.clip_gradients()})

    def check_losses(self, losses: list[float]) -> None:
        """Raise if the step that measured these losses must not be taken; called before the weights change.

        Args:
            losses: Of the step's terms, in their order.
        """

    def log_numbers(self, numbers: Mapping[str, float], prog_bar: bool = False) -> None:
        """Log numbers of a step.

        Lightning sends a number to the device, from where progress bar and loggers read it back. A tensor stays where it is.
        """
        # At half precision, that is the default.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name, number in numbers.items():
            self.log(name, torch.tensor(number, dtype=dtype), prog_bar=prog_bar)

    def on_train_end(self) -> None:
        """Leave the gradients to autograd again."""
        self.lm.accumulate_head = False

    # Measuring ----------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """Evaluate the current weights on every validation example; see `Evaluator.measure`."""
        self.reference_cache.measure()
        return self.evaluator.measure().values

    def name_means(self, means: dict[str, float]) -> dict[str, float]:
        """Return the objectives' means over whole streams under the names that they are logged by.

        Args:
            means: By name of the term.
        """
        return {f"{name}/loss": mean for name, mean in means.items()}

    def remember(self, measurement: Measurement) -> None:
        """Keep what was measured on whole streams."""
        self.evaluator.last = measurement

    @property
    def kept_step(self) -> int:
        """Global step of the model that this run would keep now; the current step unless overridden."""
        return self.global_step

    def on_validation_epoch_start(self) -> None:
        """Measure the reference model's log-probabilities, unless they are known."""
        self.reference_cache.measure()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch of one stream; the loaders are a dict from stream name to loader.

        The last batch ends the measurement, and not the hook at the end of the epoch: callbacks that exchange the weights for a
        validation, such as ``WeightAveraging``, have exchanged them again by then.
        """
        try:
            self.evaluator.update(self.evaluator.stream_name(dataloader_idx), batch)
            if self.evaluator.is_last_batch(batch_idx, dataloader_idx):
                self._finish_measurement()
        except BaseException:
            self.evaluator.abort()
            raise

    test_step = validation_step

    def _finish_measurement(self) -> None:
        measurement = self.evaluator.finish()
        self._values_to_log, self._benchmark_values_to_log = measurement.values, {}
        if self.trainer.testing or self.trainer.sanity_checking:
            return
        # With another limit, only a part was measured.
        if self.trainer.limit_val_batches == 1.0 and measurement.weights:
            self.remember(measurement)
        if self.evaluator.is_benchmark_due():
            self._benchmark_values_to_log = self.evaluator.run_benchmark("val")

    def on_validation_epoch_end(self) -> None:
        """Log the values over the whole validation set, and those of the benchmark where it was due."""
        if not self.evaluator.has_finished:  # the loaders did not say how many batches they have
            self._finish_measurement()
        if self.trainer.sanity_checking:
            return
        self.log_values("val", self._values_to_log)
        if self._benchmark_values_to_log:
            log_benchmark(self, self._benchmark_values_to_log)

    def on_test_epoch_end(self) -> None:
        """Log the values over the whole test set, and run the benchmark, if there is one."""
        if not self.evaluator.has_finished:
            self._finish_measurement()
        self.log_values("test", self._values_to_log)
        log_benchmark(self, self.evaluator.run_benchmark("test"))

    def log_values(self, stage: str, values: dict[str, float]) -> None:
        """Log values of whole streams, which are the same on every process."""
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what decides the next step beside weights and optimizer, in plain types.

        Of an adapted model only the adapter is saved, and no copy of the reference model. Where every process saves its
        shard, all weights are: they are loaded by name, without exception.
        """
        checkpoint["run"] = {"seed": self.seed, "optimizer": self._settings, "base": self.lm.base_checksum()}
        if self.reference_cache.is_needed:
            checkpoint["run"]["reference_logp"] = self.reference_cache.state_dict()
        state = checkpoint["state_dict"]
        is_sharded = any(isinstance(value, DTensor) for value in state.values())
        if not self.strict_loading and not is_sharded:
            names = saved_tensor_names(self, self.lm)
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that this run can resume from a checkpoint.

        Raises:
            CheckpointError: If dropout was seeded otherwise, the base model is another one, weights, optimizer or reference
                log-probabilities are missing, or it is beyond the last epoch.
        """
        run = checkpoint.get("run")
        if run is None:
            raise CheckpointError(
                "the checkpoint is of no LitUnlearn or LitFinetune run. Start from its exported model."
            )
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_progress(checkpoint, self.trainer)
            if run["seed"] != self.seed:
                raise CheckpointError(
                    f"the checkpoint cannot be resumed: `seed` was {run['seed']}, is {self.seed}. Restore it, or start a new run "
                    "from the exported model.",
                    owner=self,
                    argument="seed",
                )
            self._saved_settings = run["optimizer"]
        check_tensors(checkpoint, self, self.lm)
        # Where all weights come from the checkpoint, measuring them does not need the base.
        if self.lm.has_adapter or (self._trainer is not None and self.trainer.state.fn == "fit"):
            check_base(run, self, self.lm)
        self.reference_cache.load_state_dict(run.get("reference_logp"))
