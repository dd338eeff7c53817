"""The two provisioning contracts as JSON objects, for transports that carry them in messages (CONTRACT §3, §4).

    {"provision_key", "device_name", "hardware_id", "nonce"?, "csr"?}   the key claim of seed 001
    {"token", "csr"}                                                    the registration token of seed 004
        ─► the core ─► Provisioned: the fields of the HTTP answer | RegistryError       (`provision`, CoAP)
                       {"status": "ok", …those fields} | {"status": "error", "code", "message", …}  (`answer`, MQTT)

Which contract it is, the fields tell. Unknown, disabled, used, expired and revoked keys and tokens get one error, the
core's (registry/errors.py, `Refused`). The form is judged first and for everybody alike.

Nothing here has a state of its own. HTTP has the same fields in its own typed models, for its document of operations.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Final, assert_never

import msgspec
from msgspec import Meta

from adapters.cbor import decode_cbor
from registry.core import Registry
from registry.credentials import IssuedApiKey, IssuedCredential
from registry.errors import InvalidArgument, Refused, RegistryError
from registry.events import EventKind
from registry.key_claim import ClaimRequest
from registry.model import Contact, CredentialKind, TemplateId
from registry.payloads import PayloadTooLarge
from registry.ports import IssuedCertificate
from registry.psk import IssuedPsk
from registry.secrets import Secret

MAX_REQUEST_BYTES: Final = 32_768
"""A CSR of 16 KiB and the texts beside it."""
_MAX_MESSAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where another protocol of this server listens, as devices call it."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Provisioned:
    """The answer to a good request: JSON types and times. `created`: a device or a credential was made by it."""

    created: bool
    fields: Mapping[str, Any] = field(repr=False)


@dataclass(slots=True)
class Provisioning:
    """Answers provisioning requests. `mqtt` and `coap` are told to devices that come with a token; they may be set
    when the port is known."""

    registry: Registry
    mqtt: Endpoint
    coap: Endpoint

    async def answer(self, request: bytes, contact: Contact) -> Mapping[str, Any]:
        """The answer to one request: JSON types and times, to be encoded by msgspec. Never raises a RegistryError."""
        try:
            return {"status": "ok", **(await self.provision(request, contact)).fields}
        except RegistryError as error:
            return error_answer(error, contact.correlation_id)

    async def provision(
        self,
        request: bytes,
        contact: Contact,
        *,
        cbor: bool = False,
        proven_template: TemplateId | None = None,
    ) -> Provisioned:
        """Do what one request asks. Raises RegistryErrors: InvalidArgument, Refused, FailedPrecondition, Unavailable.

        `proven_template` is the one whose claim PSK the peer has proved: its key and no other is taken then, and no
        token.
        """
        asked = _read(request, cbor=cbor)
        match asked:
            case _Claim():
                return await self._claim(asked, contact, proven_template)
            case _Redemption():
                if proven_template is not None:
                    raise self._refuse("a registration token on a claim PSK's association", proven_template, contact)
                return Provisioned(True, await self._redeem(asked, contact))
            case _:
                assert_never(asked)

    async def _claim(self, asked: _Claim, contact: Contact, proven_template: TemplateId | None) -> Provisioned:
        claimed = await self.registry.key_claim.claim(
            ClaimRequest(
                provision_key=Secret(asked.provision_key),
                device_name=asked.device_name,
                hardware_id=asked.hardware_id,
                nonce=asked.nonce,
                csr=None if asked.csr is None else asked.csr.encode(),
                proven_template=proven_template,
            ),
            contact,
        )
        told = {
            "device_id": claimed.device_id,
            "api_key": "",
            "credential_type": claimed.credential_type,
            **issued_fields(claimed.issued),
        }
        return Provisioned(claimed.created, told)

    def _refuse(self, reason: str, template_id: TemplateId, contact: Contact) -> Refused:
        self.registry.refusals.note(
            tenant_id=None,
            device_id=None,
            kind=EventKind.PROVISIONING_REFUSED,
            reason=reason,
            contact=contact,
            detail={"template_id": template_id},
        )
        return Refused(reason)

    async def _redeem(self, asked: _Redemption, contact: Contact) -> Mapping[str, Any]:
        done = await self.registry.registration_tokens.provision(Secret(asked.token), asked.csr.encode(), contact)
        return {
            "device_id": done.device_id,
            "credential_type": CredentialKind.X509,
            **issued_fields(done.issued),
            "not_before": _utc(done.issued.not_before),
            "mqtt": {"host": self.mqtt.host, "port": self.mqtt.port},
            "coap": {"host": self.coap.host, "port": self.coap.port},
        }


def error_answer(error: RegistryError, correlation_id: str) -> Mapping[str, Any]:
    """An error as these transports tell it; `correlation_id` finds the exact reason in the log."""
    told: dict[str, Any] = {
        "status": "error",
        "code": error.code.value,
        "message": error.message,
        "correlation_id": correlation_id,
    }
    if error.retry_after is not None:
        told["retry_after"] = error.retry_after
    return told


def issued_fields(issued: IssuedCredential | None) -> Mapping[str, Any]:
    """The secret fields of a fresh credential, as HTTP names them; none for none."""
    match issued:
        case None:
            return {}
        case IssuedApiKey():
            return {"credential_id": issued.credential_id, "api_key": issued.api_key.reveal()}
        case IssuedPsk():
            key = base64.urlsafe_b64encode(issued.key.reveal()).rstrip(b"=").decode()
            return {"credential_id": issued.credential_id, "psk": {"identity": issued.identity, "key": key}}
        case IssuedCertificate():
            return {
                "credential_id": issued.credential_id,
                "certificate": issued.certificate_pem.decode("ascii"),
                "ca_chain": issued.chain_pem.decode("ascii"),
                "fingerprint": issued.fingerprint,
                "not_after": _utc(issued.not_after),
                "renew_after": _utc(issued.renew_after),
            }
        case _:
            assert_never(issued)


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"


_Csr = Annotated[str, Meta(min_length=1, max_length=16_384)]


class _Claim(_Request, frozen=True, kw_only=True):
    provision_key: Annotated[str, Meta(min_length=1)]
    device_name: Annotated[str, Meta(min_length=1, max_length=256)]
    hardware_id: Annotated[str, Meta(pattern="^[!-~]{1,128}$")]
    nonce: Annotated[str, Meta(pattern="^[ -~]{16,128}$")] | None = None
    csr: _Csr | None = None


class _Redemption(_Request, frozen=True, kw_only=True):
    token: Annotated[str, Meta(min_length=1, max_length=256)]
    csr: _Csr


_CLAIM: Final = msgspec.json.Decoder(_Claim)
_REDEMPTION: Final = msgspec.json.Decoder(_Redemption)


def _read(request: bytes, *, cbor: bool) -> _Claim | _Redemption:
    if len(request) > MAX_REQUEST_BYTES:
        raise PayloadTooLarge(
            f"the request has {len(request)} bytes; allowed are up to {MAX_REQUEST_BYTES}", limit=MAX_REQUEST_BYTES
        )
    try:
        if cbor:
            value = decode_cbor(request)
            if isinstance(value, dict) and "token" in value:
                return msgspec.convert(value, _Redemption)
            return msgspec.convert(value, _Claim)
        members = msgspec.json.decode(request, type=dict[str, msgspec.Raw])
        return _REDEMPTION.decode(request) if "token" in members else _CLAIM.decode(request)
    except UnicodeDecodeError:
        raise InvalidArgument("the request is no UTF-8") from None
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the request is refused: {str(error)[:_MAX_MESSAGE]}") from None
    except (msgspec.DecodeError, RecursionError):
        raise InvalidArgument("the request is no JSON object") from None


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)
