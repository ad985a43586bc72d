"""Read the file of a sweep: a grid, and for each of its cells the commands that it runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lit_unlearn.cli.main import COMMANDS, check_config, find_config
from lit_unlearn.errors import ConfigError, MissingFileError
from lit_unlearn.utils.io import expand_path, is_file, read_yaml_text
from lit_unlearn.utils.validation import list_names

Command = tuple[str, ...]
"""Arguments of ``lit-unlearn``, with `CELL` in place of the cell's folder: they are the same on every machine."""

CELL = "{cell}"
MODEL, RUN = "model", "fit"
"""Folders of a cell: its export, and its logs with the checkpoints."""

Keep = Literal["all", "model", "results"]

_KEYS = ("output", "fit", "config", "settings", "grid", "matched", "after", "keep")
# They say nothing where there is no fit.
_FIT_KEYS = ("config", "settings", "matched")
_METHOD, _SEED = "method", "seed"
# One number decides the order of the rows, dropout, and whatever else draws at random.
_SEED_KEYS = ("seed_everything", "model.seed", "data.seed")
# A run that misses its bound is a row of the comparison, not an error; a log file shows no progress bar.
_DEFAULTS = {
    "report.require_feasible": False,
    "report.require_forgotten": False,
    "trainer.enable_progress_bar": False,
}
# Last, so that they win: each cell has a folder of its own, and its fit resumes.
_OWN_SETTINGS = {
    "logs.save_dir": CELL,
    "logs.name": RUN,
    "report.dirpath": CELL,
    "export.dirpath": f"{CELL}/{MODEL}",
    "ckpt_path": "last",
}
# Commands with an `--output` by default, which each cell would replace; of an audit, the verdict is looked for in the cell.
_SHARED_OUTPUT = ("attack", "audit")
# Options of the commands whose value is a file of settings.
_FILE_OPTIONS = ("-c", "--config", "--policy", "--audit.policy")
# It names a folder, and stands in commands.
_LABEL = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Cell:
    """One combination of the grid.

    Args:
        name: Of its folder, such as ``seed=0,method=pdu``: the axes in their order.
        commands: What it runs: a fit, unless the sweep has none, and the commands that measure a model.
        digests: Of the settings in the files that the commands name, configurations and policies: an edit would give the same command
            another meaning.
        is_matched: Whether its fit has to end at a limit of damage.
        keep: What stays when all has ended: everything, all but checkpoints, or neither checkpoints nor the model.
    """

    name: str
    commands: tuple[Command, ...]
    digests: dict[str, str] = field(default_factory=dict)
    is_matched: bool = False
    keep: Keep = "all"


@dataclass(frozen=True)
class Choice:
    """What one label of an axis adds to a fit: configuration files and settings."""

    label: str
    configs: list[str]
    settings: dict[str, Any]


def read_sweep(name: str) -> tuple[Path, list[Cell]]:
    """Return the folder of a sweep and its cells, in the order of the grid: the last axis changes first.

    Args:
        name: A YAML file, or the name of a packaged one.

    Raises:
        MissingFileError: If there is no such file, or a configuration that it names is not there.
        ConfigError: If it is no YAML, or a key or a value in it is not possible.
    """
    file = _find_file(name)
    if not is_file(file):
        raise MissingFileError(
            f"a sweep must be a YAML file, or the name of a packaged one, not '{name}'.", argument="file"
        )
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"'{name}' has no setting '{key}': {list_names(str(key), _KEYS)}.")
    output = content.get("output")
    if not isinstance(output, str):
        raise ConfigError(f"'{name}' needs `output`, the folder of the sweep, as a path, not {output!r}.")
    keep = content.get("keep", "all")
    if keep not in get_args(Keep):
        raise ConfigError(f"'{name}': `keep` must be {', '.join(get_args(Keep))}, not {keep!r}.")
    has_fit = _read_fit(name, content)

    axes = _read_axes(content.get("grid"))
    cells = []
    # Files are read once: a grid may have hundreds of cells.
    digests: dict[str, str] = {}
    for choices in itertools.product(*axes.values()):
        labels = {axis: choice.label for axis, choice in zip(axes, choices, strict=True)}
        commands = _build_after(content.get("after"), labels)
        if has_fit:
            commands.insert(0, _build_fit(content, choices, labels))
        files = list(itertools.chain.from_iterable(map(list_setting_files, commands)))
        for file in files:
            # A name that there is no file of is refused now, not in the middle of the night.
            if file not in digests:
                digests[file] = _digest_settings(_find_file(file))
        cells.append(
            Cell(
                ",".join(f"{axis}={label}" for axis, label in labels.items()),
                tuple(commands),
                {file: digests[file] for file in files},
                content.get("matched") is not None,
                keep,
            )
        )
    return expand_path(output), cells


def _read_fit(name: str, content: Mapping[str, Any]) -> bool:
    """Return whether cells begin with a fit; without one they only measure models that are there already.

    Raises:
        ConfigError: If ``fit`` is neither true nor false, or is false in a file that has settings of a fit or no command.
    """
    has_fit = content.get("fit", True)
    if not isinstance(has_fit, bool):
        raise ConfigError(f"'{name}': `fit` must be true or false, not {has_fit!r}.")
    if has_fit:
        return True
    for key in _FIT_KEYS:
        if content.get(key) is not None:
            raise ConfigError(f"'{name}': `fit` is false, and `{key}` is of a fit: leave one of both out.")
    if not content.get("after"):
        raise ConfigError(f"'{name}': `fit` is false, so that `after` must have a command, and has none.")
    return False


