"""Who is asking: one credential per request, read from its headers or its TLS connection.

    Authorization: Bearer sk_live_…  ┐
    X-API-Key: sk_live_…             ├─► DeviceEvidence ─► resolver ─► session (device_sessions.py)
    the connection's certificate     ┘
    Authorization: Bearer <JWT>      ──► OperatorToken  ─► verifier ─► tenant ─► Operator

A header is this request's credential, a client certificate the connection's: it counts only where no header names
another. Two headers are ambiguous and refused, because two readers would pick two. A device's key on a connection whose
certificate is another device's is refused, too (device_sessions.py); a certificate that nobody registered, or that has
ended, says nothing and is not in a key's way. Without a header such a certificate is a credential that fails. EST has
doors of its own: HTTP Basic (`enrolment_secret`), and the certificate that is to be renewed.

Every failure is the same 401; its reason goes to the log under the correlation id. A credential of the wrong kind for a
route is first checked: who is nobody gets 401, who is known and wrong here gets 403.

Nothing here has state of its own.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Final, NoReturn

from adapters.http.allowances import Allowances
from registry import secrets
from registry.core import Registry
from registry.errors import NotFound, PermissionDenied, Unauthenticated
from registry.events import EventKind
from registry.model import Actor, ApiKey, ClientCertificate, Contact, RenewalRight, TenantId
from registry.operators import OperatorPrincipal
from registry.permissions import Permission, require
from registry.secrets import Secret, SecretKind

CREDENTIAL_HEADERS: Final = frozenset({b"authorization", b"x-api-key"})
"""The headers that name a credential."""

_DEVICE_PREFIX = SecretKind.API_KEY.value.encode()
_NO_CREDENTIAL = "no credential"


@dataclass(frozen=True, slots=True)
class DeviceEvidence:
    """A device's credential as it was presented. `digest` tells it from others on the same connection."""

    digest: bytes
    evidence: ApiKey | ClientCertificate


@dataclass(frozen=True, slots=True)
class OperatorToken:
    """A bearer token that is no device's key."""

    text: Secret[str]


Presented = DeviceEvidence | OperatorToken


@dataclass(frozen=True, slots=True)
class Operator:
    """An authenticated operator, in the one tenant that its token names."""

    tenant_id: TenantId
    actor: Actor
    expires_at: datetime
    """When the token ends, and with it every stream that it opened."""


def presented(headers: Iterable[tuple[bytes, bytes]], certificate_der: bytes | None) -> Presented | None:
    """The request's one credential, or None. `headers` have lower-case names. Raises Unauthenticated for several."""
    found: Presented | None = None
    for name, value in headers:
        if name == b"authorization":
            credential = _bearer(value)
        elif name == b"x-api-key":
            credential = _device_key(value.strip())
        else:
            continue
        if found is not None:
            raise Unauthenticated("more than one credential in one request")
        found = credential
    if found is None and certificate_der is not None:
        return DeviceEvidence(sha256(certificate_der).digest(), ClientCertificate(certificate_der))
    return found


