"""What objectives need of the model before unlearning: checked at set-up, measured once, kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_unlearn.data.base import ForgetRetain
from lit_unlearn.data.encoding import IGNORED
from lit_unlearn.models import Batch, LanguageModel
from lit_unlearn.models.packing import is_packed
from lit_unlearn.training.forward_plan import ANSWERS, Term
from lit_unlearn.utils.io import read_json, write_json


def check_needs(terms: Sequence[Term], lm: LanguageModel, data: object) -> None:
    """Says everything that objectives need and will not find, before any work is done.

    Args:
        terms: All objectives of the run.
        lm: Loaded.
        data: The data module; of any but this package's the batches tell.

    Raises:
        ValueError: With a line for each need that is not met, and what to add.
    """
    unmet = [line for term in terms for line in _unmet(term, lm, data)]
    if unmet:
        raise ValueError("\n- ".join(["the objectives need what is not there:", *unmet]))


def _unmet(term: Term, lm: LanguageModel, data: object) -> list[str]:
    who, lines = f"{term.name} ({type(term.objective).__name__})", []
    for layer in sorted(term.objective.layers):
        if layer >= lm.num_layers - 1:
            lines.append(
                f"{who} reads the output of layer {layer}, but those of this model's layers that can be read are 0 to "
                f"{lm.num_layers - 2} (the last one's ends in the final norm): set its `layer`."
            )
    rows = data.examples.get(term.stream, []) if isinstance(data, ForgetRetain) else []
    if term.objective.reads != "answer" and rows and rows[0].alternate is None:
        lines.append(
            f"{who} reads alternate answers, which the data module has for its forget set alone: use it as `model.forget`, or "
            f"give the '{term.stream}' rows the other answers as their own."
        )
    return lines


class ReferenceLogp:
    """The reference model's log-probability of every row, by what the row consists of.

    A row is known by its token ids and labels, so that another tokenizer, template or answer is another row. Files are
    known by the model's fingerprint and the precision it ran in. So nothing stale can be found, and what one run
    measured serves the next.

    Args:
        folder: Of the files; ``None`` for ``$LIT_UNLEARN_CACHE``, or else ``~/.cache/lit_unlearn``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        home = os.environ.get("LIT_UNLEARN_CACHE") or Path.home() / ".cache" / "lit_unlearn"
        self.folder = Path(home) / "reference_logp" if folder is None else folder
        self.values: dict[str, float] = {}  # of this run's rows
        self.is_measured = False

    def add_to(self, batch: Batch, terms: Sequence[Term]) -> Batch:
        """A batch with a ``reference_logp`` for its rows, and for their alternate answers, where an objective needs it.

        Args:
            batch: Padded; one that came packed, or with values of its own, is left as it is.
            terms: The objectives that read it.

        Raises:
            KeyError: If a row has not been measured.
        """
        added = dict(batch)
        for answer, part in answers_to_measure(batch, terms).items():
            value = {"reference_logp": self._of(part)}
            added = added | value if answer == "answer" else {**added, "alternate": {**part, **value}}
        return added

    def _of(self, batch: Batch) -> Tensor:
        """The values of a batch's rows, float64, shape ``(B,)``; zero for a row without supervised tokens."""
        keys = example_keys(batch)
        unknown = [key for key in keys if key is not None and key not in self.values]
        if unknown:
            raise KeyError(
                f"{len(unknown)} of {len(keys)} rows have no log-probability under the reference model, because they were in "
                "none of the validation loaders at the start: validate on every row that is trained on, or give the batch a "
                "`reference_logp` of shape (B,)."
            )
        values = [0.0 if key is None else self.values[key] for key in keys]
        return torch.tensor(values, dtype=torch.float64).to(batch["labels"].device)

    def read(self, name: str) -> dict[str, float]:
        """What earlier runs measured; nothing if there is no such file, or it is damaged."""
        try:
            return {str(key): float(value) for key, value in read_json(self._file(name)).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            rank_zero_warn(f"'{self._file(name)}' cannot be read and is measured again: {error}")
            return {}

    def write(self, name: str) -> None:
        """Adds this run's values to what earlier runs measured."""
        try:
            write_json(self._file(name), {**self.read(name), **self.values})
        except OSError as error:
            rank_zero_warn(
                f"the reference model's log-probabilities cannot be kept for later runs: {error}. Set LIT_UNLEARN_CACHE to a "
                "folder that can be written to."
            )

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def answers_to_measure(batch: Batch, terms: Sequence[Term]) -> dict[str, Batch]:
    """The parts of a batch whose log-probability under the reference model is needed and not given.

    Args:
        batch: Of one stream.
        terms: The objectives that read it.
    """
    needing = [term.objective for term in terms if "reference_logp" in term.objective.needs]
    needed = dict.fromkeys(answer for objective in needing for answer in ANSWERS[objective.reads])
    parts = {answer: batch if answer == "answer" else batch.get("alternate") for answer in needed}
    return {
        answer: part
        for answer, part in parts.items()
        if isinstance(part, Mapping) and "reference_logp" not in part and not is_packed(part)
    }


def example_keys(batch: Batch) -> list[str | None]:
    """A key for each row of a padded batch, from its token ids and labels without the padding.

    ``None`` for a row without supervised tokens, as fills up the batches of several processes.
    """
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    keys: list[str | None] = []
    for kept, ids, labels in zip(mask, batch["input_ids"], batch["labels"], strict=True):
        row = ids[kept].tolist(), labels[kept].tolist()
        supervised = any(label != IGNORED for label in row[1][1:])  # nothing predicts a row's first token
        keys.append(hashlib.sha256(repr(row).encode()).hexdigest()[:32] if supervised else None)
    return keys
