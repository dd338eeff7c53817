"""What several resources share on the wire: texts with their bounds, pages, credentials, receipts.

Requests forbid unknown fields; what a client may leave out has a default. Answers list every field, `null` where there
is nothing; a field is absent only where it is a secret that is shown once. The core checks everything again
(registry/fields.py): the bounds here are for the document and for an early, clear answer.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar, assert_never
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from registry.credentials import IssuedApiKey, IssuedCredential
from registry.errors import InvalidArgument
from registry.model import CredentialKind, Json, NodeId, Receipt, SessionId, Transport
from registry.paging import DEFAULT_LIMIT, MAX_CURSOR, MAX_LIMIT, Page
from registry.ports import IssuedCertificate
from registry.psk import IssuedPsk, PskAssignment
from registry.secrets import Secret

T = TypeVar("T")

Name = Annotated[str, Meta(min_length=1, max_length=256)]
HardwareIdText = Annotated[
    str,
    Meta(
        pattern="^[!-~]{1,128}$", description="1 to 128 printable ASCII characters without spaces; a tenant's only one"
    ),
]
ProfileIdText = Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,64}$")]
GroupNames = Annotated[list[Annotated[str, Meta(min_length=1, max_length=128)]], Meta(max_length=64)]
Tags = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=128)], Annotated[str, Meta(max_length=1024)]],
    Meta(max_length=64, description="Key/value tags; a key has no `=`"),
]
Document = Annotated[dict[str, Json], Meta(description="A JSON object of at most 32 KiB and 32 levels")]
Instant = Annotated[datetime, Meta(tz=True, description="RFC 3339 with its offset from UTC")]
CsrText = Annotated[
    str, Meta(min_length=1, max_length=16_384, description="PKCS#10 in PEM, for a key that the device has made itself")
]
Base64Url = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{0,86}={0,2}$", description="base64url, padding optional")]

_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*={0,2}")


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body or a query that somebody sends."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A body that we send."""


class PageQuery(Request, frozen=True, kw_only=True):
    """Which part of a list."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT, description="Items of the page")] = DEFAULT_LIMIT
    cursor: (
        Annotated[str, Meta(max_length=MAX_CURSOR, description="`next_cursor` of the page before; of the same list")]
        | UnsetType
    ) = UNSET

    def page(self) -> Page:
        """What the core is asked for."""
        return Page(self.limit, given(self.cursor))


class PskChoice(Request, frozen=True, kw_only=True):
    """A PSK that the operator chooses; what is left out is generated."""

    identity: Annotated[str, Meta(pattern="^[!-~]{1,32}$")] | None = None
    key: Base64Url | None = None

    def assignment(self) -> PskAssignment:
        """As the core takes it. Raises InvalidArgument."""
        return PskAssignment(self.identity, None if self.key is None else Secret(from_base64url(self.key, "key")))


class Psk(Answer, frozen=True, kw_only=True):
    """A pre-shared key, shown once; `key` in base64url without padding."""

    identity: str
    key: str


class Issued(Answer, frozen=True, kw_only=True):
    """The secret parts of a fresh credential. Only those of its type are present, and they are never shown again."""

    credential_id: UUID | UnsetType = UNSET
    api_key: Annotated[str, Meta(examples=["sk_live_Zr8K2mQx..."])] | UnsetType = UNSET
    psk: Psk | UnsetType = UNSET
    certificate: str | UnsetType = UNSET
    ca_chain: str | UnsetType = UNSET
    fingerprint: str | UnsetType = UNSET
    not_after: datetime | UnsetType = UNSET
    renew_after: datetime | UnsetType = UNSET


class ClosedSessionLine(Answer, frozen=True, kw_only=True):
    """A session that was closed, and how long after the commit."""

    session_id: SessionId
    transport: Transport
    node_id: NodeId
    closed_after_ms: float


class ReceiptBody(Answer, frozen=True, kw_only=True):
    """What a revocation did. `remaining` counts sessions that no node has confirmed as closed."""

    credential_id: UUID | None
    device_id: UUID | None
    revoked_at: datetime
    sessions: list[ClosedSessionLine]
    remaining: int


def receipt_body(receipt: Receipt) -> ReceiptBody:
    """A receipt as it is shown."""
    return ReceiptBody(
        credential_id=receipt.credential_id,
        device_id=receipt.device_id,
        revoked_at=utc(receipt.revoked_at),
        sessions=[
            ClosedSessionLine(
                session_id=s.session_id,
                transport=s.transport,
                node_id=s.node_id,
                closed_after_ms=s.closed_after_ms,
            )
            for s in receipt.sessions
        ],
        remaining=receipt.remaining,
    )


def issued_parts(issued: IssuedCredential | None) -> Mapping[str, Any]:
    """The fields of `Issued` for a credential; none for none."""
    match issued:
        case None:
            return {}
        case IssuedApiKey():
            return {"credential_id": issued.credential_id, "api_key": issued.api_key.reveal()}
        case IssuedPsk():
            return {"credential_id": issued.credential_id, "psk": psk_body(issued)}
        case IssuedCertificate():
            return {
                "credential_id": issued.credential_id,
                "certificate": issued.certificate_pem.decode("ascii"),
                "ca_chain": issued.chain_pem.decode("ascii"),
                "fingerprint": issued.fingerprint,
                "not_after": utc(issued.not_after),
                "renew_after": utc(issued.renew_after),
            }
        case _:
            assert_never(issued)


def kind_of(issued: IssuedCredential) -> CredentialKind:
    """The type of a fresh credential."""
    match issued:
        case IssuedApiKey():
            return CredentialKind.API_KEY
        case IssuedPsk():
            return CredentialKind.PSK
        case IssuedCertificate():
            return CredentialKind.X509
        case _:
            assert_never(issued)


def psk_body(issued: IssuedPsk) -> Psk:
    """A PSK as it is shown once."""
    return Psk(identity=issued.identity, key=to_base64url(issued.key.reveal()))


def to_base64url(raw: bytes) -> str:
    """RFC 4648 §5, without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def from_base64url(text: str, field: str) -> bytes:
    """The bytes of a base64url text, padded or not. Raises InvalidArgument, which repeats nothing of it."""
    body = text.rstrip("=")
    if _BASE64URL.fullmatch(text) is None or len(body) % 4 == 1 or ("=" in text and len(text) % 4):
        raise InvalidArgument(f"{field} is not base64url (RFC 4648 §5)", field=field)
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (ValueError, binascii.Error):
        raise InvalidArgument(f"{field} is not base64url (RFC 4648 §5)", field=field) from None
    if to_base64url(raw) != body:
        raise InvalidArgument(f"{field} is not canonical base64url: bits beyond its last byte are set", field=field)
    return raw


def given(value: T | UnsetType) -> T | None:
    """A query's parameter, or None where it was left out."""
    return None if isinstance(value, UnsetType) else value


def utc(moment: datetime) -> datetime:
    """A time in UTC, which is shown with a `Z`."""
    return moment.astimezone(UTC)


def utc_or_none(moment: datetime | None) -> datetime | None:
    """As `utc`, where there is a time."""
    return None if moment is None else moment.astimezone(UTC)
