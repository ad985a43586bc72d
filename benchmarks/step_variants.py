"""The formulations that are compared: the straightforward one, written here, and `LitUnlearn`.

Both minimise the token mean of margin² on the forget set plus λ times the token mean of the NLL on the retain set, clip the
gradient's norm to 1, step AdamW, and update λ. Each gets the same examples in the form that its users have: `LitUnlearn`
lists of `Example`, as the package's data modules give them, and the straightforward one padded batches on its device.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.random_llama import PaddedStep, Shape, Step, build_model, pad_step
from lit_unlearn import NLL, Constraint, DualAscent, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.data.example import IGNORED
from lit_unlearn.models.activation_checkpointing import checkpoint_activations

CLIP = 1.0
MULTIPLIER = {"lr": 5.0, "init": 100.0}
EPSILON = 0.3
Precision = Literal["32-true", "bf16-true", "bf16-mixed"]


class Observer(Protocol):
    """Is called at both ends of every optimizer step."""

    def on_step_start(self, number: int) -> None:
        """Run before anything of step ``number`` is computed; its batch has been loaded."""

    def on_step_end(self, number: int, losses: dict[str, float]) -> None:
        """Run after the optimizer and λ have been updated; ``losses`` has the step's ``forget`` and ``nll``."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the steps.

    Args:
        name: Name in tables.
        kind: ``"plain"``, or the order of passes of `LitUnlearn`.
        lora: Whether an adapter is trained while the model, its head included, is frozen.
        compiled: Whether the trunk is compiled with ``torch.compile``.
        checkpointed: Whether the backward pass recomputes the activations.
    """

    name: str
    kind: Literal["plain", "sequential", "joint"]
    lora: bool = False
    compiled: bool = False
    checkpointed: bool = False


class Formulation:
    """A model, and the steps on it that a `Variant` describes; every call of `run` starts with a new optimizer."""

    def __init__(self, variant: Variant, shape: Shape, device: str, precision: Precision) -> None:
        silence_hints()
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        self.model = _apply_options(build_model(shape, device, dtype), variant)
        self.run: Callable[[Sequence[Step], Observer], None]
        if variant.kind == "plain":
            self.run = _PlainTraining(self.model, device, precision).run
        else:
            module = make_unlearn_module(self.model, passes=variant.kind)
            self.run = lambda steps, observer: run_trainer(module, steps, observer, device, precision)
        if variant.compiled:
            # In place, because the modules above have the model already.
            self.model.base_model.compile()


def _apply_options(model: Any, variant: Variant) -> Any:
    if variant.checkpointed:
        checkpoint_activations(model)
    if not variant.lora:
        return model
    from peft import LoraConfig, get_peft_model

    # An adapter starts at random, and all variants must start alike.
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def select_trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that need a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_gradient_bytes(model: torch.nn.Module) -> int:
    """Return the size of all gradients together."""
    return sum(parameter.numel() * parameter.element_size() for parameter in select_trainable(model))


def silence_hints() -> None:
    """Hide the libraries' hints, which would be printed between the rows of tables."""
    for name in ("lightning.pytorch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")


def make_adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of all variants."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)


