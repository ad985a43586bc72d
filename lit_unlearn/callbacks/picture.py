"""Pictures of a run: records what they are drawn from, and draws them when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.callbacks.run_state import get_constraints, may_have_new_best
from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.example import IGNORED, Example, prompt_of
from lit_unlearn.data.shown_tokens import token_texts
from lit_unlearn.evaluation.scoring import score_examples
from lit_unlearn.plotting import RecordedAnswer, draw_run, read_run, write_picture_data
from lit_unlearn.training import LitUnlearn
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.utils.validation import check_integer

_MAX_TOKENS = 64  # of an answer, from its start
_END_OF_ANSWER = "∎"


class RunPicture(Callback):
    """Draw the run when it ends, from the ``metrics.csv`` of a CSV logger, as PNG and SVG in the run's folder.

    ``dual``: each constraint against its epsilon, λ, and forgetting over the steps. ``trajectory``: retention over
    forgetting, from validation to validation. ``tokens``: a few answers before and after, token by token. All data of
    the pictures is in ``metrics.csv`` and ``pictures.json`` at any time, so that ``lit-unlearn plot`` can draw a run that
    has not ended or was killed.

    Args:
        answers: Number of examples of every stream whose tokens are shown, the first ones. By default none: the picture and
            ``pictures.json`` would have the text of rows.

    Raises:
        ConfigError: If ``answers`` is negative.
    """

    def __init__(self, answers: int = 0) -> None:
        self.answers = check_integer(self, "answers", answers)
        self._earlier_files: list[str] = []  # metrics of the runs that this one resumed
        self._current_file: str | None = None
        self._folder = Path()  # of the pictures
        self._before: dict[str, float] = {}
        self._recorded: list[RecordedAnswer] = []
        self._kept_step: int | None = None
        self._scored_weights: str | None = None  # checksum of the model whose answers are recorded

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record where the metrics are, and how likely a few answers are before the first step."""
        folder = next((logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        # The first process decides: the others may count one version more.
        folder = trainer.strategy.broadcast(folder)
        self._current_file = folder and str(Path(folder).absolute() / "metrics.csv")
        if self._current_file is None or not isinstance(pl_module, LitLanguageModel):
            return

        self._folder = find_run_folder(trainer)
        has_examples = isinstance(trainer.datamodule, ForgetRetain)  # type: ignore[attr-defined]
        if not has_examples:
            self._recorded = []
        if trainer.global_step == 0:
            self._before, self._recorded, self._kept_step, self._scored_weights = {}, [], None, None
            if has_examples:
                self._before = pl_module.measure()
                self._recorded = self._record_answers(trainer, pl_module)
        elif has_examples:
            self._recorded = self._restore_texts(trainer, pl_module)
        self._write_data(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the answers again if the validation whose last batch this is has found the best model so far.

        Not when the validation has ended: callbacks such as ``WeightAveraging`` have restored the others by then.
        """
        if may_have_new_best(pl_module, trainer):
            self._score_kept_model(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do the same where the loaders did not say which batch is the last."""
        if may_have_new_best(pl_module, trainer):
            self._score_kept_model(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the run."""
        if not isinstance(pl_module, LitLanguageModel) or is_dry_run(trainer):
            return
        if self._current_file is None:
            rank_zero_info("pictures: none, for want of the metrics.csv of a CSVLogger; add one to the loggers")
            return
        # The last model may be the one to keep; without data of ours, there may be nothing to measure on.
        if self._before:
            pl_module.measure()
        self._score_kept_model(trainer, pl_module)
        if trainer.is_global_zero:
            # Loggers hold back what came since their last write.
            for logger in trainer.loggers:
                logger.save()
            self._draw_pictures(self._folder)

    def _draw_pictures(self, folder: Path) -> None:
        try:
            pictures = draw_run(read_run(folder), folder)
        except Exception as error:
            # Whatever it is: the model is still to be exported, and matters more than a picture.
            rank_zero_warn(f"the pictures could not be drawn ({error}); try `lit-unlearn plot {folder}`.")
            return
        drawn = [name for name, files in pictures.items() if not isinstance(files, str)]
        rank_zero_info(f"pictures: {', '.join(drawn) or 'none'} (.png and .svg) in {folder}")
        for name, reason in pictures.items():
            # By default, there are no tokens to draw.
            if isinstance(reason, str) and (name != "tokens" or self.answers):
                rank_zero_info(f"no picture '{name}': {reason}")

    def _record_answers(self, trainer: L.Trainer, module: LitLanguageModel) -> list[RecordedAnswer]:
        recorded, examples = [], []
        for stream, stream_examples in trainer.datamodule.examples.items():  # type: ignore[attr-defined]
            for number, example in enumerate(stream_examples[: self.answers]):
                shown = _first_tokens(example)
                is_cut = example.is_cut or len(shown.labels) < len(example.labels)
                prompt, tokens = _to_texts(module, shown)
                recorded.append(RecordedAnswer(stream, number, prompt, tokens, [], None, is_cut))
                examples.append(shown)
        scores = _score_answers(trainer, module, examples)
        return [answer._replace(before=score) for answer, score in zip(recorded, scores, strict=True)]

    def _restore_texts(self, trainer: L.Trainer, module: LitLanguageModel) -> list[RecordedAnswer]:
        """Return the answers of a checkpoint, which has no texts, with those of the rows: they are the same in a resumed run."""
        restored = []
        for answer in self._recorded:
            example = trainer.datamodule.examples[answer.stream][answer.row]  # type: ignore[attr-defined]
            prompt, tokens = _to_texts(module, _first_tokens(example))
            restored.append(answer._replace(prompt=prompt, tokens=tokens))
        return restored

    def _score_kept_model(self, trainer: L.Trainer, module: LitLanguageModel) -> None:
        """Score the answers if the present model is the one that the run keeps."""
        kept = module.best if isinstance(module, LitUnlearn) else module.evaluator.last
        if (
            self._current_file is None
            or kept is None
            or (kept.step, kept.weights) == (self._kept_step, self._scored_weights)
        ):
            return
        if kept.step != trainer.global_step or kept.weights != module.lm.checksum():
            return
        if self._recorded:
            streams = trainer.datamodule.examples  # type: ignore[attr-defined]
            examples = [_first_tokens(streams[answer.stream][answer.row]) for answer in self._recorded]
            scores = _score_answers(trainer, module, examples)
            self._recorded = [a._replace(after=score) for a, score in zip(self._recorded, scores, strict=True)]
        self._kept_step, self._scored_weights = kept.step, kept.weights
        self._write_data(trainer)

    def _write_data(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self._current_file is not None:
            files = list(map(Path, (*self._earlier_files, self._current_file)))
            epsilons = {}
            for name, constraint in get_constraints(trainer.lightning_module).items():
                if constraint.epsilon is not None:
                    epsilons[name] = constraint.epsilon
            write_picture_data(self._folder, files, self._before, self._kept_step, self._recorded, epsilons)

    def state_dict(self) -> dict[str, Any]:
        """Return where the metrics up to here are, and what was recorded, in plain types."""
        files = [*self._earlier_files]
        if self._current_file is not None:
            files.append(self._current_file)
        # Without their texts: a checkpoint is no place to look for what was deleted.
        answers = [answer._replace(prompt="", tokens=[])._asdict() for answer in self._recorded]
        kept = {"kept_step": self._kept_step, "weights": self._scored_weights}
        return {"files": files, "before": self._before, "answers": answers, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; an older version has the files alone."""
        self._earlier_files = state_dict["files"]
        self._before = state_dict.get("before", {})
        self._recorded = [RecordedAnswer(**answer) for answer in state_dict.get("answers", [])]
        self._kept_step, self._scored_weights = state_dict.get("kept_step"), state_dict.get("weights")


def _score_answers(trainer: L.Trainer, module: LitLanguageModel, examples: Sequence[Example]) -> list[list[float]]:
    """Return the probability of every supervised token; each process must call this, as a model may be sharded."""
    with trainer.precision_plugin.val_step_context(), module.evaluator.exported_weights():
        scores = score_examples(module.lm, list(examples))
    probabilities = []
    for score in scores:
        probabilities.append([round(float(p), 6) for p in np.exp(score.logp)])
    return probabilities


def _first_tokens(example: Example) -> Example:
    """Return the example up to the last token that is shown; later ones do not change its probabilities."""
    supervised = [i for i, label in enumerate(example.labels) if label != IGNORED]
    stop = supervised[:_MAX_TOKENS][-1] + 1
    return example.cut(stop)._replace(id="", is_cut=False, alternate=None)


def _to_texts(module: LitLanguageModel, example: Example) -> tuple[str, list[str]]:
    """Return the prompt and the text of every answer token; ids instead if there is no tokenizer."""
    # A first token cannot be predicted, so it is never scored.
    ids = [label for label in example.labels[1:] if label != IGNORED]
    tokenizer = module.lm.tokenizer
    if tokenizer is None:
        return "", [f" {i}" for i in ids]
    texts = token_texts(ids, tokenizer)
    for position, token_id in enumerate(ids):
        if token_id in tokenizer.all_special_ids:
            texts[position] = _END_OF_ANSWER
    return str(tokenizer.decode(prompt_of(example), skip_special_tokens=True)), texts
