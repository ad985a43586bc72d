"""Ed25519 signatures of files: who vouches for a record or an audit. Needs the extra ``sign``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lit_unlearn.errors import ConfigError, MissingFileError, reading
from lit_unlearn.utils.io import expand_path, is_file, read_json, write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_SUFFIX = ".sig"
KEY_VARIABLE = "LIT_UNLEARN_SIGNING_KEY"
_ALGORITHM = "Ed25519"
_HOW_TO_MAKE = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"


def load_signing_key(file: str | Path | None) -> Ed25519PrivateKey | None:
    """Read a private key, without a password.

    Args:
        file: In PEM; ``None`` for the text in ``$LIT_UNLEARN_SIGNING_KEY``.

    Returns:
        The key; ``None`` if there is neither a file nor a text.

    Raises:
        ConfigError: If the package is not installed, or it is no Ed25519 key.
        MissingFileError: If there is no such file.
    """
    if file is None and not os.environ.get(KEY_VARIABLE):
        return None
    _require_package()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    source = f"${KEY_VARIABLE}" if file is None else str(file)
    with reading("the private key", source, f"Give an Ed25519 key in PEM: {_HOW_TO_MAKE}.", argument="key"):
        content = os.environ[KEY_VARIABLE].encode() if file is None else _read_bytes(file)
        key = load_pem_private_key(content, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"`key` must be an Ed25519 key, and '{source}' is another one: {_HOW_TO_MAKE}.", argument="key"
        )
    return key


def write_signature(file: Path, key: Ed25519PrivateKey, target: Path | None = None) -> None:
    """Sign the bytes of a file.

    Args:
        file: The file.
        key: From `load_signing_key`.
        target: Where the signature is written; ``None`` for beside the file.
    """
    content = {
        "algorithm": _ALGORITHM,
        "file": file.name,
        "public_key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(file.read_bytes()).hex(),
    }
    write_json(target or file.with_name(file.name + SIGNATURE_SUFFIX), content)


def read_public_key(text: str) -> str:
    """Return a public key as 64 hexadecimal digits.

    Args:
        text: These digits, or a PEM file.

    Raises:
        ConfigError: If it is neither, or the package is not installed.
    """
    if not is_file(text):
        digits = text.lower()
        if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
            raise ConfigError(
                f"`public_key` must be a PEM file, or 64 hexadecimal digits as an audit prints them, not {text!r}.",
                argument="public_key",
            )
        return digits
    _require_package()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    with reading("the public key", text, "Give an Ed25519 key in PEM.", argument="public_key"):
        key = load_pem_public_key(_read_bytes(text))
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"`public_key` must be an Ed25519 key, and '{text}' is another one.", argument="public_key")
    raw: bytes = key.public_bytes_raw()
    return raw.hex()


def find_signature_problem(file: Path, signature: Path, public_key: str | None) -> str | None:
    """Return what is wrong with the signature of a file; ``None`` if nothing is.

    Args:
        file: The file.
        signature: What `write_signature` wrote.
        public_key: From `read_public_key`: whose signature it must be; ``None`` for anybody's.

    Raises:
        ConfigError: If the package is not installed.
    """
    _require_package()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    content = read_json(signature)
    if public_key is not None and content.get("public_key") != public_key:
        return f"it is by another key, {content.get('public_key')}"
    try:
        signer = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["public_key"]))
        signer.verify(bytes.fromhex(content["signature"]), file.read_bytes())
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return "the file is not the one that was signed"
    return None


def _read_bytes(file: str | Path) -> bytes:
    path = expand_path(file)
    if not path.is_file():
        raise MissingFileError(f"there is no key '{file}': {_HOW_TO_MAKE}.", argument="key")
    return path.read_bytes()


def _require_package() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        message = 'signatures need the package `cryptography`: `pip install "lit-unlearn[sign]"`.'
        raise ConfigError(message, argument="key") from None
