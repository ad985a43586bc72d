"""A training step reads values back from the device once.

On the meta device tensors have no values, so that every other look at one raises. Copies to the device, which can wait as well,
are seen on a GPU alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import lightning as L
import pytest
import torch
from objectives.forms import CASES
from objectives.models import VOCAB, build
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import modeling_flash_attention_utils

from lit_unlearn import (
    NLL,
    Constraint,
    DualAscent,
    LanguageModel,
    LitFinetune,
    LitUnlearn,
    LogitMargin,
    Objective,
)
from lit_unlearn.training import forward_plan, primal_step
from lit_unlearn.training.forward_plan import build_forward_plan

MakeTrainer = Callable[..., L.Trainer]
UNEQUAL, EQUAL = [4, 7, 5], [6, 6, 6]


class ReadBack:
    """Takes the place of the step's read-back: counts, and gives numbers without looking."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, values: Tensor) -> list[float]:
        self.count += 1
        return [1.0] * len(values)


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> ReadBack:
    counter = ReadBack()
    monkeypatch.setattr(primal_step, "read_back", counter)
    return counter


@pytest.fixture(autouse=True)
def autocast_knows_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows no autocast for it; it is off here, as on the CPU."""
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        function = getattr(torch, name)

        def call(device_type: str, *args: Any, function: Any = function, **settings: Any) -> Any:
            return function("cpu" if device_type == "meta" else device_type, *args, **settings)

        monkeypatch.setattr(torch, name, call)


load = cache(build)


def model_with_others(name: str) -> LanguageModel:
    """A model with its reference model and its teacher."""
    return copy.deepcopy(load(name, torch.float32))


@pytest.fixture
def meta_trainer(make_trainer: MakeTrainer) -> MakeTrainer:
    def make(**settings: Any) -> L.Trainer:
        trainer = make_trainer(**{"max_steps": 2, **settings})
        # What Lightning and the package do before the first step, they do on the CPU: they read values.
        trainer.strategy.model_to_device = lambda: trainer.lightning_module.to("meta")
        trainer.strategy.teardown = lambda: None
        return trainer

    return make


class EveryObjective(L.Callback):
    """Each step has another objective or another order of passes: a fit for each would take a minute."""

    def __init__(self) -> None:
        self.steps = list(product(CASES, ["joint", "sequential"]))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        case, passes = self.steps[batch_idx]
        print(f"{case}, {passes}")  # is shown when the step fails
        pl_module.forget, pl_module.passes = copy.deepcopy(CASES[case][0]), passes
        if pl_module.forget.level is not None:
            pl_module.forget.level.set(2.0)


def rows(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """A padded batch, two tokens of each prompt before the answer."""
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "reference_logp": -torch.rand(len(lengths))}


def steps(lengths: list[int], count: int = 2) -> DataLoader[Any]:
    forget = {**rows(lengths), "alternate": rows(lengths[::-1], seed=1)}
    return DataLoader([{"forget": forget, "retain": rows(lengths, seed=2)}] * count, batch_size=None)


def unlearner(lm: LanguageModel, forget: Objective, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), 2.0, DualAscent(lr=1.0, init=1.0))
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    return LitUnlearn(lm, forget, {"nll": constraint}, adam, gradient_clip_val=1.0, **settings)


# Torch computes the shapes of the meta device in Python, operation by operation.
slow = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    "model", ["llama", pytest.param("tied gpt2", **slow), pytest.param("llama with adapter", **slow)]
)
def test_a_step_of_any_objective_reads_back_once(model: str, meta_trainer: MakeTrainer, read_back: ReadBack) -> None:
    module, every = unlearner(model_with_others(model), LogitMargin()), EveryObjective()
    meta_trainer(max_steps=len(every.steps), callbacks=[every]).fit(module, steps(UNEQUAL, len(every.steps)))
    assert read_back.count == len(every.steps) == 2 * len(CASES)


@pytest.mark.parametrize("settings", [{}, {"passes": "sequential"}, {"micro_batch_size": 1}], ids=str)
@pytest.mark.parametrize("model", ["llama", "tied gpt2"])
def test_rows_of_equal_lengths_are_padded_and_need_no_look_at_their_mask(
    model: str, settings: Any, meta_trainer: MakeTrainer, read_back: ReadBack
) -> None:
    meta_trainer().fit(unlearner(model_with_others(model), LogitMargin(), **settings), steps(EQUAL))
    assert read_back.count == 2


def test_shared_first_tokens_need_no_look(meta_trainer: MakeTrainer, read_back: ReadBack) -> None:
    same = torch.arange(3, 15).expand(len(UNEQUAL), -1)
    step = {}
    for number, stream in enumerate(["forget", "retain"]):
        batch = rows(UNEQUAL, seed=number)
        batch["input_ids"] = torch.cat([same, batch["input_ids"]], dim=1)
        batch["attention_mask"] = torch.cat([torch.ones_like(same), batch["attention_mask"]], dim=1)
        batch["labels"] = torch.cat([torch.full_like(same, -100), batch["labels"]], dim=1)
        step[stream] = batch
    module = unlearner(model_with_others("llama"), LogitMargin())
    (forward_pass,) = build_forward_plan(step, module.terms(), True, None, "joint", shares_prefix=True)
    assert "segments" in forward_pass.batch
    meta_trainer().fit(module, DataLoader([step] * 2, batch_size=None))
    assert read_back.count == 2


def test_flash_attention_is_told_where_sequences_begin(
    meta_trainer: MakeTrainer, read_back: ReadBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, causal: bool, **_: Any
    ) -> Tensor:
        """Takes what the package's function takes, which needs a GPU, and returns the shape."""
        assert cu_seqlens_q.device == q.device == torch.device("meta")
        longest.append(max_seqlen_q)
        return q + k.mean() + v.mean()

    functions = (
        (None, attend, None, None, None),
        (modeling_flash_attention_utils._lazy_define_process_function(attend), dict),
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    module = unlearner(model_with_others("llama"), LogitMargin())
    module.lm.causal_lm.config._attn_implementation = "flash_attention_2"
    module.lm.shares_prefix = False
    meta_trainer().fit(module, steps(UNEQUAL))
    assert read_back.count == 2
    assert set(longest) == {max(UNEQUAL)}


def test_finetuning_reads_back_once_per_step(meta_trainer: MakeTrainer, read_back: ReadBack) -> None:
    module = LitFinetune(model_with_others("llama"), lambda p: torch.optim.AdamW(p, lr=1e-3), micro_batch_size=2)
    meta_trainer().fit(module, steps(UNEQUAL))
    assert read_back.count == 2


# The same tests, with a step that looks ------------------------------------------------------------------------------


def assert_found(trainer: L.Trainer, forget: Objective, lengths: list[int]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        trainer.fit(unlearner(model_with_others("llama"), forget), steps(lengths))


class Looking(NLL):
    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.look = look

    def forward(self, lm: Any, tokens: Any) -> Tensor:
        self.look(tokens.sequence)
        return super().forward(lm, tokens)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "if": lambda x: bool((x > 0).any()),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.bincount(),
    "mask": lambda x: x[x > 0],
    "repeat": lambda x: x.repeat_interleave(x),
    "cpu": lambda x: x.cpu(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_by_an_objective_is_found(look: str, meta_trainer: MakeTrainer, read_back: ReadBack) -> None:
    assert_found(meta_trainer(), Looking(LOOKS[look]), UNEQUAL)


def test_the_read_back_itself_is_found(meta_trainer: MakeTrainer) -> None:
    assert_found(meta_trainer(), LogitMargin(), UNEQUAL)


@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL], ids=str)
def test_transformers_looks_where_it_is_not_told(
    lengths: list[int], meta_trainer: MakeTrainer, read_back: ReadBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_plan, "known_packing", lambda *_: nullcontext())
    assert_found(meta_trainer(), LogitMargin(), lengths)


def test_transformers_looks_at_a_mask_of_ones(
    meta_trainer: MakeTrainer, read_back: ReadBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_plan, "drop_full_mask", dict)
    assert_found(meta_trainer(), LogitMargin(), EQUAL)


# On a GPU -------------------------------------------------------------------------------------------------------------


class RefuseWaiting(L.Callback):
    """From the second step on, torch refuses whatever makes the processor wait; the first one sets up libraries."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")
@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL], ids=str)
def test_a_step_on_a_gpu_waits_once(
    lengths: list[int], make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def read_back(values: Tensor) -> list[float]:
        nonlocal count
        count += 1
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        numbers = values.tolist()
        torch.cuda.set_sync_debug_mode(before)
        return numbers

    monkeypatch.setattr(primal_step, "read_back", read_back)
    trainer = make_trainer(max_steps=3, accelerator="gpu", callbacks=[RefuseWaiting()])
    trainer.fit(unlearner(model_with_others("llama"), LogitMargin()), steps(lengths, 3))
    assert count == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")
def test_a_look_on_a_gpu_is_found(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3, accelerator="gpu", callbacks=[RefuseWaiting()])
    with pytest.raises(RuntimeError, match="synchronizing"):
        trainer.fit(unlearner(model_with_others("llama"), LogitMargin()), steps(UNEQUAL, 3))
