"""LitUnlearn in somebody else's program: their Trainer, loaders and transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel

from lit_unlearn import NLL, Constraint, DualAscent, LanguageModel, LitUnlearn, LogitMargin, Relative


def user_loader(tokenizer: Any, texts: list[str], batch_size: int, shuffle: bool) -> DataLoader[Any]:
    """What a Hugging Face user writes: tokenised rows, the usual padding collator, a plain DataLoader."""
    rows = [tokenizer(text) for text in texts]
    features = [
        {"input_ids": r["input_ids"], "attention_mask": r["attention_mask"], "labels": r["input_ids"]} for r in rows
    ]
    return DataLoader(features, batch_size, shuffle=shuffle, collate_fn=DataCollatorForSeq2Seq(tokenizer))  # type: ignore[arg-type]


@pytest.mark.parametrize("relative", [False, True])
def test_own_trainer_loaders_and_model(relative: bool, tokenizer: Any, make_trainer: Callable[..., L.Trainer]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    forget = [f"The secret of house {n} is {n * 7}." for n in range(6)]
    retain = [f"The colour of house {n} is blue." for n in range(10)]
    epsilon = Relative(0.2) if relative else 5.0
    module = LitUnlearn(
        LanguageModel.wrap(model, tokenizer),
        forget=LogitMargin(),
        constraints={"nll": Constraint(NLL(), epsilon, DualAscent(lr=1.0, init=10.0))},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    trainer = make_trainer(max_epochs=8)
    trainer.fit(
        module,
        train_dataloaders={
            "forget": user_loader(tokenizer, forget, 2, True),
            "retain": user_loader(tokenizer, retain, 3, True),
        },
        val_dataloaders={
            "forget": user_loader(tokenizer, forget, 4, False),
            "retain": user_loader(tokenizer, retain, 4, False),
        },
    )
    assert module.lm.model is model  # trained in place
    values = trainer.callback_metrics
    assert values["val/forget/margin"] < 2.0
    assert (
        relative or values["val/retain/nll"] < values["val/forget/nll"]
    )  # 1.2 × an untaught model's loss binds nothing
    bound = module.constraints["nll"].epsilon
    assert values["val/constraint/nll/slack"].item() == pytest.approx(bound - values["val/retain/nll"].item(), abs=1e-4)


def test_wrong_batches_say_what_was_expected(
    tokenizer: Any, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    def module() -> LitUnlearn:
        constraint = Constraint(NLL(), 1.0, DualAscent(lr=1.0, init=1.0))
        return LitUnlearn(tiny_lm(), LogitMargin(), {"nll": constraint}, lambda p: torch.optim.SGD(p, lr=0.1))

    loader = user_loader(tokenizer, ["one", "two"], 1, False)
    with pytest.raises(ValueError, match="a training batch must be a dict with 'forget' among its keys"):
        make_trainer(max_epochs=1).fit(module(), loader)
    with pytest.raises(ValueError, match="'retain' among its keys"):
        make_trainer(max_epochs=1).fit(module(), {"forget": loader, "keep": loader})
    with pytest.raises(ValueError, match="must be a dict from stream name to loader"):
        make_trainer(max_epochs=1).fit(module(), {"forget": loader, "retain": loader}, loader)
    unlabelled = DataLoader([{"input_ids": torch.ones(4).long(), "labels": torch.full((4,), -100)}], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no example of the 'retain' batch has a supervised token"):
        make_trainer(max_epochs=1).fit(module(), {"forget": loader, "retain": unlabelled})
