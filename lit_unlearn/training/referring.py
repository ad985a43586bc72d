"""Objectives that refer to the model before unlearning: what they need is prepared before it changes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.models import Batch, LanguageModel, SupervisedTokens
from lit_unlearn.objectives import NLL, Need
from lit_unlearn.training.forward_plan import Term
from lit_unlearn.training.module import LitLanguageModel
from lit_unlearn.training.reference_cache import ReferenceLogp, answers_to_measure, check_needs, example_keys
from lit_unlearn.utils.distributed import gather_objects


class LitReferring(LitLanguageModel):
    """A module whose objectives may need the reference model: a copy of it, or what it measured on every row.

    The copy is made only for an objective that needs the reference model on every batch, and never beside an adapter,
    which can be switched off. The log-probabilities of rows are measured once and kept in checkpoints and on disk.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._reference_logp = ReferenceLogp()
        self._reference_name: str | None = None  # of the model before unlearning, for what is kept on disk

    @abstractmethod
    def terms(self) -> list[Term]:
        """The objectives with their present weights."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the objectives need beside the model; a data module asks for it."""
        return frozenset().union(*(term.objective.needs for term in self.terms()))

    def _prepare_reference(self) -> None:
        check_needs(self.terms(), self.lm, None if self._trainer is None else self.trainer.datamodule)  # type: ignore[attr-defined]
        if "reference" in self.needs:
            self.lm.keep_reference()
        if "reference_logp" in self.needs and self._reference_name is None:
            precision = None if self._trainer is None else self.trainer.precision
            self._reference_name = f"{self.lm.fingerprint()} {precision}"

    def measure(self) -> dict[str, float]:
        """As the base class does; the reference model first, where its log-probabilities are needed."""
        self._measure_reference_logp()
        return super().measure()

    def on_train_start(self) -> None:
        """As the base class does; the reference model is measured before the first step, if it was not before."""
        super().on_train_start()
        self._measure_reference_logp()

    def on_validation_epoch_start(self) -> None:
        """Measures the reference model's log-probabilities, unless they are known."""
        self._measure_reference_logp()

    on_test_epoch_start = on_validation_epoch_start

    @torch.no_grad()
    def _measure_reference_logp(self) -> None:
        """Measures every row that an objective needs it of, or reads what an earlier run measured; once."""
        reference = self._reference_logp
        if reference.is_measured or "reference_logp" not in self.needs:
            return
        own = {key for _, part in self._rows_to_measure() for key in example_keys(part) if key is not None}
        keys = set[str]().union(*gather_objects(own))
        known = self.trainer.strategy.broadcast(reference.read(str(self._reference_name)))
        if keys <= known.keys():
            reference.values = {key: known[key] for key in keys}
        else:
            with self.lm.reference() if self.lm.has_adapter else nullcontext():
                measured = dict(
                    item for stream, part in self._rows_to_measure() for item in self._row_logp(stream, part)
                )
            reference.values = {key: value for part in gather_objects(measured) for key, value in part.items()}
            if self.trainer.is_global_zero:
                reference.write(str(self._reference_name))
        reference.is_measured = True
        how = "known from an earlier run" if keys <= known.keys() else "measured"
        rank_zero_info(f"reference: log-probabilities of {len(keys)} rows, {how}")

    def _rows_to_measure(self) -> Iterator[tuple[str, Batch]]:
        for stream, batch in self._evaluation_batches():
            terms = [term for term in self.terms() if term.stream == stream]
            for part in answers_to_measure(batch, terms).values():
                yield stream, part

    def _row_logp(self, stream: str, batch: Batch) -> list[tuple[str, float]]:
        """The log-probability of each of this process's rows, by its key."""
        keys, found = example_keys(batch), list[tuple[str, float]]()

        def collect(lm: LanguageModel, tokens: SupervisedTokens) -> None:
            sums = tokens.by_sequence(lm.token_logp(tokens).double())
            found.extend(
                (str(keys[row]), value) for row, value in zip(tokens.examples.tolist(), sums.tolist(), strict=True)
            )

        self._consume(stream, batch, [(NLL(), collect)])
        return found

    def _with_reference_logp(self, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        if "reference_logp" not in self.needs or not isinstance(batch, Mapping):
            return batch
        terms = {stream: [term for term in self.terms() if term.stream == stream] for stream in batch}
        return {
            stream: self._reference_logp.add_to(part, terms[stream]) if isinstance(part, Mapping) else part
            for stream, part in batch.items()
        }

    def _evaluate(self, stream: str, batch: Batch) -> None:
        super()._evaluate(stream, self._with_reference_logp({stream: batch})[stream])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the base class does; with the reference model's log-probabilities, where an objective needs them."""
        super().on_save_checkpoint(checkpoint)
        if "reference_logp" in self.needs:
            checkpoint["run"]["reference_logp"] = self._reference_logp.values

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` saved.

        Raises:
            KeyError: If the checkpoint has no such log-probabilities, and they cannot be measured any more.
        """
        super().on_load_checkpoint(checkpoint)
        if "reference_logp" not in self.needs:
            return
        values = checkpoint["run"].get("reference_logp")
        if not values and not self.lm.has_adapter:
            raise KeyError(
                "the checkpoint has no log-probabilities of the model before unlearning, which an objective needs: it was made "
                "with another objective. Resume with that one, or start a new run."
            )
        self._reference_logp.values, self._reference_logp.is_measured = values or {}, bool(values)
