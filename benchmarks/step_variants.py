"""The formulations that are compared: the straightforward one, written here, and `LitUnlearn`.

Both minimise the token mean of margin² on forget rows plus λ times the token mean of the NLL on retain rows, clip the
gradient's norm to 1, step AdamW, and move λ. An observer sees where each optimizer step begins and ends.
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

from benchmarks.random_llama import Batch, Shape, Step, build_model
from lit_unlearn import NLL, Constraint, DualAscent, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.models.adapters import checkpoint_activations

CLIP = 1.0
MULTIPLIER = {"lr": 5.0, "init": 100.0}
EPSILON = 0.3
Precision = Literal["32-true", "bf16-true", "bf16-mixed"]


class Observer(Protocol):
    """Sees every optimizer step from outside."""

    def step_starts(self, number: int) -> None:
        """Before anything of step ``number`` is computed; the batch is on its device."""

    def step_ends(self, number: int, losses: dict[str, float]) -> None:
        """After the optimizer and λ have moved; ``losses`` has the step's ``forget`` and ``nll``."""


@dataclass(frozen=True)
class Variant:
    """One way to take the steps.

    Args:
        name: In tables.
        kind: ``"plain"``, or the order of passes of `LitUnlearn`.
        lora: Whether an adapter is trained, and the model, its head included, is frozen.
        compiled: Whether the trunk goes through ``torch.compile``.
        checkpointed: Whether the backward pass computes the activations again.
    """

    name: str
    kind: Literal["plain", "sequential", "joint"]
    lora: bool = False
    compiled: bool = False
    checkpointed: bool = False


Run = Callable[[Sequence[Step], Observer], None]


class Formulation:
    """A model, and steps on it that a `Variant` describes; the optimizer starts afresh at every call."""

    def __init__(self, variant: Variant, shape: Shape, device: str, precision: Precision) -> None:
        quiet()
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        self.model = _prepare(build_model(shape, device, dtype), variant)
        if variant.kind == "plain":
            self._run: Run = _Plain(self.model, device, precision)
        else:
            module = unlearn_module(self.model, passes=variant.kind)
            self._run = lambda steps, observer: fit(module, steps, observer, device, precision)
        if variant.compiled:
            self.model.base_model.compile()

    @property
    def gradient_bytes(self) -> int:
        return gradient_bytes(self.model)

    def run(self, steps: Sequence[Step], observer: Observer) -> None:
        self._run(steps, observer)


def _prepare(model: Any, variant: Variant) -> Any:
    if variant.checkpointed:
        checkpoint_activations(model)
    if not variant.lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # an adapter starts at random
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in trainable(model))


def quiet() -> None:
    """No hints, which would tear the tables apart."""
    for name in ("lightning.pytorch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)


def step_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Clips, steps, and frees the gradients."""
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad()


# The straightforward formulation -----------------------------------------------------------------------------------------


class _Plain:
    """Padded batches, logits of every position of both sets, one sum, one backward pass."""

    def __init__(self, model: Any, device: str, precision: Precision) -> None:
        self._model, self._device = model, device
        self._mixed = precision == "bf16-mixed"

    def __call__(self, steps: Sequence[Step], observer: Observer) -> None:
        parameters = trainable(self._model)
        optimizer = adamw(parameters)
        multiplier = MULTIPLIER["init"]
        for number, step in enumerate(steps):
            observer.step_starts(number)
            losses = self._backward(step, multiplier)
            step_optimizer(optimizer, parameters)
            multiplier = max(0.0, multiplier + MULTIPLIER["lr"] * (losses["nll"] - EPSILON))
            observer.step_ends(number, losses)

    def _backward(self, step: Step, multiplier: float) -> dict[str, float]:
        with torch.autocast(self._device, torch.bfloat16) if self._mixed else nullcontext():
            forget = squared_margin(self._logits(step["forget"]), step["forget"]["labels"])
            nll = negative_log_likelihood(self._logits(step["retain"]), step["retain"]["labels"])
        (forget + multiplier * nll).backward()
        return {"forget": forget.item(), "nll": nll.item()}

    def _logits(self, batch: Batch) -> Tensor:
        return self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def squared_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of (largest − mean logit)² over the positions that predict a label."""
    margin = logits.max(dim=-1).values - logits.mean(dim=-1)
    return margin[:, :-1][labels[:, 1:] != -100].square().mean()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the positions that predict a label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


# LitUnlearn --------------------------------------------------------------------------------------------------------------


def unlearn_module(model: Any, constraints: dict[str, Constraint] | None = None, **settings: Any) -> LitUnlearn:
    """`LitUnlearn` with the paper's objectives and this benchmark's numbers."""
    if constraints is None:
        constraints = {"nll": Constraint(NLL(), EPSILON, DualAscent(**MULTIPLIER))}
    lm = LanguageModel.wrap(model)
    return LitUnlearn(lm, LogitMargin(), constraints, adamw, gradient_clip_val=CLIP, **settings)


def fit(
    module: LitUnlearn,
    steps: Sequence[Step],
    observer: Observer,
    device: str = "cpu",
    precision: Precision = "32-true",
    **settings: Any,
) -> None:
    """Fits with a Trainer that does nothing beside the steps."""
    quiet()
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
            "callbacks": [_Watched(observer)],
            **settings,
        }
    )
    trainer.fit(module, DataLoader(steps, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    module.trainer = None  # which holds the optimizer


class _Watched(L.Callback):
    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._observer.step_starts(batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = trainer.callback_metrics
        losses = {name: float(logged[f"constraint/{name}/value"]) for name in pl_module.constraints}
        self._observer.step_ends(batch_idx, {"forget": float(logged["forget/loss"]), **losses})


# Whether they do the same -------------------------------------------------------------------------------------------------


def first_loss_difference(losses: dict[str, dict[str, float]]) -> dict[str, float]:
    """Largest relative difference of any variant's first losses from the plain one's."""
    plain = losses["plain"]
    return {key: max(abs(values[key] / plain[key] - 1) for values in losses.values()) for key in plain}


def check_agreement(losses: dict[str, dict[str, float]], tolerance: float) -> None:
    """Raises RuntimeError unless all variants measure the same in their first step: else they do different work."""
    differences = first_loss_difference(losses)
    if not all(difference <= tolerance for difference in differences.values()):  # also refuses nan
        raise RuntimeError(
            f"the formulations disagree: relative differences {differences} in the first step's losses, above {tolerance}; "
            f"they are {losses}. Their times cannot be compared."
        )
