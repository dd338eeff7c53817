"""The certificate of our own listeners: configured, or issued by the built-in CA and renewed without a restart.

A configured certificate is read at the start and again whenever its files change. An issued one lives in memory only:
its key is made at each start and never stored. Names: localhost, 127.0.0.1, ::1, the host's name, the configured ones,
and the listening address where it is a particular one. The chain of the CA is written to D/ca-chain.pem for clients.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography import x509

from adapters.tls.context import ServerCredentials
from certs.authority import AuthoritySet
from certs.chains import bundle
from certs.issuing import BadServerName, prepare_server, sign
from certs.keys import generate_p256
from certs.renewal import needs_renewal
from edge.config import Config

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0


class CertificateProblem(Exception):
    """The server's certificate cannot be had; the message names the key and the reason."""


class ServerCertificate:
    """What the listeners show."""

    def __init__(self, config: Config, authorities: AuthoritySet, clock: Callable[[], datetime]) -> None:
        self._config = config
        self._authorities = authorities
        self._clock = clock
        self._not_before: datetime | None = None
        self._not_after: datetime | None = None
        self._stamp: tuple[int, ...] = ()

    @property
    def ca_chain_pem(self) -> bytes:
        """Issuing authority and root: what a client needs to trust a certificate of the built-in CA."""
        return bundle(self._authorities.chain)

    def write_chain(self, path: Path) -> None:
        """Put the CA's chain where clients of this machine find it; anybody may read it."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        temporary.write_bytes(self.ca_chain_pem)
        temporary.chmod(0o644)
        temporary.replace(path)

    def load(self) -> ServerCredentials:
        """The credentials to serve with from now on. Raises CertificateProblem."""
        return self._issue() if self._config.https.certificate is None else self._read()

    def due(self) -> bool:
        """Whether `load` would bring something newer."""
        if self._config.https.certificate is not None:
            return self._files_stamp() != self._stamp
        if self._not_before is None or self._not_after is None:
            return True
        return needs_renewal(self._not_before, self._not_after, self._clock())

    def names(self) -> list[str]:
        """What the issued certificate is for."""
        names = ["localhost", "127.0.0.1", "::1", *_own_names(), *self._config.https.names]
        for host in (self._config.https.host, self._config.mqtt.host, self._config.coap.host):
            try:
                if not ipaddress.ip_address(host).is_unspecified:
                    names.append(host)
            except ValueError:
                names.append(host)
        return list(dict.fromkeys(names))

    def _issue(self) -> ServerCredentials:
        key = generate_p256(secrets.token_bytes)
        issuer = self._authorities.active
        try:
            prepared = prepare_server(key, self.names(), issuer, self._clock(), secrets.token_bytes)
        except BadServerName as error:
            raise CertificateProblem(f"https.names: {error}") from None
        intent = prepared.intent
        log.info("certificate.issuing", extra={"fields": {"serial": intent.serial_hex, "names": self.names()}})
        issued = sign(prepared)
        self._not_before, self._not_after = intent.not_before, intent.not_after
        return ServerCredentials(bundle((issued.der, issuer.certificate_der)), key.reveal())

    def _read(self) -> ServerCredentials:
        certificate, key = self._config.https.certificate, self._config.https.key
        assert certificate is not None
        assert key is not None
        self._stamp = self._files_stamp()
        try:
            chain = certificate.read_bytes()
            x509.load_pem_x509_certificates(chain)
            return ServerCredentials(chain, key.read_bytes())
        except OSError as error:
            raise CertificateProblem(f"https.certificate, https.key: {error}") from None
        except ValueError:
            raise CertificateProblem(f"https.certificate: {certificate} is not a chain of PEM certificates") from None

    def _files_stamp(self) -> tuple[int, ...]:
        stamp: list[int] = []
        for path in (self._config.https.certificate, self._config.https.key):
            try:
                state = path.stat() if path is not None else None
            except OSError:
                state = None
            stamp += [state.st_mtime_ns, state.st_ino, state.st_size] if state else [0, 0, 0]
        return tuple(stamp)


def _own_names() -> list[str]:
    """The host's name where it is a DNS name; what is none cannot stand in a certificate."""
    name = socket.gethostname().rstrip(".").lower()
    labels = name.split(".")
    fits = all(0 < len(label) <= 63 and label.replace("-", "a").isalnum() and label.isascii() for label in labels)
    return [name] if fits and len(name) <= 253 else []
