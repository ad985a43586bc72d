"""Embedded authors, tiny models that were trained on some of them, and a policy that suits both: for the tests of audits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY

from lit_unlearn import LanguageModel, QABenchmark
from lit_unlearn.data.encoding import encode_examples
from lit_unlearn.data.encoding_settings import EncodingSettings
from lit_unlearn.data.fictional_authors import QUESTIONS_PER_AUTHOR, fictional_authors

# Of one author each, and without wrong answers: these tests are of the default tier.
_ROWS_PER_SET = 8
SETS: dict[str, list[dict[str, Any]]] = {}
for _author, _name in enumerate(("retain", "forget", "holdout")):
    _rows = fictional_authors(3)[QUESTIONS_PER_AUTHOR * _author :][:_ROWS_PER_SET]
    SETS[_name] = [{"question": row["question"], "answer": row["answer"]} for row in _rows]
POLICY: dict[str, Any] = {
    "name": "tests",
    "min_rows": 4,
    "max_new_tokens": 4,
    "attacks": {"relearn": {"share": 0.5, "steps": 5, "lr": 0.001}},
    "requirements": {
        "forget_gap": {"at_most": 0.35},
        "relearned_gap": {"at_most": 0.35},
        "rounded_8bit_probability": {"at_most": 0.6},
        "forget_rouge": {"at_most": 0.1, "required": False},
    },
}


def write_policy(folder: Path, **changes: Any) -> str:
    file = folder / "policy.yaml"
    file.write_text(yaml.safe_dump({**POLICY, **changes}), encoding="utf-8")
    return str(file)


def write_sets(folder: Path) -> dict[str, str]:
    """Write the rows of every set as JSON lines."""
    files = {}
    for name, rows in SETS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[name] = str(path)
    return files


def benchmark(**settings: Any) -> QABenchmark:
    return QABenchmark(**{**SETS, "max_new_tokens": 4, **settings})


@cache
def trained(tokenizer_dir: str, *sets: str, steps: int = 50) -> str:
    """Directory of a tiny model that saw the rows of some sets in some steps of AdamW; without a set, one of random weights."""
    torch.manual_seed(0)
    lm = LanguageModel(config={**TINY, "num_hidden_layers": 1}, tokenizer=tokenizer_dir)
    lm.load(torch.float32)
    pairs = [(row["question"], row["answer"]) for name in sets for row in SETS[name]]
    if pairs:
        examples = encode_examples(pairs, lm.tokenizer, name="rows", settings=EncodingSettings())
        longest = max(len(example.input_ids) for example in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for number, example in enumerate(examples):
            ids[number, : len(example.input_ids)] = torch.tensor(example.input_ids)
            labels[number, : len(example.labels)] = torch.tensor(example.labels)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
        for _ in range(steps):
            # The padding stands after the row, and is not supervised.
            lm.model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return str(lm.save(Path(tokenizer_dir).parent / "-".join(["trained", *sets, str(steps)])))


def make_key(file: Path) -> str:
    """Write a private key and, beside it, the public one; return the digits of the latter."""
    ed25519 = pytest.importorskip(
        "cryptography.hazmat.primitives.asymmetric.ed25519", reason="signatures need the extra `sign`"
    )
    from cryptography.hazmat.primitives import serialization

    key = ed25519.Ed25519PrivateKey.generate()
    pem, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    file.write_bytes(key.private_bytes(encoding, pem, serialization.NoEncryption()))
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    file.with_suffix(".pub").write_bytes(public)
    return str(key.public_key().public_bytes_raw().hex())
