"""The device of test_coap_clients.py over Mbed TLS (python-mbedtls). Takes a JSON object, prints JSON lines.

The DTLS is Mbed TLS's, the codec aiocoap's, the exchanges are ours (client.py, life.py). With a PSK it offers one
suite, `TLS_PSK_WITH_AES_128_CCM_8`; with a certificate one, too: `TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8`.
"""

from __future__ import annotations

from pathlib import Path

from tests.interop.coap_clients.dtls import Certificate, Dtls, MbedtlsDtls, Psk
from tests.interop.coap_clients.life import play


def client(who: Psk | Certificate | None, ca: Path | None) -> Dtls:
    suite = "TLS-PSK-WITH-AES-128-CCM-8" if isinstance(who, Psk) else "TLS-ECDHE-ECDSA-WITH-AES-128-CCM-8"
    return MbedtlsDtls([suite], who, ca)


if __name__ == "__main__":
    play(client)
