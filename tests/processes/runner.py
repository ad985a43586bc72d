"""Runs fits and keeps what happened, on one process or, started by torchrun, on several.

``torchrun --nproc_per_node=2 runner.py FOLDER`` runs every scenario of ``FOLDER/scenarios.json`` and writes
``<name>-rank<r>.pt`` for each. Tests judge by these files.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_unlearn import (
    DPO,
    NLL,
    NPO,
    RMU,
    UNDIAL,
    ActivationMatch,
    Constraint,
    DualAscent,
    ForgetRetain,
    GradientProjection,
    KLToReference,
    KLToTeacher,
    LanguageModel,
    LitUnlearn,
    LogitMargin,
    MatchCalibrated,
    MatchUnseen,
    PIMultiplier,
    Relative,
    Schedule,
    SharpnessAware,
)
from lit_unlearn.callbacks import ResumeCheckpoint
from lit_unlearn.data.example import Example
from lit_unlearn.training import FSDP2Strategy
from lit_unlearn.training.strategies import whole_state

torch.set_num_threads(1)
FORGET: dict[str, Any] = {
    "margin": LogitMargin,
    "match": partial(MatchUnseen, "general"),
    "calibrated": partial(MatchCalibrated, "general"),
    "npo": NPO,
    "dpo": DPO,
    "undial": UNDIAL,
    "teacher": KLToTeacher,
    "rmu": partial(RMU, layer=0),
}
GENERAL: dict[str, Any] = {
    "nll": partial(Constraint, NLL(), 5.5),
    "kl": partial(Constraint, KLToReference(), 0.01),
    "activations": partial(Constraint, ActivationMatch(layer=0), 0.01),
}
ROBUSTNESS: dict[str, Any] = {"sam": partial(SharpnessAware, 0.01), "projection": GradientProjection}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.01),  # a rate at which training converges: else rounding would be magnified
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


class Recorder(L.Callback):
    """Keeps every step's rows, this process's sums, logged values, and λ afterwards."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({"local": [], "rows": {name: unpadded(part) for name, part in batch.items()}})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("val/")}
        after = {name: constraint.multiplier.value for name, constraint in pl_module.constraints.items()}
        self.steps[-1] |= {"logged": logged, "multipliers": after}


class Stopped(Exception):
    """Like a power cut."""


class Stop(L.Callback):
    def __init__(self, after: int | None) -> None:
        self._after = after

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._after:
            raise Stopped


def unpadded(batch: dict[str, Tensor]) -> list[list[int]]:
    if isinstance(batch, list):
        return [example.input_ids for example in batch]
    return batch["input_ids"].tolist()  # type: ignore[no-any-return]


class SpoiledNLL(NLL):
    """NLL that is not a number in one step of one process."""

    def __init__(self, spoil: list[int] | None) -> None:
        super().__init__()
        self.spoil = spoil  # [step, rank]
        self.now = lambda: [0, 0]

    def forward(self, lm: Any, tokens: Any) -> Any:
        values = super().forward(lm, tokens)
        spoilt = torch.is_grad_enabled() and self.spoil == self.now()
        return values * math.nan if spoilt else values


