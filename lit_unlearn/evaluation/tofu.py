"""TOFU's benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_unlearn.data.source import Source
from lit_unlearn.data.tofu import RETAIN, tofu_source
from lit_unlearn.evaluation.benchmark import Values
from lit_unlearn.evaluation.qa import QuestionBenchmark, Questions
from lit_unlearn.evaluation.results import Results
from lit_unlearn.metrics import model_utility


class TOFUBenchmark(QuestionBenchmark):
    """TOFU as its published code measures it: forget quality, model utility, and what they are made from.

    Sets: ``forget`` and ``retain`` (400 rows), with paraphrased and wrong answers; ``real_authors`` and ``world_facts``, where
    the probability is that among the options. Utility is the harmonic mean of probability, ROUGE-L recall and truth ratio of
    the latter three. Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024 (arXiv 2401.06121).

    Args:
        forget_split: ``"forget01"``, ``"forget05"`` or ``"forget10"``.
        source: Hub name, or a local folder with the files (``forget10_perturbed.json``, …). Of the sets but the first,
            one that a folder lacks is left out, with what depends on it.
        max_rows: Only the first so many rows of every set but ``forget``; ``None`` for all, as published.
        holdout: Rows that the model has never seen, for attacks and PrivLeak; ``None`` leaves those out.
        **settings: As for `QuestionBenchmark`.

    Raises:
        FileNotFoundError: If a local folder lacks the forget set.
        ValueError: If ``forget_split`` is unknown.
    """

    name: ClassVar[str] = "tofu"

    def __init__(
        self,
        forget_split: Literal["forget01", "forget05", "forget10"] = "forget10",
        source: str = "locuslab/TOFU",
        max_rows: int | None = None,
        holdout: Source | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if forget_split not in RETAIN:
            raise ValueError(f"TOFUBenchmark: `forget_split` must be one of {', '.join(RETAIN)}, not {forget_split!r}.")
        self.sets["forget"] = Questions(tofu_source(source, f"{forget_split}_perturbed"))
        options = {"right": self.answer_column, "choose": True}
        for name, kind in {"retain": {}, "real_authors": options, "world_facts": options}.items():
            try:
                self.sets[name] = Questions(tofu_source(source, f"{name}_perturbed", max_rows), **kind)  # type: ignore[arg-type]
            except FileNotFoundError as error:
                self.absent[name] = str(error)
                rank_zero_warn(f"{error} All values of '{name}' and the model utility are left out.")
        if holdout is not None:
            self.sets["holdout"] = Questions(holdout, generates=False)

    def aggregate(self, examples: Mapping[str, Sequence[Values]], retain: Results | None) -> Values:
        """As `QuestionBenchmark` does, and the model utility."""
        values = super().aggregate(examples, retain)
        names = ("retain", "real_authors", "world_facts")
        parts = [f"{name}/{key}" for name in names for key in ("probability", "rougeL_recall", "truth_ratio")]
        missing = [part for part in parts if part not in values]
        utility: Any = f"{', '.join(missing)} could not be measured"
        if not missing:
            utility = model_utility({part: values[part] for part in parts})
        return {"forget_quality": values.pop("forget_quality"), "model_utility": utility, **values}
