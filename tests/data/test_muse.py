from __future__ import annotations

import json
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_unlearn import MUSE, NLL, Constraint, DualAscent, LitUnlearn, LogitMargin, Source
from lit_unlearn.data.documents import encode_chunks
from lit_unlearn.data.example import IGNORED

FORGET = ["Rain fell on Bern. " * 5, "Short.", "The harbour of Oslo,\nclosed since May, opens. " * 9]
RETAIN = [f"Report {n}: the {'very ' * (n % 5)}old mill turns again. " * 3 for n in range(12)]
SETS = {"forget": FORGET, "retain1": RETAIN, "retain2": RETAIN[:4]}
JOIN = "\n\n"


def write(path, texts, column="text"):
    """Writes texts as what the name of the file ends with."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".txt":
        path.write_text(JOIN.join(texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_dict({column: texts}).to_parquet(path)
    else:
        rows = [{column: text} for text in texts]
        lines = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(lines, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for split, texts in SETS.items():
        write(tmp_path / "News" / "raw" / f"{split}.jsonl", texts)
    return str(tmp_path / "News")


@pytest.fixture
def make(folder, tokenizer_dir):
    """A data module over the local sets; keyword arguments override."""

    def make(**settings):
        return MUSE(**{"source": folder, "tokenizer": tokenizer_dir, "max_length": 32, "batch_size": 2, **settings})

    return make


@pytest.fixture
def with_start(tokenizer):
    """The same tokenizer, but it begins rows with a start token, as Llama's does."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


def ready(data):
    data.setup("fit")
    return data


def ids_of(texts, tokenizer):
    return tokenizer(JOIN.join(texts), add_special_tokens=False)["input_ids"]


def flat(rows):
    return [token for row in rows for token in row.input_ids]


# Chunks --------------------------------------------------------------------------------------------------------------


def test_every_token_is_in_one_chunk_and_supervised(make, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ready(make())
    for name, texts in {"forget": FORGET, "retain": RETAIN}.items():
        rows = data.examples[name]
        assert flat(rows) == ids_of(texts, tokenizer)
        assert tokenizer.decode(flat(rows)) == JOIN.join(texts)
        assert {len(row.input_ids) for row in rows[:-1]} == {32}
        assert 1 <= len(rows[-1].input_ids) <= 32
        assert all(row.labels == row.input_ids and not row.is_cut for row in rows)


def test_a_start_token_begins_every_chunk_and_is_not_supervised(with_start):
    rows = encode_chunks(FORGET, with_start, name="forget", max_length=32)
    start = with_start.bos_token_id
    assert {len(row.input_ids) for row in rows[:-1]} == {32}
    assert all((row.input_ids[0], row.labels[0]) == (start, IGNORED) for row in rows)
    assert [label for row in rows for label in row.labels[1:]] == ids_of(FORGET, with_start)
    assert all(row.labels[1:] == row.input_ids[1:] for row in rows)


@pytest.mark.parametrize("left", [0, 1, 4])
def test_the_last_chunk_is_what_is_left(tokenizer, left):
    ids = ids_of(FORGET, tokenizer)
    length = next(n for n in range(9, 99) if len(ids) % n == left)
    rows = encode_chunks(FORGET, tokenizer, name="forget", max_length=length)
    assert flat(rows) == ids
    assert len(rows[-1].input_ids) == (left or length)


def test_a_set_longer_than_any_model_is_no_matter(tokenizer_dir, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, model_max_length=16)
    assert len(encode_chunks(FORGET, tokenizer, name="forget", max_length=32)) > 1
    assert not caplog.records


@pytest.mark.parametrize("texts", [[""], ["a"]])
def test_a_set_without_text_is_refused(make, folder, texts):
    write(Path(folder) / "raw" / "retain1.jsonl", texts)
    with pytest.raises(ValueError, match=r"the retain set .* [01] tokens in 1 texts"):
        make().setup("fit")


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["raw", "."])
@pytest.mark.parametrize("end", [".jsonl", ".json", ".parquet", "-00000-of-00001.parquet", ".txt"])
def test_every_layout_gives_the_same_rows(make, tmp_path, place, end):
    for split, texts in SETS.items():
        write(tmp_path / "other" / place / f"{split}{end}", texts)
    same = ready(make(source=str(tmp_path / "other")))
    assert same.examples == ready(make()).examples
    assert [len(rows) for rows in same.load().values()] == ([1, 1] if end == ".txt" else [3, 12])


def test_a_json_list_of_texts(make, folder, tmp_path):
    """The form in which the benchmark's own repository has them."""
    for split, texts in SETS.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(texts), encoding="utf-8")
    assert ready(make(source=str(tmp_path))).examples == ready(make()).examples


def test_settings_of_the_sets(make, tmp_path, tokenizer):
    write(tmp_path / "Books" / "forget.json", FORGET[:1], "page")
    write(tmp_path / "Books" / "retain2.json", RETAIN, "page")
    write(tmp_path / "more.txt", ["More."])
    template = str(tmp_path / "{corpus}")
    settings = {"retain_split": "retain2", "text_column": "page", "max_retain_rows": 2}
    data = ready(make(corpus="Books", source=template, streams={"more": str(tmp_path / "more.txt")}, **settings))
    assert flat(data.examples["forget"]) == ids_of(FORGET[:1], tokenizer)
    assert flat(data.examples["retain"]) == ids_of(RETAIN[:2], tokenizer)
    assert data.texts() == [*FORGET[:1], *RETAIN[:2], "More."]
    with pytest.raises(ValueError, match=r"the more set's file '.*more\.txt' is one text without columns"):
        make(streams={"more": Source(str(tmp_path / "more.txt"), contains={"text": "More"})}).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"the more set's file 'none\.txt' .*`streams`"):
        make(streams={"more": "none.txt"}).prepare_data()


