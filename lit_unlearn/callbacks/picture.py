"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.encoding import IGNORED, Example, prompt_of, token_texts
from lit_unlearn.evaluation.scoring import Scored, score_examples
from lit_unlearn.plotting import Answer, draw_run, read_run, write_record
from lit_unlearn.training import LitLanguageModel, LitUnlearn

_TOKENS = 64  # of an answer, from its start


class RunPicture(Callback):
    """Draws the run when it ends, beside the ``metrics.csv`` of a CSV logger, as PNG and SVG.

    ``dual``: retention against its bound, λ, and forgetting over the steps. ``trajectory``: retention over forgetting,
    from validation to validation. ``tokens``: a few answers before and after, token by token. Everything they are drawn
    from is in ``metrics.csv`` and ``pictures.json`` all the time, so that ``lit-unlearn plot`` draws a run that goes on
    or was killed.

    Args:
        answers: Rows of every stream whose tokens are shown, the first ones; 0 for none.

    Raises:
        ValueError: If ``answers`` is negative.
    """

    def __init__(self, answers: int = 3) -> None:
        if answers < 0:
            raise ValueError(f"`picture.answers` must be at least 0, not {answers}.")
        self.answers = answers
        self._earlier: list[str] = []  # the metrics of what this run resumed
        self._current: str | None = None
        self._before: dict[str, float] = {}
        self._answers: list[dict[str, Any]] = []
        self._kept_step: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where the metrics go, and what the model finds of a few answers before the first step."""
        folder = next((logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        folder = trainer.strategy.broadcast(folder)  # other processes may count one version more
        self._current = folder and str(Path(folder).absolute() / "metrics.csv")
        if self._current is None or not isinstance(pl_module, LitLanguageModel):
            return
        if trainer.global_step == 0:
            self._before, self._answers, self._kept_step = {}, [], None
            if _has_rows(trainer):
                self._before = pl_module.measure()  # which others measure as well: it is done once
                self._answers = self._first_answers(trainer, pl_module)
        elif not _has_rows(trainer):
            self._answers = []  # of a data module that there is no more
        self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the answers again if validation has just found the best model so far."""
        if trainer.state.fn == "fit" and isinstance(pl_module, LitUnlearn) and pl_module.keep == "best":
            self._look_again(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws."""
        if not isinstance(pl_module, LitLanguageModel):
            return
        if self._current is None:
            rank_zero_info(
                "pictures: none, because they are drawn from the metrics.csv of a CSVLogger; add one to the loggers"
            )
            return
        if self._before:
            pl_module.measure()  # the last model may be the one to keep
        self._look_again(trainer, pl_module)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            self._draw(Path(self._current).parent)

    def _draw(self, folder: Path) -> None:
        try:
            drawn = draw_run(read_run(folder), folder)
        except Exception as error:  # no picture is worth the model, which is still to be exported
            rank_zero_warn(f"the pictures could not be drawn ({error}); try `lit-unlearn plot {folder}`.")
            return
        there = [name for name, files in drawn.items() if not isinstance(files, str)]
        rank_zero_info(f"pictures: {', '.join(there) or 'none'} (.png and .svg) in {folder}")
        for name, reason in drawn.items():
            if isinstance(reason, str):
                rank_zero_info(f"no picture '{name}': {reason}")

    def _look_again(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        """Notes what the model makes of the answers, if it is the one that the run keeps."""
        kept = module.kept_step
        if self._current is None or trainer.sanity_checking or kept != trainer.global_step or kept == self._kept_step:
            return
        if self._answers:
            rows = [trainer.datamodule.examples[answer["stream"]][answer["row"]] for answer in self._answers]  # type: ignore[attr-defined]
            after = [_probabilities(scored) for scored in _score(trainer, module, rows)]
            self._answers = [{**answer, "after": own} for answer, own in zip(self._answers, after, strict=True)]
        self._kept_step = kept
        self._write(trainer)

    def _first_answers(self, trainer: L.Trainer, module: LitLanguageModel) -> list[dict[str, Any]]:
        sets: dict[str, list[Example]] = trainer.datamodule.examples  # type: ignore[attr-defined]
        found = [(stream, i, row) for stream, rows in sets.items() for i, row in enumerate(rows[: self.answers])]
        scored = _score(trainer, module, [row for *_, row in found])
        return [
            Answer(
                stream, number, *_texts(module, row, one.labels.tolist()), _probabilities(one), None, _is_cut(row)
            )._asdict()
            for (stream, number, row), one in zip(found, scored, strict=True)
        ]

    def _write(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self._current is not None:
            files = [Path(file) for file in self.state_dict()["files"]]
            write_record(files[-1].parent, files, self._before, self._kept_step, self._answers)

    def state_dict(self) -> dict[str, Any]:
        """Where the metrics up to here are, and what was noted."""
        files = [*self._earlier, *filter(None, [self._current])]
        return {"files": files, "before": self._before, "answers": self._answers, "kept_step": self._kept_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; of an older version only the files."""
        self._earlier = state_dict["files"]
        self._before, self._answers = state_dict.get("before", {}), state_dict.get("answers", [])
        self._kept_step = state_dict.get("kept_step")


def _has_rows(trainer: L.Trainer) -> bool:
    return isinstance(trainer.datamodule, ForgetRetain)  # type: ignore[attr-defined]


def _score(trainer: L.Trainer, module: LitLanguageModel, rows: Sequence[Example]) -> list[Scored]:
    """Scores the beginnings of rows; every process must, because a sharded model is whole in all or none."""
    with trainer.precision_plugin.val_step_context():
        return score_examples(module.lm, [_start(row) for row in rows])


def _start(row: Example) -> Example:
    """The row up to the last token that is shown, on which no later one has an influence."""
    supervised = [i for i, label in enumerate(row.labels) if label != IGNORED]
    stop = supervised[:_TOKENS][-1] + 1
    return Example(row.input_ids[:stop], row.labels[:stop])


def _probabilities(scored: Scored) -> list[float]:
    return [round(float(p), 6) for p in np.exp(scored.logp)]


def _is_cut(row: Example) -> bool:
    return row.is_cut or len(_start(row).labels) < len(row.labels)


def _texts(module: LitLanguageModel, row: Example, ids: list[int]) -> tuple[str, list[str]]:
    """What comes before the answer, and its tokens; their numbers if there is no tokenizer."""
    tokenizer = module.lm.tokenizer
    if tokenizer is None:
        return "", [f" {i}" for i in ids]
    special = set(tokenizer.all_special_ids)
    tokens = ["∎" if i in special else text for i, text in zip(ids, token_texts(ids, tokenizer), strict=True)]
    return str(tokenizer.decode(prompt_of(row), skip_special_tokens=True)), tokens
