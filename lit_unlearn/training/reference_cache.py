"""The reference model: what objectives need of it and of the teacher is checked at set-up, measured once, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.example import Example, has_supervised_token
from lit_unlearn.errors import BatchError, CheckpointError, ConfigError
from lit_unlearn.models import Batch, LanguageModel, SupervisedTokens
from lit_unlearn.models.packed_attention import is_packed
from lit_unlearn.objectives import NLL
from lit_unlearn.training.forward_plan import ANSWERS_READ, Answer, Term, as_examples, build_forward_plan, select_answer
from lit_unlearn.training.run_folder import is_dry_run
from lit_unlearn.utils.distributed import gather_objects
from lit_unlearn.utils.io import cache_folder, read_json, write_json

if TYPE_CHECKING:
    from lit_unlearn.training.module import LitLanguageModel


class ReferenceCache:
    """Log-probabilities of examples under the reference model, measured once.

    An example is known by its digest, so that another tokenizer, template or answer is another example; within a run its
    id finds it without hashing. Files are known by the model's fingerprint and the precision it ran in: nothing stale can
    be found, and a measurement of one run serves the next.

    Args:
        module: The module whose objectives need them.
        folder: Folder of the files; ``None`` for ``reference_logp`` in the cache folder of this package.
    """

    def __init__(self, module: LitLanguageModel, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "reference_logp" if folder is None else folder
        self.values: dict[str, float] = {}  # of this run's examples, by digest
        self.is_measured = False
        self.keeps_model = (
            False  # whether the model is kept although no objective needs it: something else compares with it
        )
        self._by_id: dict[str, float] = {}
        self._module = module
        self._name: str | None = None

    @property
    def is_needed(self) -> bool:
        """True if an objective needs log-probabilities of the reference model."""
        return any("reference_logp" in term.objective.needs for term in self._module.terms())

    def prepare(self) -> None:
        """Check what objectives need, and keep reference model and teacher, before a checkpoint or a step changes the weights.

        Raises:
            ConfigError: With a line for each need that is not met.
        """
        module, lm = self._module, self._module.lm
        terms = module.terms()
        check_needs(terms, lm, module.attached_trainer and module.attached_trainer.datamodule)  # type: ignore[attr-defined]
        if self.keeps_model or any("reference" in term.objective.needs for term in terms):
            lm.keep_reference()
        if module.needs_teacher:
            if lm.teacher is not None and not lm.teacher.is_loaded:
                rank_zero_info(f"loading the teacher {lm.teacher.name}")
            lm.keep_teacher()
        if self.is_needed and self._name is None:
            precision = None if module.attached_trainer is None else module.attached_trainer.precision
            self._name = f"{lm.fingerprint()} {precision}"

    @torch.no_grad()
    def measure(self) -> None:
        """Measure every example that an objective needs it of, or read an earlier run's values; once."""
        if self.is_measured or not self.is_needed:
            return
        module, trainer = self._module, self._module.trainer
        digests = set[str]()
        for _, examples in self._examples_to_measure():
            digests.update(example.digest() for example in examples)
        digests = set[str]().union(*gather_objects(digests))

        earlier = trainer.strategy.broadcast(self._read_file())
        is_known = digests <= earlier.keys()
        if is_known:
            self.values = {digest: earlier[digest] for digest in digests}
        else:
            measured: dict[str, float] = {}
            with module.lm.reference() if module.lm.has_adapter else nullcontext():
                for stream, examples in self._examples_to_measure():
                    measured |= self._measure_examples(stream, examples)
            for values in gather_objects(measured):
                self.values |= values
            if trainer.is_global_zero and not is_dry_run(trainer):
                self._write_file()
        self.is_measured = True
        source = "known from an earlier run" if is_known else "measured"
        rank_zero_info(f"reference: log-probabilities of {len(digests)} answers, {source}")

    def logp(self, example: Example) -> float:
        """Return the log-probability of an example's answer, nats; zero without supervised tokens.

        Raises:
            BatchError: If it has not been measured.
        """
        if example.id in self._by_id:
            return self._by_id[example.id]
        if not has_supervised_token(example):
            return 0.0
        value = self.values.get(example.digest())
        if value is None:
            raise BatchError(
                f"the example {example.id or example.digest()} has no log-probability under the reference model, because it "
                "was in none of the validation loaders at the start: validate on every example that is trained on, or give "
                "the batch a `reference_logp` of shape (B,)."
            )
        if example.id:
            self._by_id[example.id] = value
        return value

    def state_dict(self) -> dict[str, float] | None:
        """Return the values, if they are needed, for a checkpoint."""
        return self.values if self.is_needed else None

    def load_state_dict(self, values: Mapping[str, float] | None) -> None:
        """Restore the values of a checkpoint.

        Raises:
            CheckpointError: If it has none, and they cannot be measured any more.
        """
        if not self.is_needed:
            return
        if not values and not self._module.lm.has_adapter:
            raise CheckpointError(
                "the checkpoint has no log-probabilities of the reference model, which an objective needs: it was made with "
                "another objective. Resume with that one, or start a new run."
            )
        self.values, self.is_measured = dict(values or {}), bool(values)
        self._by_id = {}

    # Measuring ----------------------------------------------------------------------------------------------------

    def _examples_to_measure(self) -> Iterator[tuple[str, list[Example]]]:
        for stream, batch in self._module.evaluator.batches():
            terms = [term for term in self._module.terms() if term.stream == stream]
            for answers in answers_to_measure(batch, stream, terms):
                yield stream, [example for example in as_examples(answers) if has_supervised_token(example)]

    def _measure_examples(self, stream: str, examples: list[Example]) -> dict[str, float]:
        if not examples:
            return {}
        lm, nll = self._module.lm, NLL()
        values: dict[str, float] = {}

        def collect(lm: LanguageModel, tokens: SupervisedTokens) -> None:
            sums = tokens.by_sequence(lm.token_logp(tokens).double())
            for i, value in zip(tokens.examples.tolist(), sums.tolist(), strict=True):
                values[examples[i].digest()] = value

        for forward_pass in build_forward_plan(
            {stream: examples}, [Term(stream, stream, nll, 0.0)], lm.packs, None, "joint"
        ):
            forward_pass.run(lm, [collect])
        return values

    # Files --------------------------------------------------------------------------------------------------------

    def _file(self) -> Path:
        return self.folder / f"{hashlib.sha256(str(self._name).encode()).hexdigest()[:32]}.json"

    def _read_file(self) -> dict[str, float]:
        """Return what earlier runs measured; nothing if there is no such file, or it is damaged."""
        try:
            return {str(digest): float(value) for digest, value in read_json(self._file()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            rank_zero_warn(f"'{self._file()}' cannot be read and is measured again: {error}")
            return {}

    def _write_file(self) -> None:
        """Add this run's values to those of earlier runs."""
        try:
            write_json(self._file(), {**self._read_file(), **self.values}, private=True)
        except OSError as error:
            rank_zero_warn(
                f"the reference model's log-probabilities cannot be kept for later runs: {error}. Set LIT_UNLEARN_CACHE to a "
                "folder that can be written to."
            )


def answers_to_measure(batch: Batch, stream: str, terms: Sequence[Term]) -> list[Batch]:
    """Return the answers of a batch whose log-probability under the reference model is needed and not given.

    Args:
        batch: Examples or a Hugging Face batch of one stream.
        stream: Its name, for messages.
        terms: The terms that read it.
    """
    answers: list[Answer] = []
    for term in terms:
        if "reference_logp" in term.objective.needs:
            answers.extend(ANSWERS_READ[term.objective.reads])
    missing = []
    for answer in dict.fromkeys(answers):
        answers_batch = select_answer(batch, stream, answer)
        is_given = isinstance(answers_batch, Mapping) and "reference_logp" in answers_batch
        # The plan refuses packed batches, and says why.
        if not is_given and not (isinstance(answers_batch, Mapping) and is_packed(answers_batch)):
            missing.append(answers_batch)
    return missing


def check_needs(terms: Sequence[Term], lm: LanguageModel, data: object) -> None:
    """Raise an error that lists everything that objectives need and will not find, before any work is done.

    Args:
        terms: All objectives of the run.
        lm: Loaded.
        data: The data module; with any but this package's, the batches decide.

    Raises:
        ConfigError: With a line for each need that is not met, and what to add.
    """
    unmet: list[str] = []
    for term in terms:
        name = f"{term.name} ({type(term.objective).__name__})"
        for layer in sorted(term.objective.layers):
            if layer >= lm.num_layers - 1:
                unmet.append(
                    f"{name} reads the output of layer {layer}, but those of this model's layers that can be read are 0 to "
                    f"{lm.num_layers - 2} (the last one's ends in the final norm): set its `layer`."
                )
        if "teacher" in term.objective.needs and lm.teacher is None:
            unmet.append(
                f"{name} needs a teacher, a model that never saw the forget set: set the language model's `teacher` "
                "(model.lm.teacher) to the name of the base model."
            )
        examples: list[Any] = data.examples.get(term.stream, []) if isinstance(data, ForgetRetain) else []
        if term.objective.reads != "answer" and examples and examples[0].alternate is None:
            unmet.append(
                f"{name} reads alternate answers, which the data module has for its forget set alone: use it as `forget`, or "
                f"give the '{term.stream}' rows the other answers as their own."
            )
    if unmet:
        raise ConfigError("\n- ".join(["the objectives need what is not there:", *unmet]))
