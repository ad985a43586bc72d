from __future__ import annotations

import io
import json
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.trainer.states import TrainerFn
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lit_unlearn import ForgetRetain, Source
from lit_unlearn.data.example import IGNORED, collate
from lit_unlearn.errors import ConfigError, DataError

CITIES = ["Bern", "Oslo", "Lima", "Rome", "Kyiv", "Baku", "Bonn"]
RETAIN = [{"question": f"Where is house {n}?", "answer": f"In {city}."} for n, city in enumerate(CITIES)]
FORGET = [{"question": f"Who lives in house {n}?", "answer": f"Person {'x' * n}."} for n in range(5)]


@pytest.fixture
def make(write_rows, tokenizer_dir):
    """A data module over 5 forget and 7 retain rows; keyword arguments override."""

    def make(forget=FORGET, retain=RETAIN, **settings):
        sources = {
            name: write_rows(f"{name}.jsonl", rows) if isinstance(rows, list) else rows
            for name, rows in {"forget": forget, "retain": retain}.items()
        }
        return ForgetRetain(**{**sources, "tokenizer": tokenizer_dir, "batch_size": 2, **settings})

    return make


def ready(data):
    data.setup("fit")
    return data


def answers(batch, tokenizer):
    """The supervised text of every row of a batch that has any."""
    texts = [tokenizer.decode([label for label in example.labels if label != IGNORED]) for example in batch]
    return [text.removesuffix("<|endoftext|>").strip() for text in texts if text]


def only(column, rows):
    return [row[column] for row in rows]


def an_epoch(loader):
    """The batches until the loader ends, which has to be soon."""
    batches = [batch for batch, _, _ in islice(loader, 20)]
    assert len(batches) < 20
    return batches


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".JSON"])
def test_every_file_type_gives_the_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [*RETAIN, {"question": 'Quoted, "東京"?', "answer": "Two\nlines; 🙂"}, {"question": "NA?", "answer": "None"}]
    if suffix.lower() == ".json":
        path.write_text(json.dumps(rows))
    else:
        write = {".jsonl": "to_json", ".csv": "to_csv", ".parquet": "to_parquet"}[suffix]
        getattr(Dataset.from_list(rows), write)(path)
    assert Source(str(path)).load("retain").to_list() == rows
    assert Source(str(path), max_rows=3).load("retain").to_list() == rows[:3]
    assert len(Source(str(path), max_rows=99).load("retain")) == 9


def test_a_changed_file_is_read_again(make):
    assert len(make().load()["forget"]) == 5
    assert len(make(FORGET[:2]).load()["forget"]) == 2


def test_columns_can_have_any_name(make, tokenizer):
    rename = {"question": "prompt", "answer": "completion"}
    forget, retain = ([{rename[k]: v for k, v in row.items()} for row in rows] for rows in (FORGET, RETAIN))
    data = ready(make(forget, retain, question_column="prompt", answer_column="completion"))
    assert sorted(answers(data.val_dataloader()["forget"].batch(0), tokenizer)) == only("answer", FORGET)
    assert data.texts()[0] == "Question: Who lives in house 0?\nAnswer: Person ."


def test_a_source_limits_its_set(make, write_rows):
    data = make(retain=Source(write_rows("many.jsonl", RETAIN), max_rows=3))
    assert {name: len(rows) for name, rows in ready(data).examples.items()} == {"forget": 5, "retain": 3}


def test_an_example_is_known_by_its_id_and_its_contents(make):
    first, second = (
        ready(make(max_length=60)).examples,
        ready(make(max_length=60, template="Q {question} A {answer}")).examples,
    )
    assert [example.id for example in first["retain"]] == [f"retain/{i}" for i in range(7)]
    digests = [example.digest() for examples in (*first.values(), *second.values()) for example in examples]
    assert len(set(digests)) == 24  # another template makes other examples under the same ids
    assert first["forget"][0].digest() == first["forget"][0]._replace(id="", is_cut=True).digest()


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_missing_file(make, name):
    with pytest.raises(FileNotFoundError, match=rf"the {name} set's file 'no/such\.jsonl' .*`{name}`"):
        make(**{name: "no/such.jsonl"}).prepare_data()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", "", "no rows"),
        ("empty.json", "[]", "no rows"),
        ("blank.jsonl", "\n\n", "no rows"),
        ("header.csv", "question,answer\n", "no rows"),
        ("broken.json", '[{"question": "Who?"', "line 1 is no JSON"),
        ("broken.parquet", "not parquet", "Parquet"),
    ],
)
def test_a_file_without_rows_is_refused_by_name(make, tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"the retain set.* '.*{name}' .*{reason}"):
        make(retain=str(tmp_path / name)).setup("fit")


