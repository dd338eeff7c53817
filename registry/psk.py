"""Pre-shared keys: their identities, their lengths, and how they rest.

A PSK must be recoverable, because DTLS needs the key itself and not a proof of it; it rests sealed under the key ring,
bound to its tenant, its credential and its version (sealing.py). Its identity is no secret: it is sent in the clear and
is what the key is found by, over all tenants, because a DTLS peer names no tenant (RFC 4279 §5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.model import CredentialId
from registry.secrets import Secret


@dataclass(frozen=True, slots=True)
class PskAssignment:
    """A PSK that the operator chooses; what is None is generated.

    `identity`: 1–32 printable ASCII characters without spaces, not beginning with `claim-` (those are templates').
    `key`: exactly 32 bytes; 16 where the device's profile allows short keys.
    """

    identity: str | None = None
    key: Secret[bytes] | None = None


@dataclass(frozen=True, slots=True)
class IssuedPsk:
    """A PSK, shown once."""

    credential_id: CredentialId
    identity: str
    key: Secret[bytes]
