"""Credentials over HTTP: issue, list without secrets, rotate, revoke with a receipt (seed 003)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import Meta

from adapters.http.api_request import ApiRequest, answer
from adapters.http.bodies import uuid_in_path
from adapters.http.devices import device_id_in
from adapters.http.models import (
    Answer,
    CsrText,
    Instant,
    Issued,
    PageQuery,
    Psk,
    PskChoice,
    ReceiptBody,
    Request,
    issued_parts,
    kind_of,
    psk_body,
    receipt_body,
    utc,
    utc_or_none,
)
from adapters.http.operations import Operation, Reply, operation
from registry.credentials import MAX_OVERLAP_SECONDS, RotateRequest
from registry.model import Credential, CredentialId, CredentialKind, Json


class ApiKeyCreation(Request, frozen=True, kw_only=True):
    """An API key to be made."""

    label: Annotated[str, Meta(max_length=128)] = ""
    expires_at: Instant | None = None


class ApiKeyBody(Answer, frozen=True, kw_only=True):
    """A new API key, shown this once."""

    credential_id: UUID
    device_id: UUID
    label: str
    api_key: Annotated[str, Meta(examples=["sk_live_Zr8K2mQx..."])]
    expires_at: datetime | None


class PskBody(Answer, frozen=True, kw_only=True):
    """A new PSK, shown this once."""

    credential_id: UUID
    device_id: UUID
    psk: Psk


class CredentialBody(Answer, frozen=True, kw_only=True):
    """A credential without its secret. `identity` is a PSK's, `fingerprint` a certificate's."""

    credential_id: UUID
    device_id: UUID
    credential_type: CredentialKind
    label: str
    detail: dict[str, Json]
    identity: str | None
    fingerprint: str | None
    not_before: datetime | None
    expires_at: datetime | None
    superseded_by: UUID | None
    retire_on_use: bool
    revoked_at: datetime | None
    revoked_reason: str | None
    created_at: datetime
    first_used_at: datetime | None


class CredentialsBody(Answer, frozen=True, kw_only=True):
    """A page of credentials, oldest first, revoked ones included."""

    credentials: list[CredentialBody]
    next_cursor: str | None


class Rotation(Request, frozen=True, kw_only=True):
    """How to rotate. The old credential stays valid for the overlap, or until the new one is first used."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=MAX_OVERLAP_SECONDS)] | None = None
    credential_type: CredentialKind | None = None
    retire_on_use: bool = False
    csr: CsrText | None = None
    """For, and only for, x509."""


class RotatedBody(Issued, frozen=True, kw_only=True):
    """The new credential, shown this once, and what became of the old ones.

    `retired` were given their end, at the latest at `valid_until`; `receipts` tell of those that ended at once.
    """

    device_id: UUID
    credential_type: CredentialKind
    retired: list[UUID]
    valid_until: datetime | None
    receipts: list[ReceiptBody]


