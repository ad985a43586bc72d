"""MUSE: news articles and novels to forget, as raw text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_unlearn.data.base import Contents, ForgetRetain
from lit_unlearn.data.encoding import Example, encode_chunks
from lit_unlearn.data.source import Source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SPLITS = {"corpus": ("News", "Books"), "retain_split": ("retain1", "retain2")}
_FILES = (".jsonl", ".json", ".parquet", "-00000-of-00001.parquet", ".txt")  # the last but one as on the hub


class MUSE(ForgetRetain):
    """Raw text to forget and to keep, in chunks: BBC news, or the Harry Potter novels with their wiki to keep.

    Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", 2024 (arXiv 2407.06460). As in its
    baselines, the texts of a set are joined and cut into rows of ``max_length`` tokens, all supervised, without regard to
    where a text ends; unlike there, the last row is short instead of being filled with the beginning of the set.

    Args:
        corpus: ``"News"`` or ``"Books"``: 889 articles or 4 novels to forget.
        source: Hub name, or a local folder, where ``{corpus}`` stands for the corpus. The folder, or ``raw`` in it, has
            ``forget`` and the retain split as ``.jsonl``, ``.json`` or ``.parquet`` (also as the hub names it,
            ``forget-00000-of-00001.parquet``), a text per row, or as ``.txt``, which is one text.
        retain_split: ``"retain1"``, on which the published baselines train, or ``"retain2"``, on which MUSE evaluates.
        max_retain_rows: Only the first so many retain texts; ``None`` for all.
        text_column: Column with the text.
        max_length: Tokens of a row, the start token among them if the tokenizer has one.
        **settings: As for `ForgetRetain`, without ``forget`` and ``retain`` and what concerns questions and answers.

    Raises:
        FileNotFoundError: If a local folder lacks a file.
        ValueError: If ``corpus`` or ``retain_split`` is unknown or ``max_length`` leaves nothing to predict.
    """

    def __init__(
        self,
        corpus: Literal["News", "Books"] = "News",
        source: str = "muse-bench/MUSE-{corpus}",
        retain_split: Literal["retain1", "retain2"] = "retain1",
        max_retain_rows: int | None = None,
        text_column: str = "text",
        max_length: int = 2048,
        **settings: Any,
    ) -> None:
        for name, value in {"corpus": corpus, "retain_split": retain_split}.items():
            if value not in _SPLITS[name]:
                raise ValueError(f"MUSE: `{name}` must be one of {', '.join(_SPLITS[name])}, not {value!r}.")
        if max_length < 2:
            raise ValueError(f"MUSE: `max_length` must be at least 2, so that a token predicts one, not {max_length}.")
        source = source.replace("{corpus}", corpus)
        super().__init__(
            muse_source(source, "forget"),
            muse_source(source, retain_split, max_retain_rows),
            question_column=text_column,  # given here, these are no settings of this class
            answer_column=text_column,
            template=None,
            max_length=max_length,
            **settings,
        )
        self._columns = {"text_column": text_column}

    def load_set(self, name: str) -> Dataset:
        """The texts of one set."""
        path = Path(self.sources[name].path)
        if path.suffix.lower() != ".txt":
            return super().load_set(name)
        if not path.is_file():
            raise FileNotFoundError(f"the {name} set's file '{path}' does not exist: check `data.streams`.")
        from datasets import Dataset

        return Dataset.from_dict({self._columns["text_column"]: [path.read_text(encoding="utf-8")]})

    def texts(self) -> list[str]:
        """Every text, for training a tokenizer."""
        return [text for rows in self.load().values() for (text,) in self._contents(rows, "data")]

    def _encode(self, contents: Contents, tokenizer: PreTrainedTokenizerBase, name: str) -> list[Example]:
        return encode_chunks([text for (text,) in contents], tokenizer, name=name, max_length=self.max_length)

    def _alternates(self, rows: Dataset, contents: Contents) -> Contents:
        raise ValueError(
            "MUSE's raw texts are no answers, so there are no alternate ones: choose a method that needs none "
            "(`lit-unlearn methods` says what each needs)."
        )


def muse_source(source: str, split: str, max_rows: int | None = None, config: str = "raw") -> Source:
    """Where a split is: in a local folder, or on the hub.

    Raises:
        FileNotFoundError: If a local folder, or its file of the split, is missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith("."):
            raise FileNotFoundError(f"there is no folder '{source}' with MUSE's files: check `data.source`.")
        return Source(source, name=config, split=split, max_rows=max_rows)
    files = [place / f"{split}{end}" for place in (folder / config, folder) for end in _FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"neither the folder '{source}' nor '{config}' in it has the set '{split}', as a file {split}{f', {split}'.join(_FILES)}: "
            "check `data.source`."
        )
    return Source(str(file), max_rows=max_rows)