class PackedForgetRetain(ForgetRetain):
    """The same rows, packed into one."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {name: pack(part) for name, part in batch.items()} if "forget" in batch else batch


def pack(batch: list[Example]) -> dict[str, Tensor]:
    ids = torch.cat([torch.tensor(example.input_ids) for example in batch])
    labels = torch.cat([torch.tensor(example.labels) for example in batch])
    positions = torch.cat([torch.arange(len(example.labels)) for example in batch])
    return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}


def make_module(settings: dict[str, Any]) -> LitUnlearn:
    every = settings.get("update_every", "step")
    constraints = {
        "nll": Constraint(
            SpoiledNLL(settings.get("spoil")),
            Relative(settings.get("relative", -0.3)),  # out of reach, so that λ moves
            PIMultiplier(lr=5.0, kp=2.0, nu=0.5, init=5.0),
            warmup_epochs=1,
            smoothing=settings.get("smoothing", 0.0),
            update_every=every,
        ),
        "general": GENERAL[settings.get("general", "nll")](
            DualAscent(lr=2.0, init=1.0), stream="general", update_every=every
        ),
    }
    robustness = settings.get("robustness")
    return LitUnlearn(
        LanguageModel(settings["model"], adapter=settings.get("adapter"), teacher=settings.get("teacher")),
        FORGET[settings.get("forget", "margin")](),
        constraints,
        OPTIMIZERS[settings.get("optimizer", "sgd")],
        Schedule("linear", warmup_epochs=0.5),
        micro_batch_size=settings.get("micro_batch_size"),
        gradient_clip_val=settings.get("gradient_clip_val", 5.0),
        forget_weight=settings.get("forget_weight", 1.0),
        passes=settings.get("passes", "joint"),
        robustness=None if robustness is None else ROBUSTNESS[robustness](),
    )


def run(settings: dict[str, Any], folder: Path, **place: Any) -> dict[str, Any]:
    """One fit; returns what this process saw.

    Args:
        settings: ``model`` and ``data`` (folder of the rows), and whatever differs from a plain run.
        folder: For checkpoints.
        place: Trainer settings for strategy and devices.
    """
    warnings.filterwarnings("ignore")
    L.seed_everything(settings.get("seed", 0), verbose=False)
    module = make_module(settings)
    module.reference_cache.folder = folder / "reference_logp"  # of this run alone
    if settings.get("padded"):
        load = module.configure_model

        def load_and_pad() -> None:
            load()
            module.lm.packs = False

        module.configure_model = load_and_pad  # type: ignore[method-assign]
    kind = PackedForgetRetain if settings.get("packed") else ForgetRetain
    rows = Path(settings["data"])
    data = kind(
        str(rows / "forget.jsonl"),
        str(rows / "retain.jsonl"),
        {"general": str(rows / "general.jsonl")},
        batch_size=4,
        retain_batch_size=5,
        eval_batch_size=3,
    )
    recorder = Recorder()
    result: dict[str, Any] = {}
    add = module.primal_step._sum_over_processes

    def spy(sums: Tensor) -> Tensor:
        recorder.steps[-1]["local"].append(sums.clone())
        return sums if settings.get("no_reduction") else add(sums)

    module.primal_step._sum_over_processes = spy  # type: ignore[method-assign]
    module.constraints["nll"].objective.now = lambda: [module.global_step, module.global_rank]  # type: ignore[attr-defined]
    callbacks: list[L.Callback] = [recorder]
    if settings.get("checkpoints") == "own":
        callbacks += [ResumeCheckpoint(every_n_train_steps=1, dirpath=str(folder)), Stop(settings["stop_after"])]
    elif "checkpoints" in settings:
        every = {"every_n_train_steps": 1} if settings["checkpoints"] == "steps" else {"every_n_epochs": 1}
        callbacks.append(ModelCheckpoint(folder, "{step}", save_top_k=-1, auto_insert_metric_name=False, **every))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=settings.get("max_epochs", 3),
        check_val_every_n_epoch=settings.get("measure_every", 1),
        precision=settings.get("precision", "32-true"),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing="checkpoints" in settings,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **place,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=settings.get("ckpt_path"))
    except (ValueError, Stopped) as error:
        result["error"] = str(error)
    if settings.get("validate"):
        result["validated"] = {
            name: value
            for part in trainer.validate(module, datamodule=data, verbose=False)
            for name, value in part.items()
        }
    weights = whole_state(module.lm)
    return result | {
        "world_size": trainer.world_size,
        "rank": trainer.global_rank,
        "strategy": type(trainer.strategy).__name__,
        "steps": recorder.steps,
        "weights": module.lm.model.state_dict() if weights is None else weights,  # type: ignore[union-attr]
        "trained": [name for name, parameter in module.lm.model.named_parameters() if parameter.requires_grad],  # type: ignore[union-attr]
        "values": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "multipliers": {name: constraint.multiplier.value for name, constraint in module.constraints.items()},
        "best": module.best and module.best._asdict(),
        "reference_logp": module.reference_cache.values,
        "level": module.forget.level and module.forget.level.value,
    }


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "fsdp2-file": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
}


def main(folder: Path) -> None:
    for name, settings in json.loads((folder / "scenarios.json").read_text()).items():
        place = {"strategy": STRATEGIES[settings["strategy"]](), "devices": 2}
        result = run(settings, folder / name, **place)
        torch.save(result, folder / f"{name}-rank{result['rank']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
