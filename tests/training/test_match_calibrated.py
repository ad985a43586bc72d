"""`MatchCalibrated` in a run: each answer has a level of its own, from the base model and from rows that neither model saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, MatchCalibrated
from lit_unlearn.data.example import collate


def make(model_dir: str, base_dir: str, factor: float) -> LitUnlearn:
    bound = Constraint(NLL(), 50.0, DualAscent(lr=1.0, init=0.0))
    forget = MatchCalibrated("unseen", factor)
    return LitUnlearn(
        LanguageModel(model_dir, teacher=base_dir), forget, {"nll": bound}, lambda p: torch.optim.Adam(p, lr=3e-3)
    )


def read_rows(folder: str) -> ForgetRetain:
    streams = {"unseen": f"{folder}/general.jsonl"}
    return ForgetRetain(f"{folder}/forget.jsonl", f"{folder}/retain.jsonl", streams=streams, batch_size=5)


@torch.no_grad()
def compute_nll(model: torch.nn.Module, data: ForgetRetain, stream: str) -> torch.Tensor:
    """NLL per token of every answer, from transformers' own logits."""
    values = []
    for example in data.examples[stream]:
        batch = collate([example._replace(alternate=None)], 0)
        labels = batch["labels"][0, 1:]
        logp = model(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        answer = labels != -100
        values.append(-logp[answer].gather(1, labels[answer][:, None]).mean())
    return torch.stack(values)


@pytest.mark.parametrize("factor", [0.9, 1.2])
def test_answers_are_led_to_their_own_levels(
    factor: float,
    make_trainer: Callable[..., L.Trainer],
    tiny_lm: Callable[..., LanguageModel],
    model_dir: str,
    rows_dir: str,
    tmp_path: Path,
) -> None:
    base = tiny_lm(seed=5)
    base.load(torch.float32)
    base_dir = str(base.save(tmp_path / "base"))
    data, module = read_rows(rows_dir), make(model_dir, base_dir, factor)
    make_trainer(max_epochs=10).fit(module, datamodule=data)

    before, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_dir, base_dir))
    ratio = compute_nll(before, data, "unseen") / compute_nll(teacher, data, "unseen")
    assert module.forget.level is not None
    assert module.forget.level.value == pytest.approx(factor * ratio.mean().item(), rel=1e-4)
    levels = module.forget.level.value * compute_nll(teacher, data, "forget")
    after = compute_nll(AutoModelForCausalLM.from_pretrained(module.lm.save(tmp_path / "out")), data, "forget")
    distances = [(nll - levels).square().mean() for nll in (compute_nll(before, data, "forget"), after)]
    assert distances[1] < distances[0] / 10