def credential_body(credential: Credential) -> CredentialBody:
    """A credential as it is shown."""
    return CredentialBody(
        credential_id=credential.credential_id,
        device_id=credential.device_id,
        credential_type=credential.kind,
        label=credential.label,
        detail=dict(credential.detail),
        identity=credential.identity,
        fingerprint=credential.fingerprint,
        not_before=utc_or_none(credential.not_before),
        expires_at=utc_or_none(credential.expires_at),
        superseded_by=credential.superseded_by,
        retire_on_use=credential.retire_on_use,
        revoked_at=utc_or_none(credential.revoked_at),
        revoked_reason=credential.revoked_reason,
        created_at=utc(credential.created_at),
        first_used_at=utc_or_none(credential.first_used_at),
    )


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/api-keys",
        "CreateApiKey",
        "Make one more API key for a device",
        "Credentials",
        {201: Reply("The key, shown this once", ApiKeyBody)},
        body=ApiKeyCreation,
        body_required=False,
        body_example={"label": "bench"},
        description="FAILED_PRECONDITION (400) for a device of another credential type.",
    )
)
async def create_api_key(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/api-keys"""
    key = device_id_in(device_id)
    wanted = await request.decoded_or(ApiKeyCreation())
    operator = request.operator
    issued = await request.registry.credentials.issue_api_key(
        operator.tenant_id, key, wanted.label, wanted.expires_at, operator.actor
    )
    return answer(
        201,
        ApiKeyBody(
            credential_id=issued.credential_id,
            device_id=key,
            label=wanted.label,
            api_key=issued.api_key.reveal(),
            expires_at=utc_or_none(issued.expires_at),
        ),
    )


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/psk",
        "CreatePsk",
        "Generate or assign a PSK for a device",
        "Credentials",
        {201: Reply("The PSK, shown this once", PskBody)},
        body=PskChoice,
        body_required=False,
        body_example={"identity": "press-7"},
        refusals=(409,),
        description="FAILED_PRECONDITION (400) for a device of another credential type.",
    )
)
async def create_psk(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/psk"""
    key = device_id_in(device_id)
    assignment = (await request.decoded_or(PskChoice())).assignment()
    operator = request.operator
    issued = await request.registry.credentials.issue_psk(operator.tenant_id, key, assignment, operator.actor)
    return answer(201, PskBody(credential_id=issued.credential_id, device_id=key, psk=psk_body(issued)))


@operation(
    Operation(
        "GET",
        "/devices/{device_id}/credentials",
        "ListCredentials",
        "List a device's credentials, without secrets",
        "Credentials",
        {200: Reply("A page of credentials", CredentialsBody)},
        query=PageQuery,
    )
)
async def list_credentials(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """GET /devices/{device_id}/credentials"""
    page = request.asked(PageQuery).page()
    found = await request.registry.credentials.list(request.operator.tenant_id, device_id_in(device_id), page)
    bodies = [credential_body(c) for c in found.items]
    return answer(200, CredentialsBody(credentials=bodies, next_cursor=found.next_cursor))


@operation(
    Operation(
        "POST",
        "/devices/{device_id}/credentials/rotate",
        "RotateCredential",
        "Issue a fresh credential and retire the old one",
        "Credentials",
        {201: Reply("The new credential, shown this once", RotatedBody)},
        body=Rotation,
        body_required=False,
        body_example={"overlap_seconds": 3600},
        refusals=(409,),
    )
)
async def rotate_credential(request: ApiRequest, device_id: FromPath[str]) -> Response[bytes]:
    """POST /devices/{device_id}/credentials/rotate"""
    key = device_id_in(device_id)
    wanted = await request.decoded_or(Rotation())
    overlap = wanted.overlap_seconds
    how = RotateRequest(
        overlap_seconds=request.service.settings.rotation_overlap_seconds if overlap is None else overlap,
        credential_type=wanted.credential_type,
        retire_on_use=wanted.retire_on_use,
        csr=None if wanted.csr is None else wanted.csr.encode(),
    )
    operator = request.operator
    rotated = await request.registry.credentials.rotate(operator.tenant_id, key, how, operator.actor)
    return answer(
        201,
        RotatedBody(
            device_id=key,
            credential_type=kind_of(rotated.issued),
            retired=list(rotated.retired),
            valid_until=utc_or_none(rotated.valid_until),
            receipts=[receipt_body(r) for r in rotated.receipts],
            **issued_parts(rotated.issued),
        ),
    )


@operation(
    Operation(
        "DELETE",
        "/devices/{device_id}/credentials/{credential_id}",
        "RevokeCredential",
        "End a credential now, with the sessions that it opened",
        "Credentials",
        {200: Reply("What ended", ReceiptBody)},
        description="Revoking again answers the first `revoked_at` and no sessions.",
    )
)
async def revoke_credential(
    request: ApiRequest, device_id: FromPath[str], credential_id: FromPath[str]
) -> Response[bytes]:
    """DELETE /devices/{device_id}/credentials/{credential_id}"""
    operator = request.operator
    receipt = await request.registry.credentials.revoke(
        operator.tenant_id,
        device_id_in(device_id),
        CredentialId(uuid_in_path(credential_id, "credential")),
        operator.actor,
    )
    return answer(200, receipt_body(receipt))


ROUTES: Final = (create_api_key, create_psk, list_credentials, rotate_credential, revoke_credential)