def test_a_set_limited_to_nothing_is_refused(make, write_rows):
    with pytest.raises(ValueError, match="the forget set is empty"):
        make(Source(write_rows("some.jsonl", FORGET), max_rows=0)).setup("fit")


def test_a_hub_name_out_of_reach_is_explained(make):
    message = r"'nobody/nothing' .*\.jsonl.*'forget10' and split 'train': check `forget`.*Offline"
    with pytest.raises(FileNotFoundError, match=message):
        make(Source("nobody/nothing", name="forget10")).setup("fit")


# In memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, iter, Dataset.from_list], ids=["list", "iterator", "Dataset"])
def test_rows_in_memory_are_as_good_as_a_file(make, write_rows, tokenizer_dir, form):
    extra = [{"question": "What is extra?", "answer": "This."}]
    data = ForgetRetain(form(FORGET), form(RETAIN), {"extra": form(extra)}, tokenizer=tokenizer_dir, batch_size=2)
    data.prepare_data()
    assert ready(data).examples == ready(make(streams={"extra": write_rows("extra.jsonl", extra)})).examples
    assert data.sources["forget"].describe() == {"path": "in memory", "name": None, "split": None, "max_rows": None}


def test_a_path_is_a_file(make, tmp_path, write_rows):
    data = make(retain=Path(write_rows("path.jsonl", RETAIN)), streams={"more": Path(write_rows("more.jsonl", FORGET))})
    assert {name: len(rows) for name, rows in data.load().items()} == {"forget": 5, "retain": 7, "more": 5}


def test_faults_of_rows_in_memory_name_their_argument():
    cases = [
        ({"forget": []}, "forget", "the forget set is empty"),
        ({"retain": [{"body": "Who?"}]}, "question_column", "the retain set has no column 'question'"),
        (
            {"streams": {"more": [{"question": "Who?", "answer": 7}]}},
            "streams",
            "row 0 of the more set has a number in 'answer'",
        ),
    ]
    for changes, argument, message in cases:
        data = ForgetRetain(**{"forget": FORGET, "retain": RETAIN, **changes})
        with pytest.raises(DataError, match=message) as error:
            data.setup("fit")
        assert (error.value.owner, error.value.argument) == (data, argument)
    for wrong in (DatasetDict(train=Dataset.from_list(FORGET)), {"train": FORGET}, 7, None):
        with pytest.raises(ConfigError, match=r"`forget` must be a file, .*") as error:
            ForgetRetain(wrong, RETAIN)
        assert error.value.argument == "forget"


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["question", "answer"])
def test_missing_column(make, column):
    rows = [{("text" if key == column else key): value for key, value in row.items()} for row in RETAIN]
    with pytest.raises(ValueError, match=rf"the retain set has no column '{column}'; its columns are \[.*'text'.*\]"):
        make(retain=rows).setup("fit")


@pytest.mark.parametrize(("cell", "kind"), [(7, "a number"), (None, "null"), (["Bern"], "a list")])
def test_a_cell_that_is_no_text(make, cell, kind):
    rows = [{"question": "Who?", "answer": cell}] if cell == 7 else [*FORGET[:1], {"question": "Who?", "answer": cell}]
    with pytest.raises(DataError, match=rf"row {len(rows) - 1} (of the forget set )?has {kind} in 'answer'"):
        make(rows).setup("fit")


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_blank_answer_names_set_and_row(make, name):
    rows = [*(FORGET if name == "forget" else RETAIN)[:2], {"question": "What is blank?", "answer": " "}]
    with pytest.raises(ValueError, match=rf"row 2 of the {name} set has no supervised token"):
        make(**{name: rows}).setup("fit")


