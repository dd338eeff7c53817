"""Server credentials: wrong ones are refused when given, and never show their key."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from adapters.tls.context import ServerCredentials, TlsContext
from tests.tls_peers import make_certificate

ONE, OTHER = make_certificate("one"), make_certificate("other")
ENCRYPTED = ONE.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"a password"))


@pytest.mark.parametrize(
    "credentials",
    [
        ServerCredentials(ONE.pem, OTHER.key_pem),
        ServerCredentials(b"", ONE.key_pem),
        ServerCredentials(ONE.pem, b"no key"),
        ServerCredentials(ONE.pem, ENCRYPTED),
        ServerCredentials(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ONE.key_pem),
    ],
)
def test_unusable_credentials_are_a_value_error_and_change_nothing(credentials: ServerCredentials) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the reasons come from several libraries
        TlsContext(credentials)
    context = TlsContext(ONE.credentials())
    before = context.connection().get_context()
    with pytest.raises(ValueError):  # noqa: PT011
        context.replace(credentials)
    assert context.connection().get_context() is before


def test_a_weak_server_key_is_refused() -> None:
    weak = make_certificate(key=rsa.generate_private_key(65537, 1024))
    with pytest.raises(ValueError, match="112 bits"):
        TlsContext(weak.credentials())


def test_the_key_is_not_in_the_repr() -> None:
    assert "PRIVATE" not in repr(ONE.credentials())


def test_session_name_is_bounded() -> None:
    with pytest.raises(ValueError, match="session_name"):
        TlsContext(ONE.credentials(), session_name=b"")