def _find_file(name: str) -> str:
    """Return the path of a configuration: a local file or, where there is none, the packaged one of that name.

    YAML in place of a name stays as it is.
    """
    path = find_config(name)
    check_config(path)
    return path


def _digest_settings(config: str) -> str:
    """Return the digest of the settings in a file, or in YAML itself: an edited comment changes no result."""
    settings = yaml.safe_load(read_yaml_text(config))
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()


def list_setting_files(command: Command) -> list[str]:
    """Return the files of settings that a command names, its configurations and its policy, as it names them.

    What an earlier command of the cell writes is none of them.
    """
    files = []
    for argument, following in itertools.zip_longest(command, command[1:], fillvalue=""):
        option, _, value = argument.partition("=")
        file = value or following
        if option in _FILE_OPTIONS and file != "null" and CELL not in file:
            files.append(file)
    return files


# Axes -----------------------------------------------------------------------------------------------------------------


def _read_axes(grid: Any) -> dict[str, list[Choice]]:
    """Return the choices of every axis, by its short name: the last part of a key of the fit."""
    if not isinstance(grid, Mapping) or not grid:
        raise ConfigError("`grid` must have an entry for each axis, such as `seed: [0, 1, 2]` or `method: [pdu, npo]`.")
    axes: dict[str, list[Choice]] = {}
    for key, values in grid.items():
        name = str(key).rpartition(".")[2]
        is_taken = name in axes or name == "cell"
        if is_taken or not _LABEL.fullmatch(name):
            raise ConfigError(
                f"the axis '{key}' cannot be called '{name}': expected are letters and digits, and no other axis of that name. Choose "
                f"a name, with a label for each value: `my_axis: {{small: {{{key}: …}}}}`."
            )
        if not isinstance(values, Mapping | list) or not values:
            raise ConfigError(f"the axis '{key}' must be a list of values, or settings by label, not {values!r}.")
        choices = []
        if isinstance(values, Mapping):
            for label, settings in values.items():
                choices.append(_build_choice(str(key), str(label), {} if settings is None else settings))
        else:
            for value in values:
                settings = {} if key in (_METHOD, _SEED) else {str(key): value}
                choices.append(_build_choice(str(key), _format_value(value), settings))
        _check_labels(str(key), choices)
        axes[name] = choices
    return axes


def _build_choice(axis: str, label: str, settings: Any) -> Choice:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"'{label}' of the axis '{axis}' must be settings, `key: value`, not {settings!r}.")
    given = {str(key): value for key, value in settings.items()}
    defaults: dict[str, Any] = {}
    if axis == _METHOD:
        defaults["config"] = f"method/{label}.yaml"
    elif axis == _SEED:
        defaults = dict.fromkeys(_SEED_KEYS, label)
    given = {**defaults, **given}
    return Choice(label, _as_list(given.pop("config", None)), given)


def _check_labels(axis: str, choices: Sequence[Choice]) -> None:
    labels = [choice.label for choice in choices]
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ConfigError(
                f"'{label}' of the axis '{axis}' cannot name a folder: give it a label of letters and digits, as in `my_axis: {{my_label: "
                f"{{{axis}: {label}}}}}`."
            )
        if labels.count(label) > 1:
            raise ConfigError(f"the axis '{axis}' has '{label}' twice.")


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


# Commands -------------------------------------------------------------------------------------------------------------


def _build_fit(content: Mapping[str, Any], choices: Sequence[Choice], labels: Mapping[str, str]) -> Command:
    """Return the fit of a cell: what is more special comes later, and wins."""
    configs = _as_list(content.get("config"))
    settings = {**_DEFAULTS, **_read_settings(content.get("settings"))}
    for choice in choices:
        configs += choice.configs
        settings |= choice.settings
    # After the method's file, whose `keep` it replaces.
    if content.get("matched") is not None:
        configs.append(f"method/matched/{content['matched']}.yaml")
    for key in settings:
        if key in _OWN_SETTINGS:
            raise ConfigError(f"`{key}` cannot be set in a sweep, whose cells have a folder each: leave it out.")
    arguments = ["fit"]
    for config in configs:
        arguments.append(f"--config={_fill(config, labels)}")
    for key, value in {**settings, **_OWN_SETTINGS}.items():
        arguments.append(f"--{key}={_fill(_format_value(value), labels)}")
    return tuple(arguments)


def _read_settings(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, Mapping | None):
        raise ConfigError(f"`settings` must be keys of the fit, such as `trainer.max_epochs: 5`, not {settings!r}.")
    return {str(key): value for key, value in (settings or {}).items()}


def _build_after(after: Any, labels: Mapping[str, str]) -> list[Command]:
    commands = []
    for line in _as_list(after):
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise ConfigError(f"`after`: '{line}' cannot be split into words ({error}): check its quotes.") from error
        if not words or words[0] not in COMMANDS:
            raise ConfigError(
                f"`after` must have commands such as 'audit {CELL}/{MODEL} --policy FILE --output {CELL}/audit', not '{line}': "
                f"{list_names(words[0] if words else '', COMMANDS)}."
            )
        is_in_cell = f"--output {CELL}" in " ".join(words).replace("--output=", "--output ")
        if words[0] in _SHARED_OUTPUT and not is_in_cell:
            raise ConfigError(
                f"`after`: '{line}' writes to one folder for all cells: add `--output {CELL}/{words[0]}`."
            )
        commands.append(tuple(_fill(word, labels) for word in words))
    return commands


def _fill(text: str, labels: Mapping[str, str]) -> str:
    """Replace the name of an axis in braces by the cell's label. Other braces stay: they may be those of a template."""
    for axis, label in labels.items():
        text = text.replace(f"{{{axis}}}", label)
    return text


def _format_value(value: Any) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
