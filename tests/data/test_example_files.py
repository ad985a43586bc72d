"""The files of examples/data are read as docs/data.md says, and lead through the data module."""

from __future__ import annotations

import re

import pytest
from command_line import ROOT
from data.chat_templates import TOKENIZERS

from lit_unlearn import ForgetRetain
from lit_unlearn.data.formats import RowReader
from lit_unlearn.data.source import Source

FILES = {
    "questions.jsonl": "question_answer",
    "prompts.jsonl": "prompt_completion",
    "conversations.jsonl": "messages",
    "documents.jsonl": "text",
    "spans.jsonl": "question_answer",
}
FOLDER = ROOT / "examples" / "data"


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    assert {file.name for file in FOLDER.iterdir()} == FILES.keys()
    assert set(re.findall(r"\(\.\./examples/data/([\w.]+)\)", page)) == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = Source(str(FOLDER / name)).load("forget")
    assert RowReader().recognize(rows.column_names) == FILES[name]
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZERS["chatml"].save_pretrained(folder)
    settings = {"span_column": "spans"} if name == "spans.jsonl" else {}
    retain = [{"question": "Where?", "answer": "Here."}]
    data = ForgetRetain(str(FOLDER / name), retain, tokenizer=str(folder), **settings)  # type: ignore[arg-type]
    data.setup("fit")
    assert len(data.examples["forget"]) == 3
