"""Secrets in settings: found by the name of their key, and replaced before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
_SECRET_WORDS = {"key", "keys", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "credentials"}
_SECRET_WORDS |= {"credential", "authorization"}
# A token of a text, as in `eos_token`, is no secret; one that opens a door ends its name, as in `hf_token`.
_TEXT_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "end", "start", "next"}


def redact_secrets(value: Any) -> Any:
    """Return a copy of plain settings with secrets replaced, whether in a dict under a telling key or in an address.

    Example:
        >>> redact_secrets({"api_key": "sk-1", "tokenizer": "gpt2", "url": "https://me:pw@host/x"})
        {'api_key': '[redacted]', 'tokenizer': 'gpt2', 'url': 'https://[redacted]@host/x'}
    """
    if isinstance(value, Mapping):
        return {key: _redact_entry(key, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_secrets(entry) for entry in value]
    if isinstance(value, str):
        return re.sub(r"://[^/@\s]+@", f"://{REDACTED}@", value)
    return value


def _redact_entry(key: Any, value: Any) -> Any:
    # Numbers and switches are no secrets, such as `use_auth_token: true`.
    if is_secret(str(key)) and value not in (None, "") and not isinstance(value, bool):
        return REDACTED
    return redact_secrets(value)


def is_secret(key: str) -> bool:
    """Return whether the name of a setting says that its value is a secret.

    Example:
        >>> [is_secret(key) for key in ("WANDB_API_KEY", "accessToken", "hf_token", "max_new_tokens", "eos_token")]
        [True, True, True, False, False]
    """
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", snake) if word]
    if _SECRET_WORDS & set(words):
        return True
    return words[-1:] == ["token"] and not _TEXT_TOKENS & set(words)
