"""Devices' certificates over HTTP: register one of any CA, list, revoke by fingerprint (seed 003).

A certificate is registered by its PEM, as JSON or as the file itself; only the SHA-256 of its DER, its dates and what
an operator may read of it are kept. Registering one for a device of another credential type changes the type to x509:
what the device had stays valid through the overlap of a rotation, so that a device has one active type and nobody is
locked out. Our own certificates are listed beside the foreign ones and revoked in the same way.

A fingerprint is written as 64 hexadecimal digits, in any case, with or without the colons that openssl puts between.
What is none names nothing, and is NOT_FOUND.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType

from adapters.http.api_request import ApiRequest, answer
from adapters.http.bodies import JSON, decode, media_type
from adapters.http.devices import device_id_in
from adapters.http.models import (
    Answer,
    PageQuery,
    ReceiptBody,
    Request,
    given,
    receipt_body,
    utc,
    utc_or_none,
)
from adapters.http.operations import Media, Operation, Reply, operation
from certs.crl import RevocationReason
from registry.credentials import MAX_OVERLAP_SECONDS
from registry.errors import NotFound
from registry.model import Credential, CredentialKind, DeviceId

PEM_FILE: Final = "application/x-pem-file"
MAX_PEM: Final = 65_536
"""Characters. A certificate of RSA-4096 with long names takes 4 KB; the text that `openssl x509 -text` adds as much."""

_FINGERPRINT: Final = re.compile(r"[0-9A-Fa-f]{64}|[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){31}")


class CertificateRegistration(Request, frozen=True, kw_only=True):
    """A certificate of any CA, or a self-signed one."""

    certificate: Annotated[str, Meta(min_length=1, max_length=MAX_PEM, description="PEM, exactly one, without a key")]
    overlap_seconds: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_OVERLAP_SECONDS,
                description="For a device of another credential type: how long what it has stays valid",
            ),
        ]
        | None
    ) = None


class CertificateBody(Answer, frozen=True, kw_only=True):
    """A device's certificate. `origin` is `issued` for our own and `foreign` for others."""

    credential_id: UUID
    device_id: UUID
    fingerprint: Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="SHA-256 of the DER")]
    subject: str
    issuer: str | None
    serial: str
    origin: str
    not_before: datetime | None
    not_after: datetime | None
    renew_after: str | None
    superseded_by: UUID | None
    revoked_at: datetime | None
    revoked_reason: str | None
    created_at: datetime
    first_used_at: datetime | None


class CertificatesBody(Answer, frozen=True, kw_only=True):
    """A page of certificates, oldest first, revoked ones included."""

    certificates: list[CertificateBody]
    next_cursor: str | None


class CertificateQuery(PageQuery, frozen=True, kw_only=True):
    """Whose certificates; all of the tenant's if nobody is named."""

    device_id: UUID | UnsetType = UNSET


class RevocationQuery(Request, frozen=True, kw_only=True):
    """Why, in the words of a revocation list (RFC 5280 §5.3.1)."""

    reason: RevocationReason | UnsetType = UNSET


def certificate_body(credential: Credential) -> CertificateBody:
    """A certificate as it is shown."""
    detail = credential.detail
    return CertificateBody(
        credential_id=credential.credential_id,
        device_id=credential.device_id,
        fingerprint=credential.fingerprint or "",
        subject=str(detail.get("subject", "")),
        issuer=_text(detail.get("issuer")),
        serial=str(detail.get("serial", "")),
        origin=str(detail.get("origin", "foreign")),
        not_before=utc_or_none(credential.not_before),
        not_after=utc_or_none(credential.expires_at),
        renew_after=_text(detail.get("renew_after")),
        superseded_by=credential.superseded_by,
        revoked_at=utc_or_none(credential.revoked_at),
        revoked_reason=credential.revoked_reason,
        created_at=utc(credential.created_at),
        first_used_at=utc_or_none(credential.first_used_at),
    )


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/certs",
        "RegisterDeviceCert",
        "Let a device in with a certificate of any CA",
        "Certificates",
        {201: Reply("The certificate is registered", CertificateBody)},
        body=CertificateRegistration,
        other_bodies=(Media(PEM_FILE, {"type": "string"}),),
        refusals=(409,),
        description="Only the fingerprint and the dates are kept. One that has expired, or that this server issued "
        "itself, is INVALID_ARGUMENT; one that is registered already, ALREADY_EXISTS.",
    )
)
async def register_certificate(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/certs"""
    key = device_id_in(device_id)
    media = media_type(request.scope["headers"], (JSON, PEM_FILE.encode()))
    raw = await request.body()
    seconds = None
    if media == JSON:
        wanted = decode(raw, CertificateRegistration)
        raw, seconds = wanted.certificate.encode(), wanted.overlap_seconds
    if seconds is None:
        seconds = request.service.settings.rotation_overlap_seconds
    operator = request.operator
    made = await request.registry.foreign_certificates.register(
        operator.tenant_id, key, raw, operator.actor, overlap=timedelta(seconds=seconds)
    )
    return answer(201, certificate_body(made))


@operation(
    Operation(
        "GET",
        "/devices/certs",
        "ListDeviceCerts",
        "List certificates, of one device or of all",
        "Certificates",
        {200: Reply("A page of certificates", CertificatesBody)},
        query=CertificateQuery,
        refusals=(404,),
    )
)
async def list_certificates(request: ApiRequest) -> Response[bytes]:
    """GET /devices/certs"""
    query = request.asked(CertificateQuery)
    device_id = given(query.device_id)
    found = await request.registry.credentials.list(
        request.operator.tenant_id,
        None if device_id is None else DeviceId(device_id),
        query.page(),
        kind=CredentialKind.X509,
    )
    bodies = [certificate_body(c) for c in found.items]
    return answer(200, CertificatesBody(certificates=bodies, next_cursor=found.next_cursor))


@operation(
    Operation(
        "DELETE",
        "/devices/certs/{fingerprint}",
        "RevokeDeviceCert",
        "End a certificate now, with the sessions that it opened",
        "Certificates",
        {200: Reply("What ended", ReceiptBody)},
        query=RevocationQuery,
        description="One of our own is in the next revocation list. Revoking again answers the first `revoked_at` and "
        "no sessions.",
    )
)
async def revoke_certificate(request: ApiRequest, fingerprint: FromPath[str]) -> Response[bytes]:
    """DELETE /devices/certs/{fingerprint}"""
    if _FINGERPRINT.fullmatch(fingerprint) is None:
        raise NotFound("no certificate with this fingerprint is registered in this tenant")
    reason = given(request.asked(RevocationQuery).reason)
    operator = request.operator
    receipt = await request.registry.credentials.revoke_by_fingerprint(
        operator.tenant_id,
        fingerprint.replace(":", ""),
        operator.actor,
        *(() if reason is None else (reason.value,)),
    )
    return answer(200, receipt_body(receipt))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


ROUTES: Final = (register_certificate, list_certificates, revoke_certificate)
