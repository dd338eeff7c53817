"""Enrolment over Secure Transport, with CoAP's short names (EST-coaps, RFC 9148), for holders of a certificate.

    GET  /.well-known/est/crts   everybody            the authorities             281, 287   RFC 7030 §4.1
    GET  /.well-known/est/att    everybody            suggested key and signature 285        RFC 7030 §4.5
    POST /.well-known/est/sren   certificate's holder the successor, same subject 281, 287   RFC 7030 §4.2.2
    POST /.well-known/est/sen    certificate's holder the successor, any subject  281, 287   RFC 7030 §4.2.1

Everything is DER, without base64 (RFC 9148 §4.3). Format 281 is PKCS#7 certs-only and the answer where Accept says
nothing; 287 is one certificate alone (§4.3): the issued one, or of the authorities the root. A request is 286, PKCS#10;
PEM is taken, too, as over HTTP.

The certificate of the DTLS handshake decides and nothing else. Its holder gets a successor by the rules of a renewal
(registry/enrolment.py), under either name: what a first enrolment would give it has already, so `sen` differs only in
that its request need not repeat the subject. Who has no certificate yet gets one at `/provision`. A certificate that
expired a few days ago still renews. Keys made by the server (`skg`, `skc`, §4.8) are not served.

State: the authorities as they are sent, for as long as they are the same: anybody may ask for them, and to write them
costs half a millisecond of everybody's time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from aiocoap.numbers.codes import Code

from adapters.coap import formats
from adapters.coap.admission import Claimant, Device, Renewer, Role
from adapters.coap.errors import Unserved
from adapters.coap.ports import Request, Response
from certs.chains import pkcs7_der, unbundle
from certs.request import MAXIMUM_REQUEST_BYTES, SUGGESTED_ATTRIBUTES
from registry.core import Registry
from registry.errors import PermissionDenied, Unauthenticated
from registry.model import Contact, Identity, RenewalRight
from registry.payloads import PayloadTooLarge

BASE: Final = (".well-known", "est")

EstServe: TypeAlias = Callable[[Request, Role, Contact], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class EstResource:
    """One of them, as resources.py serves it."""

    path: tuple[str, ...]
    method: Code
    serve: EstServe
    resource_type: str
    """RFC 9148 §9.2."""
    content_formats: tuple[int, ...]
    roles: tuple[type[Role], ...]


class Est:
    """The four resources."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._shown = _Authorities(b"", b"", b"")

    def resources(self) -> Sequence[EstResource]:
        """All of them."""
        everybody, holders = (Device, Claimant, Renewer), (Device, Renewer)
        certificates = (formats.PKCS7_CERTS, formats.PKIX_CERTIFICATE)
        return (
            EstResource((*BASE, "crts"), Code.GET, self._authorities, "ace.est.crts", certificates, everybody),
            EstResource(
                (*BASE, "att"), Code.GET, self._attributes, "ace.est.att", (formats.CSR_ATTRIBUTES,), everybody
            ),
            EstResource((*BASE, "sen"), Code.POST, self._enroll, "ace.est.sen", certificates, holders),
            EstResource((*BASE, "sren"), Code.POST, self._reenroll, "ace.est.sren", certificates, holders),
        )

    async def _authorities(self, request: Request, role: Role, contact: Contact) -> Response:
        del role, contact
        content_format = formats.wanted(request, formats.PKCS7_CERTS, formats.PKIX_CERTIFICATE)
        pem = self._registry.certificates.chain_pem()
        if pem != self._shown.pem:
            chain = unbundle(pem)
            self._shown = _Authorities(pem, pkcs7_der(chain), chain[-1])
        payload = self._shown.root if content_format == formats.PKIX_CERTIFICATE else self._shown.pkcs7
        return Response(Code.CONTENT, payload, content_format)

    async def _attributes(self, request: Request, role: Role, contact: Contact) -> Response:
        del role, contact
        content_format = formats.wanted(request, formats.CSR_ATTRIBUTES)
        return Response(Code.CONTENT, SUGGESTED_ATTRIBUTES, content_format)

    async def _enroll(self, request: Request, role: Role, contact: Contact) -> Response:
        return await self._renewed(request, role, contact, same_subject=False)

    async def _reenroll(self, request: Request, role: Role, contact: Contact) -> Response:
        return await self._renewed(request, role, contact, same_subject=True)

    async def _renewed(self, request: Request, role: Role, contact: Contact, *, same_subject: bool) -> Response:
        right = _right(role)
        formats.wanted(request, formats.PKCS7_CERTS, formats.PKIX_CERTIFICATE)
        issued = await self._registry.enrolment.renew(right, _csr(request), contact, same_subject=same_subject)
        certificate = unbundle(issued.certificate_pem)
        return _certificates(request, certificate)


@dataclass(frozen=True, slots=True)
class _Authorities:
    """A chain, and how it is sent in either format."""

    pem: bytes
    pkcs7: bytes
    root: bytes


def _right(role: Role) -> Identity | RenewalRight:
    match role:
        case Device(session, certificate):
            if not certificate:
                raise PermissionDenied("only the holder of a certificate enrolls here; this association has a PSK")
            return session.identity
        case Renewer(right):
            return right
        case Claimant():
            raise Unauthenticated("enrolment without a certificate")


def _csr(request: Request) -> bytes:
    if request.content_format not in (None, formats.PKCS10):
        raise Unserved(
            Code.UNSUPPORTED_CONTENT_FORMAT, f"content format {request.content_format}; {formats.PKCS10} is taken"
        )
    if len(request.payload) > MAXIMUM_REQUEST_BYTES:
        raise PayloadTooLarge(
            f"csr has {len(request.payload)} bytes; at most {MAXIMUM_REQUEST_BYTES} are read",
            limit=MAXIMUM_REQUEST_BYTES,
        )
    return request.payload


def _certificates(request: Request, issued: Sequence[bytes]) -> Response:
    content_format = formats.wanted(request, formats.PKCS7_CERTS, formats.PKIX_CERTIFICATE)
    payload = issued[0] if content_format == formats.PKIX_CERTIFICATE else pkcs7_der(issued)
    return Response(Code.CHANGED, payload, content_format)
