"""TOFU subsets, the tokenizer, and the models that are unlearned from or compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import protocol
from benchmarks.quality.results_files import read_json_lines, write_json_lines

ROWS_PER_AUTHOR = 20


def prepare_data(tofu: Path, work: Path) -> None:
    """Write one folder per forget set with TOFU's file names, and train the tokenizer.

    Two folders inside it hold fewer sets, for measurements that need no more: ``alone`` only the forget set, ``tuning``
    the forget set and the retain set.

    Args:
        tofu: Folder with TOFU's files.
        work: Folder of the sweep; data goes to ``data/<authors>``, the tokenizer to ``tokenizer``.
    """
    first_authors = read_json_lines(tofu / "retain_perturbed.json")
    last_authors = read_json_lines(tofu / "forget10_perturbed.json")
    # No model of the sweep is fine-tuned on these ten authors: they give MatchUnseen its level.
    unseen = read_json_lines(tofu / "retain90.json")[20 * ROWS_PER_AUTHOR : 30 * ROWS_PER_AUTHOR]

    for size in protocol.SIZES:
        count = size * ROWS_PER_AUTHOR
        forget = last_authors[-count:]
        files = {
            "forget10.json": forget,
            "forget10_perturbed.json": forget,
            "retain90.json": [*first_authors, *last_authors[:-count]],
            "retain_perturbed.json": first_authors,
            "alone/forget10_perturbed.json": forget,
            "tuning/forget10_perturbed.json": forget,
            "tuning/retain_perturbed.json": first_authors,
            "unseen.json": unseen,
        }
        for name in ("real_authors_perturbed.json", "world_facts_perturbed.json"):
            files[name] = read_json_lines(tofu / name)
        for name, rows in files.items():
            write_json_lines(work / "data" / str(size) / name, rows)

    if not (work / "tokenizer" / "tokenizer.json").is_file():
        train_tokenizer(work)


def train_tokenizer(work: Path) -> None:
    """Train the tokenizer on all 800 rows and save it, so that every model of the sweep shares it."""
    from lit_unlearn import ForgetRetain
    from lit_unlearn.data import tokenizer

    data = ForgetRetain(str(work / "data/4/forget10.json"), str(work / "data/4/retain90.json"))
    trained = tokenizer.train_tokenizer(data.texts(), protocol.FINETUNE["vocab_size"])
    trained.save_pretrained(work / "tokenizer")


def model_name(size: int | None, seed: int) -> str:
    """Return the name of the target model (``size`` is ``None``), or of the retain-only model of a forget set."""
    return f"target-{seed}" if size is None else f"retain_only-{size}-{seed}"


def model_folder(size: int | None, seed: int, work: Path) -> Path:
    """Return the folder of a fine-tuned model, whether it exists or not."""
    return work / "models" / model_name(size, seed)


def is_finetuned(size: int | None, seed: int, work: Path) -> bool:
    """Return whether a model has been exported; the export is atomic, so its config file stands for all of it."""
    return (model_folder(size, seed, work) / "config.json").is_file()


def finetune_arguments(size: int | None, seed: int, work: Path) -> list[str]:
    """Return the command line that fine-tunes a model from random weights."""
    settings: dict[str, Any] = protocol.FINETUNE
    return [
        "fit",
        "--model.class_path=LitFinetune",
        f"--model.lm.config={json.dumps(settings['config'])}",
        f"--model.lm.tokenizer={work / 'tokenizer'}",
        "--model.optimizer.class_path=torch.optim.AdamW",
        f"--model.optimizer.init_args.lr={settings['lr']}",
        f"--model.optimizer.init_args.weight_decay={settings['weight_decay']}",
        '--model.scheduler={"name": "linear", "warmup_epochs": 1}',
        "--model.gradient_clip_val=1",
        "--data.class_path=TOFU",
        # Every folder has the same 800 rows in total; it only matters to the retain-only model how they are split.
        f"--data.source={work / 'data' / str(size or protocol.TUNED_SIZE)}",
        "--data.max_length=256",
        f"--data.batch_size={settings['batch_size']}",
        f"--data.train_on={'all' if size is None else 'retain'}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        f"--trainer.max_epochs={settings['epochs']}",
        f"--trainer.check_val_every_n_epoch={settings['epochs']}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_checkpointing=false",
        f"--logs.save_dir={work / 'logs'}",
        f"--logs.name={model_name(size, seed)}",
        f"--export.dirpath={model_folder(size, seed, work)}",
    ]
