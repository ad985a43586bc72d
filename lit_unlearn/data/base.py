"""The data module: a forget and a retain set, tokenised, zipped and resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn

from lit_unlearn.data.alternates import alternate_answers
from lit_unlearn.data.encoding import IGNORED, Example, check_tokenizer, encode_examples
from lit_unlearn.data.source import Source
from lit_unlearn.data.streams import BatchStream, FiniteStream
from lit_unlearn.data.templates import check_template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["pairs", "all", "retain"]
Contents = list[tuple[str, ...]]  # what the rows of a set say: question and answer, or whatever a subclass reads


class ForgetRetain(L.LightningDataModule):
    """A forget set and a retain set of questions and answers, from files or the hub.

    Training batches are ``{"forget": batch, "retain": batch, …}``: an epoch is one pass over the forget set, while the
    retain set, and every further set, runs on without end. Validation and test go over every row of all. Where training
    stands is saved in checkpoints, so that a resumed run draws the rows it would have drawn.

    Batch sizes are those of one optimizer step over all processes, which share its rows: the same configuration takes
    the same steps on any number of devices. What a device holds at a time is ``LitUnlearn``'s ``micro_batch_size``.

    Args:
        forget: Rows to forget: a file or hub name, or a `Source`.
        retain: Rows to keep, likewise.
        streams: Further sets, by name, likewise: measured like the others, and trained on where a constraint's ``stream`` is
            that name.
        tokenizer: Hub name or directory; ``None`` for the model's own.
        question_column: Column with the question.
        answer_column: Column with the answer, the part that is supervised.
        alternate_column: Column of the forget set with another answer, or a list of them of which one is drawn, for
            objectives that read one; ``None`` for refusals.
        refusals: Text file with a refusal per line, to draw from; ``None`` for a hundred and twenty of our own.
        template: Text with ``{question}`` and ``{answer}``; ``None`` for the tokenizer's chat template where it has
            one, else a plain one.
        max_length: Longest row, in tokens; longer ones are cut, and counted in a warning.
        batch_size: Forget rows per optimizer step.
        retain_batch_size: Retain rows per optimizer step, and rows of every further set; ``None`` for as many.
        eval_batch_size: Rows per process and batch in validation and test.
        num_workers: Processes that collate; rows are tokenised beforehand, so 0 is seldom slower.
        seed: Of the order of rows.
        train_on: ``"pairs"`` to unlearn; ``"all"`` (all sets as one) to teach a target model, ``"retain"`` (all but
            the forget set) to teach the retain-only model that unlearning is compared with.

    Raises:
        ValueError: If a number is out of range, ``template`` lacks a placeholder or a further set takes a name that
            is in use.
    """

    def __init__(
        self,
        forget: str | Path | Source,
        retain: str | Path | Source,
        streams: Mapping[str, str | Path | Source] | None = None,
        tokenizer: str | None = None,
        question_column: str = "question",
        answer_column: str = "answer",
        alternate_column: str | None = None,
        refusals: str | None = None,
        template: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        retain_batch_size: int | None = None,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        train_on: TrainOn = "pairs",
    ) -> None:
        super().__init__()
        retain_batch_size = batch_size if retain_batch_size is None else retain_batch_size
        sizes = {"max_length": max_length, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, size in {**sizes, "retain_batch_size": retain_batch_size}.items():
            if size < 1:
                raise ValueError(f"`data.{name}` must be at least 1, not {size}.")
        check_template(template, "`data.template`")
        if train_on not in ("pairs", "all", "retain"):
            raise ValueError(f"`data.train_on` must be 'pairs', 'all' or 'retain', not {train_on!r}.")
        further = streams or {}
        if taken := further.keys() & {"forget", "retain", "train"}:
            raise ValueError(
                f"`data.streams` may not use the name {', '.join(map(repr, sorted(taken)))}: choose others."
            )
        self.sources = {
            name: source if isinstance(source, Source) else Source(str(source))
            for name, source in {"forget": forget, "retain": retain, **further}.items()
        }
        self.question_column, self.answer_column = question_column, answer_column
        self.alternate_column, self.refusals = alternate_column, refusals
        self.template, self.max_length = template, max_length
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.eval_batch_size, self.num_workers, self.seed, self.train_on = eval_batch_size, num_workers, seed, train_on
        self.examples: dict[str, list[Example]] = {}
        self._columns = {"question_column": question_column, "answer_column": answer_column}
        self._tokenizer_name = tokenizer
        self._pad_id = 0
        self._streams: dict[str, BatchStream] = {}
        self._cursors: dict[str, int] = {}

    def load(self) -> dict[str, Dataset]:
        """The raw rows of all sets by name, with whatever columns they have."""
        return {name: self.load_set(name) for name in self.sources}

    def load_set(self, name: str) -> Dataset:
        """The raw rows of one set."""
        return self.sources[name].load(name)

    def texts(self) -> list[str]:
        """Every question and answer as plain text, for training a tokenizer."""
        pairs = [pair for rows in self.load().values() for pair in self._contents(rows, "data")]
        return [f"Question: {question}\nAnswer: {answer}" for question, answer in pairs]

    def prepare_data(self) -> None:
        """Fetches the sets once per machine, before the other processes read them."""
        self.load()

    def setup(self, stage: str) -> None:
        """Reads, checks and tokenises all sets; everything wrong with them is said here, before any model is loaded.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a column is missing, a set is empty, a row has no supervised token or the tokenizer is unfit.
        """
        self._streams = {}
        alternate = "alternate" in getattr(getattr(self.trainer, "lightning_module", None), "needs", ())
        if self.examples and not (alternate and self.examples["forget"][0].alternate is None):
            return
        sets = self.load()
        contents = {role: self._contents(rows, role) for role, rows in sets.items()}
        for name, rows in contents.items():
            kept = set() if name == "forget" else set(rows)
            if shared := [row for row in contents["forget"] if row in kept]:
                rank_zero_warn(
                    f"{len(shared)} of {len(contents['forget'])} forget rows are also {name} rows: the run is told to forget "
                    f"and to keep them. The first is {shared[0][0][:80]!r}."
                )
        tokenizer = self._tokenizer()
        check_tokenizer(tokenizer)
        self._pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for role, rows in contents.items():
            examples = self._encode(rows, tokenizer, role)
            self.examples[role] = [example._replace(id=f"{role}/{i}") for i, example in enumerate(examples)]
        if alternate:
            alternates = self._encode(self._alternates(sets["forget"], contents["forget"]), tokenizer, "alternate")
            pairs = zip(self.examples["forget"], alternates, strict=True)
            self.examples["forget"] = [
                example._replace(alternate=other._replace(id=f"{example.id}/alternate")) for example, other in pairs
            ]
        rank_zero_info("data: " + ", ".join(f"{role} {_size(rows)}" for role, rows in self.examples.items()))

    def _encode(self, contents: Contents, tokenizer: PreTrainedTokenizerBase, name: str) -> list[Example]:
        pairs = [(question, answer) for question, answer in contents]
        rows = encode_examples(pairs, tokenizer, name=name, template=self.template, max_length=self.max_length)
        cut = sum(row.is_cut for row in rows)
        if cut:
            rank_zero_warn(
                f"{cut} of {len(rows)} {name} rows are longer than `data.max_length` ({self.max_length} tokens) and were cut "
                "at the end."
            )
        return rows

    def train_dataloader(self) -> CombinedLoader:
        """Zipped batches that end with the forget set, or batches of one set to teach a model."""
        self._cursors = {name: stream.cursor for name, stream in self._streams.items()} | self._cursors  # if reloaded
        if self.train_on == "pairs":
            self._streams = {
                name: self._finite(name, rows, self.batch_size) if name == "forget" else self._endless(name, rows)
                for name, rows in self.examples.items()
            }
        else:
            rows = [
                row
                for name, rows in self.examples.items()
                for row in rows
                if (name, self.train_on) != ("forget", "retain")
            ]
            self._streams = {"train": self._finite("train", rows, self.batch_size)}
        self._go_on()
        self._cursors = {}
        return CombinedLoader(self._streams, "min_size")

    def val_dataloader(self) -> dict[str, FiniteStream]:
        """Every row of all sets, in order of length so that the largest batch comes first."""
        size = self.eval_batch_size * self._place()["world_size"]
        return {
            name: self._finite(name, sorted(rows, key=lambda row: len(row.input_ids), reverse=True), size, seed=None)
            for name, rows in self.examples.items()
        }

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """How many batches of each training stream were handed out, and what their order depends on."""
        return {
            "cursors": {name: stream.cursor for name, stream in self._streams.items()},
            "order": self._order_of_rows(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped.

        Raises:
            ValueError: If the rows, their order or the batches differ from those the checkpoint was made with.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # validation and test go over all rows, whatever training had seen
        mine = self._order_of_rows()
        changed = [
            f"{key}: was {state['order'].get(key)!r}, is {mine[key]!r}"
            for key in mine
            if mine[key] != state["order"].get(key)
        ]
        if changed:
            raise ValueError(
                "the checkpoint cannot be resumed, because what decides the order of rows changed ("
                + "; ".join(changed)
                + "). Restore it, or start a new run from the exported model."
            )
        self._cursors = dict(state["cursors"])
        self._go_on()

    def _go_on(self) -> None:
        """Sets the streams, where there are any yet, to where training stands."""
        for name, stream in self._streams.items():
            stream.cursor = self._cursors.get(name, stream.cursor)

    def _order_of_rows(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for role in sorted(self.examples):
            contents = [(row.input_ids, row.labels) for row in self.examples[role]]
            others = [row.alternate.input_ids for row in self.examples[role] if row.alternate is not None]
            digest.update(repr([role, contents, *([others] if others else [])]).encode())
        return {
            "rows": digest.hexdigest()[:16],
            "seed": self.seed,
            "train_on": self.train_on,
            "batch_size": self.batch_size,
            "retain_batch_size": self.retain_batch_size,
            "processes": self._place()["world_size"],
        }

    def _finite(self, name: str, rows: list[Example], batch_size: int, **order: Any) -> FiniteStream:
        return FiniteStream(rows, self._pad_id, batch_size, **self._settings(name) | order)

    def _endless(self, name: str, rows: list[Example]) -> BatchStream:
        return BatchStream(rows, self._pad_id, self.retain_batch_size, **self._settings(name))

    def _settings(self, name: str) -> dict[str, Any]:
        return {"name": name, "seed": self.seed, "num_workers": self.num_workers, **self._place()}

    def _place(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer_name is not None:
            from transformers import AutoTokenizer

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._tokenizer_name)
            return tokenizer
        lm = getattr(getattr(self.trainer, "lightning_module", None), "lm", None)
        own = getattr(lm, "tokenizer", None)
        if own is None:
            raise ValueError(
                "there is no tokenizer: set `data.tokenizer` or `model.lm.tokenizer`, or give `LanguageModel.wrap` one."
            )
        return own  # type: ignore[no-any-return]

    def _contents(self, rows: Dataset, role: str) -> Contents:
        columns = self._columns.values()
        if missing := [column for column in columns if column not in rows.column_names]:
            raise ValueError(
                f"the {role} set has no column {', '.join(map(repr, missing))}; its columns are {rows.column_names}. Set "
                f"{' and '.join(f'`data.{setting}`' for setting in self._columns)}."
            )
        contents = list(zip(*(rows[column] for column in columns), strict=True))
        for number, content in enumerate(contents):
            if not all(isinstance(text, str) for text in content):
                raise ValueError(
                    f"row {number} of the {role} set is not text: {content!r}. {' and '.join(columns)} must be strings."
                )
        return contents

    def _alternates(self, rows: Dataset, contents: Contents) -> Contents:
        answers = alternate_answers(rows, self.alternate_column, self.refusals, self.seed)
        return [(question, answer) for (question, _), answer in zip(contents, answers, strict=True)]


def _size(rows: list[Example]) -> str:
    tokens = sum(label != IGNORED for row in rows for label in row.labels)
    return f"{len(rows)} rows ({tokens} supervised tokens of {sum(len(row.input_ids) for row in rows)})"
