"""Protocol of the public grid: Llama-3.2-1B-Instruct on TOFU's forget10, beside the rows that others have published.

It was written before any of its runs. Whoever has a hub and a GPU produces these rows with one command, which resumes.

Models. The published target and retain-only models of open-unlearning, in the prompt that they were fine-tuned in. ``--models``
names a folder that has them, and the base model that `RECOMMENDED` needs, in folders of their hub names.

Data. forget10 and retain90, all rows, and holdout10 for the membership attacks, if the source has it. The rows that give `MatchCalibrated`
its level are about invented names, written by the target model (``prepare unseen``): all of TOFU's authors are in it. So are the
answers that AltPO prefers (``prepare alternates``).

Methods. `RECOMMENDED`, plain PDU as its paper runs it (configs/paper/tofu_llama-3.2-1b.yaml), and published objectives under the same
bound: 10 epochs, 32 examples of each set per step, AdamW at 1e-5, epsilon 0.3 nats per token. Nothing is tuned. Seed 0, or ``--seeds``.

Measured. The scores of the public grid (docs/scores.md): Memorization with the floor of published tables, Privacy with the Unlearning
Depth Score (``--entities``), Utility relative to the target model's, Overall. Fluency is the stand-in, by NLL under the target model,
where the grid has a classifier: so Utility and Overall differ a little from the grid's. Beside them, relearning on 40 rows, weights of
4 bits, and the goals of `goals`, of which (e) compares with the grid as well.

Cost, estimated and not measured, on one GPU with 80 GB: a fit takes 125 steps of 64 rows and ten measurements of 4000, 8 minutes; the
benchmark scores 7000 answers and writes 1100, 6 minutes; relearning, rounding and depth 8. Seven methods and the two published models
take 2.9 hours.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.quality.collecting import digest_settings
from benchmarks.quality.measuring import (
    ATTACKS_FILE,
    CELL,
    RELEARNING,
    Sweep,
    attack,
    depth,
    evaluate,
    measure,
    prepare,
)
from benchmarks.quality.tofu_rows import Selection, write_entities, write_rows

RECOMMENDED = "match_calibrated"
BASE = "meta-llama/Llama-3.2-1B-Instruct"
TARGET = "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
RETAIN_ONLY = "open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90"
CHAT = {"system": "You are a helpful assistant.", "args": {"date_string": "10 Apr 2025"}}
DTYPE = "bfloat16"
EPSILON = 0.3
AUTHORS = 20  # of forget10
SELECTION = Selection(200, (AUTHORS,), aside=0, measured=None)
PUBLISHED = {
    "AltPO": 0.773,
    "NPO": 0.739,
    "SimNPO": 0.722,
    "IdkDPO": 0.709,
    "GradDiff": 0.637,
    "RMU": 0.625,
    "UNDIAL": 0.103,
    "IdkNLL": 0.0,
}
"""Best Overall of each method in the public grid of 150 models, four settings and more each (arXiv 2605.24614)."""
PUBLISHED_RETAIN_ONLY = 0.807

_RELEARN = {"attack": "relearn", "source": "forget", "rows": 0.1, "steps": 20, "seed": 0}
ATTACKS: dict[str, Any] = {
    "max_new_tokens": 200,
    "value": "probability",
    "attacks": {
        RELEARNING[0]: {**_RELEARN, "lr": 1e-5, "lora_rank": None},
        RELEARNING[1]: {**_RELEARN, "lr": 1e-4, "lora_rank": 16},
        "4 bits": {"attack": "rounding", "bits": 4, "backend": "round"},
    },
}
_MULTIPLIER = "model.constraints.nll.multiplier.init_args"
# What each file is given beside epsilon. BASE is the base model, UNSEEN and ALTERNATES are the rows that the target model wrote.
_MATCHED: dict[str, Any] = {
    f"{_MULTIPLIER}.lr": 50,
    f"{_MULTIPLIER}.init": 10,
    "model.constraints.nll.warmup_epochs": 1,
    "data.streams": {"unseen": "UNSEEN"},
}
METHODS: dict[str, dict[str, Any]] = {
    # Not rewound: these steps see the retain rows once, too few to learn them again.
    RECOMMENDED: {**_MATCHED, "model.lm.teacher": "BASE"},
    "match_unseen": {**_MATCHED, "model.forget.init_args.factor": 1},
    # The paper's file has it all, and configs/method/pdu.yaml would replace it.
    "pdu": {"config": []},
    "npo_constrained": {},
    "simnpo_constrained": {},
    "altpo_constrained": {"data.forget": "ALTERNATES"},
    "grad_ascent_constrained": {},
}


def digest() -> str:
    """Return the digest of the settings that decide results."""
    return digest_settings([TARGET, RETAIN_ONLY, CHAT, DTYPE, EPSILON, SELECTION, ATTACKS])


@dataclass(frozen=True)
class TOFU1B:
    """The tier of the published models.

    Args:
        folder: Folder of rows, sweeps and models.
        results: Folder of the results files.
        seeds: Seeds of the fits.
        methods: Names of `METHODS`.
        models: Folder with the models in place of the hub; ``None`` for the hub.
        measures_depth: Whether there are entities for the Unlearning Depth Score.
    """

    folder: Path
    results: Path
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    models: Path | None
    measures_depth: bool

    STAGES: ClassVar[tuple[str, ...]] = ("answers", "reference", "target", "final")
    MAY_FAIL: ClassVar[tuple[str, ...]] = ("final",)

    @classmethod
    def from_options(cls, options: Namespace) -> TOFU1B:
        """Return the tier that a command line asks for."""
        folder, results = options.work / "tofu-1b", options.results / "tofu-1b"
        seeds, methods = tuple(options.seeds or (0,)), tuple(options.methods or METHODS)
        return cls(folder, results, seeds, methods, options.models, options.entities is not None)

    @property
    def default_stages(self) -> tuple[str, ...]:
        """The stages that run where ``--stages`` names none: all."""
        return self.STAGES

    @property
    def digest(self) -> str:
        """The digest that results are stored with."""
        return digest()

    @property
    def attacks(self) -> dict[str, Any]:
        """The settings of the attacks."""
        return ATTACKS

    def write_inputs(self, options: Namespace) -> None:
        """Write rows, unless they are there."""
        rows = options.tofu, self.folder / "rows", SELECTION
        write_rows(*rows)
        if options.entities is not None:
            write_entities(*rows, options.entities, max_rows=None)

    def build(self, stage: str) -> Sweep:
        """Return the sweep of a stage."""
        target, retain_only = self._find(TARGET), self._find(RETAIN_ONLY)
        output, size = f"{self.folder}/{stage}", {"size": [AUTHORS]}
        if stage == "answers":
            options = {
                "model": target,
                "forget": self._rows("forget10_perturbed.json"),
                "chat": json.dumps(CHAT),
                "dtype": DTYPE,
            }
            return measure(output, size, [prepare("unseen", **options), prepare("alternates", **options)])
        if stage == "reference":
            return measure(output, size, [self._evaluate(retain_only), self._attack(retain_only)])
        if stage == "target":
            return measure(output, size, [self._evaluate(target, has_reference=True)])
        after = [self._evaluate(f"{CELL}/model", has_reference=True), self._attack(f"{CELL}/model")]
        if self.measures_depth:
            rows = {"rows": self._rows("entities.jsonl"), "chat": json.dumps(CHAT), "dtype": DTYPE}
            after.append(depth(f"{CELL}/model", target=target, retain_only=retain_only, **rows))
        settings = {
            "model.lm.model": target,
            "model.constraints.nll.epsilon": EPSILON,
            "data": "ForgetRetain",
            "data.forget": self._rows("forget10_perturbed.json"),
            "data.retain": self._rows("retain.jsonl"),
            "picture.answers": 0,
        }
        methods = {name: self._settings(name) for name in self.methods}
        return {
            "output": output,
            "config": ["tofu.yaml", "paper/tofu_llama-3.2-1b.yaml"],
            "settings": settings,
            # A list would be values of a key of the fit.
            "grid": {"seed": list(self.seeds), "size": {str(AUTHORS): None}, "method": methods},
            "after": after,
            "keep": "model",
        }

    def _find(self, name: str) -> str:
        return name if self.models is None else str(self.models / name)

    def _rows(self, name: str) -> str:
        return f"{self.folder}/rows/{AUTHORS}/{name}"

    def _settings(self, method: str) -> dict[str, Any]:
        answers = f"{self.folder}/answers/size={AUTHORS}"
        text = json.dumps(METHODS[method]).replace("BASE", self._find(BASE))
        for name in ("unseen", "alternates"):
            text = text.replace(name.upper(), f"{answers}/{name}.jsonl")
        settings: dict[str, Any] = json.loads(text)
        return settings

    def _evaluate(self, model: str, has_reference: bool = False) -> str:
        holdout = self.folder / "rows/holdout.jsonl"
        settings = {"holdout": json.dumps({"path": str(holdout)})} if holdout.is_file() else {}
        if has_reference:
            settings["retain_results"] = f"{self.folder}/reference/size={AUTHORS}/tofu.json"
        sources = {"source": f"{self.folder}/rows/{AUTHORS}", "fluency_model": self._find(TARGET)}
        return evaluate(model, **settings, **sources, chat=json.dumps(CHAT), floor="true", dtype=DTYPE)

    def _attack(self, model: str) -> str:
        sets = {"forget": self._rows("forget10_perturbed.json"), "retain": self._rows("retain.jsonl")}
        return attack(model, f"{self.folder}/{ATTACKS_FILE}", **sets, chat=json.dumps(CHAT), dtype=DTYPE)
