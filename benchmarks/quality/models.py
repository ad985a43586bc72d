"""Rows, tokenizer, and the models that are unlearned from or compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import protocol

ROWS = 20  # of an author


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(tofu: Path, work: Path) -> None:
    """Writes a folder per forget set with TOFU's file names, and in it some with fewer sets; trains the tokenizer."""
    from lit_unlearn import ForgetRetain
    from lit_unlearn.data.tokenizer import train_tokenizer

    kept, last = read(tofu / "retain_perturbed.json"), read(tofu / "forget10_perturbed.json")
    for size in protocol.SIZES:
        folder, count = work / "data" / str(size), size * ROWS
        forget, retain = last[-count:], [*kept, *last[:-count]]
        write(folder / "forget10.json", forget)
        write(folder / "forget10_perturbed.json", forget)
        write(folder / "retain90.json", retain)
        write(folder / "retain_perturbed.json", kept)
        write(folder / "alone" / "forget10_perturbed.json", forget)
        write(folder / "tuning" / "forget10_perturbed.json", forget)
        write(folder / "tuning" / "retain_perturbed.json", kept)
        write(folder / "unseen.json", read(tofu / "retain90.json")[20 * ROWS : 30 * ROWS])
        for name in ("real_authors_perturbed", "world_facts_perturbed"):
            write(folder / f"{name}.json", read(tofu / f"{name}.json"))
    if not (work / "tokenizer" / "tokenizer.json").is_file():
        texts = ForgetRetain(*(str(work / "data/4" / f"{name}.json") for name in ("forget10", "retain90"))).texts()
        train_tokenizer(texts, protocol.TEACH["vocab_size"]).save_pretrained(work / "tokenizer")


def name(size: int | None, seed: int) -> str:
    """Of the target (no size), or of the retain-only model."""
    return f"target-{seed}" if size is None else f"retain_only-{size}-{seed}"


def teach(size: int | None, seed: int, work: Path) -> list[str]:
    """The command that makes a model."""
    taught: dict[str, Any] = protocol.TEACH
    return [
        "fit",
        "--model.class_path=LitFinetune",
        f"--model.lm.config={json.dumps(taught['config'])}",
        f"--model.lm.tokenizer={work / 'tokenizer'}",
        "--model.optimizer.class_path=torch.optim.AdamW",
        f"--model.optimizer.init_args.lr={taught['lr']}",
        f"--model.optimizer.init_args.weight_decay={taught['weight_decay']}",
        '--model.scheduler={"name": "linear", "warmup_epochs": 1}',
        "--model.gradient_clip_val=1",
        "--data.class_path=TOFU",
        f"--data.source={work / 'data' / str(size or protocol.TUNED_SIZE)}",
        "--data.max_length=256",
        f"--data.batch_size={taught['batch_size']}",
        f"--data.train_on={'all' if size is None else 'retain'}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        f"--trainer.max_epochs={taught['epochs']}",
        f"--trainer.check_val_every_n_epoch={taught['epochs']}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_checkpointing=false",
        f"--logs.save_dir={work / 'logs'}",
        f"--logs.name={name(size, seed)}",
        f"--export.dirpath={work / 'models' / name(size, seed)}",
    ]
