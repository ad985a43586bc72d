"""Check, print and save the configuration of a run as a whole."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lit_unlearn.errors import ConfigError
from lit_unlearn.training import LitUnlearn
from lit_unlearn.training.run_folder import find_run_folder, is_dry_run
from lit_unlearn.training.strategies import check_strategy
from lit_unlearn.training.trainer_checks import ONE_STEP_PER_BATCH, check_callbacks
from lit_unlearn.training.unlearn import check_constraint_names as check_names
from lit_unlearn.utils.io import atomic_file, read_yaml_text
from lit_unlearn.utils.redaction import redact_secrets
from lit_unlearn.utils.validation import list_names

# Keys that may differ in a resumed run without a word.
_MAY_DIFFER = ("ckpt_path", "logs", "trainer.logger", "trainer.callbacks")
_PRINTED_FIRST = ("model", "data", "trainer", "logs", "report", "picture", "export", "attach", "audit", "damage")
_NOT_SET = "# not set"


def check_trainer(trainer: Namespace) -> None:
    """Refuse Trainer flags and callbacks that cannot work with manual optimisation, before anything is built.

    Raises:
        ConfigError: With what to set instead.
    """
    reasons = {}
    if (trainer.accumulate_grad_batches or 1) != 1:
        reasons["accumulate_grad_batches"] = ONE_STEP_PER_BATCH
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        reasons["gradient_clip_algorithm"] = (
            "only clipping by the norm of the whole gradient is exact over processes. Leave it out and set "
            "`gradient_clip_val`."
        )
    if trainer.overfit_batches:
        reasons["overfit_batches"] = "it would stop the retain stream. Set `max_rows` of the data instead."
    if trainer.reload_dataloaders_every_n_epochs:
        reasons["reload_dataloaders_every_n_epochs"] = "every epoch has its own order anyway. Leave it out."
    for flag, reason in reasons.items():
        raise ConfigError(f"`{flag}={trainer[flag]}` is refused: {reason}", owner=L.Trainer, argument=flag)
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    check_callbacks(_import_class(callback.class_path) for callback in callbacks if callback is not None)
    strategy = trainer.strategy
    check_strategy(strategy if isinstance(strategy, str) else strategy.class_path)


def check_constraint_names(arguments: Sequence[str]) -> None:
    """Refuse constraints that are changed but were never made: their name is mistyped.

    Without this, the parser would ask for the objective and the multiplier of a new constraint of that name.

    Args:
        arguments: Of the command, with the configuration files as paths or YAML.

    Raises:
        ConfigError: With the nearest name.
    """
    known: set[str] = set()
    # In the order in which the parser takes them: a file, too, changes what came before it.
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, text = argument.partition("=")
        if option in ("--config", "-c"):
            for name, fields in _read_constraints(text if equals else value).items():
                is_whole = isinstance(fields, Mapping) and {"objective", "multiplier"} <= fields.keys()
                _check_is_known(name, known, is_whole)
        elif match := _CONSTRAINT_OPTION.match(option):
            # Whoever makes a constraint on the command line begins with its objective.
            _check_is_known(match[1], known, match[2] in (None, "objective", "objective.class_path"))


_CONSTRAINT_OPTION = re.compile(r"--model(?:\.init_args)?\.constraints\.([^.]+)(?:\.(.+))?$")


def _check_is_known(name: str, known: set[str], is_whole: bool) -> None:
    if known and not is_whole and name not in known:
        raise ConfigError(
            f"there is no constraint '{name}' to change: {list_names(name, sorted(known))}. A new one needs an `objective`, an "
            "`epsilon` and a `multiplier`.",
            owner=LitUnlearn,
            argument="constraints",
        )
    check_names([name])
    known.add(name)


def _read_constraints(config: str) -> dict[str, Any]:
    content: Any = yaml.safe_load(read_yaml_text(config))
    for key in ("model", "init_args", "constraints"):
        is_left_out = key == "init_args" and isinstance(content, Mapping) and key not in content
        if not is_left_out:
            content = content.get(key) if isinstance(content, Mapping) else None
    return {str(name): fields for name, fields in content.items()} if isinstance(content, Mapping) else {}


def _import_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    named: type = getattr(importlib.import_module(module), name)
    return named


def format_settings(settings: dict[str, Any], changed: dict[str, Any], header: str) -> str:
    """Format a configuration for people: important sections first, unset options in one comment per section.

    A null that was written in place of another default stays, so that the text, read again, gives the same settings.

    Args:
        settings: The whole configuration.
        changed: The part of it that differs from the defaults.
        header: The first line.
    """
    ordered = {key: settings[key] for key in (*_PRINTED_FIRST, *settings) if key in settings}
    text = yaml.safe_dump(
        _collapse_unset(ordered, changed), sort_keys=False, allow_unicode=True, default_flow_style=False, width=10_000
    )
    # YAML has no comments to dump: the line is a key that needs quotes, until they are taken off.
    return f"{header}\n" + text.replace(f"'{_NOT_SET}':", f"{_NOT_SET}:")


def _collapse_unset(settings: dict[str, Any], changed: Any) -> dict[str, Any]:
    if not isinstance(changed, dict):
        changed = {}
    unset = []
    shown: dict[str, Any] = {}
    for key, value in settings.items():
        if value is None and key not in changed:
            unset.append(key)
        elif isinstance(value, dict):
            section = _collapse_unset(value, changed.get(key))
            if list(section) == [_NOT_SET]:
                # A section that has nothing but a comment would be read as null.
                unset += [f"{key}.{name}" for name in section[_NOT_SET].split(", ")]
            else:
                shown[key] = section
        else:
            shown[key] = value
    if unset:
        shown[_NOT_SET] = ", ".join(unset)
    return shown


class SaveSettings(SaveConfigCallback):
    """Saves the configuration in the run's folder and in checkpoints; a resumed run logs which settings changed."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``config.yaml``, unless it is written already or this is a dry run."""
        # Lightning's own writes into the working directory where the logger has no folder for each run.
        if self.already_saved or is_dry_run(trainer):
            return
        folder = find_run_folder(trainer)
        if trainer.is_global_zero:
            with atomic_file(folder / self.config_filename) as file:
                file.write_text(self._dump_config(), encoding="utf-8")
        self.already_saved = True

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration, flat."""
        return {"settings": self._flatten_config()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Log what changed; the new settings are the ones used."""
        old, new = state_dict["settings"], self._flatten_config()
        changes = []
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) and not key.startswith(_MAY_DIFFER):
                changes.append(f"{key}: {old.get(key, 'not set')} → {new.get(key, 'not set')}")
        if changes:
            rank_zero_info("resumed with changed settings: " + "; ".join(changes))

    def _flatten_config(self) -> dict[str, str]:
        return _flatten(yaml.safe_load(self._dump_config()))

    def _dump_config(self) -> str:
        """Return the configuration as YAML, without the keys and tokens that a logger, for one, may have been given."""
        text: str = self.parser.dump(self.config, skip_unset=False)
        settings = yaml.safe_load(text)
        shown = redact_secrets(settings)
        return text if shown == settings else yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): str(value)}
    flat: dict[str, str] = {}
    for name, child in value.items():
        flat |= _flatten(child, f"{prefix}{name}.")
    return flat
