"""The key claim over HTTP, as seed 001 tells it: `POST /api/v1/provision`.

201 for the claim that made the device, 200 for every later one with the same hardware_id (`api_key: ""`: keep using the
key that you were given). Invalid, disabled, expired, used, over quota, or a hardware_id outside the pattern: the same
403. The form of the body is judged first, for everybody alike, and tells nothing about any key. Attempts are counted
per address.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType

from adapters.http.api_request import ApiRequest, answer
from adapters.http.models import Answer, CsrText, HardwareIdText, Name, Psk, Request, issued_parts
from adapters.http.operations import Operation, Reply, operation
from registry.key_claim import ClaimRequest
from registry.model import CredentialKind
from registry.secrets import Secret


class Claim(Request, frozen=True, kw_only=True):
    """What a device sends. `nonce` is its own: who repeats it before the first use of the key gets the same key."""

    provision_key: Annotated[str, Meta(min_length=1)]
    device_name: Name
    hardware_id: HardwareIdText
    nonce: Annotated[str, Meta(pattern="^[ -~]{16,128}$")] | None = None
    csr: CsrText | None = None
    """For templates of type x509."""

    def __repr__(self) -> str:
        return "Claim(…)"


class ClaimAnswer(Answer, frozen=True, kw_only=True):
    """The device's id and its credential. An empty `api_key` says: keep using the credential that you have."""

    device_id: UUID
    api_key: str
    credential_type: CredentialKind
    credential_id: UUID | UnsetType = UNSET
    psk: Psk | UnsetType = UNSET
    certificate: str | UnsetType = UNSET
    ca_chain: str | UnsetType = UNSET
    fingerprint: str | UnsetType = UNSET
    not_after: datetime | UnsetType = UNSET
    renew_after: datetime | UnsetType = UNSET


@operation(
    Operation(
        "POST",
        "/provision",
        "Provision",
        "Claim a device's identity with a provisioning key",
        "Provisioning",
        {
            201: Reply(
                "A new device and its credential",
                ClaimAnswer,
                {
                    "device_id": "8f1c0b7e-3d2a-4f56-9a10-2c4e6f8b1d33",
                    "api_key": "sk_live_Zr8K2mQx...redacted...",
                    "credential_type": "api_key",
                },
            ),
            200: Reply(
                "The device was claimed before; an empty api_key says that its credential stays",
                ClaimAnswer,
                {
                    "device_id": "8f1c0b7e-3d2a-4f56-9a10-2c4e6f8b1d33",
                    "api_key": "",
                    "credential_type": "api_key",
                },
            ),
        },
        body=Claim,
        body_example={
            "provision_key": "pk_factory_7Qx2mZr8K...redacted...",
            "device_name": "Cold Store Sensor 014",
            "hardware_id": "AA:BB:CC:00:11:22",
        },
        refusals=(403,),
        description="Every refusal of a key is the same PERMISSION_DENIED.",
    )
)
async def provision(request: ApiRequest) -> Response[bytes]:
    """POST /provision"""
    claim = await request.decoded(Claim)
    claimed = await request.registry.key_claim.claim(
        ClaimRequest(
            provision_key=Secret(claim.provision_key),
            device_name=claim.device_name,
            hardware_id=claim.hardware_id,
            nonce=claim.nonce,
            csr=None if claim.csr is None else claim.csr.encode(),
        ),
        request.contact,
    )
    parts = {"api_key": ""} | dict(issued_parts(claimed.issued))
    body = ClaimAnswer(device_id=claimed.device_id, credential_type=claimed.credential_type, **parts)
    return answer(201 if claimed.created else 200, body)


ROUTES: Final = (provision,)
