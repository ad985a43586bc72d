"""The settings of the paper, one overlay each: what they say reaches the objects."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command_line import ROOT, instantiate

from lit_unlearn import MUSE, TOFU

METHODS = ["dpo", "npo", "pdu"]


class Paper(NamedTuple):
    """What an overlay sets."""

    model: str
    epsilon: float
    epochs: int
    tokenizer: str | None = None


LLAMA_2 = "meta-llama/Llama-2-{}b-hf"
PAPER = {
    "tofu_llama-3.2-1b": Paper("open-unlearning/tofu_Llama-3.2-1B-Instruct_full", 0.3, 10),
    "tofu_llama-3.2-3b": Paper("open-unlearning/tofu_Llama-3.2-3B-Instruct_full", 0.3, 10),
    "tofu_llama-3.1-8b": Paper("open-unlearning/tofu_Llama-3.1-8B-Instruct_full", 0.3, 30),
    "tofu_gemma-7b": Paper("tamarsonha/TOFU-target-gemma-7b-it", 0.3, 20, "google/gemma-7b-it"),
    "muse_news_llama-2-7b": Paper("muse-bench/MUSE-News_target", 1.5, 10, LLAMA_2.format(7)),
    "muse_books_llama-2-7b": Paper("muse-bench/MUSE-Books_target", 0.1, 10, LLAMA_2.format(7)),
    "muse_news_llama-2-13b": Paper("tamarsonha/MUSE-News-target-Llama-2-13b-hf", 0.8, 10, LLAMA_2.format(13)),
    "muse_books_llama-2-13b": Paper("tamarsonha/MUSE-Books-target-Llama-2-13b-hf", 0.6, 10, LLAMA_2.format(13)),
}
SHARED = {"tofu": (100.0, 5.0, 5), "muse": (50.0, 1.0, 3)}  # first multiplier, its step, warm-up epochs


def test_every_overlay_is_in_the_table() -> None:
    assert {file.stem for file in (ROOT / "configs" / "paper").iterdir()} == PAPER.keys()


@pytest.mark.parametrize("name", [*PAPER, "muse"])
def test_the_papers_numbers(name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = name.split("_")[0]
    files = [f"--config={file}.yaml" for file in (benchmark, *([f"paper/{name}"] if name in PAPER else []))]
    made = instantiate(["fit", *files, "--trainer.accelerator=cpu"], monkeypatch)
    wanted = PAPER.get(name, PAPER["muse_news_llama-2-7b"])
    model, data, nll = made.model, made.datamodule, made.model.constraints["nll"]
    assert (model.lm.name, model.lm.tokenizer_name) == (wanted.model, wanted.tokenizer or wanted.model)
    assert (nll.epsilon, made.trainer.max_epochs) == (wanted.epsilon, wanted.epochs)
    assert (nll.multiplier.value, nll.multiplier.lr, nll.warmup_epochs) == SHARED[benchmark]
    assert (data.batch_size, data.retain_batch_size, model.micro_batch_size) == (32, 32, 4)
    optimizer = model._optimizer([torch.nn.Parameter(torch.zeros(1))])
    decay, schedule = (0.01, ("linear", 1)) if benchmark == "tofu" else (0.0, None)
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 1e-5)
    assert optimizer.defaults["weight_decay"] == decay
    assert (model._scheduler and (model._scheduler.name, model._scheduler.warmup_epochs)) == schedule
    if benchmark == "tofu":
        assert isinstance(data, TOFU)
        assert [source.name for source in data.sources.values()] == ["forget10", "retain90"]
        return
    assert isinstance(data, MUSE)
    path = f"muse-bench/MUSE-{'Books' if 'books' in name else 'News'}"
    places = [(source.path, source.name, source.split) for source in data.sources.values()]
    assert places == [(path, "raw", "forget"), (path, "raw", "retain1")]
    assert data.max_length == 2048


@pytest.mark.parametrize("method", METHODS)
def test_methods_go_over_muse(method: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files set what concerns answers, which raw text has none of."""
    made = instantiate(
        ["fit", "--config=muse.yaml", f"--config=method/{method}.yaml", "--trainer.accelerator=cpu"], monkeypatch
    )
    assert isinstance(made.datamodule, MUSE)


@pytest.mark.parametrize("option", ["question_column=text", "template=x"])
def test_raw_text_has_no_settings_of_questions(
    option: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        instantiate(["fit", "--config=muse.yaml", f"--data.{option}", "--trainer.accelerator=cpu"], monkeypatch)
    assert option.split("=")[0] in capsys.readouterr().err
