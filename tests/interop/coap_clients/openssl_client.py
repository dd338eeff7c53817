"""The device of test_coap_clients.py over OpenSSL (pyOpenSSL). Takes a JSON object, prints JSON lines.

The suites are those that Mbed TLS's and tinydtls's clients do not offer: ECDHE-PSK, and AES-GCM with a certificate.
"""

from __future__ import annotations

from pathlib import Path

from tests.interop.coap_clients.dtls import Certificate, Dtls, OpensslContext, OpensslDtls, Psk
from tests.interop.coap_clients.life import play


def client(who: Psk | Certificate | None, ca: Path | None) -> Dtls:
    if isinstance(who, Psk):
        return OpensslDtls(OpensslContext("ECDHE-PSK-CHACHA20-POLY1305"), who)
    return OpensslDtls(OpensslContext("ECDHE-ECDSA-AES128-GCM-SHA256", who, ca))


if __name__ == "__main__":
    play(client)
