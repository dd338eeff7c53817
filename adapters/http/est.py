"""Enrolment over Secure Transport (RFC 7030) on the HTTPS port, for devices and tools that speak it already.

    GET  /.well-known/est/cacerts         anybody                       §4.1  the authorities, certs-only
    GET  /.well-known/est/csrattrs        anybody                       §4.5  which key and signature are suggested
    POST /.well-known/est/simpleenroll    HTTP Basic                    §4.2.1
    POST /.well-known/est/simplereenroll  the certificate to be renewed §4.2.2

First enrolment. The password of HTTP Basic (§3.2.3) is a registration token (`rt_…`), or the key of a template of type
x509 (`pk_…`), and then the request's common name is the hardware_id. The user name is not looked at: a token names its
device already, and the tenant is the secret's. A secret that is not good is 401, the same for every reason. The same
secret with the same public key gets the same certificate again, so a lost answer harms nobody.

Re-enrolment. The client certificate of the TLS connection decides and nothing else. It may have expired a few days ago
(the grace; a certificate that is not yet valid has none). Subject and SAN of the request are those of the certificate
(§4.2.2); the same key renews, another one rekeys. It opens no session, and headers with credentials are not looked at.

Bodies. A request is PKCS#10 in base64 with or without line breaks (§4.2.1, §4); DER and PEM are taken, too, because
they cannot be mistaken for it and openssl makes them (line breaks are free by RFC 8951 §3.2). Answers are PKCS#7 certs-
only in base64 (§4.1.3, §4.2.3), with the issued certificate alone; the chain is at cacerts. Refusals are the JSON that
every refusal of this server is; §4.2.3 leaves their type free. 202 is never answered: whoever may enrol is enrolled at
once. Full CMC and keys made by the server (§4.3, §4.4) are not served.

No state. Below /api/v1 there is nothing of this, since clients know these paths by heart (§3.2.2).
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

from litestar.response import Response

from adapters.http.api_request import ApiRequest
from adapters.http.bodies import media_type
from adapters.http.errors import BasicRequired
from adapters.http.operations import Media, Operation, Reply, operation
from certs.chains import pkcs7_base64, unbundle
from certs.request import MAXIMUM_REQUEST_BYTES, SUGGESTED_ATTRIBUTES
from registry.errors import FailedPrecondition, InvalidArgument, Refused
from registry.key_claim import ClaimRequest
from registry.model import CredentialKind
from registry.ports import IssuedCertificate
from registry.secrets import Secret, SecretKind

BASE: Final = "/.well-known/est"
PKCS10: Final = "application/pkcs10"
CERTS_ONLY: Final = "application/pkcs7-mime; smime-type=certs-only"
CSR_ATTRIBUTES: Final = "application/csrattrs"
MAX_BODY: Final = 2 * MAXIMUM_REQUEST_BYTES
"""Base64 adds a third, line breaks a little."""

_BASE64: Final = (("Content-Transfer-Encoding", "base64"),)

_REQUEST_BODY: Final = Media(PKCS10, {"type": "string", "description": "PKCS#10 in base64"})
_CERTIFICATES: Final = Media(CERTS_ONLY, {"type": "string", "description": "PKCS#7 certs-only in base64"})


@operation(
    Operation(
        "GET",
        "/cacerts",
        "EstCaCerts",
        "The authorities that EST clients trust from now on",
        "EST",
        {200: Reply("Issuing authorities and root", _CERTIFICATES)},
        base=BASE,
        description="RFC 7030 §4.1.",
    )
)
async def ca_certificates(request: ApiRequest) -> Response[bytes]:
    """GET /.well-known/est/cacerts"""
    return _certificates(request.registry.certificates.chain_pem())


@operation(
    Operation(
        "GET",
        "/csrattrs",
        "EstCsrAttrs",
        "What a certification request should be made with",
        "EST",
        {200: Reply("ECDSA with SHA-256 on P-256", Media(CSR_ATTRIBUTES, {"type": "string"}))},
        base=BASE,
        description="RFC 7030 §4.5. A suggestion: P-384, Ed25519 and RSA from 2048 bits are accepted, too.",
    )
)
async def csr_attributes(request: ApiRequest) -> Response[bytes]:
    """GET /.well-known/est/csrattrs"""
    del request
    return Response(base64.encodebytes(SUGGESTED_ATTRIBUTES), media_type=CSR_ATTRIBUTES, headers=dict(_BASE64))


@operation(
    Operation(
        "POST",
        "/simpleenroll",
        "EstSimpleEnroll",
        "Get a first certificate with a registration token or a template's key",
        "EST",
        {200: Reply("The certificate", _CERTIFICATES)},
        base=BASE,
        body=_REQUEST_BODY,
        body_media=(PKCS10,),
        description="RFC 7030 §4.2.1. With a template's key the request's common name is the hardware_id.",
    )
)
async def simple_enroll(request: ApiRequest) -> Response[bytes]:
    """POST /.well-known/est/simpleenroll"""
    secret = request.enrolment_secret
    csr = await _request_in(request)
    try:
        if secret.reveal().startswith(SecretKind.PROVISIONING_KEY.value):
            issued = await _claim(request, secret, csr)
        else:
            issued = (await request.registry.registration_tokens.provision(secret, csr, request.contact)).issued
    except Refused as refused:
        raise BasicRequired(refused.reason) from None
    return _certificates(issued.certificate_pem)


@operation(
    Operation(
        "POST",
        "/simplereenroll",
        "EstSimpleReenroll",
        "Get the successor of the certificate that the connection was made with",
        "EST",
        {200: Reply("The certificate", _CERTIFICATES)},
        base=BASE,
        body=_REQUEST_BODY,
        body_media=(PKCS10,),
        description="RFC 7030 §4.2.2. Subject and SAN as in the certificate, which may have expired a few days ago.",
    )
)
async def simple_reenroll(request: ApiRequest) -> Response[bytes]:
    """POST /.well-known/est/simplereenroll"""
    right = request.renewal_right
    csr = await _request_in(request)
    issued = await request.registry.enrolment.renew(right, csr, request.contact)
    return _certificates(issued.certificate_pem)


async def _claim(request: ApiRequest, key: Secret[str], csr: bytes) -> IssuedCertificate:
    hardware_id = request.registry.certificates.checked(csr).common_name
    if hardware_id is None:
        raise InvalidArgument("csr: it has no common name; enrolling with a template's key it is the hardware_id")
    claimed = await request.registry.key_claim.claim(
        ClaimRequest(
            provision_key=key,
            device_name=hardware_id,
            hardware_id=hardware_id,
            csr=csr,
            credential_type=CredentialKind.X509,
        ),
        request.contact,
    )
    if not isinstance(claimed.issued, IssuedCertificate):
        raise FailedPrecondition(
            "the device of this hardware_id has a certificate for another key; it renews it with simplereenroll, or an "
            "operator gives it a new one"
        )
    return claimed.issued


async def _request_in(request: ApiRequest) -> bytes:
    """The PKCS#10 of the body: DER or PEM, to be judged by the core. Raises InvalidArgument, UnsupportedMediaType."""
    media_type(request.scope["headers"], (PKCS10.encode(),))
    raw = await request.body()
    if len(raw) > MAX_BODY:
        raise InvalidArgument(f"csr has {len(raw)} bytes; at most {MAX_BODY} are read", field="csr")
    if not raw.isascii() or b"-----BEGIN" in raw:
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error:
        raise InvalidArgument("csr: the body is not PKCS#10 in base64 (RFC 7030 §4.2.1)", field="csr") from None


def _certificates(pem: bytes) -> Response[bytes]:
    return Response(pkcs7_base64(unbundle(pem)), media_type=CERTS_ONLY, headers=dict(_BASE64))


ROUTES: Final = (ca_certificates, csr_attributes, simple_enroll, simple_reenroll)
