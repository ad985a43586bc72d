"""The data module of a forget and a retain set: reads, checks, tokenises, batches, and resumes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import lightning as L
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info

from lit_unlearn.data.alternates import alternate_rows
from lit_unlearn.data.chat_template import find_prompt_difference
from lit_unlearn.data.encoding import describe_first_prompt
from lit_unlearn.data.encoding_settings import EncodingSettings, check_chunk_overlap, check_tokenizer
from lit_unlearn.data.example import Example
from lit_unlearn.data.formats import Conversation, Format, Row, RowReader, Supervise
from lit_unlearn.data.sets import (
    digest_examples,
    encode_set,
    handle_duplicates,
    summarize_examples,
    warn_of_special_tokens,
)
from lit_unlearn.data.shown_tokens import format_example, show_tokens
from lit_unlearn.data.source import Rows, Source, to_source
from lit_unlearn.data.spans import Spans, read_spans
from lit_unlearn.data.streams import BatchStream, FiniteStream
from lit_unlearn.data.templates import (
    PLAIN_TEMPLATE,
    Chat,
    check_chat,
    check_template,
)
from lit_unlearn.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LitUnlearnError,
    ModelError,
    arguments_of,
    reading,
)
from lit_unlearn.models.hub import check_hub
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.io import expand_home
from lit_unlearn.utils.validation import check_at_least, check_choice

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["pairs", "all", "retain"]


class ForgetRetain(L.LightningDataModule):
    r"""A forget set and a retain set: questions and answers, conversations, or raw text.

    Training batches are ``{"forget": batch, "retain": batch, …}``: an epoch is one pass over the forget set, while the
    retain set, and every additional set, is repeated without end. Validation and test go over every example of all sets.
    The position in each set is saved in checkpoints, so that a resumed run draws the examples it would have drawn.

    Batch sizes are those of one optimizer step over all processes, which share its examples: the same configuration takes
    the same steps on any number of devices. How many a device holds at a time is ``LitUnlearn``'s ``micro_batch_size``.

    Args:
        forget: Rows to forget: a ``datasets.Dataset``, a list of dicts, a file, a hub name or a `Source`.
        retain: Rows to keep, likewise.
        streams: Additional sets by name, likewise: measured like the others, and trained on where a constraint's
            ``stream`` is that name.
        tokenizer: Hub name or directory; ``None`` for the model's.
        question_column: Column with the question.
        answer_column: Column with the answer, the part that is supervised.
        alternate_column: Column of the forget set with another answer, or a list of them of which one is drawn, for
            objectives that read one; ``None`` for refusals.
        refusals: Text file with a refusal per line, to draw from; ``None`` for this package's 120.
        template: Text with ``{question}`` and ``{answer}``, in which a typed ``\n`` is a line break; ``None`` for the
            tokenizer's chat template where it has one, else a plain one. A prompt and a completion that are two texts then
            have no template.
        max_length: Largest number of tokens of an example; longer ones are cut, and counted in a warning. Raw text continues
            in another example.
        batch_size: Forget examples per optimizer step.
        retain_batch_size: Retain examples per optimizer step, and examples of every additional set; ``None`` for
            ``batch_size``.
        eval_batch_size: Examples per process and batch in validation and test.
        seed: Seed of the order of examples.
        train_on: ``"pairs"`` to unlearn; ``"all"`` (all sets as one) to fine-tune a target model, ``"retain"`` (all but
            the forget set) to fine-tune the retain-only model that unlearning is compared with.
        allow_special_tokens: Whether special tokens in rows, such as ``<|im_end|>``, are control tokens. By default they are
            text like any other, and the rows are counted in a warning; those of the template are control tokens always.
        drop_duplicates: Whether rows of the retain set and of additional sets are left out if they are forget rows as well,
            whatever their white space and case. By default they are reported with their numbers.
        format: Format of all sets: ``"question_answer"``, ``"prompt_completion"`` (as trl reads them), ``"messages"``
            or ``"text"``; ``"auto"`` to recognise that of every set by its columns.
        supervise: Which turns of the assistant's in a conversation are supervised, ``"all"`` or the ``"last"`` one.
        messages_column: Column with a conversation, a list of messages with ``role`` and ``content``.
        text_column: Column with raw text, every token of which is supervised.
        context_column: Column with text that stands before it and is only read.
        chunk_overlap: Of raw text that is longer than ``max_length``, tokens that an example repeats from the one before, to
            read them only.
        span_column: Column of the forget set with the sensitive parts of what is supervised, a list of texts or of
            ``[start, end]`` in characters: only their tokens are then supervised. ``None`` for everything.
        chat: Settings of the chat template: ``system``, ``template`` and ``args``. Not beside ``template``.
        mask_padding_ids: Whether tokens with the id of the padding are hidden from all others (``ids != pad``), as in
            published code, whose models were measured so. Where the end token pads, that hides every end.
        show_example: Whether the first forget example is shown as tokens, with the supervised ones marked, once on the terminal
            and in ``report.json``.

    Raises:
        ConfigError: If an argument is out of range, or an additional set has a reserved name.

    Example:
        >>> data = ForgetRetain([{"question": "Who?", "answer": "Ada."}], "retain.jsonl")
        >>> data.load_set("forget")["answer"][0]
        'Ada.'
    """

    sets_argument: ClassVar[str | None] = None
    """The argument that both sets come from, in a subclass that has no ``forget`` and ``retain``; for errors."""

    def __init__(
        self,
        forget: Rows,
        retain: Rows,
        streams: Mapping[str, Rows] | None = None,
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
        seed: int = 0,
        train_on: TrainOn = "pairs",
        allow_special_tokens: bool = False,
        drop_duplicates: bool = False,
        format: Format = "auto",
        supervise: Supervise = "all",
        messages_column: str = "messages",
        text_column: str = "text",
        context_column: str | None = None,
        chunk_overlap: int = 0,
        span_column: str | None = None,
        chat: Chat | None = None,
        mask_padding_ids: bool = False,
        show_example: bool = False,
    ) -> None:
        super().__init__()
        retain_batch_size = batch_size if retain_batch_size is None else retain_batch_size
        check_at_least(1, self, max_length=max_length, batch_size=batch_size, retain_batch_size=retain_batch_size)
        check_at_least(1, self, eval_batch_size=eval_batch_size)
        check_choice(get_args(TrainOn), self, train_on=train_on)
        check_choice(get_args(Format), self, format=format)
        check_choice(get_args(Supervise), self, supervise=supervise)
        check_chunk_overlap(chunk_overlap, max_length, self)
        streams = streams or {}
        # "train" is the stream of all sets as one.
        if reserved := streams.keys() & {"forget", "retain", "train"}:
            message = f"`streams` may not use the name {', '.join(map(repr, sorted(reserved)))}: choose another one."
            raise ConfigError(message, owner=self, argument="streams")
        self.sources: dict[str, Source] = {}
        with arguments_of(self):
            template = check_template(template)
            check_chat(chat, template)
            for name, rows in {"forget": forget, "retain": retain, **streams}.items():
                self.sources[name] = to_source(rows, self._argument_of(name))
        self.question_column, self.answer_column = question_column, answer_column
        self.alternate_column, self.refusals = alternate_column, refusals
        self.messages_column, self.text_column = messages_column, text_column
        self.context_column, self.span_column = context_column, span_column
        self.format, self.supervise = format, supervise
        self.template, self.chat = template, chat
        self.max_length, self.chunk_overlap = max_length, chunk_overlap
        self.allow_special_tokens, self.mask_padding_ids = allow_special_tokens, mask_padding_ids
        self.show_example = show_example
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.eval_batch_size, self.seed, self.train_on = eval_batch_size, seed, train_on
        self.drop_duplicates = drop_duplicates
        self.num_dropped: dict[str, int] = {}
        self.examples: dict[str, list[Example]] = {}
        self.formats: dict[str, Format] = {}
        """The format of every set, once the sets are read."""
        self.prompt: dict[str, Any] | None = None
        """What decides the prompts of conversations, from `describe_first_prompt`, once the sets are read; ``None`` without any."""
        self.shown_example: dict[str, list[Any]] | None = None
        """``tokens`` of the first forget example, as texts, and which are ``supervised``, if ``show_example`` is true."""
        self._tokenizer_name = None if tokenizer is None else expand_home(tokenizer)
        self._streams: dict[str, BatchStream] = {}
        self._cursors: dict[str, int] = {}

    def load(self) -> dict[str, Dataset]:
        """Return the raw rows of all sets by name, with all their columns."""
        return {name: self.load_set(name) for name in self.sources}

    def load_set(self, name: str) -> Dataset:
        """Return the raw rows of one set."""
        with arguments_of(self):
            return self.sources[name].load(name, self._argument_of(name))

    def texts(self) -> list[str]:
        """Return the text of every row, to train a tokenizer on."""
        texts = []
        for name, rows in self.load().items():
            for row in self._read_rows(rows, name):
                if isinstance(row, Conversation) and row.is_single_turn:
                    texts.append(PLAIN_TEMPLATE.format(question=row.question, answer=row.answer))
                else:
                    texts.append("\n".join(row.texts))
        return texts

    def prepare_data(self) -> None:
        """Fetch the sets once per machine, before the other processes read them."""
        self.load()

    def setup(self, stage: str) -> None:
        """Read, check and tokenise all sets; everything wrong with them is reported here, before any model is loaded.

        Raises:
            LitUnlearnError: If a file or a column is missing, a set is empty, a row has no supervised token or the tokenizer
                cannot be used.
        """
        self._streams = {}
        needs_alternates = self._needs_alternates()
        # A trainer sets up again for each of fit, validate and test.
        if self.examples and not (needs_alternates and self.examples["forget"][0].alternate is None):
            return

        problem: LitUnlearnError | None = None
        try:
            with arguments_of(self):
                self._make_examples(needs_alternates)
        except LitUnlearnError as error:
            problem = error
        self._raise_together(problem)
        summaries = [f"{name} {summarize_examples(rows, self.formats[name])}" for name, rows in self.examples.items()]
        rank_zero_info(f"data: {', '.join(summaries)}")
        if self.shown_example is not None:
            rank_zero_info(
                f"first forget example, supervised tokens in brackets:\n{format_example(self.shown_example)}"
            )

    def _raise_together(self, problem: LitUnlearnError | None) -> None:
        """Raise this process's problem or, if it has none, that of another: it would wait for that one without a word."""
        # Without a trainer there is nothing that all processes do together.
        problems = [problem and str(problem)] if self.trainer is None else gather_objects(problem and str(problem))
        if problem is not None:
            raise problem
        for rank, message in enumerate(problems):
            if message is not None:
                raise DataError(f"the process of rank {rank} cannot use its rows: {message}")

    def _make_examples(self, needs_alternates: bool) -> None:
        tables = self.load()
        rows = {name: self._read_rows(table, name) for name, table in tables.items()}
        self.num_dropped = handle_duplicates(rows, self.drop_duplicates, self.train_on == "pairs", self._argument_of)

        tokenizer = self._load_tokenizer()
        check_tokenizer(tokenizer)
        warn_of_special_tokens(rows, tokenizer, self.allow_special_tokens)
        spans = None
        if self.span_column is not None:
            spans = read_spans(tables["forget"], rows["forget"], self.span_column, "forget")
        # Masks are made from lengths, so the end token may pad.
        for name, of_set in rows.items():
            self.examples[name] = self._encode(of_set, tokenizer, name, spans if name == "forget" else None)
        every_row = chain.from_iterable(rows.values())
        self.prompt = describe_first_prompt(every_row, tokenizer, self._encoding_settings())
        if needs_alternates:
            alternates = alternate_rows(
                tables["forget"], rows["forget"], self.alternate_column, self.refusals, self.seed, type(self)
            )
            self._attach_alternates(self._encode(alternates, tokenizer, "alternate"))
        if self.show_example:
            self.shown_example = show_tokens(self.examples["forget"][0], tokenizer)

    def train_dataloader(self) -> CombinedLoader:
        """Return zipped batches that end with the forget set, or batches of one set to fine-tune a model."""
        # Loaders may be made anew in the middle of a run, and then continue.
        for name, stream in self._streams.items():
            self._cursors.setdefault(name, stream.cursor)
        self._streams = {}
        if self.train_on == "pairs":
            for name, examples in self.examples.items():
                if name == "forget":
                    self._streams[name] = self._finite_stream(name, examples, self.batch_size)
                else:
                    settings = self._stream_settings(name)
                    self._streams[name] = BatchStream(examples, self.retain_batch_size, **settings)
        else:
            together = []
            for name, examples in self.examples.items():
                if name != "forget" or self.train_on == "all":
                    together += examples
            self._streams["train"] = self._finite_stream("train", together, self.batch_size)
        self._restore_cursors()
        self._cursors = {}
        return CombinedLoader(self._streams, "min_size")

    def val_dataloader(self) -> dict[str, FiniteStream]:
        """Return every example of all sets, the longest first so that memory runs out at once or never."""
        batch_size = self.eval_batch_size * self._rank_and_world_size()["world_size"]
        streams = {}
        for name, examples in self.examples.items():
            longest_first = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
            streams[name] = self._finite_stream(name, longest_first, batch_size, seed=None)
        return streams

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches handed out of each training stream, and what their order depends on."""
        cursors = {name: stream.cursor for name, stream in self._streams.items()}
        return {"cursors": cursors, "order": self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where a checkpoint stopped.

        Raises:
            CheckpointError: If the examples, their order or the batches differ from those of the checkpoint.
        """
        # Validation and test go over all examples, whatever training had seen.
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        changes = []
        current = self._order_settings()
        for key, value in current.items():
            before = state["order"].get(key)
            # Another setting that gives the same tokens changes nothing; one that does not explains the other rows.
            if before != value and key != "prompt":
                changes.append(f"{key}: was {before!r}, is {value!r}")
        difference = find_prompt_difference(state["order"].get("prompt"), current["prompt"])
        if changes and difference is not None:
            changes.append(difference)
        if changes:
            raise CheckpointError(
                f"the checkpoint cannot be resumed, because the order of examples depends on what changed "
                f"({'; '.join(changes)}). Restore it, or start a new run from the exported model."
            )
        self._cursors = dict(state["cursors"])
        self._restore_cursors()

    def _argument_of(self, name: str) -> str:
        return (self.sets_argument or name) if name in ("forget", "retain") else "streams"

    def _needs_alternates(self) -> bool:
        # Without a trainer, or under a module of the user's, there are no objectives to ask.
        module: Any = getattr(self.trainer, "lightning_module", None)
        terms = module.terms() if hasattr(module, "terms") else []
        return any(term.objective.reads != "answer" for term in terms)

    def _read_rows(self, rows: Dataset, name: str) -> list[Row]:
        reader = RowReader(
            self.format,
            self.supervise,
            self.question_column,
            self.answer_column,
            self.messages_column,
            self.text_column,
            self.context_column,
        )
        self.formats[name] = reader.recognize(rows.column_names)
        return reader.read(rows, name, self._argument_of(name))

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer_name is not None:
            from transformers import AutoTokenizer

            check_hub(self._tokenizer_name, self, "tokenizer", "tokenizer_config.json")
            with reading("the tokenizer", self._tokenizer_name, "Check `tokenizer`.", ModelError, argument="tokenizer"):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._tokenizer_name)
            return tokenizer
        lm = getattr(getattr(self.trainer, "lightning_module", None), "lm", None)
        model_tokenizer: PreTrainedTokenizerBase | None = getattr(lm, "tokenizer", None)
        if model_tokenizer is None:
            remedy = "set `tokenizer`, here or of `LanguageModel`, or give `LanguageModel.wrap` one"
            raise ConfigError(f"there is no tokenizer: {remedy}.", argument="tokenizer")
        return model_tokenizer

    def _encoding_settings(self) -> EncodingSettings:
        return EncodingSettings(
            self.template,
            self.chat,
            self.max_length,
            self.chunk_overlap,
            self.allow_special_tokens,
            self.mask_padding_ids,
        )

    def _encode(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, name: str, spans: list[Spans] | None = None
    ) -> list[Example]:
        return encode_set(rows, tokenizer, self._encoding_settings(), name, spans)

    def _attach_alternates(self, alternates: list[Example]) -> None:
        for i, (example, alternate) in enumerate(zip(self.examples["forget"], alternates, strict=True)):
            alternate = alternate._replace(id=f"{example.id}/alternate")
            self.examples["forget"][i] = example._replace(alternate=alternate)

    def _restore_cursors(self) -> None:
        """Move the streams, if there are any yet, to where training stands."""
        for name, stream in self._streams.items():
            stream.cursor = self._cursors.get(name, stream.cursor)

    def _order_settings(self) -> dict[str, Any]:
        """Return what the order of examples depends on: a run can be resumed only where all of it is the same."""
        return {
            "prompt": self.prompt,
            "rows": digest_examples(self.examples),
            "seed": self.seed,
            "train_on": self.train_on,
            "batch_size": self.batch_size,
            "retain_batch_size": self.retain_batch_size,
            "processes": self._rank_and_world_size()["world_size"],
        }

    def _finite_stream(self, name: str, examples: list[Example], batch_size: int, **settings: Any) -> FiniteStream:
        return FiniteStream(examples, batch_size, **self._stream_settings(name) | settings)

    def _stream_settings(self, name: str) -> dict[str, Any]:
        return {"name": name, "seed": self.seed, **self._rank_and_world_size()}

    def _rank_and_world_size(self) -> dict[str, int]:
        # Without a trainer, as in a loop of the user's.
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
