"""Registration tokens over HTTP (seed 004): an operator names a device, the device comes with a key of its own.

    operator  POST /devices/registration/tokens ─► {token: rt_…, device_id, status: pending}, the token shown once
    device    POST /devices/provision {token, csr} ─► certificate, its chain, when to renew, where MQTT and CoAP are

201 for the request that made the certificate, 200 for every later one with the same token and public key while the
token lives: the same certificate again. Unknown, used, expired and revoked tokens get the same 403, whatever the CSR
beside them is like; with a good token a bad CSR is 400 and the token stays usable. Attempts are counted per address.

Nothing here has state; what races is decided in registry/registration_tokens.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from litestar.params import FromPath
from litestar.response import Response
from msgspec import Meta, field

from adapters.http.api_request import ApiRequest, answer
from adapters.http.bodies import uuid_in_path
from adapters.http.models import (
    Answer,
    CsrText,
    GroupNames,
    HardwareIdText,
    Name,
    PageQuery,
    ProfileIdText,
    ReceiptBody,
    Request,
    Tags,
    receipt_body,
    utc,
)
from adapters.http.operations import Operation, Reply, operation
from registry.model import DeviceStatus
from registry.registration_tokens import MAX_TTL_SECONDS, NewToken, RegistrationToken, TokenStatus
from registry.secrets import Secret


class TokenCreation(Request, frozen=True, kw_only=True):
    """The device that will come. What is left out is inherited from the profile, where it has it."""

    name: Name
    hardware_id: HardwareIdText | None = None
    profile_id: ProfileIdText | None = None
    groups: GroupNames = field(default_factory=list)
    tags: Tags = field(default_factory=dict)
    ttl_seconds: (
        Annotated[int, Meta(ge=1, le=MAX_TTL_SECONDS, description="Life of the token; 24 hours if it is left out")]
        | None
    ) = None


class CreatedTokenBody(Answer, frozen=True, kw_only=True):
    """A token, shown this once, and its device, which waits for it."""

    token_id: UUID
    token: Annotated[str, Meta(examples=["rt_4mTq0..."])]
    device_id: UUID
    status: DeviceStatus
    expires_at: datetime


class TokenBody(Answer, frozen=True, kw_only=True):
    """A token without its text."""

    token_id: UUID
    device_id: UUID
    name: str
    hardware_id: str | None
    profile_id: str | None
    status: TokenStatus
    created_by: str
    created_at: datetime
    expires_at: datetime


class TokensBody(Answer, frozen=True, kw_only=True):
    """A page of tokens that wait for their device, oldest first, those that waited in vain included."""

    tokens: list[TokenBody]
    next_cursor: str | None


class Provisioning(Request, frozen=True, kw_only=True):
    """What a device sends: its token, and a request for a certificate of the key that it has made itself."""

    token: Annotated[str, Meta(min_length=1, max_length=256)]
    csr: CsrText

    def __repr__(self) -> str:
        return "Provisioning(…)"


class EndpointBody(Answer, frozen=True, kw_only=True):
    """Where another protocol of this server listens."""

    host: str
    port: int


class ProvisionedBody(Answer, frozen=True, kw_only=True):
    """A device's identity. `ca_chain` goes from the certificate's issuer to the root; renew from `renew_after` on."""

    device_id: UUID
    credential_id: UUID
    certificate: str
    ca_chain: str
    fingerprint: str
    not_before: datetime
    not_after: datetime
    renew_after: datetime
    mqtt: EndpointBody
    coap: EndpointBody


def token_body(token: RegistrationToken) -> TokenBody:
    """A token as it is shown."""
    return TokenBody(
        token_id=token.token_id,
        device_id=token.device_id,
        name=token.name,
        hardware_id=token.hardware_id,
        profile_id=token.profile_id,
        status=token.status,
        created_by=token.created_by,
        created_at=utc(token.created_at),
        expires_at=utc(token.expires_at),
    )


@operation(
    Operation(
        "POST",
        "/devices/registration/tokens",
        "CreateRegistrationToken",
        "Name a device and make the one-time token that it will come with",
        "Certificates",
        {201: Reply("The token, shown this once", CreatedTokenBody)},
        body=TokenCreation,
        body_example={"name": "Pump 7", "groups": ["hall-2"], "ttl_seconds": 86400},
        refusals=(409,),
        description="Makes the device, too, in status `pending`. A hardware_id that the tenant has already is "
        "ALREADY_EXISTS.",
    )
)
async def create_token(request: ApiRequest) -> Response[bytes]:
    """POST /devices/registration/tokens"""
    wanted = await request.decoded(TokenCreation)
    operator = request.operator
    made = await request.registry.registration_tokens.create(
        operator.tenant_id,
        NewToken(
            name=wanted.name,
            hardware_id=wanted.hardware_id,
            profile_id=wanted.profile_id,
            groups=wanted.groups,
            tags=wanted.tags,
            ttl_seconds=wanted.ttl_seconds,
        ),
        operator.actor,
    )
    return answer(
        201,
        CreatedTokenBody(
            token_id=made.token.token_id,
            token=made.secret.reveal(),
            device_id=made.token.device_id,
            status=made.device.status,
            expires_at=utc(made.token.expires_at),
        ),
    )


@operation(
    Operation(
        "GET",
        "/devices/registration/tokens",
        "ListRegistrationTokens",
        "List the tokens whose devices have not come yet",
        "Certificates",
        {200: Reply("A page of tokens", TokensBody)},
        query=PageQuery,
    )
)
async def list_tokens(request: ApiRequest) -> Response[bytes]:
    """GET /devices/registration/tokens"""
    page = request.asked(PageQuery).page()
    found = await request.registry.registration_tokens.list(request.operator.tenant_id, page)
    return answer(200, TokensBody(tokens=[token_body(t) for t in found.items], next_cursor=found.next_cursor))


@operation(
    Operation(
        "DELETE",
        "/devices/registration/tokens/{token_id}",
        "RevokeRegistrationToken",
        "End a token; a device that never came goes with it",
        "Certificates",
        {200: Reply("What ended; a token opens no sessions", ReceiptBody)},
        description="A certificate that the token was used for stays: revoke it by its fingerprint.",
    )
)
async def revoke_token(request: ApiRequest, token_id: FromPath[str]) -> Response[bytes]:
    """DELETE /devices/registration/tokens/{token_id}"""
    operator = request.operator
    key = uuid_in_path(token_id, "registration token")
    receipt = await request.registry.registration_tokens.revoke(operator.tenant_id, key, operator.actor)
    return answer(200, receipt_body(receipt))


@operation(
    Operation(
        "POST",
        "/devices/provision",
        "ProvisionDevice",
        "Get a certificate with a registration token and a CSR",
        "Provisioning",
        {
            201: Reply("The certificate", ProvisionedBody),
            200: Reply("The same certificate again: an earlier answer was lost", ProvisionedBody),
        },
        body=Provisioning,
        refusals=(403,),
        description="Every refusal of a token is the same PERMISSION_DENIED.",
    )
)
async def provision_device(request: ApiRequest) -> Response[bytes]:
    """POST /devices/provision"""
    asked = await request.decoded(Provisioning)
    done = await request.registry.registration_tokens.provision(
        Secret(asked.token), asked.csr.encode(), request.contact
    )
    settings = request.service.settings
    issued, mqtt, coap = done.issued, settings.mqtt, settings.coap
    body = ProvisionedBody(
        device_id=done.device_id,
        credential_id=issued.credential_id,
        certificate=issued.certificate_pem.decode("ascii"),
        ca_chain=issued.chain_pem.decode("ascii"),
        fingerprint=issued.fingerprint,
        not_before=utc(issued.not_before),
        not_after=utc(issued.not_after),
        renew_after=utc(issued.renew_after),
        mqtt=EndpointBody(host=mqtt.host, port=mqtt.port),
        coap=EndpointBody(host=coap.host, port=coap.port),
    )
    return answer(201 if done.created else 200, body)


ROUTES: Final = (create_token, list_tokens, revoke_token, provision_device)