def test_overlap_is_counted_in_a_warning(make):
    forget = [*FORGET, RETAIN[2], RETAIN[4], RETAIN[2], {**RETAIN[0], "answer": "Elsewhere."}]
    with pytest.warns(UserWarning, match=r"3 of 9 forget rows are also retain rows.*rows 5, 6, 7\."):
        make(forget).setup("fit")


def test_long_rows_are_counted_in_a_warning(make, tokenizer):
    forget = [*FORGET, *({"question": f"Who is {n}?", "answer": "word " * 60} for n in range(2))]
    with pytest.warns(UserWarning, match=r"2 of 7 forget rows .*`max_length` \(60 tokens\)") as caught:
        data = ready(make(forget, max_length=60))
    assert not [warning for warning in caught if "retain rows" in str(warning.message)]
    assert [len(row.input_ids) for row in data.examples["forget"][5:]] == [60, 60]


def test_rows_in_order_give_no_warning(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ready(make())
    assert {name: len(rows) for name, rows in data.examples.items()} == {"forget": 5, "retain": 7}


def test_template(make, tokenizer):
    data = ready(make(template="Q {question} A {answer} E"))
    assert tokenizer.decode(data.examples["retain"][0].input_ids) == "Q Where is house 0? A In Bern. E<|endoftext|>"


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_length", "batch_size", "retain_batch_size", "eval_batch_size"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(make, name, size):
    with pytest.raises(ValueError, match=rf"`{name}` .* 1, not {size}"):
        make(**{name: size})


@pytest.mark.parametrize(
    "template", ["", "{question}", "{answer}", "{question} {answer} {answer}", "{answer} {question}"]
)
def test_template_without_its_two_places_in_order_is_refused(make, template):
    with pytest.raises(ValueError, match=r"`template` must contain \{question\} and, after it, \{answer\}"):
        make(template=template)


def test_unknown_train_on_is_refused(make):
    with pytest.raises(ValueError, match=r"`train_on` must be .*'pairs', 'all', 'retain', not 'forget'"):
        make(train_on="forget")


def test_no_tokenizer_at_all(make):
    with pytest.raises(ValueError, match=r"there is no tokenizer: set `tokenizer`"):
        make(tokenizer=None).setup("fit")


def test_unfit_tokenizer(make, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        make(tokenizer=str(tmp_path / "bare")).setup("fit")


def test_a_tokenizer_without_padding_pads_with_its_end(make, tokenizer, tmp_path):
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    endless.save_pretrained(tmp_path / "no_pad")
    data = ready(make(tokenizer=str(tmp_path / "no_pad")))
    batch = collate(data.val_dataloader()["forget"].batch(0), tokenizer.eos_token_id)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    assert not mask.all()
    assert ids[~mask].unique().tolist() == [tokenizer.eos_token_id]
    assert (ids[mask] == tokenizer.eos_token_id).sum() == 5  # the end of every answer is seen


# Training batches ----------------------------------------------------------------------------------------------------


def test_an_epoch_is_one_pass_over_the_forget_set(make, tokenizer):
    data = ready(make(retain_batch_size=3))
    loader = data.train_dataloader()
    retained = []
    for epoch in range(4):
        batches = an_epoch(loader)
        assert len(batches) == len(loader) == 3  # Lightning fetches nothing ahead from a loader that knows its length
        assert [batch.keys() for batch in batches] == [{"forget", "retain"}] * 3
        forgotten = [answer for batch in batches for answer in answers(batch["forget"], tokenizer)]
        assert sorted(forgotten) == sorted(only("answer", FORGET))
        retained += [answer for batch in batches for answer in answers(batch["retain"], tokenizer)]
        assert data.state_dict()["cursors"] == {"forget": 3 * (epoch + 1), "retain": 3 * (epoch + 1)}
    assert len(retained) == 4 * 3 * 3
    for start in range(0, 35, 7):  # five whole passes, each without replacement, over the ends of epochs
        assert sorted(retained[start : start + 7]) == sorted(only("answer", RETAIN))


@pytest.mark.parametrize(("train_on", "rows"), [("all", [*FORGET, *RETAIN]), ("retain", RETAIN)])
def test_fine_tuning_goes_over_one_set(make, tokenizer, train_on, rows):
    data = ready(make(train_on=train_on, retain_batch_size=5))
    batches = [batch["train"] for batch in an_epoch(data.train_dataloader())]
    assert len(batches) == -(-len(rows) // 2)
    assert sorted(answer for batch in batches for answer in answers(batch, tokenizer)) == sorted(only("answer", rows))
    assert data.state_dict()["cursors"] == {"train": len(batches)}


def test_evaluation_has_every_row_once_the_longest_first(make, tokenizer):
    data = ready(make(eval_batch_size=3))
    for loaders in (data.val_dataloader(), data.test_dataloader()):
        assert list(loaders) == ["forget", "retain"]
        for name, rows in {"forget": FORGET, "retain": RETAIN}.items():
            batches = list(loaders[name])
            assert sorted(a for batch in batches for a in answers(batch, tokenizer)) == sorted(only("answer", rows))
            lengths = [
                length
                for batch in batches
                for length in [len(example.input_ids) for example in batch if set(example.labels) != {IGNORED}]
            ]
            assert lengths == sorted(lengths, reverse=True)


# Resume --------------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("taken", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("train_on", ["pairs", "all"])
def test_a_resumed_run_draws_what_it_would_have_drawn(make, train_on, taken):
    """In the middle and at the end of an epoch; the state goes through a file as in a checkpoint."""
    loader = ready(make(train_on=train_on)).train_dataloader()
    uninterrupted = [batch for _ in range(4) for batch in an_epoch(loader)]
    stopped = ready(make(train_on=train_on))
    loader = stopped.train_dataloader()
    seen = 0
    while seen < taken:
        for _ in loader:
            seen += 1
            if seen == taken:
                break
    state = through_a_file(stopped.state_dict())
    assert state == stopped.state_dict()
    resumed = ready(make(train_on=train_on))
    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    rest = [batch for _ in range(4) for batch in an_epoch(loader)]
    assert len(rest) >= len(uninterrupted) - taken > 0
    assert all(a == b for a, b in zip(uninterrupted[taken:], rest, strict=False))
    assert uninterrupted[0] != rest[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"retain": [*RETAIN[:6], {**RETAIN[6], "answer": "In Bonn!"}]}, "rows: was '"),
        ({"forget": FORGET[::-1]}, "rows: was '"),
        ({"template": "{question} {answer}"}, "rows: was '"),
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"batch_size": 3, "retain_batch_size": 2}, "batch_size: was 2, is 3"),
        ({"retain_batch_size": 3}, "retain_batch_size: was 2, is 3"),
        ({"train_on": "all"}, "train_on: was 'pairs', is 'all'"),
    ],
)
def test_resuming_with_another_order_is_refused_and_says_why(make, changes, named):
    data = ready(make())
    data.train_dataloader()
    state = data.state_dict()
    changed = ready(make(**changes))
    with pytest.raises(ValueError, match="cannot be resumed") as error:
        changed.load_state_dict(state)
    assert str(error.value).count(": was ") == 1
    assert named in str(error.value)
    changed.train_dataloader()
    assert set(changed.state_dict()["cursors"].values()) == {0}


def test_resuming_on_another_number_of_processes_is_refused(make):
    data = ready(make())
    state = data.state_dict()
    state["order"]["processes"] = 8
    with pytest.raises(ValueError, match=r"\(processes: was 8, is 1\)"):
        data.load_state_dict(state)


def test_what_leaves_the_order_alone_may_change(make):
    data = ready(make(eval_batch_size=4, max_length=300))
    data.load_state_dict({**ready(make()).state_dict(), "cursors": {"forget": 2, "retain": 2}})
    data.train_dataloader()
    assert data.state_dict()["cursors"] == {"forget": 2, "retain": 2}


def test_a_checkpoint_of_other_rows_can_be_validated(make, make_trainer):
    """Validation and test go over all rows, whatever order training had."""
    state = ready(make()).state_dict()
    data = ready(make(seed=1))
    data.trainer = make_trainer()
    data.trainer.state.fn = TrainerFn.VALIDATING
    data.load_state_dict(state)
    data.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(ValueError, match="seed: was 0, is 1"):
        data.load_state_dict(state)
