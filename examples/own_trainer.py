"""Forget inside your own LightningModule, beside a task loss of your own.

    python examples/own_trainer.py --model runs/demo/target --output runs/examples/own_trainer

``Assistant`` is a plain LightningModule for continued training: loaders of padded Hugging Face batches, automatic
optimisation, ``model(**batch).loss``. Its task is to learn two new authors. In the same steps it forgets two authors, while
the NLL of the eighteen others stays below a bound. What it takes from lit_unlearn does not depend on Lightning:
`LanguageModel` around the model, the objectives `LogitMargin` and `NLL`, a `Constraint` with its multiplier, and `AnswerSuite`
to measure. Callbacks and logger are Lightning's usual ones.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup

from lit_unlearn import NLL, AnswerSuite, Constraint, DualAscent, FictionalAuthors, LanguageModel, LogitMargin, Relative


class Assistant(L.LightningModule):
    """Learns new examples and forgets old ones: descends task loss + 0.01 · margin² + λ · retain NLL."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.lm = lm
        self.margin, self.nll = LogitMargin(), NLL()
        self.bound = Constraint(self.nll, Relative(0.5), DualAscent(lr=10, init=2), warmup_epochs=2)
        self.suite = AnswerSuite()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        task = self.lm.model(**batch["new"]).loss
        forget = self.lm.loss(self.margin, batch["forget"])
        retain = self.lm.loss(self.nll, batch["retain"])

        # The primal step uses the λ from before the dual step.
        multiplier = self.bound.multiplier.value
        self.bound.update(retain.item(), self.current_epoch)  # on several processes, average the value first
        self.log_dict({"task": task, "forget": forget, "retain": retain, "multiplier": multiplier})
        return task + 0.01 * forget + multiplier * retain

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        stream = list(self.trainer.val_dataloaders)[dataloader_idx]
        self.lm(batch, partial(self.suite.update, stream, self.lm))

    def on_validation_epoch_end(self) -> None:
        values = self.suite.compute()
        self.suite.reset()
        if self.bound.level.measured is None:
            # The first validation is that of the model before unlearning, which a relative epsilon refers to.
            self.bound.level.set(values["retain/nll"])
        # Infinite where the constraint is violated, so that checkpoints and early stopping never choose such a model.
        feasible = self.bound.violation(values["retain/nll"]) <= 0
        values["feasible_forget"] = values["forget/margin"] if feasible else float("inf")
        self.log_dict({f"val/{name}": value for name, value in values.items()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.lm.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, 5, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # λ, the controller's memory and the measured epsilon: a resumed run needs all three.
        checkpoint["bound"] = self.bound.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bound.load_state_dict(checkpoint["bound"])


class PrintAnswer(Callback):
    """Prints the model's answer to a question, before and after the fit."""

    def __init__(self, question: str) -> None:
        self.prompt = f"Question: {question}\nAnswer:"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            tokenizer, model = pl_module.lm.tokenizer, pl_module.lm.model
            inputs = tokenizer(self.prompt, return_tensors="pt").to(pl_module.device)
            output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
            print(tokenizer.decode(output[0], skip_special_tokens=True))


def build_loader(rows: Any, tokenizer: Any, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """Return padded batches of questions and answers, with labels on the answer alone."""
    examples = []
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return DataLoader(examples, batch_size, shuffle, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
    parser.add_argument("--epochs", default=12, type=int, help="at most: the run stops at a margin below 1")
    parser.add_argument(
        "--output", default="runs/examples/own_trainer", type=Path, help="for model, checkpoint and logs"
    )
    options = parser.parse_args()
    L.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = {**FictionalAuthors(20, 2).load(), "new": FictionalAuthors(22, 2).load_set("forget")}
    sizes = {"forget": 5, "retain": 20, "new": 5}
    train = {name: build_loader(rows[name], tokenizer, size, shuffle=True) for name, size in sizes.items()}
    val = {name: build_loader(rows[name], tokenizer, 50) for name in sizes}

    module = Assistant(LanguageModel.wrap(model, tokenizer))
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=CSVLogger(options.output, "logs"),
        log_every_n_steps=1,
        callbacks=[
            ModelCheckpoint(options.output, "best", monitor="val/feasible_forget", enable_version_counter=False),
            EarlyStopping("val/feasible_forget", patience=10, stopping_threshold=1.0, check_finite=False),
            LearningRateMonitor("step"),
            PrintAnswer(rows["forget"][0]["question"]),
        ],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = trainer.validate(module, val, verbose=False)[0]  # measures the relative epsilon, too
    trainer.fit(module, train, val)
    after = trainer.validate(module, val, ckpt_path="best", verbose=False)[0]
    module.lm.save(options.output / "model")

    print(f"\n{'answer probability':<20}{'before':>10}{'after':>10}")
    for name in sizes:
        print(f"{name:<20}{before[f'val/{name}/probability']:>10.4f}{after[f'val/{name}/probability']:>10.4f}")
    nll, epsilon, multiplier = after["val/retain/nll"], module.bound.epsilon, module.bound.multiplier.value
    comparison = "≤" if nll <= epsilon else ">"
    state = "feasible" if nll <= epsilon else "violated"
    print(f"retain NLL {nll:.5f} {comparison} epsilon {epsilon:.5f} ({state}); λ {multiplier:.2f}")


if __name__ == "__main__":
    main()
