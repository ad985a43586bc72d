"""The sweeps of the comparison on SmolLM2, as its protocol in `smollm2` states them."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.quality import smollm2 as protocol
from benchmarks.quality.collecting import read_lines, select_lines
from benchmarks.quality.measuring import ATTACKS_FILE, CELL, Sweep, attack, depth, evaluate, measure, prepare
from benchmarks.quality.results_files import drop_failed
from benchmarks.quality.tofu_rows import write_entities, write_rows

_LR = "model.optimizer.init_args.lr"
_UNLEARNED = f"{CELL}/model"


@dataclass(frozen=True)
class SmolLM2:
    """The tier of a pretrained model that two cores can fine-tune.

    Args:
        size: One of the protocol's `GRIDS`.
        folder: Folder of rows, sweeps and models.
        results: Folder of the results files.
        seeds: Seeds that judge.
        sizes: Forget sets, in authors.
        methods: Files of configs/method, without suffix.
        precision: The Trainer's, of every fit.
        measures_depth: Whether there are entities for the Unlearning Depth Score.
    """

    size: str
    folder: Path
    results: Path
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    precision: str
    measures_depth: bool

    STAGES: ClassVar[tuple[str, ...]] = (
        *("answers", "models", "tuning_reference", "tuning"),
        *("reference", "target", "final", "ceiling", "ablation", "matched"),
    )
    MAY_FAIL: ClassVar[tuple[str, ...]] = ("tuning", "final", "ceiling", "ablation", "matched")
    """Stages whose cells are results even if they fail; later stages need all cells of the others."""

    @classmethod
    def from_options(cls, options: Namespace) -> SmolLM2:
        """Return the tier that a command line asks for."""
        from benchmarks.real import choose_precision

        grid, precision = protocol.GRIDS[options.size], choose_precision()
        count = protocol.count_methods(grid, options.rate or protocol.TOKENS_PER_SECOND[precision])
        return cls(
            options.size,
            options.work / f"smollm2-{options.size}",
            options.results / f"smollm2-{options.size}",
            tuple(options.seeds or grid.seeds),
            tuple(options.sizes or grid.selection.sizes),
            tuple(options.methods or list(protocol.METHODS)[:count]),
            precision,
            options.entities is not None,
        )

    @property
    def default_stages(self) -> tuple[str, ...]:
        """The stages that run where ``--stages`` names none."""
        others = {"ceiling", "ablation", "matched"}
        if not self._grid.is_tuned:
            others |= {"tuning_reference", "tuning"}
        return tuple(stage for stage in self.STAGES if stage not in others)

    @property
    def digest(self) -> str:
        """The digest that results are stored with."""
        return protocol.digest(self.size)

    @property
    def attacks(self) -> dict[str, Any]:
        """The settings of the attacks."""
        return protocol.ATTACKS

    @property
    def _grid(self) -> protocol.Grid:
        return protocol.GRIDS[self.size]

    def write_inputs(self, options: Namespace) -> None:
        """Find the model, and write rows, unless they are there."""
        from benchmarks.smollm2 import find_model

        rows = options.tofu, self.folder / "rows", self._grid.selection
        write_rows(*rows)
        if options.entities is not None:
            write_entities(*rows, options.entities, protocol.MAX_ENTITIES)
        base = self.folder / "base"
        # A link, so that commands are the same wherever a machine keeps the model.
        if not base.exists():
            base.unlink(missing_ok=True)
            base.symlink_to(find_model().absolute())

    def build(self, stage: str) -> Sweep:
        """Return the sweep of a stage.

        Raises:
            ValueError: If its settings are chosen by results that are not there yet.
        """
        output = f"{self.folder}/{stage}"
        judging = {"seed": self.seeds, "size": self.sizes}
        tuning = {"seed": [protocol.TUNING_SEED], "size": [self._grid.one_size]}
        match stage:
            case "answers":
                rows = {"model": self._base, "forget": self._rows("forget"), "count": 0, "max_new_tokens": 60}
                return measure(output, {"size": self.sizes}, [prepare("alternates", **rows)])
            case "models":
                return self._finetune()
            case "tuning_reference":
                return measure(output, tuning, [self._evaluate(self._reference)])
            case "tuning":
                methods = {name: self._settings(name) for name in self.methods}
                after = [self._evaluate(_UNLEARNED, "tuning_reference")]
                return self._unlearn(output, tuning, {"method": methods, _LR: list(protocol.RATES)}, after)
            case "reference":
                return measure(output, judging, [self._evaluate(self._reference), self._attack(self._reference)])
            case "target":
                return measure(output, judging, [self._evaluate(self._target, "reference")])
            case "final":
                sweep = self._unlearn(output, judging, {"method": self._choose_settings()}, self._measure_unlearned())
                if self.size != "full":
                    # So that depth can be added. A model has 0.5 GB, and a GPU's grid hundreds of them.
                    sweep["keep"] = "model"
                return sweep
            case "ceiling":
                return self._finetune_again(output)
            case "ablation":
                rate = self._choose_rate(protocol.ABLATED)
                ablations = {}
                for name, settings in protocol.ABLATIONS.items():
                    ablations[name] = {**self._complete(settings, "unseen"), _LR: rate}
                axes = {"seed": self.seeds, "size": tuning["size"]}
                return self._unlearn(output, axes, {"method": ablations}, self._measure_unlearned())
            case "matched":
                after = [self._evaluate(_UNLEARNED, "reference"), self._attack(_UNLEARNED)]
                axes = {"seed": self.seeds, "size": tuning["size"]}
                sweep = self._unlearn(output, axes, {"method": self._choose_settings("general")}, after)
                sweep["settings"] |= {"damage.stream": "general", "damage.rows": 32, "damage.every_n_steps": 2}
                return sweep | {"matched": "kl"}
        raise ValueError(f"there is no stage '{stage}'.")

    # Parts of sweeps --------------------------------------------------------------------------------------------------

    @property
    def _base(self) -> str:
        return f"{self.folder}/base"

    @property
    def _target(self) -> str:
        return f"{self.folder}/models/model=target-{{seed}}/model"

    @property
    def _reference(self) -> str:
        return f"{self.folder}/models/model=retain_only-{{size}}-{{seed}}/model"

    @property
    def _finetuning(self) -> dict[str, Any]:
        """Settings of every fine-tuning."""
        return {"model.lm.model": self._base, "trainer.precision": self.precision, "picture.answers": 0}

    def _rows(self, name: str, size: object = "{size}") -> str:
        files = {"forget": f"{size}/forget10_perturbed.json", "retain": f"{size}/retain.jsonl"}
        return f"{self.folder}/rows/{files.get(name, f'{name}.jsonl')}"

    def _sets(self, size: int) -> dict[str, str]:
        return {"data.forget": self._rows("forget", size), "data.retain": self._rows("retain", size)}

    def _finetune(self) -> Sweep:
        """Return the sweep of all target models and retain-only models: one axis, because no grid has exactly these."""
        models: dict[str, dict[str, Any]] = {}
        pairs = list(itertools.product(self.seeds, self.sizes))
        if self._grid.is_tuned:
            pairs.append((protocol.TUNING_SEED, self._grid.one_size))
        for seed, size in pairs:
            seeds = _seed_everything(seed)
            # The rows of all sizes are the same in total; these are the same whatever ``--sizes`` names, too.
            models.setdefault(
                f"target-{seed}", {**seeds, **self._sets(self._grid.selection.sizes[0]), "data.train_on": "all"}
            )
            rows = self._sets(size)
            models[f"retain_only-{size}-{seed}"] = {**seeds, **rows, "data.train_on": "retain"}
        return {
            "output": f"{self.folder}/models",
            "config": "real/target.yaml",
            "settings": self._finetuning,
            "grid": {"model": models},
            "keep": "model",
        }

    def _finetune_again(self, output: str) -> Sweep:
        """Return a sweep of retain-only models of other seeds, each measured like an unlearned model of the seed in its cell's name."""
        seeds, sizes = {}, {}
        for seed in self.seeds:
            seeds[str(seed)] = _seed_everything(seed + protocol.OTHER_SEEDS)
        for size in self.sizes:
            sizes[str(size)] = self._sets(size)
        after = [self._evaluate(_UNLEARNED, "reference")]
        if self.measures_depth:
            after.append(self._depth())
        settings = {**self._finetuning, "data.train_on": "retain"}
        return {
            "output": output,
            "config": "real/target.yaml",
            "settings": settings,
            "grid": {"seed": seeds, "size": sizes},
            "after": after,
            "keep": "results",
        }

    def _unlearn(
        self, output: str, axes: Mapping[str, Sequence[int]], methods: Mapping[str, Any], after: list[str]
    ) -> Sweep:
        """Return a sweep of unlearning runs.

        Args:
            output: Its folder.
            axes: Seeds and forget sets.
            methods: The axes after them.
            after: What measures a model.
        """
        batches = {}
        for size in axes["size"]:
            batch = protocol.BATCH_PER_AUTHOR * size
            retain = max(protocol.MIN_RETAIN_BATCH, batch)
            batches[str(size)] = {"data.batch_size": batch, "data.retain_batch_size": retain}
        settings = {
            "model.lm.model": self._target,
            "model.lm.teacher": self._base,
            # Only where a method's own file has it.
            "model.rewind": 0,
            "model.constraints.nll.epsilon.relative": protocol.EPSILON,
            "model.constraints.nll.warmup_epochs": 1,
            "data.forget": self._rows("forget"),
            "data.retain": self._rows("retain"),
            "trainer.precision": self.precision,
            "audit.policy": None,
            "picture.answers": 0,
        }
        return {
            "output": output,
            "config": "real/unlearn.yaml",
            "settings": settings,
            "grid": {"seed": list(axes["seed"]), "size": batches, **methods},
            "after": after,
            "keep": "results",
        }

    def _settings(self, method: str, *streams: str) -> dict[str, Any]:
        """Return the settings of a method beside its file, with the sets that it reads beside forget and retain rows."""
        if method.startswith("match_"):
            streams = ("unseen", *streams)
        return self._complete(protocol.METHODS[method], *streams)

    def _complete(self, settings: Mapping[str, Any], *streams: str) -> dict[str, Any]:
        """Return a method's settings with the files that they need."""
        settings = dict(settings)
        if settings.get("data.forget") == "ANSWERS":
            settings["data.forget"] = f"{self.folder}/answers/size={{size}}/alternates.jsonl"
        # null, because the file to begin with names a set that is not here.
        settings["data.streams"] = {name: self._rows(name) for name in streams} or None
        return settings

    def _choose_settings(self, *streams: str) -> dict[str, dict[str, Any]]:
        """Return the settings of all methods, with the chosen learning rates."""
        settings = {}
        for name in self.methods:
            settings[name] = {**self._settings(name, *streams), _LR: self._choose_rate(name)}
        return settings

    def _choose_rate(self, method: str) -> float:
        """Return the learning rate that all methods have, or that of the tuning run that the rule chooses.

        Raises:
            ValueError: If a run is missing, or all failed.
        """
        from benchmarks.quality.goals import choose_run

        if not self._grid.is_tuned:
            return protocol.FIXED_RATE
        runs = select_lines(read_lines(self.results / "tuning.jsonl", self.digest), method=method)
        succeeded = drop_failed(runs)
        if len(runs) < len(protocol.RATES) or not succeeded:
            raise ValueError(
                f"'{method}' has {len(runs)} of {len(protocol.RATES)} tuning runs, {len(succeeded)} of them without an error: run the "
                "stage 'tuning' first, or leave the method out."
            )
        chosen = choose_run(succeeded, read_lines(self.results / "tuning_reference.jsonl", self.digest))
        return float(chosen["labels"]["lr"])

    def _measure_unlearned(self) -> list[str]:
        """Return the commands that measure an unlearned model: scores, attacks and, where there are entities, depth."""
        commands = [self._evaluate(_UNLEARNED, "reference"), self._attack(_UNLEARNED)]
        return [*commands, self._depth()] if self.measures_depth else commands

    def _evaluate(self, model: str, reference: str | None = None) -> str:
        settings = {
            "source": f"{self.folder}/rows/{{size}}",
            "holdout": json.dumps({"path": self._rows("holdout")}),
            "fluency_model": self._base,
            "max_length": protocol.MAX_LENGTH,
            "max_new_tokens": protocol.MAX_NEW_TOKENS,
            "trainer.precision": self.precision,
        }
        if reference is not None:
            settings["retain_results"] = f"{self.folder}/{reference}/seed={{seed}},size={{size}}/tofu.json"
        return evaluate(model, **settings)

    def _attack(self, model: str) -> str:
        sets = {"forget": self._rows("forget"), "retain": self._rows("retain")}
        return attack(model, f"{self.folder}/{ATTACKS_FILE}", **sets, max_length=protocol.MAX_LENGTH)

    def _depth(self) -> str:
        rows = f"{self.folder}/rows/{{size}}/entities.jsonl"
        models = {"target": self._target, "retain_only": self._reference}
        return depth(_UNLEARNED, **models, rows=rows, max_length=protocol.MAX_LENGTH)


def _seed_everything(seed: int) -> dict[str, int]:
    return dict.fromkeys(("seed_everything", "model.seed", "data.seed"), seed)
