"""Pre-shared keys: their identities, their lengths, and how they rest.

A PSK must be recoverable, because DTLS needs the key itself and not a proof of it; it rests sealed under the key ring,
bound to its tenant, its credential and its version (sealing.py). Its identity is no secret: it is sent in the clear and
is what the key is found by, over all tenants, because a DTLS peer names no tenant (RFC 4279 §5.1).
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

from registry.errors import InvalidArgument
from registry.fields import shown
from registry.model import CredentialId, TenantId
from registry.sealing import SealContext
from registry.secrets import SECRET_BYTES, RandomBytes, Secret

CLAIM_PREFIX: Final = "claim-"
"""Identities of templates' claim PSKs begin with this (CONTRACT §4); no device's may."""

KEY_BYTES: Final = SECRET_BYTES
SHORT_KEY_BYTES: Final = 16
_IDENTITY = re.compile(r"[\x21-\x7e]{1,32}")
_IDENTITY_BYTES: Final = 10
"""80 random bits, 16 characters: unique for ever, and short, because every handshake carries them."""


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


def new_identity(random: RandomBytes) -> str:
    """A generated identity: 16 characters of a–z and 2–7."""
    return base64.b32encode(random(_IDENTITY_BYTES)).decode().lower()


def checked_identity(identity: str) -> str:
    """`identity`, if a device may have it. Raises InvalidArgument."""
    if _IDENTITY.fullmatch(identity) is None:
        raise InvalidArgument(
            f"identity {shown(identity)} is not accepted: it takes 1 to 32 printable ASCII characters without spaces",
            field="identity",
        )
    if identity.startswith(CLAIM_PREFIX):
        raise InvalidArgument(
            f"identity {shown(identity)} is not accepted: those beginning with {CLAIM_PREFIX} are templates'",
            field="identity",
        )
    return identity


def checked_key(key: Secret[bytes], *, allow_short: bool) -> Secret[bytes]:
    """`key`, if it has an allowed length. Raises InvalidArgument, which says the length and nothing else."""
    length = len(key.reveal())
    if length == KEY_BYTES or (allow_short and length == SHORT_KEY_BYTES):
        return key
    allowed = f"{KEY_BYTES} or {SHORT_KEY_BYTES}" if allow_short else f"exactly {KEY_BYTES}"
    raise InvalidArgument(f"key has {length} bytes; {allowed} are allowed", field="key")


def seal_context(tenant_id: TenantId, credential_id: CredentialId, version: int) -> SealContext:
    """What a device's PSK is bound to."""
    return SealContext("psk", str(tenant_id), str(credential_id), version)
