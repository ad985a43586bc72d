"""Run ``lit-unlearn plan``: the memory and the steps of a fit, before anything of it is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser

from lit_unlearn.cli.plan_setup import build_setup, count_devices, find_precision, find_tokenizer
from lit_unlearn.cli.settings import check_constraint_names
from lit_unlearn.cli.trainer import UnlearnCLI, build_parsers, refusals_as_config_errors, silence_libraries
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.errors import ConfigError
from lit_unlearn.evaluation.tables import format_table
from lit_unlearn.models.memory_plan import MemoryPlan, Setup, plan_memory, weight_bytes
from lit_unlearn.models.model_sizes import ModelSizes, measure_model
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.step_sizes import RunSizes, assume_run, can_read, count_steps, read_run
from lit_unlearn.training.weights import TRUE_PRECISION

COMMAND = "plan"
_DESCRIPTION = (
    "Shows what a fit with the same options would need: the peak memory of a device by parts, and the number of steps. Of a model, the "
    "config is read alone: a folder with nothing but config.json will do. Rows are read if they and the tokenizer are local files."
)
_GIB = 2**30
_STRATEGIES = {"single": "one device", "ddp": "DDP, every device holds the model", "fsdp2": "FSDP2, shards the model"}


class Plan(NamedTuple):
    """What is printed.

    Args:
        description: Of the run, a line each.
        memory: Of one device, at its largest step.
        values: For programs.
    """

    description: list[str]
    memory: MemoryPlan
    values: dict[str, Any]


class PlanTrainer(L.Trainer):
    """A Trainer with the command's name and options; it is never built."""

    def plan(self, ckpt_path: str | None = None, weights_only: bool | None = None) -> None:
        """Show the memory and the steps that a fit with the same options would need.

        Args:
            ckpt_path: As for a fit; nothing is read from it.
            weights_only: Likewise.
        """


