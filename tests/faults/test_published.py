"""What is published: settings from a list, no paths, no secrets, rows by digest; and it is shown before it is uploaded."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import torch
import yaml
from command_line import quick
from fake_judge import Server, graded, judge, results, say, server  # noqa: F401  (fixtures)

from lit_unlearn import NLL, Constraint, DualAscent, ForgetRetain, LanguageModel, LitUnlearn, LogitMargin, cli
from lit_unlearn.callbacks import ExportModel
from lit_unlearn.errors import EndpointError, OutputError
from lit_unlearn.export.hub import upload_export
from lit_unlearn.export.published import publish_record
from lit_unlearn.utils.redaction import REDACTED, is_secret, redact_secrets

SECRETS = [
    "api_key",
    "API_KEY",
    "apiKey",
    "WANDB_API_KEY",
    "token",
    "hf_token",
    "accessToken",
    "client_secret",
    "password",
]
SECRETS += ["db_passwd", "aws_secret_access_key", "credentials", "Authorization"]
HARMLESS = [
    "tokenizer",
    "max_new_tokens",
    "token_budget",
    "eos_token",
    "pad_token_id",
    "allow_special_tokens",
    "monitor",
]


@pytest.mark.parametrize("key", SECRETS)
def test_secrets_are_found_by_their_key(key: str) -> None:
    assert is_secret(key)
    settings = {"trainer": {"logger": [{"init_args": {key: "CANARY", "name": "run"}}]}}
    assert redact_secrets(settings) == {"trainer": {"logger": [{"init_args": {key: REDACTED, "name": "run"}}]}}


@pytest.mark.parametrize("key", HARMLESS)
def test_settings_of_texts_are_no_secrets(key: str) -> None:
    assert not is_secret(key)


def test_an_address_loses_its_password() -> None:
    assert redact_secrets("postgresql://me:CANARY@host:5432/db") == f"postgresql://{REDACTED}@host:5432/db"
    assert redact_secrets("https://host/a@b") == "https://host/a@b"


RECORD: dict[str, Any] = {
    "kind": "unlearned",
    "model": {"name": "/home/me/CANARY/target", "weights": {}},
    "data": {
        "class": "ForgetRetain",
        "template": "/{question} {answer}",
        "sets": {
            "forget": {
                "source": {"path": "/data/CANARY/john_doe.jsonl", "max_rows": None, "sha256": "ab"},
                "rows": 3,
                "sha256": "cd",
            },
            "retain": {"source": {"path": "org/john_doe", "name": "c", "split": "train", "max_rows": 5}, "rows": 5},
        },
    },
    "benchmarks": [
        {
            "suite": "qa",
            "model": {"name": "/home/me/CANARY/target"},
            "data": {"forget": {"source": "/data/john_doe.jsonl", "rows": 3, "tokens": "ef"}},
            "settings": {"fluency_model": "/home/me/CANARY/judge"},
            "retain_results": "/home/CANARY.json",
        }
    ],
    "config": {
        "seed_everything": 3,
        "trainer": {
            "precision": "32-true",
            "max_epochs": 2,
            "devices": 1,
            "logger": {"class_path": "X", "init_args": {"api_key": "CANARY"}},
            "callbacks": [{"class_path": "CANARY"}],
            "default_root_dir": "/home/me/CANARY",
        },
        "model": {
            "class_path": "lit_unlearn.training.LitUnlearn",
            "init_args": {
                "lm": {"model": "/home/me/CANARY/target", "hf_token": "CANARY"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
                "benchmark": {"init_args": {"forget": "CANARY"}},
            },
        },
        "data": {
            "class_path": "ForgetRetain",
            "init_args": {"forget": "CANARY.jsonl", "max_length": 9, "template": "t"},
        },
        "logs": {"save_dir": "/home/me/CANARY"},
        "export": {"push_to_hub": "CANARY/x"},
    },
}


def test_a_published_record_has_what_decides_the_numbers_and_nothing_else() -> None:
    published = publish_record(RECORD)
    text = json.dumps(published)
    assert "CANARY" not in text
    assert "john_doe" not in text
    assert "/home" not in text
    config = published["config"]
    assert config["seed_everything"] == 3
    assert config["trainer"] == {"precision": "32-true", "max_epochs": 2, "devices": 1}
    assert config["model"]["init_args"]["optimizer"]["init_args"] == {"lr": 0.1}
    assert config["model"]["init_args"]["lm"]["model"] == "target"
    assert config["data"]["init_args"] == {"max_length": 9, "template": "t"}
    assert published["data"]["template"] == "/{question} {answer}"
    assert published["data"]["sets"]["forget"] == {"source": {"sha256": "ab"}, "rows": 3, "sha256": "cd"}
    assert published["benchmarks"][0]["data"] == {"forget": {"rows": 3, "tokens": "ef"}}
    assert publish_record(published) == published
    assert RECORD["model"]["name"] == "/home/me/CANARY/target"


def test_sources_are_named_where_that_is_asked_for() -> None:
    published = publish_record({**RECORD, "name_sources": True})
    assert published["data"]["sets"]["forget"]["source"] == {"sha256": "ab", "path": "john_doe.jsonl"}
    assert published["data"]["sets"]["retain"]["source"]["name"] == "c"
    assert "CANARY" not in json.dumps(published["data"])


def fit(model: str, rows: str, folder: Path, make_trainer: Callable[..., L.Trainer], **settings: Any) -> Path:
    constraint = Constraint(NLL(), 9.0, DualAscent(lr=5.0, init=3.0))
    adapter = settings.pop("adapter", None)
    module = LitUnlearn(
        LanguageModel(model, adapter=adapter),
        LogitMargin(),
        {"nll": constraint},
        lambda p: torch.optim.SGD(p, lr=0.01),
        keep="last",
    )
    data = ForgetRetain(f"{rows}/forget.jsonl", f"{rows}/retain.jsonl", batch_size=5)
    out = folder / "out"
    make_trainer(max_epochs=1, callbacks=[ExportModel(str(out), **settings)]).fit(module, datamodule=data)
    return out


@pytest.mark.parametrize("named", [False, True])
def test_an_export_shows_no_folders(
    model_dir: str, rows_dir: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer], named: bool
) -> None:
    out = fit(model_dir, rows_dir, tmp_path, make_trainer, name_sources=named, adapter={"r": 2})
    for file in out.rglob("*"):
        if file.suffix in (".json", ".md", ".jinja") and "tokenizer" not in file.name:
            text = file.read_text(encoding="utf-8")
            assert str(Path(model_dir).parent) not in text, file
            assert str(Path(rows_dir)) not in text, file
    card = (out / "README.md").read_text(encoding="utf-8")
    assert ("forget.jsonl" in card) == named
    record = json.loads((out / "unlearning.json").read_text(encoding="utf-8"))
    assert ("path" in record["data"]["sets"]["forget"]["source"]) == named
    assert len(record["data"]["sets"]["forget"]["source"]["sha256"]) == 64


def test_the_files_are_listed_before_they_are_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "an export; rm -rf x"
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1234))
    (folder / "adapter" / "a.json").write_text("{}", encoding="utf-8")

    def refuse(*_: Any, **__: Any) -> None:
        listed = capsys.readouterr().out
        assert "1,234 bytes  model.safetensors" in listed
        assert "2 bytes  adapter/a.json" in listed
        assert "1,236 bytes in all" in listed
        raise ValueError("no")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(OutputError) as caught:
        upload_export(folder, "me/it")
    assert f"hf upload me/it '{folder}' --private" in str(caught.value)


@pytest.mark.slow
def test_no_secret_of_a_run_is_written_anywhere(in_tmp: Path, model_dir: str) -> None:
    """A logger with a key, as a user gives it on the command line."""
    (in_tmp / "keyed.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n\n\nclass Keyed(CSVLogger):\n"
        "    def __init__(self, save_dir: str, api_key: str):\n        super().__init__(save_dir)\n",
        encoding="utf-8",
    )
    options = ["--trainer.logger=keyed.Keyed", "--trainer.logger.save_dir=log", "--trainer.logger.api_key=CANARY"]
    cli.main(quick(model_dir, *options, "--trainer.accelerator=cpu", "--picture.answers=0"))
    files = [file for file in in_tmp.rglob("*") if file.is_file()]
    assert any(file.name == "config.yaml" for file in files)
    assert any(file.suffix == ".ckpt" for file in files)
    assert [file for file in files if b"CANARY" in file.read_bytes()] == []
    (config,) = (file for file in files if file.name == "config.yaml")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert settings["trainer"]["logger"]["init_args"]["api_key"] == REDACTED


# The judge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_takes_nothing_elsewhere(server: Server, results: Path, status: int) -> None:  # noqa: F811
    other = Server()
    server.play = lambda question: (status, {"Location": f"{other.url}/chat/completions"}, {})
    try:
        with pytest.raises(EndpointError, match="redirects to") as caught:
            judge(results)
    finally:
        other.stop()
    assert other.url in str(caught.value)
    assert other.requests == []
    assert len(server.requests) == 1


def test_an_answer_that_is_no_text_fails_its_row(server: Server, results: Path, capsys: Any) -> None:  # noqa: F811
    server.play = lambda question: (200, {}, b"\xff\xfe\x81") if question == "forget 1?" else say(graded(question))
    judged = judge(results)
    assert judged["judge"]["scores"]["forget"]["FLUENCY"]["failed"] == 1
    assert judged["judge"]["scores"]["retain"]["FLUENCY"]["failed"] == 0


def test_replies_are_for_their_owner_alone(server: Server, results: Path, tmp_path: Path) -> None:  # noqa: F811
    judge(results)
    files = list((tmp_path / "cache" / "judge").glob("*.json"))
    assert len(files) == 8
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
