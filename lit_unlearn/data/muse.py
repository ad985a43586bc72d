"""MUSE: news articles and novels to forget, as raw text."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.documents import encode_chunks
from lit_unlearn.data.example import Example
from lit_unlearn.data.files import read_text_file
from lit_unlearn.data.formats import Row
from lit_unlearn.data.source import Source, find_file, find_local_folder
from lit_unlearn.data.spans import Spans
from lit_unlearn.errors import DataError, MissingFileError, arguments_of
from lit_unlearn.utils.validation import check_at_least, check_choice

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ForgetSet = Literal["forget", "scal_1", "scal_2", "scal_3", "scal_4", "sust_1", "sust_2", "sust_3", "sust_4"]

# The long one is how the hub names its files, so a downloaded repository can be used as it is.
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", "-00000-of-00001.parquet", ".txt")


class MUSE(ForgetRetain):
    """Raw text to forget and to keep, in chunks: BBC news, or the Harry Potter novels with their wiki to keep.

    Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", 2024 (arXiv 2407.06460). As in its
    baselines, the texts of a set are joined and cut into examples of ``max_length`` tokens, all supervised, without regard to
    where a text ends; unlike there, the last example is short instead of being filled with the beginning of the set.

    Args:
        corpus: ``"News"`` or ``"Books"``: 889 articles or 4 novels to forget.
        source: Hub name, or a local folder, where ``{corpus}`` stands for the corpus. The folder, or ``raw`` in it, has
            ``forget`` and the retain split as ``.jsonl``, ``.json`` or ``.parquet`` (also as the hub names it,
            ``forget-00000-of-00001.parquet``), a text per row, or as ``.txt``, which is one text. The files of ``"scal_1"`` are
            named ``forget_1`` and are in ``scal``.
        retain_split: ``"retain1"``, on which the published baselines train, or ``"retain2"``, on which MUSE evaluates.
        max_retain_rows: Number of retain texts to read, from the first one on; ``None`` for all.
        text_column: Column with the text.
        max_length: Tokens of an example, the start token among them if the tokenizer has one.
        forget_set: ``"forget"``, the texts that MUSE's own evaluation asks for; or, to study many or repeated requests, one of
            ``"scal_1"`` to ``"scal_4"``, each of which contains the one before, or of ``"sust_1"`` to ``"sust_4"``, which have no
            text in common and are forgotten one after the other.
        **settings: As for `ForgetRetain`, without ``forget``, ``retain`` and those of questions and answers.

    Raises:
        MissingFileError: If a local folder lacks a file.
        ConfigError: If ``corpus``, ``forget_set`` or ``retain_split`` is unknown or ``max_length`` leaves nothing to predict.
    """

    sets_argument: ClassVar[str | None] = "source"

    def __init__(
        self,
        corpus: Literal["News", "Books"] = "News",
        source: str = "muse-bench/MUSE-{corpus}",
        retain_split: Literal["retain1", "retain2"] = "retain1",
        max_retain_rows: int | None = None,
        text_column: str = "text",
        max_length: int = 2048,
        forget_set: ForgetSet = "forget",
        **settings: Any,
    ) -> None:
        check_choice(("News", "Books"), self, corpus=corpus)
        check_choice(get_args(ForgetSet), self, forget_set=forget_set)
        check_choice(("retain1", "retain2"), self, retain_split=retain_split)
        # The first token is only read, so a second one is needed to be predicted.
        check_at_least(2, self, max_length=max_length)
        source = source.replace("{corpus}", corpus)
        with arguments_of(self):
            forget_source = _forget_source(source, forget_set)
            retain_source = muse_source(source, retain_split, max_retain_rows)
        super().__init__(
            # Not `*sets`: jsonargparse reads in this call which arguments are left for a configuration.
            forget_source,
            retain_source,
            # Passed here, these are no settings of this class on the command line.
            question_column=text_column,
            answer_column=text_column,
            messages_column="messages",
            format="text",
            supervise="all",
            text_column=text_column,
            context_column=None,
            chunk_overlap=0,
            span_column=None,
            template=None,
            chat=None,
            mask_padding_ids=False,
            max_length=max_length,
            **settings,
        )
        self.corpus, self.forget_set = corpus, forget_set

    def load_set(self, name: str) -> Dataset:
        """Return the texts of one set."""
        source = self.sources[name]
        path = Path(source.path)
        if source.rows is not None or path.suffix.lower() != ".txt":
            return super().load_set(name)
        from datasets import Dataset

        with arguments_of(self):
            if not path.is_file():
                message = f"the {name} set's file '{path}' does not exist: check `{self._argument_of(name)}`."
                raise MissingFileError(message, argument=self._argument_of(name))
            if source.rules:
                message = (
                    f"the {name} set's file '{path}' is one text without columns, of which no rule can choose rows."
                )
                raise DataError(message, argument=self._argument_of(name))
            text = read_text_file(path, self._argument_of(name), f"file of the {name} set")
        return Dataset.from_dict({self.text_column: [text]})

    def _encode(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, name: str, spans: list[Spans] | None = None
    ) -> list[Example]:
        texts = list(chain.from_iterable(row.texts for row in rows))
        settings: Any = {"max_length": self.max_length, "allow_special_tokens": self.allow_special_tokens}
        examples = encode_chunks(texts, tokenizer, name=name, **settings)
        return [example._replace(id=f"{name}/{i}") for i, example in enumerate(examples)]


def _forget_source(source: str, forget_set: ForgetSet) -> Source:
    if forget_set == "forget":
        return muse_source(source, "forget")
    config, _, number = forget_set.partition("_")
    return muse_source(source, f"forget_{number}", config=config)


def muse_source(source: str, split: str, max_rows: int | None = None, config: str = "raw") -> Source:
    """Return the source of a split: a file of a local folder, or a split of the hub data set.

    Raises:
        MissingFileError: If a local folder, or its file of the split, is missing.
    """
    folder = find_local_folder(source, "MUSE")
    if folder is None:
        return Source(source, name=config, split=split, max_rows=max_rows)
    names = [f"{split}{ending}" for ending in _FILE_ENDINGS]
    if file := find_file((folder / config, folder), names):
        return Source(str(file), max_rows=max_rows)
    message = f"neither the folder '{source}' nor '{config}' in it has the set '{split}', as a file {', '.join(names)}"
    raise MissingFileError(f"{message}: check `source`.", argument="source")
