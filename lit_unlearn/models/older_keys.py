"""What transformers 4.45 to 4.57 read in a model's folder under other names than those that transformers 5 writes.

transformers 4 ignores keys that it does not know. It then takes its own defaults, such as a base of 10000 for rotary positions:
the model loads, and computes something else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Keys = dict[str, Any]

# The name of each layer type's parameters in transformers 5, with the name of its base in transformers 4.
_NESTED_BASES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
# For these, some models of transformers 4 accept two fields and no more.
_TWO_FIELDS = ("linear", "dynamic")


def write_older_keys(folder: Path) -> None:
    """Add to a model's folder the keys that transformers 4.45 and later read, beside those of transformers 5.

    Keys of the config that transformers 5 would not read alike are left out, as for models that transformers 4 does not know.

    Args:
        folder: As ``save_pretrained`` of a model and of a tokenizer wrote it; either may be missing.
    """
    _edit(folder / "config.json", _add_config_keys)
    template = _read_chat_template(folder)
    _edit(folder / "tokenizer_config.json", lambda config: _add_tokenizer_keys(config, template))


def _edit(file: Path, add_keys: Callable[[Keys], Keys]) -> None:
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    # As transformers writes it.
    text = json.dumps(add_keys(config), indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


# Config -------------------------------------------------------------------------------------------------------------


def _add_config_keys(config: Keys) -> Keys:
    older = dict(config)
    for name, value in config.items():
        # A model of text and pictures has a config for each.
        if name.endswith("_config") and isinstance(value, dict):
            older[name] = _add_config_keys(value)
    if config.get("dtype") is not None:
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        for is_short in (True, False):
            with_rope = {**older, **_older_rope_keys(rope, str(config.get("model_type")), is_short)}
            if _are_read_alike(config, with_rope):
                return with_rope
    return older


def _older_rope_keys(rope: Keys, model_type: str, is_short: bool) -> Keys:
    """Return the keys of transformers 4 for the parameters of rotary positions.

    Args:
        rope: The parameters, of all layers or by type of layer.
        model_type: Of the model.
        is_short: Whether to leave out what only some versions know, for the models that refuse it.
    """
    nested = {name: rope[name] for name in _NESTED_BASES if isinstance(rope.get(name), dict)}
    if "full_attention" not in nested:
        return _older_flat_keys(rope, model_type, is_short)
    keys = _older_flat_keys(nested["full_attention"], model_type, is_short)
    for layer_type, parameters in nested.items():
        # Layers that see a window only are never scaled there.
        keys[_NESTED_BASES[layer_type]] = parameters.get("rope_theta")
    return keys


def _older_flat_keys(rope: Keys, model_type: str, is_short: bool) -> Keys:
    base, part = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    keys: Keys = {"rope_theta": base, "rope_scaling": _older_scaling(rope, model_type, is_short)}
    if part is not None:
        keys["partial_rotary_factor"] = part
    if model_type.startswith("gpt_neox"):
        keys |= {"rotary_emb_base": base, "rotary_pct": part}
    return keys


def _older_scaling(rope: Keys, model_type: str, is_short: bool) -> Keys | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if is_short and kind in _TWO_FIELDS:
        # OLMo accepts these two alone; Gemma 3 came later, and knows the later name alone.
        name = "rope_type" if model_type.startswith("gemma3") else "type"
        return {name: kind, "factor": rope.get("factor")}
    if is_short and model_type == "phi3":
        # Exactly these three are accepted.
        return {"type": kind, "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    elsewhere = ("rope_theta", "partial_rotary_factor", "type")
    return {name: value for name, value in rope.items() if name not in elsewhere}


def _are_read_alike(config: Keys, older: Keys) -> bool:
    """Return whether the transformers installed reads the same rotary positions with the older keys, which it prefers to its own."""
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return False
    read = []
    # Whatever a class refuses, the config that is there must stay as it is.
    with suppress(Exception):
        for fields in (config, older):
            # It changes what it is given.
            parsed = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields))
            read.append(_without_older_names(parsed.rope_parameters))
    return len(read) == 2 and read[0] == read[1]


def _without_older_names(rope: Any) -> Any:
    """Return parameters without ``type``, the older name of ``rope_type``, which may stand beside it."""
    if not isinstance(rope, dict):
        return rope
    return {name: _without_older_names(value) for name, value in rope.items() if name != "type"}


# Tokenizer ----------------------------------------------------------------------------------------------------------


def _add_tokenizer_keys(config: Keys, template: str | list[Keys] | None) -> Keys:
    older = dict(config)
    # The class of any tokenizer.json, under its name in transformers 4; 5 knows both names.
    if config.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 takes a list under this name for a table of names, and fails; 5 knows both names.
    if isinstance(config.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if template is not None:
        older["chat_template"] = template
    return older


def _read_chat_template(folder: Path) -> str | list[Keys] | None:
    """Return the template as transformers 4 writes it into the tokenizer's config: a text, or a list if there are several."""
    file = folder / "chat_template.jinja"
    default = file.read_text(encoding="utf-8") if file.is_file() else None
    more_files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not more_files:
        return default
    templates = [] if default is None else [{"name": "default", "template": default}]
    for more_file in more_files:
        templates.append({"name": more_file.stem, "template": more_file.read_text(encoding="utf-8")})
    return templates
