"""The policy of an audit: what is measured, and the thresholds that are fixed before anything is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_unlearn.errors import ConfigError, MissingFileError
from lit_unlearn.evaluation.attacks.relearning import Relearn
from lit_unlearn.evaluation.measures import MEASURES, Role
from lit_unlearn.utils.io import expand_path, file_digest
from lit_unlearn.utils.validation import check_integer, check_number, list_names

_PACKAGE = Path(__file__).parents[1]
# The wheel has them inside the package, the source tree beside it.
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_ATTACKS = ("relearn", "sampled")


@dataclass(frozen=True)
class Requirement:
    """A threshold for one measure.

    Args:
        measure: Name of the measure, one of `MEASURES`.
        at_most: Largest value that is allowed; ``None`` for any.
        at_least: Smallest value that is allowed; ``None`` for any.
        required: Whether the audit fails with it; otherwise it is advisory, and only reported.

    Raises:
        ConfigError: If the measure is unknown, or there is no threshold or one that cannot be met.
    """

    measure: str
    at_most: float | None = None
    at_least: float | None = None
    required: bool = True

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(
                f"there is no measure '{self.measure}': {list_names(self.measure, MEASURES)}.", argument="requirements"
            )
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not bounds or not all(map(math.isfinite, bounds)) or bounds != sorted(bounds):
            raise ConfigError(
                f"'{self.measure}' needs a finite `at_most`, or an `at_least` that is not above it, or one of the two; got "
                f"at_least={self.at_least} and at_most={self.at_most}.",
                argument="requirements",
            )

    def describe_threshold(self) -> str:
        """Return the threshold as people read it, such as ``"at most 0.2"``."""
        parts = []
        if self.at_least is not None:
            parts.append(f"at least {self.at_least:g}")
        if self.at_most is not None:
            parts.append(f"at most {self.at_most:g}")
        return " and ".join(parts)


@dataclass(frozen=True)
class RelearnPlan:
    """The attack by relearning, for any number of forget rows.

    Args:
        share: Fraction of the forget rows that the attacker has, between 0 and 1. The others are measured.
        steps: As for `Relearn`, like ``lr`` and ``seed``.
        lr: As there.
        seed: As there.
    """

    share: float
    steps: int
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "share", self.share, above=0, below=1)
        self.plan_attack(rows=2)

    def plan_attack(self, rows: int) -> Relearn:
        """Return the attack on this many forget rows, of which at least one is relearned."""
        return Relearn(max(1, round(self.share * rows)), self.steps, self.lr, self.seed)


@dataclass(frozen=True)
class SamplingPlan:
    """How answers are sampled, with the whole distribution: bounds on the share of leaks then hold for the model as it is.

    Args:
        samples: Answers to every question.
        temperature: 1 for the model's own distribution.
        seed: Of the samples.
    """

    samples: int
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self, "samples", self.samples, at_least=1)
        check_number(self, "temperature", self.temperature, above=0)


@dataclass(frozen=True)
class Policy:
    """Thresholds, fixed before anything is measured, and how the measuring is done.

    Args:
        name: Its name for people.
        requirements: At least one of them required.
        confidence: Of every interval: the probability with which it is to hold the value for rows like these.
        min_rows: With fewer rows than this, nothing is decided: the intervals of few rows are not reliable.
        seed: Of the intervals.
        max_new_tokens: Longest generated answer.
        relearn: The attack by relearning, where a requirement asks for it.
        sampled: How answers are sampled, likewise.
        sha256: Of its file, as ``sha256sum`` prints it; ``None`` if it came from no file.

    Raises:
        ConfigError: If a number is out of range, nothing is required, or an attack that a requirement needs is not described.
    """

    name: str
    requirements: tuple[Requirement, ...]
    confidence: float = 0.95
    min_rows: int = 20
    seed: int = 0
    max_new_tokens: int = 100
    relearn: RelearnPlan | None = None
    sampled: SamplingPlan | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_number(self, "confidence", self.confidence, at_least=0.5, below=1)
        check_integer(self, "min_rows", self.min_rows, at_least=2)
        check_integer(self, "max_new_tokens", self.max_new_tokens, at_least=1)
        if not any(requirement.required for requirement in self.requirements):
            message = "`requirements` must have one that is `required: true`: otherwise every model would pass."
            raise ConfigError(message, owner=self, argument="requirements")
        if "relearn" in self.list_runs("model") and self.relearn is None:
            message = (
                "a requirement needs the attack by relearning: give `attacks: {relearn: {share, steps, lr, seed}}`."
            )
            raise ConfigError(message, owner=self, argument="attacks")

    def list_runs(self, role: Role) -> list[str]:
        """Return the runs that a model must make for the requirements, the plain one first."""
        runs: dict[str, None] = {}
        for requirement in self.requirements:
            measure = MEASURES[requirement.measure]
            if role == "model" or role in measure.compares_with:
                runs |= dict.fromkeys(measure.runs)
        return sorted(runs, key=lambda run: run != "plain")

    def describe(self) -> dict[str, Any]:
        """Return its content in plain types, for records."""
        return {**asdict(self), "requirements": [asdict(requirement) for requirement in self.requirements]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Policy:
        """Return the policy that `describe` gave."""
        values = dict(content)
        values["requirements"] = tuple(Requirement(**requirement) for requirement in content["requirements"])
        # A file that was written before there was such an attack has no key for it.
        if content.get("relearn") is not None:
            values["relearn"] = RelearnPlan(**content["relearn"])
        if content.get("sampled") is not None:
            values["sampled"] = SamplingPlan(**content["sampled"])
        return cls(**values)


def read_policy(name: str | Path) -> Policy:
    """Read a policy from a YAML file.

    Args:
        name: A file, or the name of a packaged one, such as ``policy/default.yaml``.

    Raises:
        MissingFileError: If there is no such file.
        ConfigError: If it is no YAML, or a key or a number in it is not possible.
    """
    file = find_policy(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the policy '{file}' is no YAML file: {str(error).splitlines()[0]}.", argument="policy"
        ) from error
    try:
        return _build_policy(content, file)
    except ConfigError as error:
        raise ConfigError(f"the policy '{file}' cannot be used: {error}", argument="policy") from error


def find_policy(name: str | Path) -> Path:
    """Return the file of a policy: a local one or, where there is none, the packaged one of that name."""
    file = expand_path(name)
    if file.is_file():
        return file
    for folder in _CONFIGS:
        packaged = folder / str(name).removeprefix("configs/")
        if packaged.is_file():
            return packaged
    raise MissingFileError(
        f"there is no policy file '{name}': give a YAML file, or one of policy/default.yaml, policy/real.yaml and policy/short.yaml.",
        argument="policy",
    )


def _build_policy(content: Any, file: Path) -> Policy:
    known = ("name", "confidence", "min_rows", "seed", "max_new_tokens", "attacks", "requirements")
    settings = _read_keys(content, known, "the policy")
    requirements = []
    for measure, thresholds in _read_keys(settings.pop("requirements", None), MEASURES, "`requirements`").items():
        values = _read_keys(thresholds, ("at_most", "at_least", "required"), f"'{measure}'")
        required = values.pop("required", True)
        if not isinstance(required, bool):
            raise ConfigError(f"'{measure}' needs `required: true` or `required: false`, not {required!r}.")
        numbers = {key: _read_float(key, value) for key, value in values.items()}
        requirements.append(Requirement(measure, required=required, **numbers))

    attacks = _read_keys(settings.pop("attacks", None) or {}, _ATTACKS, "`attacks`")
    if "relearn" in attacks:
        keys = {"share": _read_float, "steps": _read_integer, "lr": _read_float, "seed": _read_integer}
        settings["relearn"] = RelearnPlan(
            **_read_plan("relearn", attacks["relearn"], keys, required=("share", "steps", "lr"))
        )
    if "sampled" in attacks:
        keys = {"samples": _read_integer, "temperature": _read_float, "seed": _read_integer}
        settings["sampled"] = SamplingPlan(**_read_plan("sampled", attacks["sampled"], keys, required=("samples",)))
    if "confidence" in settings:
        settings["confidence"] = _read_float("confidence", settings["confidence"])
    for key in ("min_rows", "seed", "max_new_tokens"):
        if key in settings:
            settings[key] = _read_integer(key, settings[key])
    settings["name"] = str(settings.get("name", file.stem))
    return Policy(requirements=tuple(requirements), sha256=file_digest(file), **settings)


def _read_plan(
    attack: str, content: Any, keys: Mapping[str, Callable[[str, Any], float]], required: Sequence[str]
) -> dict[str, Any]:
    """Return the settings of an attack, each read as the number that it is."""
    values = _read_keys(content, keys, f"`attacks.{attack}`")
    for key in required:
        if key not in values:
            raise ConfigError(f"`attacks.{attack}` needs `{key}`, which is missing: set it.")
    return {key: keys[key](key, value) for key, value in values.items()}


def _read_keys(content: Any, known: Any, what: str) -> dict[str, Any]:
    """Return a mapping, all of whose keys are known."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{what} must have `key: value` lines, not {type(content).__name__}.")
    for key in content:
        if key not in known:
            raise ConfigError(f"{what} has no key '{key}': {list_names(str(key), known)}.")
    return dict(content)


def _read_float(key: str, value: Any) -> float:
    # YAML reads 1e-5, which has no point, as a text.
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"`{key}` must be a number, not {value!r}.") from None


def _read_integer(key: str, value: Any) -> int:
    number = _read_float(key, value)
    if not math.isfinite(number) or number != int(number):
        raise ConfigError(f"`{key}` must be a whole number, not {value!r}.")
    return int(number)