def step_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Clip the gradients, step, and free the gradients."""
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad()


# The straightforward formulation -----------------------------------------------------------------------------------------


class _PlainTraining:
    """Padded batches, the logits of every position of both sets, one sum, one backward pass."""

    def __init__(self, model: Any, device: str, precision: Precision) -> None:
        self._model, self._device = model, device
        self._is_mixed = precision == "bf16-mixed"

    def run(self, steps: Sequence[Step], observer: Observer) -> None:
        # Padded and sent before the first step, so that this variant is charged neither time nor memory for it.
        padded_steps = [pad_step(step, self._device) for step in steps]
        parameters = select_trainable(self._model)
        optimizer = make_adamw(parameters)
        multiplier = MULTIPLIER["init"]
        for number, step in enumerate(padded_steps):
            observer.on_step_start(number)
            losses = self._accumulate_gradients(step, multiplier)
            step_optimizer(optimizer, parameters)
            multiplier = max(0.0, multiplier + MULTIPLIER["lr"] * (losses["nll"] - EPSILON))
            observer.on_step_end(number, losses)

    def _accumulate_gradients(self, step: PaddedStep, multiplier: float) -> dict[str, float]:
        with torch.autocast(self._device, torch.bfloat16) if self._is_mixed else nullcontext():
            forget = squared_margin(self._compute_logits(step["forget"]), step["forget"]["labels"])
            nll = negative_log_likelihood(self._compute_logits(step["retain"]), step["retain"]["labels"])
        (forget + multiplier * nll).backward()
        return {"forget": forget.item(), "nll": nll.item()}

    def _compute_logits(self, batch: dict[str, Tensor]) -> Tensor:
        # transformers upcasts the same way for its own losses: in bfloat16, sums over the vocabulary lose precision.
        return self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def squared_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of (largest − mean logit)² over the positions that predict a label."""
    margin = logits.max(dim=-1).values - logits.mean(dim=-1)
    # The logits of position t predict the token of position t + 1.
    return margin[:, :-1][labels[:, 1:] != IGNORED].square().mean()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean NLL, in nats per token, over the positions that predict a label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


# LitUnlearn --------------------------------------------------------------------------------------------------------------


def make_unlearn_module(model: Any, constraints: dict[str, Constraint] | None = None, **settings: Any) -> LitUnlearn:
    """Return `LitUnlearn` with the paper's objectives and the settings of the plain formulation."""
    if constraints is None:
        constraints = {"nll": Constraint(NLL(), EPSILON, DualAscent(**MULTIPLIER))}
    lm = LanguageModel.wrap(model)
    return LitUnlearn(lm, LogitMargin(), constraints, make_adamw, gradient_clip_val=CLIP, **settings)


def run_trainer(
    module: LitUnlearn,
    steps: Sequence[Step],
    observer: Observer,
    device: str = "cpu",
    precision: Precision = "32-true",
    **settings: Any,
) -> None:
    """Fit with a Trainer that computes nothing except the steps."""
    silence_hints()
    trainer = L.Trainer(
        **{
            "accelerator": "gpu" if device == "cuda" else "cpu",
            "devices": 1,
            "precision": precision,
            "max_epochs": 1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [_StepCallback(observer)],
            **settings,
        }
    )
    # The default `collate_fn` would copy every example, token by token.
    loader = DataLoader(steps, batch_size=None, collate_fn=lambda step: step)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    # The Trainer holds the optimizer, whose state would stay in memory during other variants' turns.
    module.trainer = None


class _StepCallback(L.Callback):
    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._observer.on_step_start(batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = trainer.callback_metrics
        losses = {"forget": float(logged["forget/loss"])}
        for name in pl_module.constraints:
            losses[name] = float(logged[f"constraint/{name}/value"])
        self._observer.on_step_end(batch_idx, losses)


# Agreement ---------------------------------------------------------------------------------------------------------------


def first_loss_difference(losses: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the largest relative difference of any variant's first losses from those of the plain one."""
    differences = {}
    for key, plain in losses["plain"].items():
        differences[key] = max(abs(values[key] / plain - 1) for values in losses.values())
    return differences


def check_agreement(losses: dict[str, dict[str, float]], tolerance: float) -> None:
    """Raise RuntimeError unless the first losses of all variants agree: otherwise they do different work."""
    differences = first_loss_difference(losses)
    # Not `any(… > tolerance)`: a difference that is NaN must fail, too.
    if not all(difference <= tolerance for difference in differences.values()):
        raise RuntimeError(
            f"the formulations disagree: relative differences {differences} in the first step's losses, above {tolerance}; "
            f"they are {losses}. Their times cannot be compared."
        )
