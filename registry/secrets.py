"""Bearer secrets: API keys, provisioning keys, registration tokens, and the type that keeps them out of sight.

Each is a prefix and 32 random bytes in URL-safe base64 without padding (seed 003). The raw text is shown once; at
rest there is only its SHA-256, which needs no salt and no stretching because the input has 256 bits of entropy.
Look-up is by that hash: the database compares hashes of the attacker's choosing, which tells nothing about a stored
secret, and the final comparison is constant-time all the same.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from enum import Enum
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T", str, bytes)

RandomBytes = Callable[[int], bytes]
"""A source of that many random bytes; `secrets.token_bytes` outside tests."""

SECRET_BYTES = 32
MAX_SECRET_TEXT = 256
"""Longer presented secrets are refused before they are hashed; the longest of ours has 51 characters."""


class Secret(Generic[T]):
    """A value that must not be seen: no repr, str, format or pickle by accident. `reveal()` is the only door."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value: T = value

    def reveal(self) -> T:
        """The value itself. Duty of the caller: never log it, never put it into an exception, an event or a URL."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_as_bytes(self._value), _as_bytes(other._value))

    __hash__ = None  # type: ignore[assignment]  # a secret is never a dictionary key

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")


class SecretKind(Enum):
    """The three bearer secrets; the value is the prefix that tells them apart."""

    API_KEY = "sk_live_"
    PROVISIONING_KEY = "pk_"
    REGISTRATION_TOKEN = "rt_"  # noqa: S105  # a prefix, not a secret


_SHAPE = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(k.value for k in SecretKind)})[A-Za-z0-9_-]{{43}}(?![A-Za-z0-9_-])")
"""32 bytes in base64 are 43 characters; the ends are looked at so that no honest smart_thermostat-… is meant."""


def generate(kind: SecretKind, random: RandomBytes) -> Secret[str]:
    """A new secret of `kind` with 256 bits from `random`."""
    return encode(kind, random(SECRET_BYTES))


def encode(kind: SecretKind, raw: bytes) -> Secret[str]:
    """The text of a secret of `kind` whose 32 bytes are `raw`."""
    if len(raw) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(raw)}")
    return Secret(kind.value + base64.urlsafe_b64encode(raw).rstrip(b"=").decode())


def digest(presented: str) -> bytes:
    """SHA-256 of the presented text: 32 bytes, the key that it is stored and found under.

    Text that is no secret of ours at all is hashed the same way, so that it fails later and alike.
    """
    return hashlib.sha256(presented[:MAX_SECRET_TEXT].encode("utf-8", "surrogatepass")).digest()


def holds_one(text: str) -> bool:
    """Whether a text has something of the shape of these secrets in it.

    Names, identifiers and correlation ids are stored, shown and logged, so a secret that somebody pastes into one of
    them by mistake would be in all these places: such a text is not accepted.
    """
    return _SHAPE.search(text) is not None


def same(one: bytes, other: bytes) -> bool:
    """Constant-time comparison of two digests."""
    return hmac.compare_digest(one, other)


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