class PlanCLI(UnlearnCLI):
    """Parses the options of a fit and, in place of running it, prints what it would need."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one command."""
        return {"plan": set()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that a fit does not have."""
        super().add_arguments_to_parser(parser)
        parser.description = _DESCRIPTION
        parser.add_argument("--rows", type=PositiveInt | None, help="Number of forget rows: they are not read then.")
        parser.add_argument(
            "--length", type=PositiveInt | None, help="Tokens of every example: rows are not read then."
        )
        parser.add_argument("--format", type=Literal["text", "markdown", "json"], default="text", help="Of the output.")

    def instantiate_classes(self) -> None:
        """Build the module and the data without the model, and print the plan.

        Raises:
            ConfigError: If the module or the data are classes of the user's.
        """
        config = self.config[self.subcommand]
        if config.get("data") is None:
            raise ConfigError("`data` is missing: a plan is that of a fit.")
        lm = config.model.init_args.lm
        settings = (lm.init_args if "class_path" in lm else lm).as_dict()
        precision = find_precision(config.trainer.precision)
        model = measure_model(settings, TRUE_PRECISION.get(precision, torch.float32))
        tokenizer = find_tokenizer(settings)
        # `LanguageModel` would ask for weights, which need not be there.
        config.model.init_args.lm = Namespace({"config": {"model_type": "none"}})  # type: ignore[no-untyped-call]
        if config.data.init_args.get("tokenizer") is None:
            config.data.init_args.tokenizer = tokenizer
        with refusals_as_config_errors(ValueError, OSError, ImportError):
            chosen: Any = Namespace({self.subcommand: Namespace(model=config.model, data=config.data)})  # type: ignore[no-untyped-call]
            built = self.parser.instantiate(chosen)[self.subcommand]
        if not isinstance(built.model, LitLanguageModel) or not isinstance(built.data, ForgetRetain):
            raise ConfigError(
                "only runs of this package's modules on its data can be planned: set `model` to LitUnlearn or LitFinetune, and `data` to "
                "ForgetRetain or one of its subclasses."
            )
        per_node, devices = count_devices(config.trainer)
        setup = build_setup(config, settings, model, built.model, devices)
        if config.rows or config.length or not can_read(built.data, tokenizer is not None):
            run = assume_run(built.data, built.model, devices, config.rows, config.length)
        else:
            run = read_run(built.data, built.model, devices, model.shares_prefix)
        setup = replace(setup, validation_tokens=run.validation_tokens)
        plan = make_plan(config, model, setup, run, built.model, per_node)
        print(format_plan(plan, config.format))

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing: the plan is printed already."""


def make_plan(
    config: Namespace, model: ModelSizes, setup: Setup, run: RunSizes, module: LitLanguageModel, per_node: int
) -> Plan:
    """Return the plan of the largest step.

    Args:
        config: The parsed options.
        model: Sizes of the model.
        setup: How it is trained.
        run: Passes of the steps.
        module: With the division into passes.
        per_node: Devices of a node.
    """
    memory = max((plan_memory(model, setup, step) for step in run.steps), key=lambda plan: plan.peak)
    steps = count_steps(run.per_epoch, config.trainer.max_epochs, config.trainer.max_steps)
    trained = sum(parameter.numel() for parameter in model.trainable)
    kind = "all weights" if not model.has_adapter else "an adapter"
    if setup.weight_bits:
        kind += f" beside weights of {setup.weight_bits} bits"
    size = module.micro_batch_size
    examples = "all examples of a device" if size is None else f"{size} examples of a stream"
    loading = weight_bytes(model, setup) * per_node
    values = {
        "model": model.name,
        "parameters": model.parameters,
        "trained_parameters": trained,
        "precision": find_precision(config.trainer.precision),
        "strategy": setup.strategy,
        "devices": setup.devices,
        "device": setup.device,
        "rows": run.source,
        "steps_per_epoch": run.per_epoch,
        "steps": steps,
        "peak_bytes": memory.peak,
        "peak_at": memory.at,
        "moments": memory.moments,
        "host_bytes_while_loading": loading,
    }
    layers = "recomputed in backward, but for each layer's input" if setup.checkpointing else "kept for backward"
    description = [
        f"{model.name}: {model.parameters:,} parameters, trains {kind} ({trained:,}), {values['precision']}, attention {model.attention}",
        f"{_STRATEGIES[setup.strategy]}: {setup.devices} × {'CPU' if setup.device == 'cpu' else 'GPU'}",
        f"a pass has {examples}, {module.passes}; activations are {layers}",
        f"rows: {run.source}",
        f"steps: {_format_count(run.per_epoch)} per epoch, {_format_count(steps)} in all",
    ]
    return Plan(description, memory, values)


def _format_count(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def format_plan(plan: Plan, style: Literal["text", "markdown", "json"] = "text") -> str:
    """Format a plan as lines and a table, or as JSON with all moments in bytes."""
    if style == "json":
        return json.dumps(plan.values, indent=2)
    rows: list[list[object]] = []
    for name, size in plan.memory.parts.items():
        if size:
            rows.append([name, f"{size / _GIB:.2f}"])
    rows.append(["peak of a device", f"{plan.memory.peak / _GIB:.2f}"])
    moments = []
    for name, parts in plan.memory.moments.items():
        moments.append(f"{name} {sum(parts.values()) / _GIB:.2f}")
    after = [
        f"the largest of: {', '.join(moments)}",
        f"host memory while loading: {plan.values['host_bytes_while_loading'] / _GIB:.2f} GiB on each node, because every process reads "
        "the whole model",
        "not counted: libraries, a GPU's context, what an allocator reserves, generated answers of benchmarks",
    ]
    table = format_table(rows, ["", "GiB"], style)
    return "\n".join([*plan.description, "", table, "", *after])


def build_parser() -> LightningArgumentParser:
    """Return the command's parser, for shell completion."""
    return build_parsers(PlanCLI, (COMMAND,), trainer_class=PlanTrainer)[COMMAND]


def run(arguments: list[str]) -> None:
    """Parse the options of a fit, and print its plan."""
    silence_libraries()
    # Where LightningCLI looks for them.
    sys.argv[1:] = [COMMAND, *arguments]
    check_constraint_names(arguments)
    PlanCLI((COMMAND,), trainer_class=PlanTrainer)