def enrolment_secret(headers: Iterable[tuple[bytes, bytes]]) -> Secret[str]:
    """The password of HTTP Basic (RFC 7617 §2). Raises Unauthenticated where there is none."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        raise Unauthenticated(_NO_CREDENTIAL if not values else "more than one credential in one request")
    scheme, _, encoded = values[0].partition(b" ")
    if scheme.lower() != b"basic":
        raise Unauthenticated("the Authorization scheme is not Basic")
    try:
        pair = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:  # binascii.Error and UnicodeDecodeError are such
        raise Unauthenticated("malformed Basic credentials") from None
    _, colon, password = pair.partition(":")
    if not colon:
        raise Unauthenticated("malformed Basic credentials")
    return Secret(password)


class Authentication:
    """Decides whether a request may go on to its operation."""

    def __init__(self, registry: Registry, allowances: Allowances) -> None:
        self._registry = registry
        self._allowances = allowances

    async def operator(self, credential: Presented | None, needed: Permission, contact: Contact) -> Operator:
        """The operator behind a credential. Raises Unauthenticated, PermissionDenied, ResourceExhausted."""
        if credential is None:
            self.refuse(_NO_CREDENTIAL, contact)
        if isinstance(credential, DeviceEvidence):
            self.spend_look_up(credential.evidence, contact)
            identity = await self._registry.resolver.admit(credential.evidence, contact)
            now = asyncio.get_running_loop().time()
            self._allowances.spend(identity.tenant_id, identity.credential_id, now)
            raise PermissionDenied("this is an operation for operators; the credential is a device's")
        return await self._operator(credential, needed, contact)

    async def device_evidence(self, credential: Presented | None, contact: Contact) -> DeviceEvidence:
        """The device's evidence, still to be resolved. Raises as `operator`."""
        if credential is None:
            self.refuse(_NO_CREDENTIAL, contact)
        if isinstance(credential, OperatorToken):
            operator, _ = await self._verify(credential, contact)
            self._spend(operator)
            raise PermissionDenied("this is an operation for devices; the credential is an operator's")
        return credential

    async def renewal_right(self, certificate_der: bytes | None, contact: Contact) -> RenewalRight:
        """What the connection's certificate may ask for. Raises Unauthenticated, Unavailable."""
        if certificate_der is None:
            self.refuse(_NO_CREDENTIAL, contact)
        evidence = ClientCertificate(certificate_der)
        self.spend_look_up(evidence, contact)
        return await self._registry.resolver.admit_for_renewal(evidence, contact)

    def spend_look_up(self, evidence: ApiKey | ClientCertificate, contact: Contact) -> None:
        """Before a credential is looked up. Raises ResourceExhausted if its address has failed too often."""
        if not self._registry.resolver.remembers(evidence):
            self._allowances.spend_look_up(contact.peer)

    def refuse(self, reason: str, contact: Contact) -> NoReturn:
        """Keep the reason for the operator and raise what everybody sees."""
        self._registry.refusals.note(
            tenant_id=None, device_id=None, kind=EventKind.AUTH_REFUSED, reason=reason, contact=contact, detail={}
        )
        raise Unauthenticated(reason)

    async def _operator(self, token: OperatorToken, needed: Permission, contact: Contact) -> Operator:
        operator, caller = await self._verify(token, contact)
        self._spend(operator)
        require(caller, needed)
        return operator

    def _spend(self, operator: Operator) -> None:
        now = asyncio.get_running_loop().time()
        self._allowances.spend_operator(operator.tenant_id, operator.actor.name, now)

    async def _verify(self, token: OperatorToken, contact: Contact) -> tuple[Operator, OperatorPrincipal]:
        registry = self._registry
        try:
            principal = registry.operators.verify(token.text.reveal(), registry.clock())
        except Unauthenticated as refused:
            self.refuse(refused.reason, contact)
        try:
            tenant = await registry.tenants.find(principal.tenant_claim)
        except NotFound:
            self.refuse("operator token of an unknown tenant", contact)
        actor = Actor(f"operator:{principal.subject}", contact.correlation_id)
        return Operator(tenant.tenant_id, actor, principal.expires_at), principal


def _bearer(value: bytes) -> Presented:
    # RFC 9110 §11.1: the scheme is case-insensitive; RFC 6750 §2.1: Bearer, then the token.
    scheme, _, text = value.partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated("the Authorization scheme is not Bearer")
    text = text.strip()
    if text.startswith(_DEVICE_PREFIX):
        return _device_key(text)
    return OperatorToken(Secret(text.decode("latin-1")))


def _device_key(text: bytes) -> DeviceEvidence:
    digest = secrets.digest(text.decode("latin-1"))
    return DeviceEvidence(digest, ApiKey(digest))
