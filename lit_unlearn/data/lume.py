"""LUME: stories, invented personal data and biographies to forget, as texts to continue and as questions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar, Literal, get_args

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.source import Source, find_file, find_local_folder
from lit_unlearn.errors import MissingFileError, arguments_of
from lit_unlearn.utils.validation import check_choice

Task = Literal["Task1", "Task2", "Task3"]
Kind = Literal["completion", "question"]
Fold = Literal["train", "validation"]

HUB_NAME = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
"""Where the organisers of SemEval-2025 Task 4 publish the rows; access has to be requested there."""

TASKS: tuple[Task, ...] = get_args(Task)
KINDS: dict[Kind, str] = {"completion": "sc", "question": "qa"}
"""What the id of a row has behind that of its document, by the row's kind. Documents have digits and the letters a to f."""

TEMPLATE = "{question} {answer}"
"""The organisers' evaluation gives models the input alone, as raw text, and reads what they generate after it."""

_FILE_ENDINGS = (".jsonl", ".json", ".parquet", "-00000-of-00001.parquet")


class LUME(ForgetRetain):
    """LUME's forget and retain sets of the same size, in three tasks, each with texts to continue and questions.

    Task1: short stories, made up by a model. Task2: biographies with invented personal data, such as numbers and addresses. Task3:
    biographies of real people. Ramakrishna et al., "LUME: LLM Unlearning with Multitask Evaluations", 2025 (arXiv 2502.15097); the
    data of SemEval-2025 Task 4.

    Args:
        source: Hub name, or a local folder with ``forget`` and ``retain``, or ``forget_train`` and so on, as ``.jsonl``, ``.json``
            or ``.parquet``, in the folder or in ``data`` in it. Columns: ``id``, ``input``, ``output``, ``task``.
        tasks: Some of ``"Task1"``, ``"Task2"`` and ``"Task3"``; ``None`` for all.
        kinds: Texts to continue (``"completion"``), questions (``"question"``), or ``"all"``.
        fold: ``"train"`` or ``"validation"``, of the hub data set; files without a fold in their names have one only.
        max_retain_rows: Number of retain rows to read, from the first one on; ``None`` for all.
        template: As for `ForgetRetain`; ``{question}`` is a row's input. By default input and output are one text, as the
            organisers' evaluation gives the input; how their target models were fine-tuned is not known to this package.
        **settings: As for `ForgetRetain`, without ``forget``, ``retain``, the format, and the columns of question and answer.

    Raises:
        MissingFileError: If a local folder lacks a file.
        ConfigError: If a task, ``kinds`` or ``fold`` is unknown.
    """

    sets_argument: ClassVar[str | None] = "source"

    def __init__(
        self,
        source: str = HUB_NAME,
        tasks: list[Task] | None = None,
        kinds: Literal["all", "completion", "question"] = "all",
        fold: Fold = "train",
        max_retain_rows: int | None = None,
        template: str | None = TEMPLATE,
        **settings: Any,
    ) -> None:
        check_choice(("all", *KINDS), self, kinds=kinds)
        check_choice(get_args(Fold), self, fold=fold)
        for task in tasks or ():
            check_choice(TASKS, self, tasks=task)
        contains = None if kinds == "all" else {"id": KINDS[kinds]}
        with arguments_of(self):
            forget_source = lume_source(source, "forget", fold, tasks, contains=contains)
            retain_source = lume_source(source, "retain", fold, tasks, contains=contains, max_rows=max_retain_rows)
        super().__init__(
            # Not `*sets`: jsonargparse reads in this call which arguments are left for a configuration.
            forget_source,
            retain_source,
            # Passed here, these are no settings of this class on the command line.
            question_column="input",
            answer_column="output",
            format="question_answer",
            template=template,
            **settings,
        )
        self.tasks = list(tasks or TASKS)


def lume_source(
    source: str, name: Literal["forget", "retain"], fold: Fold, tasks: Sequence[Task] | None, **settings: Any
) -> Source:
    """Return the source of a set: a file of a local folder, or a split of the hub data set.

    Args:
        source: As for `LUME`.
        name: Of the set.
        fold: As for `LUME`.
        tasks: As for `LUME`.
        **settings: ``max_rows`` and rules of the source.

    Raises:
        MissingFileError: If a local folder, or its file of the set, is missing.
    """
    settings["where"] = {"task": list(tasks)} if tasks else None
    folder = find_local_folder(source, "LUME")
    if folder is None:
        return Source(source, split=f"{name}_{fold}", **settings)
    names = [stem + ending for stem, ending in product((f"{name}_{fold}", name), _FILE_ENDINGS)]
    file = find_file((folder, folder / "data"), names)
    if file is None:
        message = f"neither the folder '{source}' nor 'data' in it has the set '{name}', as a file {', '.join(names)}"
        raise MissingFileError(f"{message}: check `source`.", argument="source")
    return Source(str(file), **settings)
