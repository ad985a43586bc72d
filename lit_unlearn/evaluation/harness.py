"""Tasks of lm-evaluation-harness as a benchmark: general ability, measured by the code that published tables use."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lit_unlearn.errors import ConfigError, DataError, MissingFileError, reading
from lit_unlearn.evaluation.benchmark import Aggregate, Benchmark
from lit_unlearn.evaluation.benchmark_rows import BenchmarkExample, BenchmarkStream
from lit_unlearn.evaluation.results import Results, Values
from lit_unlearn.evaluation.scoring import Scored
from lit_unlearn.models import LanguageModel
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.io import expand_path
from lit_unlearn.utils.validation import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = (
    "The harness reads most tasks from the hub: run it once where the network is reachable, after which the files are in the cache of "
    "`datasets`; or describe your own rows in a task file, and set `source` to its folder."
)


class LMEvalBenchmark(Benchmark):
    """Tasks of lm-evaluation-harness, such as ``mmlu`` or ``wmdp``, by name, or your own task files.

    Values are ``<task>/<metric>``, as the harness computes them, with ``<metric>_stderr`` where it gives one; a filter's name is
    appended, as in ``gsm8k/exact_match/strict-match``. A group such as ``mmlu`` has its own values beside those of its tasks.

    Every process measures all rows, since the harness divides them only among processes that it has started itself. An interrupted
    evaluation begins anew. Gao et al., "The Language Model Evaluation Harness", 2024 (doi 10.5281/zenodo.12608602).

    Args:
        tasks: Names of tasks, groups or tags; ``lm_eval ls tasks`` lists those of the harness.
        source: Folder with further task files (``.yaml``); ``None`` for the harness's own tasks alone.
        max_rows: Number of rows of each task, the first ones; ``None`` for all.
        num_fewshot: Number of solved examples before each question; ``None`` for the task's own.
        chat: Whether questions are put in the tokenizer's chat template.
        batch_size: Number of sequences in a batch.

    Raises:
        ConfigError: If the package ``lm_eval`` is missing, there is no task, or a number is out of range.
        MissingFileError: If ``source`` is no folder.
    """

    name: ClassVar[str] = "lm_eval"

    def __init__(
        self,
        tasks: list[str],
        source: str | None = None,
        max_rows: int | None = None,
        num_fewshot: int | None = None,
        chat: bool = False,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        if not (isinstance(tasks, list) and tasks):
            raise ConfigError(
                f"`tasks` must be a list of names, such as ['mmlu'], not {tasks!r}.", owner=self, argument="tasks"
            )
        check_at_least(1, self, batch_size=batch_size)
        if max_rows is not None:
            check_at_least(1, self, max_rows=max_rows)
        if num_fewshot is not None:
            check_at_least(0, self, num_fewshot=num_fewshot)
        if source is not None and not expand_path(source).is_dir():
            raise MissingFileError(f"there is no folder '{source}' with task files.", owner=self, argument="source")
        self.tasks = list(tasks)
        self.source = source
        self.max_rows = max_rows
        self.num_fewshot = num_fewshot
        self.chat = chat
        self.batch_size = batch_size
        self._values: dict[str, float] = {}  # of the last model
        self._manager = _build_task_manager(self)

    def settings(self) -> Values:
        """Return the settings that decide values, with the harness's version."""
        import lm_eval

        settings = {name: getattr(self, name) for name in ("tasks", "max_rows", "num_fewshot", "chat")}
        return {**settings, "lm_eval": lm_eval.__version__}

    def load(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkStream]:
        """Read the rows of every task.

        Raises:
            ConfigError: If the harness has no such task, or the tokenizer no chat template.
            DataError: If the rows of a task cannot be read.
        """
        for name in self.tasks:
            if name not in self._manager.task_index:
                close = difflib.get_close_matches(name, self._manager.all_tasks) or ["none is spelt alike"]
                message = (
                    f"the harness has no task '{name}': did you mean {', '.join(close)}? `lm_eval ls tasks` lists all."
                )
                raise ConfigError(message, owner=self, argument="tasks")
        if self.chat and tokenizer.chat_template is None:
            raise ConfigError("`chat` is true, but the tokenizer has no chat template.", owner=self, argument="chat")
        streams = {}
        with reading("the tasks", ", ".join(self.tasks), _REMEDY, DataError, owner=self, argument="tasks"):
            for name, task in self._manager.load(self.tasks)["tasks"].items():
                examples = []
                for row in islice(task.eval_docs, self.max_rows):
                    # For the digest of the rows; the harness itself makes prompts of them.
                    text = json.dumps(row, sort_keys=True, default=str)
                    examples.append(BenchmarkExample({"row": text}, sequences={}))
                streams[name] = BenchmarkStream(examples, source=str(task.config.dataset_path))
        return streams

    def measure(
        self, stream: str, example: BenchmarkExample, scored: Mapping[str, Sequence[Scored]], generated: str | None
    ) -> Values:
        """Return no values: the harness measures all rows at once, in `add_values`."""
        return {}

    def add_values(self, examples: Mapping[str, list[Values]], lm: LanguageModel) -> None:
        """Let the harness measure the model, which is left as it was."""
        # It gives results to the first process of a machine alone.
        values, rows = gather_objects(self._run_harness(lm))[0]
        self._values = values
        for name, row, row_values in rows:
            examples[name][row] |= row_values

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Aggregate:
        """Return the values of the harness."""
        return Aggregate(self._values, {})

    def _run_harness(self, lm: LanguageModel) -> tuple[dict[str, float], list[tuple[str, int, Values]]]:
        """Return the values of tasks and groups, and those of every row: its task, number and values."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model: Any = lm.model
        device_type = model.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        # The harness seeds all generators, which would change the steps of a fit, and may give the tokenizer a padding token.
        with evaluation_mode(model), isolate_rng():
            output = simple_evaluate(
                HFLM(
                    model,
                    tokenizer=copy.deepcopy(lm.tokenizer),
                    batch_size=self.batch_size,
                    # Its own autocast replaces that of the Trainer.
                    mixed_precision_dtype=autocast,
                ),
                tasks=self.tasks,
                task_manager=self._manager,
                num_fewshot=self.num_fewshot,
                limit=self.max_rows,
                apply_chat_template=self.chat,
            )
        return ({}, []) if output is None else (_read_values(output["results"]), _read_rows(output["samples"]))


def _build_task_manager(owner: LMEvalBenchmark) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        message = '`LMEvalBenchmark` needs lm-evaluation-harness, which is not installed: pip install "lit-unlearn[neighbours]"'
        raise ConfigError(message, owner=owner) from None
    folder = None if owner.source is None else str(expand_path(owner.source))
    return TaskManager(include_path=folder)


def _read_values(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of tasks and groups, which the harness names ``metric,filter``."""
    values = {}
    for task, of_task in results.items():
        for key, value in of_task.items():
            metric, comma, filter_name = key.partition(",")
            # Names and counts have no filter; a standard error that cannot be computed is a text.
            if comma and isinstance(value, int | float):
                suffix = "" if filter_name == "none" else f"/{filter_name}"
                values[f"{task}/{metric}{suffix}"] = float(value)
    return values


def _read_rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, int, Values]]:
    rows = []
    for task, of_task in samples.items():
        for sample in of_task:
            suffix = "" if sample["filter"] == "none" else f"/{sample['filter']}"
            values = {}
            for metric in sample["metrics"]:
                # Metrics over all rows need pairs or texts of each, which are no values of a row.
                if isinstance(sample[metric], int | float):
                    values[f"{metric}{suffix}"] = float(sample[metric])
            rows.append((task, sample["doc_id"], values))
    return rows
