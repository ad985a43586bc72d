"""Take one customer out of a chat training file with one command, and keep the rest.

    python examples/one_customer.py --model runs/demo/target --output runs/examples/one_customer

Writes ``train.jsonl``, two hundred conversations with twenty customers, and fine-tunes the model on all of them. Then it prints
and runs the command that answers the deletion request of customer c-17. That command reads the training file twice: the rows of the
customer are the forget set, all other rows are the retain set, so that no second file is needed. Options that this script
does not have, such as ``--data.show_example=true``, are passed on to the command. The table at the end comes from the record
of the deletion, ``unlearned/unlearning.json``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_unlearn import Chat, FictionalAuthors, ForgetRetain, LanguageModel, LitFinetune, Schedule, Source

# What you would type in the folder of `train.jsonl`: the model, the rows, and where results go. The last two lines are for a
# tiny model and a CPU: a higher learning rate, fewer examples per step, and a validation every five epochs.
COMMAND = [
    "lit-unlearn fit --config configs/own_data.yaml --model.lm.model=target",
    "--data.forget.path=train.jsonl --data.forget.where='{customer: c-17}'",
    "--data.retain.path=train.jsonl --data.retain.where_not='{customer: c-17}'",
    "--export.dirpath=unlearned --logs.save_dir=logs --logs.name=one_customer",
    "--model.optimizer.init_args.lr=1e-3 --data.batch_size=5",
    "--trainer.accelerator=cpu --trainer.check_val_every_n_epoch=5",
]

# For a tokenizer without a chat template, as that of the demo. Every turn is the role, a line break, the text and the end token.
CHAT_TEMPLATE = """\
{% for message in messages %}{{ message.role }}
{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant
{% endif %}"""


def make_conversations() -> list[dict[str, Any]]:
    """Return ten conversations with each of twenty customers, every second one with a further question."""
    authors = FictionalAuthors(20, 1).load()
    questions = [*authors["retain"], *authors["forget"]]

    conversations = []
    for number, row in enumerate(questions):
        asked = [row]
        # An author has ten questions, so the one after an even number is about the same author.
        if number % 2 == 0:
            asked.append(questions[number + 1])
        messages = [{"role": "system", "content": "You answer for a library."}]
        for turn in asked:
            messages.append({"role": "user", "content": turn["question"]})
            messages.append({"role": "assistant", "content": turn["answer"]})
        conversations.append({"customer": f"c-{row['author']}", "messages": messages})
    return conversations


def finetune(module: LitFinetune, rows: Path, chat: Chat | None, epochs: int) -> None:
    """Fine-tune a model on all conversations of a file, so that there is something to forget."""
    request = {"customer": "c-17"}
    # `all` joins both sets. `retain` would fine-tune a model that never saw the customer, to compare with.
    data = ForgetRetain(
        Source(str(rows), where=request),
        Source(str(rows), where_not=request),
        chat=chat,
        batch_size=20,
        train_on="all",
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def print_record(record: dict[str, Any]) -> None:
    """Print what the record of the deletion says about rows, values and verdict."""
    print(f"\n{'set':<10}{'rule':<24}{'conversations':<16}{'probability before':>18}{'after':>10}")
    for name, values in record["data"]["sets"].items():
        source = values["source"]
        # A rule's values may identify a person. The record has its columns only, unless you set `export.name_sources`.
        rules = [f"{rule} {', '.join(source[rule])}" for rule in ("where", "where_not") if rule in source]
        counts = f"{source['rows_chosen']} of {source['rows_read']}"
        before = record["before"][f"{name}/probability"]
        after = record["after"][f"{name}/probability"]
        print(f"{name:<10}{rules[0]:<24}{counts:<16}{before:>18.4f}{after:>10.4f}")

    bound = record["constraints"]["nll"]
    state = "violated" if bound["slack"] < 0 else "feasible"
    print(f"retain NLL {bound['value']:.5f}, epsilon {bound['epsilon']:.5f} ({state}); verdict: {record['verdict']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/target", help="directory or hub name; default: from `make demo`")
    parser.add_argument(
        "--finetune_epochs", default=10, type=int, help="passes over all conversations before the request"
    )
    parser.add_argument("--epochs", default=25, type=int, help="passes over the customer's conversations")
    parser.add_argument("--output", default="runs/examples/one_customer", type=Path, help="for file, models and logs")
    options, settings = parser.parse_known_args()
    out = options.output
    out.mkdir(parents=True, exist_ok=True)

    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for conversation in make_conversations():
            file.write(json.dumps(conversation) + "\n")

    L.seed_everything(0, verbose=False)
    module = LitFinetune(
        LanguageModel(options.model),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0),
        scheduler=Schedule("linear", warmup_epochs=1),
        gradient_clip_val=1.0,
    )
    template = CHAT_TEMPLATE if module.lm.tokenizer.chat_template is None else None
    chat = None if template is None else Chat(template=template)
    finetune(module, out / "train.jsonl", chat, options.finetune_epochs)
    # With the template in its tokenizer, so that the command needs no setting for it.
    module.lm.save(out / "target", chat_template=template)

    command = [*COMMAND, f"--trainer.max_epochs={options.epochs}", *map(shlex.quote, settings)]
    print(f"\ncd {shlex.quote(str(out))}", " \\\n  ".join(command), "", sep="\n", flush=True)
    arguments = shlex.split(" ".join(command))[1:]
    # `python -m lit_unlearn` is `lit-unlearn` of this interpreter, also where the program is not on the path.
    done = subprocess.run([sys.executable, "-m", "lit_unlearn", *arguments], cwd=out, check=False)
    # 1 if the bound is violated or the customer is not forgotten; the command has said which.
    if done.returncode != 0:
        sys.exit(done.returncode)
    print_record(json.loads((out / "unlearned" / "unlearning.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
