"""`lit-unlearn inspect` on model directories: a model that was taught an answer beside one that was not."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_unlearn import LanguageModel
from lit_unlearn.cli import main
from lit_unlearn.cli.answer_page import AnswerPage
from lit_unlearn.data.encoding import encode_examples
from lit_unlearn.data.example import collate
from lit_unlearn.data.tokenizer import train_tokenizer
from lit_unlearn.evaluation.inspection import Answer, Asked, Reply
from lit_unlearn.evaluation.scoring import score_examples
from lit_unlearn.utils.io import write_json

KNOWN = ("Who is Jassela Raskaya?", "The writer of a book.")
UNKNOWN = ("Who was born in Gdynia?", "A writer of the sea.")


@pytest.fixture(scope="module")
def taught(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    lm: Any = LanguageModel(model_dir)
    lm.load(torch.float32)
    batch = collate(encode_examples([KNOWN], lm.tokenizer, name="known"), pad_id=1)
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
    for _ in range(40):
        lm.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return str(lm.save(tmp_path_factory.mktemp("taught") / "taught-1.5B"))


@pytest.fixture
def file(write_rows: Callable[..., str]) -> str:
    return write_rows("rows.jsonl", [{"question": q, "answer": a} for q, a in (KNOWN, UNKNOWN)])


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_file_of_questions(taught: str, model_dir: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", taught, model_dir, "--questions", file, "--max_new_tokens", "20"])
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    said = re.fullmatch(r"  taught-1.5B  says ✓ (\d\.\d+) +The writer of a book\.∎", lines[lines.index(KNOWN[0]) + 2])
    assert said
    assert float(said[1]) > 0.9
    assert re.fullmatch(r" +[▆▇█]{22}", lines[lines.index(KNOWN[0]) + 3])
    assert sum(line.startswith("  plain        says    ") for line in lines) == 2
    assert lines[-4].split() == ["questions:", "2", "answer", "probability", "exact", "answers"]
    assert [line.split()[::2] for line in lines[-2:]] == [["taught-1.5B", "50%"], ["plain", "0%"]]


def test_an_export_is_asked_as_it_was_trained_unless_told_otherwise(
    taught: str, model_dir: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(taught, "exported")
    write_json(Path("exported/unlearning.json"), {"data": {"template": "Q: {question} A: {answer}"}})
    settings = ["--questions", file, "--max_new_tokens=3", "--format=json"]

    def inspect(*options: str) -> dict[str, Any]:
        main(["inspect", model_dir, *options, *settings])
        means: dict[str, Any] = json.loads(capsys.readouterr().out)["means"]
        return means

    as_trained = inspect("exported")
    assert as_trained == inspect("exported", "--template=Q: {question} A: {answer}")
    other = inspect("exported", "--template={question} {answer}")
    assert other["plain"] != as_trained["plain"]


def test_numbers_for_programs(
    taught: str, model_dir: str, file: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", taught, model_dir, "--questions", file, "--max_new_tokens", "20", "--format", "json"]
    main([*arguments, "--output", "new/out.json"])
    assert capsys.readouterr().out == ""
    assert [path.name for path in Path("new").iterdir()] == ["out.json"]
    content = json.loads(Path("new/out.json").read_text("utf-8"))
    main(arguments)
    assert json.loads(capsys.readouterr().out) == content
    assert content["models"] == {"taught-1.5B": taught, "plain": model_dir}
    for name, model in content["models"].items():
        lm: Any = LanguageModel(model)
        lm.load(torch.float32)
        rows = encode_examples([KNOWN, UNKNOWN], lm.tokenizer, name="all")
        expected = [torch.tensor(-one.nll).exp().item() for one in score_examples(lm, rows)]
        replies = [one["replies"][name] for one in content["questions"]]
        assert [reply["right"]["probability"] for reply in replies] == pytest.approx(expected)
        assert content["means"][name]["probability"] == pytest.approx(sum(expected) / 2)
        assert [reply["exact"] for reply in replies] == [name == "taught-1.5B", False]
        assert all(
            len(reply[kind]["tokens"]) == len(reply[kind]["probabilities"])
            for reply in replies
            for kind in ("said", "right")
        )


def test_one_model_at_a_time_is_in_memory(
    model_dir: str, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load, loaded, alive = LanguageModel.load, list[Any](), list[int]()

    def counted(self: LanguageModel, dtype: torch.dtype) -> None:
        alive.append(sum(model() is not None for model in loaded))
        assert dtype == torch.bfloat16
        load(self, dtype)
        loaded.append(weakref.ref(self.model))

    monkeypatch.setattr(LanguageModel, "load", counted)
    main(["inspect", model_dir, model_dir, "--questions", file, "--max_new_tokens", "2", "--dtype", "bfloat16"])
    assert alive == [0, 0]
    assert "plain (2)" in capsys.readouterr().out


def test_questions_of_other_columns_and_none_of_an_answer(
    model_dir: str, write_rows: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"frage": f"Who {n}?", "antwort": "The sea."} for n in range(3)]
    arguments = ["--questions", write_rows("r.jsonl", rows), "--question_column", "frage", "--max_new_tokens", "2"]
    main(["inspect", model_dir, *arguments, "--max_rows", "2"])
    out = capsys.readouterr().out
    assert (out.count("Who"), "right" in out) == (2, False)
    main(["inspect", model_dir, *arguments, "--answer_column", "antwort"])
    out = capsys.readouterr().out
    assert (out.count("Who"), out.count("The sea.∎")) == (3, 3)


def test_questions_piped_in(taught: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{KNOWN[0]}\n  Who? \n\nnot asked\n"))
    main(["inspect", taught, "--max_new_tokens", "9"])
    piped = capsys.readouterr().out
    assert "says  The writer of a book.∎" in piped
    main(["inspect", taught, "--max_new_tokens", "9", "-q", KNOWN[0], "-q", "Who?"])
    assert capsys.readouterr().out == piped


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_questions_typed_at_a_terminal(
    no_color: str, taught: str, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    ours, theirs = os.openpty()
    read = bytearray()

    def listen() -> None:
        while not read.endswith(b"END"):
            read.extend(os.read(ours, 4096))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    os.write(ours, f"{KNOWN[0]}\n\x04".encode())
    terminal = Path(os.ttyname(theirs))
    with terminal.open(encoding="utf-8") as stdin, terminal.open("w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        main(["inspect", taught, model_dir, "--max_new_tokens", "9", "--format", "json"])
        stdout.write("END")
    listener.join(10)
    out = read.decode().replace("\r\n", "\n")
    assert out.count("\n> ") == 2
    answer = r"[^\x1b]+" if no_color else r"(\x1b\[38;5;16;48;5;\d+m[\w .∎]+\x1b\[0m)+"
    assert re.search(rf"  taught-1.5B  says  {answer}\n  plain  ", out)
    assert [one["question"] for one in json.loads(out[out.index("{") : -len("END")])["questions"]] == [KNOWN[0]]


@pytest.mark.parametrize(
    ("options", "coloured"), [((), False), (("--color", "always"), True), (("--color", "never"), False)]
)
def test_colours_elsewhere_than_at_a_terminal(
    model_dir: str, options: tuple[str, ...], coloured: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", model_dir, "-q", "Who?", "--max_new_tokens", "2", *options])
    assert ("\x1b[" in capsys.readouterr().out) == coloured


ERRORS = {  # arguments after the model, and what is said
    "no question": ((), "there is no question: give --questions FILE or -q TEXT"),
    "no model": (("missing/model/dir", "-q", "Who?"), "there is no model directory 'missing/model/dir'"),
    "no file": (("--questions", "none.jsonl"), "there is no file of questions 'none.jsonl'"),
    "no rows": (("--questions", "empty.jsonl"), "the questions set is empty"),
    "no column": (
        ("--questions", "rows.jsonl", "--question_column", "q"),
        r"'rows.jsonl' has no column 'q'; its columns are \[",
    ),
    "no answers": (("--questions", "rows.jsonl", "--answer_column", "a"), "'rows.jsonl' has no column 'a'"),
    "no text": (
        ("--questions", "rows.jsonl"),
        r"row 0 of 'rows.jsonl' has null in 'answer'",
    ),
    "no place": (("-q", "Who?", "--template", "{question}"), r"`template` must contain \{question\} and"),
    "no token": (("-q", "Who?", "--max_new_tokens", "0"), "`max_new_tokens` is 0"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors(
    kind: str,
    model_dir: str,
    write_rows: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, said = ERRORS[kind]
    write_rows("rows.jsonl", [{"question": "Who?", "answer": None}])
    write_rows("empty.jsonl", [])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit):
        main(["inspect", model_dir, *arguments])
    assert re.fullmatch(f"lit-unlearn: error: {said}.*\n", capsys.readouterr().err)


def test_models_with_tokenizers_of_their_own(taught: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each scores the right answer in its own tokens."""
    small = train_tokenizer(["a book"], vocab_size=260)
    small.save_pretrained("small")
    lm = LanguageModel(
        config={
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        tokenizer="small",
    )
    lm.load(torch.float32)
    lm.save("other")
    Path("rows.csv").write_text(f"question,answer\n{KNOWN[0]},{KNOWN[1]}\n", encoding="utf-8")
    main(["inspect", taught, "other", "--questions", "rows.csv", "--max_new_tokens", "3", "--format", "json"])
    replies = json.loads(capsys.readouterr().out)["questions"][0]["replies"]
    tokens = {name: reply["right"]["tokens"] for name, reply in replies.items()}
    assert len(tokens["other"]) > len(tokens["taught-1.5B"])
    assert {"".join(of_one).strip() for of_one in tokens.values()} == {f"{KNOWN[1]}<|endoftext|>"}


# The page -------------------------------------------------------------------------------------------------------------

RIGHT = Answer("In Rome.", [" In", " Rome", ".", "</s>"], [0.999, 0.6, 1.0, 0.9], 0.86, True)
LOST = Answer("In Rome.", [" In", " Rome", ".", "</s>"], [0.2, 1e-9, 0.0, 0.13], 0.00034, True)
NOISE = Answer("a\x1b[2J", [" a", "\x1b[2J", "\n"], [0.3, 0.1, 0.2], 0.18, False)
ASKED = Asked("Where?", "In Rome.", {"old": Reply(RIGHT, RIGHT), "unlearned": Reply(NOISE, LOST)})


def test_bars_stand_below_their_tokens() -> None:
    lines = AnswerPage(80, coloured=False).format_answers(ASKED).splitlines()
    for text, bars in ((" In Rome.∎", " ██▅▅▅▅▅██"), ("a\ufffd[2J↵…", "▃▁▁▁▁▂▂"), (" In Rome.∎", " ▂▂▁▁▁▁▁▁▂")):
        answer, below = lines.pop(0), lines.pop(0)
        assert answer.endswith(text)
        assert below.strip() == bars.strip()
        assert len(below) == len(answer)
    assert lines == []


def test_colours_stand_behind_their_tokens() -> None:
    page = AnswerPage(80, coloured=True)
    old, noise, _ = page.format_answers(ASKED).splitlines()
    assert old.endswith(
        "\x1b[38;5;16;48;5;32mIn\x1b[0m\x1b[38;5;16;48;5;195m Rome\x1b[0m\x1b[38;5;16;48;5;32m.∎\x1b[0m"
    )
    assert "\x1b[2J" not in noise  # a model must not steer the terminal
    assert page.format_page([ASKED]).count("\x1b[1mWhere?\x1b[0m") == 1


def test_lines_end_at_spaces_and_lose_nothing() -> None:
    words = ["The", " quick", " brown", " fox", " jumps", " over", f" {'x' * 45}", " it"]
    answer = Answer("".join(words), words, [i / 8 for i in range(8)], 0.5, False)
    lines = AnswerPage(31, coloured=False).format_answers(Asked("Who?", None, {"m": Reply(answer, None)})).splitlines()
    assert max(map(len, lines)) <= 31
    assert "".join(lines[::2]).removeprefix("  m  says  ").replace(" ", "") == "".join(words).replace(" ", "") + "…"
    assert lines[2].strip() == "jumps over"
