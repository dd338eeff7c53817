"""The seam between an association and whoever does its handshake.

Two do: OpenSSL for certificates and for ECDHE with a PSK (openssl_handshake.py), and we ourselves for plain PSK, in
which there is no asymmetric cryptography (psk_handshake.py). The association (engine.py) bounds what reaches them,
keeps what comes while a key is awaited, and goes on alone when one has verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from adapters.dtls.ports import Proof, PskKey
from adapters.dtls.protection import Protection
from adapters.dtls.records import ClientHello, Record


class End(StrEnum):
    """Why an association, or the handshake that should have become one, has ended."""

    CLOSED_BY_PEER = "closed by the peer"
    ABORTED_BY_PEER = "aborted by the peer"
    HANDSHAKE_FAILED = "the handshake failed"
    HANDSHAKE_OVERSIZED = "the handshake was too large"
    WRONG_KEY = "the key did not verify"
    CERTIFICATE = "the certificate is not one for this"
    KEY_UNAVAILABLE = "no key could be had"


class IdentityNeeded(msgspec.Struct, frozen=True, gc=False):
    """Call `key` with what the application gives for this identity; until then the peer's datagrams wait."""

    identity: bytes


class Verified(msgspec.Struct, frozen=True):
    """The handshake has verified: what was proved, and the protection of what follows.

    `fragment`: the most bytes that one record to the peer may carry, where it has asked for a limit (RFC 6066 §4).
    """

    proof: Proof
    protection: Protection
    fragment: int | None


Outcome = IdentityNeeded | Verified | End | None
"""What a step has brought; None: it goes on."""


class Handshake(Protocol):
    """One handshake of the server's side. What it wants sent it appends to the list of datagrams that it was given.

    Nothing raises, whatever comes. After IdentityNeeded the next call is `key`; after Verified or End there is none.
    """

    mtu: int
    """Bytes of the largest datagram that it makes now; may shrink when a flight is lost."""

    def start(self, hello: ClientHello) -> Outcome:
        """Answer the ClientHello, whose cookie is good, with the first flight."""

    def repeat(self) -> None:
        """The ClientHello has come again: perhaps the first flight has not arrived (RFC 6347 §4.2.4)."""

    def receive(self, datagram: bytes, records: Sequence[Record]) -> Outcome:
        """Take one datagram, which consists of these records."""

    def key(self, key: PskKey | None) -> Outcome:
        """The answer to IdentityNeeded; None when there can be none."""

    def retransmission_due(self) -> float | None:
        """Seconds until `retransmit` has something to do; None while no flight waits for an answer."""

    def retransmit(self) -> Outcome:
        """Send the last flight again; called when it is due (RFC 6347 §4.2.4)."""
