"""Cookies: a stranger proves that it can read at its address before it costs us anything (RFC 6347 §4.2.1).

Theory
------
    cookie = generation(1) ‖ HMAC-SHA-256(secret of that generation, address ‖ parameters of the ClientHello)[:19]

20 bytes, so that the answer is smaller than the smallest ClientHello and nobody can be flooded through us. The secret
changes every `lifetime` seconds and the last one stays good for as long again; a cookie is therefore good for between
one and two lifetimes, and whoever collects cookies has to be at those addresses all the time. Nothing is kept per peer.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from registry.secrets import RandomBytes

_MAC: Final = 19
_SECRET: Final = 32


class CookieJar:
    """Makes and checks cookies. `lifetime` in seconds; `random` gives the secrets; `now` is any monotonic clock's."""

    __slots__ = ("_changed", "_current", "_generation", "_lifetime", "_previous", "_random")

    def __init__(self, lifetime: float, random: RandomBytes, now: float) -> None:
        self._lifetime = lifetime
        self._random = random
        self._changed = now
        self._generation = 0
        self._current = self._secret()
        self._previous = self._secret()

    def bake(self, address: bytes, parameters: bytes, now: float) -> bytes:
        """The cookie of a peer at `address` (host and port, in any one encoding) for a ClientHello's parameters."""
        self._rotate(now)
        return bytes((self._generation,)) + _mac(self._current, address, parameters)

    def good(self, cookie: bytes, address: bytes, parameters: bytes, now: float) -> bool:
        """Whether `cookie` was baked here, for that address and those parameters, and is not too old."""
        if len(cookie) != 1 + _MAC:
            return False
        self._rotate(now)
        secret = self._current if cookie[0] == self._generation else self._previous
        return bytes_eq(cookie[1:], _mac(secret, address, parameters))

    def _rotate(self, now: float) -> None:
        age = now - self._changed
        if age < self._lifetime:
            return
        late = age >= 2 * self._lifetime
        self._previous = self._secret() if late else self._current
        self._current = self._secret()
        self._generation = (self._generation + 1) % 256
        self._changed = now if late else self._changed + self._lifetime  # when it was due, however quiet it was then

    def _secret(self) -> HMAC:
        return HMAC(self._random(_SECRET), SHA256())


def _mac(secret: HMAC, address: bytes, parameters: bytes) -> bytes:
    mac = secret.copy()
    mac.update(len(address).to_bytes(1, "big") + address + parameters)
    return mac.finalize()[:_MAC]
