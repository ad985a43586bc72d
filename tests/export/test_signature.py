"""Signatures: of these bytes, by this key."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit_models import make_key

from lit_unlearn.errors import ConfigError, MissingFileError
from lit_unlearn.export.signature import (
    KEY_VARIABLE,
    find_signature_problem,
    load_signing_key,
    read_public_key,
    write_signature,
)


def test_a_signature_is_of_these_bytes_and_by_this_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = make_key(tmp_path / "key.pem")
    file, signature = tmp_path / "audit.json", tmp_path / "audit.json.sig"
    file.write_text("{}", encoding="utf-8")
    monkeypatch.setenv(KEY_VARIABLE, (tmp_path / "key.pem").read_text("utf-8"))
    for source in (tmp_path / "key.pem", None):
        key = load_signing_key(source)
        assert key is not None
        write_signature(file, key)
        assert find_signature_problem(file, signature, digits) is None
    assert find_signature_problem(file, signature, None) is None
    assert read_public_key(str(tmp_path / "key.pub")) == read_public_key(digits.upper()) == digits
    other = make_key(tmp_path / "other.pem")
    assert "another key" in str(find_signature_problem(file, signature, other))
    file.write_text("{ }", encoding="utf-8")
    assert "signed" in str(find_signature_problem(file, signature, digits))


def test_keys_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert load_signing_key(None) is None
    with pytest.raises(ConfigError, match="64"):
        read_public_key("abc")
    make_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").write_text("no key", encoding="utf-8")
    with pytest.raises(ConfigError, match="private key"):
        load_signing_key(tmp_path / "key.pem")
    with pytest.raises(MissingFileError):
        load_signing_key(tmp_path / "nowhere.pem")
