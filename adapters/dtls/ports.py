"""The seam between the datagram shell and the protocol that rides on it.

    UDP socket ─► shell (listener.py) ─► Association: handshake, records ─► Application: admission, requests

The shell proves possession and nothing else; who may come in is the application's word, given by the resolver. A PSK is
needed before it is proved, so the application is asked for a key in the middle of a handshake and may take its time:
datagrams of that peer wait, bounded, and nobody else does. For an identity that nobody knows it gives a random key.

An association is known by its opaque id, never by its address: addresses change behind NATs, and connection ids
(RFC 9146) will let an association follow them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from registry.secrets import Secret


class PskKey(msgspec.Struct, frozen=True):
    """The key to verify one handshake with, and what the application wants back when it has verified.

    `mismatched` is called once, after the peer has been answered, if the handshake shows that the peer has another key.
    """

    key: Secret[bytes]
    offer: object
    mismatched: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return "PskKey(…)"


class PskProven(msgspec.Struct, frozen=True):
    """The peer holds the key of `identity`."""

    identity: bytes
    offer: object

    def __repr__(self) -> str:
        return f"PskProven({self.identity!r}, …)"


@dataclass(frozen=True, slots=True)
class CertificateProven:
    """The peer holds the private key of this certificate (DER). Nobody has judged its issuer, dates or usages."""

    der: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class NothingProven:
    """The peer only knows who we are: it checked, or did not check, our certificate."""


Proof = PskProven | CertificateProven | NothingProven


class Association(Protocol):
    """One DTLS association whose handshake has verified."""

    @property
    def association_id(self) -> str:
        """Opaque, random, never reused."""

    @property
    def address(self) -> str:
        """The peer's host, as limits and logs name it."""

    @property
    def proof(self) -> Proof: ...

    @property
    def alive(self) -> bool: ...

    @property
    def room(self) -> int:
        """Bytes of the largest datagram that `send` takes: what is left of the path's MTU after DTLS and UDP."""

    def keep(self) -> None:
        """Say that it is somebody's. Until then it may have to give way to a newcomer's handshake (`ended` tells)."""

    def send(self, datagram: bytes) -> None:
        """Encrypt and send; after the end it does nothing. Never waits: a full socket loses it, as the network may."""

    def close(self) -> None:
        """Send close_notify and forget the peer. `Application.ended` is not called for what one ends oneself."""

    def abort(self) -> None:
        """Forget the peer without a word."""


class Application(Protocol):
    """What a protocol gives to the shell. All calls come from the event loop's thread."""

    async def psk(self, identity: bytes, address: str) -> PskKey:
        """The key of an identity, known or not. Raises registry.errors.Unavailable: the handshake is given up."""

    def established(self, association: Association) -> None:
        """A handshake has verified; datagrams follow. Admission is the application's, before it answers any."""

    def received(self, association: Association, datagram: bytes) -> None:
        """One decrypted datagram. Must not raise, and must not wait."""

    def ended(self, association: Association, reason: str) -> None:
        """The peer closed, was silent too long, came back with a new handshake, gave way, or broke the protocol."""
