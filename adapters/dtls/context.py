"""What our side of DTLS is: versions, suites, a certificate and key, and how client certificates are treated.

Theory
------
As over TLS (adapters/tls/context.py), the handshake proves possession and nothing else: a client may show any
certificate of any issuer, or hold any key that the application gives for its identity. What is refused here is what
proves nothing, or was made for something else:

- a certificate whose key is too weak, because these suites need OpenSSL's security level 0 (below), which would let it;
- a certificate that says it is not for clients (an extended key usage without clientAuth, RFC 5280 §4.2.1.12) or not
  for signing (a key usage without digitalSignature, RFC 5246 §7.4.8), because whoever issued it said so. Dates are the
  registry's to judge, with its own clock.

DTLS 1.2 only (RFC 9325 §3.1.2). Suites: what constrained stacks have (RFC 7925 §4) and no more. OpenSSL counts the
8-byte tags of CCM_8 as 64 bits and lets them only at level 0; versions, signature algorithms and groups are therefore
named one by one. No renegotiation, no compression, no resumption: every association is judged anew.

Two contexts: one for clients that offer a suite with a pre-shared key, with nothing but those, and one for the others.
Who offers such a suite holds a key; who offers one with a certificate may hold none, and stacks that are told a key and
nothing else about suites put certificates first (Mbed TLS does). In one list they would agree on a handshake that
proves nothing. Within each the client's order decides.

What can race: nothing; `replace` swaps one reference, and every connection keeps the context it was born with.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL
from OpenSSL.crypto import X509

from adapters.dtls.psk_binding import serve_psk
from adapters.tls.context import ServerCredentials, load_credentials

# Clients choose the order: a device picks what its hardware or its code size prefers. AEAD only (RFC 9325 §4.2), all
# known to protection.py; OpenSSL has no ECDHE_PSK suite with GCM or CCM.
PSK_SUITES: Final = (
    "PSK-AES128-GCM-SHA256:PSK-AES256-GCM-SHA384:PSK-AES128-CCM:PSK-AES128-CCM8:ECDHE-PSK-CHACHA20-POLY1305"
)
# RSA is there for servers whose configured certificate is RSA; constrained clients will find nothing to talk to there.
CERTIFICATE_SUITES: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-CCM:ECDHE-ECDSA-AES128-CCM8:"
    "ECDHE-RSA-AES128-GCM-SHA256"
)
SIGNATURES: Final = (
    b"ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:ed25519:RSA-PSS+SHA256:RSA-PSS+SHA384:RSA+SHA256:RSA+SHA384"
)
GROUPS: Final = b"P-256:X25519:P-384"

_WEAKEST_RSA: Final = 2048
_WEAKEST_CURVE: Final = 224

_OPTIONS: Final = SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION | SSL.OP_NO_TICKET | SSL.OP_NO_QUERY_MTU


class Turn(Protocol):
    """Whose datagram OpenSSL is working on: what its callbacks ask and tell."""

    def key_of(self, identity: bytes) -> bytes:
        """The key of an identity; a random one when none was prepared."""

    certificate_fault: str | None
    certificate_accepted: bool
    """It has shown one without a fault."""


class DtlsContext:
    """Makes server-side connections with the credentials current at that moment.

    Without credentials only pre-shared keys can be served. Raises ValueError when the credentials cannot be read or the
    key does not belong to the certificate, and PskUnsupported.
    """

    __slots__ = ("_contexts", "turn")

    def __init__(self, credentials: ServerCredentials | None = None) -> None:
        self.turn: Turn | None = None
        self._contexts = self._build_both(credentials)

    def replace(self, credentials: ServerCredentials | None) -> None:
        """Serve new handshakes with `credentials`; living associations keep theirs. On ValueError nothing changed."""
        self._contexts = self._build_both(credentials)

    def connection(self, mtu: int, *, has_psk: bool) -> SSL.Connection:
        """A fresh server-side connection over memory buffers, whose flights fit into UDP payloads of `mtu` bytes.

        `has_psk`: the client offers a suite with a pre-shared key (records.psk_suite).
        """
        keys, certificates = self._contexts
        connection = SSL.Connection(keys if has_psk else certificates)
        connection.set_accept_state()
        connection.set_ciphertext_mtu(mtu)
        return connection

    def _build_both(self, credentials: ServerCredentials | None) -> tuple[SSL.Context, SSL.Context]:
        keys = self._build(None)
        return keys, keys if credentials is None else self._build(credentials)

    def _build(self, credentials: ServerCredentials | None) -> SSL.Context:
        context = _Context(SSL.DTLS_SERVER_METHOD)
        # pyOpenSSL's setter speaks of TLS versions; the binding's takes any (RFC 6347 §4.1: 1.2 is 0xFEFD).
        library: Any = Binding().lib
        for bound in (library.SSL_CTX_set_min_proto_version, library.SSL_CTX_set_max_proto_version):
            if bound(context._context, 0xFEFD) != 1:
                raise ValueError("OpenSSL was built without DTLS 1.2")
        context.set_options(_OPTIONS)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        suites = PSK_SUITES if credentials is None else CERTIFICATE_SUITES
        context.set_cipher_list(f"{suites}:@SECLEVEL=0".encode())
        for setter, value in (
            (library.SSL_CTX_set1_sigalgs_list, SIGNATURES),
            (library.SSL_CTX_set1_curves_list, GROUPS),
        ):
            if setter(context._context, value) != 1:
                raise ValueError(f"OpenSSL does not know all of {value.decode()}")
        # The listener has judged the cookie before there is a connection; OpenSSL only carries on from there.
        context.set_cookie_generate_callback(lambda _connection: b"")
        context.set_cookie_verify_callback(lambda _connection, _cookie: True)
        if credentials is None:
            context.psk = serve_psk(context, self._key_of)
        else:
            context.set_verify(SSL.VERIFY_PEER, self._judge_certificate)
            context.set_verify_depth(0)
            load_credentials(context, credentials)
        return context

    def _key_of(self, identity: bytes) -> bytes:
        return b"" if self.turn is None else self.turn.key_of(identity)

    def _judge_certificate(self, _: SSL.Connection, certificate: X509, _error: int, depth: int, _ok: int) -> bool:
        turn = self.turn
        if depth or turn is None:
            return depth > 0
        if not turn.certificate_accepted:  # OpenSSL asks again for each objection of its own to the same one
            turn.certificate_fault = certificate_fault(certificate)
            turn.certificate_accepted = turn.certificate_fault is None
        return turn.certificate_accepted


class _Context(SSL.Context):
    """OpenSSL keeps only a pointer to the callback of keys; this keeps the callback for as long as any connection."""

    psk: object


def certificate_fault(certificate: X509) -> str | None:
    """Why a client's certificate proves nothing or was not made for this; None when it may go to the registry."""
    try:
        parsed = certificate.to_cryptography()
        key = parsed.public_key()
        extensions = parsed.extensions
    except Exception:  # whatever a hostile encoding makes the parser raise, it means one thing
        return "unreadable"
    match key:
        case ec.EllipticCurvePublicKey():
            strong = key.curve.key_size >= _WEAKEST_CURVE
        case rsa.RSAPublicKey():
            strong = key.key_size >= _WEAKEST_RSA
        case _:
            strong = isinstance(key, ed25519.Ed25519PublicKey)
    if not strong:
        return "weak key"
    for extension in extensions:
        match extension.value:
            case x509.ExtendedKeyUsage() as usages:
                if not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(usages):
                    return "not for clients"
            case x509.KeyUsage(digital_signature=False):
                return "not for signing"
            case _:
                pass
    return None
