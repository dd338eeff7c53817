"""Pre-shared keys stand on a binding that promises nothing: this fails loudly when an upgrade moves it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cryptography.hazmat.bindings.openssl.binding import Binding

from adapters.dtls.context import DtlsContext
from adapters.dtls.psk_binding import PskUnsupported, check
from tests.dtls_peers import Client, psk_client_context


def test_the_installed_binding_has_all_that_is_needed() -> None:
    binding = Binding()
    check(binding.lib)
    setter = binding.ffi.typeof(binding.lib.SSL_CTX_set_psk_server_callback)
    assert str(setter.args[1]) == "<ctype 'unsigned int(*)(SSL *, char *, unsigned char *, unsigned int)'>"
    setter = binding.ffi.typeof(binding.lib.SSL_CTX_set_psk_client_callback)
    signature = "unsigned int(*)(SSL *, char *, char *, unsigned int, unsigned char *, unsigned int)"
    assert str(setter.args[1]) == f"<ctype '{signature}'>"


NEEDED = frozenset(
    {
        "SSL_CTX_set_psk_server_callback",
        "SSL_CTX_set_psk_client_callback",
        "ERR_clear_error",
        "Cryptography_HAS_PSK",
    }
)


def test_nothing_else_is_needed_of_a_binding() -> None:
    check(SimpleNamespace(**dict.fromkeys(NEEDED, 1)))


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_a_binding_without_it_is_a_loud_error(missing: str) -> None:
    with pytest.raises(PskUnsupported, match="cryptography's OpenSSL binding lacks"):
        check(SimpleNamespace(**dict.fromkeys(NEEDED - {missing}, 1)))


def test_every_suite_that_is_promised_can_be_chosen() -> None:
    listed = DtlsContext(None).connection(1200, has_psk=True).get_cipher_list()
    assert {"PSK-AES128-CCM8", "PSK-AES128-GCM-SHA256", "ECDHE-PSK-CHACHA20-POLY1305"} <= set(listed)


def test_openssl_sends_and_retransmits_by_its_own_clock() -> None:
    client = Client(psk_client_context())
    assert len(client.step()) == 1
    due = client.due()
    assert due is not None
    assert 0 < due <= 1
