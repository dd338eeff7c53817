"""Bearer secrets, and the type that keeps them out of sight."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import re
from hashlib import sha256

import pytest

from registry import secrets
from registry.secrets import Secret, SecretKind


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (SecretKind.API_KEY, r"sk_live_[A-Za-z0-9_-]{43}"),
        (SecretKind.PROVISIONING_KEY, r"pk_[A-Za-z0-9_-]{43}"),
        (SecretKind.REGISTRATION_TOKEN, r"rt_[A-Za-z0-9_-]{43}"),
    ],
)
def test_form(kind: SecretKind, form: str) -> None:
    raw = bytes(range(32))
    asked: list[int] = []

    def random(count: int) -> bytes:
        asked.append(count)
        return raw

    made = secrets.generate(kind, random)
    assert re.fullmatch(form, made.reveal())
    assert base64.urlsafe_b64decode(made.reveal().removeprefix(kind.value) + "=") == raw
    assert asked == [32]


def test_a_secret_has_exactly_32_bytes() -> None:
    for length in (0, 31, 33):
        with pytest.raises(ValueError, match="32 bytes"):
            secrets.encode(SecretKind.API_KEY, bytes(length))


def test_digest_is_sha256_of_the_text_as_shown() -> None:
    assert secrets.digest("sk_live_x") == sha256(b"sk_live_x").digest()


def test_digest_takes_any_text() -> None:
    for text in ("", "\ud800", "\x00", "x" * 1_000_000, "ä"):
        assert len(secrets.digest(text)) == 32
    assert secrets.digest("x" * 256) == secrets.digest("x" * 1_000_000)


def test_same() -> None:
    assert secrets.same(b"a" * 32, b"a" * 32)
    assert not secrets.same(b"a" * 32, b"b" * 32)
    assert not secrets.same(b"a" * 32, b"a" * 31)


@pytest.mark.parametrize("value", ["sk_live_hidden", b"hidden bytes"])
def test_a_secret_is_not_seen(value: str | bytes) -> None:
    secret = Secret(value)  # type: ignore[type-var]
    seen = [repr(secret), str(secret), f"{secret}", f"{secret:>40}", f"{secret} {secret!r}", repr([secret])]
    assert not any("hidden" in each for each in seen)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)
    with pytest.raises(TypeError):
        json.dumps(secret)
    with pytest.raises(TypeError):
        hash(secret)
    with pytest.raises(AttributeError):
        secret.__dict__  # noqa: B018
    assert secret.reveal() == value


def test_equality_compares_values() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert Secret("ü") == Secret("ü")
    assert (bool(Secret("")), bool(Secret(b"x"))) == (False, True)


@pytest.mark.parametrize("kind", SecretKind)
def test_a_secret_is_recognised_wherever_it_was_pasted(kind: SecretKind) -> None:
    raw = secrets.encode(kind, bytes(range(32))).reveal()
    assert secrets.holds_one(raw)
    assert secrets.holds_one(f"my key is {raw}.")
    assert not secrets.holds_one(raw[:-1])


def test_honest_names_are_no_secrets() -> None:
    for name in ("", "smart_thermostat-building-north-floor-two-room-0000001", "rt_1", "sk_live_soon", "x" * 200):
        assert not secrets.holds_one(name)
