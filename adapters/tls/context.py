"""What our side of TLS is: a certificate and key, the versions and suites, and how client certificates are treated.

Theory
------
TLS proves *possession* and nothing else. A client may show any certificate of any issuer, self-signed, expired or
foreign; the handshake still checks the signature over the transcript (RFC 8446 §4.4.3, RFC 5246 §7.4.8), so whoever
finishes it holds the private key. Whether that key may enter is decided later and elsewhere, by the fingerprint of
the certificate's DER, on every connection, resumed ones included.

- *Chains are not walked.* Nothing above the leaf is ever believed, so the chain is cut at the leaf: a hostile chain
  costs its bytes (bounded by the stream) and no signature checks. One finding is not forgiven: a leaf key so weak
  that its signature proves nothing (below 112 bits of security, as OpenSSL's security level 2 counts it).
- *Resumption.* Tickets only (RFC 5077, RFC 8446 §4.6.1): no server-side cache, so idle sessions cost no memory. The
  client's certificate travels sealed inside the ticket and is there again after resumption. The ticket keys belong to
  one OpenSSL context: `replace` drops them, so tickets from before it fall back to a full handshake.
- *No 0-RTT, no renegotiation, no compression*, AEAD suites with ephemeral keys only (RFC 9325 §4).

What can race: nothing; `replace` swaps one reference, and every connection keeps the context it was born with.
What can be lost: on `replace`, resumption of older sessions (they handshake in full).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from OpenSSL.crypto import X509

# RFC 9325 §4.2: forward secrecy and AEAD. CCM is for constrained stacks that lack GCM; its 8-byte-tag form stays out.
# Clients choose the order: a small processor without AES instructions knows best that it prefers ChaCha20.
TLS12_SUITES: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AESCCM:!AESCCM8:!aNULL:@SECLEVEL=2"
TLS13_SUITES: Final = b"TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"
GROUPS: Final = b"X25519:P-256:P-384"

# X509_V_ERR_EE_KEY_TOO_SMALL: the one complaint about a client's certificate that is not left to the registry.
_LEAF_KEY_TOO_WEAK: Final = 66

_NO_TLS12_RENEGOTIATION_OR_COMPRESSION: Final = SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION


@dataclass(frozen=True, slots=True)
class ServerCredentials:
    """What the server shows. `chain_pem` is the leaf first, then its issuers; `key_pem` the leaf's unencrypted key."""

    chain_pem: bytes
    key_pem: bytes = field(repr=False)


class TlsContext:
    """Makes server-side connections with the credentials current at that moment.

    `alpn` lists the application protocols in our order of preference; a client that offers none of them gets no ALPN
    answer rather than a refusal. `session_lifetime` is in seconds (a ticket older than that is not honoured; RFC 8446
    §4.6.1 caps it at a week). `session_name` keeps tickets of one listener from being used at another.
    Raises ValueError when the credentials cannot be read or the key does not belong to the certificate.
    """

    __slots__ = ("_alpn", "_client_certificates", "_context", "_session_lifetime", "_session_name")

    def __init__(
        self,
        credentials: ServerCredentials,
        *,
        alpn: Sequence[bytes] = (),
        client_certificates: bool = True,
        session_lifetime: int = 7200,
        session_name: bytes = b"gatehouse",
    ) -> None:
        if not 1 <= len(session_name) <= 32:
            raise ValueError(f"session_name has {len(session_name)} bytes; allowed are 1 to 32")
        self._alpn = tuple(alpn)
        self._client_certificates = client_certificates
        self._session_lifetime = session_lifetime
        self._session_name = session_name
        self._context = self._build(credentials)

    def replace(self, credentials: ServerCredentials) -> None:
        """Serve new connections with `credentials`; live ones keep theirs. On ValueError nothing has changed.

        Also the way to rotate the ticket keys: the same credentials may be given again.
        """
        self._context = self._build(credentials)

    def connection(self) -> SSL.Connection:
        """A fresh server-side connection over memory buffers, waiting for its ClientHello."""
        connection = SSL.Connection(self._context)
        connection.set_accept_state()
        return connection

    def _build(self, credentials: ServerCredentials) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.set_options(_NO_TLS12_RENEGOTIATION_OR_COMPRESSION)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_cipher_list(TLS12_SUITES)
        context.set_tls13_ciphersuites(TLS13_SUITES)
        _set_groups(context, GROUPS)
        context.set_session_id(self._session_name)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_timeout(self._session_lifetime)
        if self._client_certificates:
            context.set_verify(SSL.VERIFY_PEER, _accept_any_issuer)
            context.set_verify_depth(0)
        if self._alpn:
            context.set_alpn_select_callback(_alpn_chooser(self._alpn))
        load_credentials(context, credentials)
        return context


def session_was_resumed(connection: SSL.Connection) -> bool:
    """Whether the finished handshake of `connection` continued an earlier session."""
    # pyOpenSSL has no name for this question, only its binding has.
    return bool(_openssl().SSL_session_reused(_raw_connection(connection)))


def _accept_any_issuer(_connection: SSL.Connection, _certificate: X509, error: int, _depth: int, _ok: int) -> bool:
    return error != _LEAF_KEY_TOO_WEAK


def _alpn_chooser(ours: tuple[bytes, ...]) -> Callable[[SSL.Connection, list[bytes]], Any]:
    def choose(_connection: SSL.Connection, offered: list[bytes]) -> Any:
        return next((name for name in ours if name in offered), SSL.NO_OVERLAPPING_PROTOCOLS)

    return choose


def load_credentials(context: SSL.Context, credentials: ServerCredentials) -> None:
    """Let `context` show `credentials`. Raises ValueError when they cannot be read or do not belong together."""
    chain = x509.load_pem_x509_certificates(credentials.chain_pem)
    try:
        key = load_pem_private_key(credentials.key_pem, None)
    except TypeError:
        raise ValueError("the private key is encrypted; it has to be readable without a password") from None
    if not isinstance(
        key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
    ):
        raise ValueError(f"a {type(key).__name__} cannot sign a TLS handshake; allowed are EC, RSA and Edwards keys")
    if key.public_key() != chain[0].public_key():
        raise ValueError("the private key does not belong to the first certificate of the chain")
    try:
        context.use_certificate(chain[0])
        for issuer in chain[1:]:
            context.add_extra_chain_cert(issuer)
        context.use_privatekey(key)
        context.check_privatekey()
    except SSL.Error as error:
        raise ValueError("OpenSSL refuses the server certificate (a key below 112 bits of security?)") from error


def _set_groups(context: SSL.Context, groups: bytes) -> None:
    # pyOpenSSL's own setter takes a single curve; the list is set through the same binding it stands on.
    if _openssl().SSL_CTX_set1_curves_list(_raw_context(context), groups) != 1:
        raise ValueError(f"OpenSSL does not know the groups {groups!r}")


def _openssl() -> Any:
    return Binding().lib


def _raw_context(context: SSL.Context) -> Any:
    return context._context


def _raw_connection(connection: SSL.Connection) -> Any:
    return connection._ssl