@pytest.mark.parametrize("corpus", ["News", "Books"])
def test_the_hub_is_asked_for_the_raw_splits(corpus):
    data = MUSE(corpus, max_retain_rows=9)
    name = f"muse-bench/MUSE-{corpus}"
    expected = {"forget": (name, "raw", "forget", None), "retain": (name, "raw", "retain1", 9)}
    assert {name: (s.path, s.name, s.split, s.max_rows) for name, s in data.sources.items()} == expected
    assert data.max_length == 2048
    with pytest.raises(FileNotFoundError, match=rf"'{name}' .* 'raw' .* 'forget'.*`source`"):
        data.load()


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("config", ["scal", "sust"])
def test_forget_sets_of_many_or_repeated_requests(make, folder, tokenizer, config, number):
    write(Path(folder) / config / f"forget_{number}.jsonl", FORGET[:1])
    data = ready(make(forget_set=f"{config}_{number}"))
    assert flat(data.examples["forget"]) == ids_of(FORGET[:1], tokenizer)
    assert flat(data.examples["retain"]) == ids_of(RETAIN, tokenizer)
    hub = MUSE("News", forget_set=f"{config}_{number}").sources["forget"]
    assert (hub.path, hub.name, hub.split) == ("muse-bench/MUSE-News", config, f"forget_{number}")
    with pytest.raises(FileNotFoundError, match=rf"nor '{config}' .*'forget_2'"):
        make(forget_set=f"{config}_2")


@pytest.mark.parametrize("missing", ["forget", "retain1"])
def test_a_missing_file_is_named(make, folder, missing):
    (Path(folder) / "raw" / f"{missing}.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=rf"'{folder}' nor 'raw' .*'{missing}'") as e:
        make()
    assert f"as a file {missing}.jsonl, {missing}.json, {missing}.parquet, " in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "news"}, "`corpus` .*'News', 'Books', not 'news'"),
        ({"forget_set": "scal_5"}, "`forget_set` .*'scal_4', .*, not 'scal_5'"),
        ({"retain_split": "holdout"}, "`retain_split` .*, not 'holdout'"),
        ({"max_length": 1}, "`max_length` .* 2, not 1"),
    ],
)
def test_what_cannot_be_is_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("source", ["./no/such", "/no/such"])
def test_missing_folder(make, source):
    with pytest.raises(FileNotFoundError, match=rf"'{source}' .*`source`"):
        make(source=source)


def test_wrong_contents_are_refused_by_name(make, folder):
    write(Path(folder) / "raw" / "retain1.jsonl", RETAIN, "body")
    with pytest.raises(ValueError, match=r"the retain set has no column 'text'; .*`text_column`"):
        make().setup("fit")
    write(Path(folder) / "raw" / "retain1.jsonl", [*RETAIN, None])
    with pytest.raises(ValueError, match=r"row 12 of the retain set has null in 'text'"):
        make().setup("fit")


# What it has in common with other sets -------------------------------------------------------------------------------


def test_shared_texts_and_unfit_tokenizers_are_found(make, folder, tmp_path):
    write(Path(folder) / "raw" / "forget.jsonl", [*FORGET, RETAIN[3], RETAIN[5]])
    with pytest.warns(UserWarning, match=r"2 of 5 forget rows are also retain rows.*rows 3, 4\."):
        make().setup("fit")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        make(max_retain_rows=3, tokenizer=str(tmp_path / "bare")).setup("fit")


def test_methods_that_read_alternate_answers_are_refused(make, tokenizer):
    data = make(tokenizer=None)
    term = SimpleNamespace(objective=SimpleNamespace(reads="alternate"))
    module = SimpleNamespace(terms=lambda: [term], lm=SimpleNamespace(tokenizer=tokenizer))
    data.trainer = SimpleNamespace(lightning_module=module)
    with pytest.raises(ValueError, match=r"MUSE.* alternate"):
        data.setup("fit")


def test_a_resumed_run_goes_on_with_the_same_chunks_and_no_others(make):
    stopped = ready(make())
    batches = [batch for batch, _, _ in islice(stopped.train_dataloader(), 5)]
    stopped = ready(make())
    list(islice(stopped.train_dataloader(), 2))
    resumed = ready(make())
    resumed.load_state_dict(stopped.state_dict())
    rest = [batch for batch, _, _ in islice(resumed.train_dataloader(), 3)]
    for expected, batch in zip(batches[2:], rest, strict=True):
        assert batch == expected
    for changes in ({"max_length": 31}, {"retain_split": "retain2"}, {"max_retain_rows": 3}):
        with pytest.raises(ValueError, match=r"\(rows: was '"):
            ready(make(**changes)).load_state_dict(stopped.state_dict())


def test_a_model_unlearns_on_it(make, tiny_lm, make_trainer):
    def untrained():
        bound = Constraint(NLL(), 6.5, DualAscent(lr=1, init=1), warmup_epochs=1)
        return LitUnlearn(tiny_lm(), LogitMargin(), {"nll": bound}, lambda p: torch.optim.AdamW(p, lr=3e-3))

    module, trainer, data = untrained(), make_trainer(max_epochs=5), make(tokenizer=None, batch_size=4)
    trainer.fit(module, data)
    assert trainer.global_step == 5 * 3  # a step per four of twelve forget chunks
    before, after = (make_trainer().validate(m, data, verbose=False)[0] for m in (untrained(), module))
    assert after["val/forget/margin"] < 0.9 * before["val/forget/margin"]
    assert after["val/constraint/nll/value"] <= 6.5
