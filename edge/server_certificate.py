"""The certificate of our own listeners: configured, or issued by the built-in CA and renewed without a restart.

A configured certificate is read at the start and again whenever its files change. An issued one lives in memory only:
its key is made at each start and never stored, its serial and intent are in the database before it is signed. It is
issued again when it comes to its last third, and after a roll-over, by the new authority. Names: localhost, 127.0.0.1,
::1, the host's name, the configured ones, and the listening address where it is a particular one.

The chain of the CA is written to D/ca-chain.pem for clients, at the start and after a roll-over. Who trusts the root of
an older file goes on trusting us: a roll-over replaces the issuing authority below it.
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
from certs.authority import Authority
from certs.issuing import BadServerName
from certs.keys import generate_p256
from certs.renewal import needs_renewal
from edge.config import Config
from registry import file_ownership
from registry.certificates import Certificates
from registry.errors import FailedPrecondition
from registry.trust import Trust

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0


class CertificateProblem(Exception):
    """The server's certificate cannot be had; the message names the key and the reason."""


class ServerCertificate:
    """What the listeners show."""

    def __init__(self, config: Config, trust: Trust, certificates: Certificates, clock: Callable[[], datetime]) -> None:
        self._config = config
        self._trust = trust
        self._certificates = certificates
        self._clock = clock
        self._issuer: Authority | None = None
        self._written: Authority | None = None
        self._not_before: datetime | None = None
        self._not_after: datetime | None = None
        self._stamp: tuple[int, ...] = ()

    def write_chain(self, path: Path) -> bool:
        """Put the CA's chain where clients of this machine find it, unless it is there; anybody may read it."""
        active = self._trust.authorities.active
        if active is self._written:
            return False
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        temporary.unlink(missing_ok=True)
        with os.fdopen(file_ownership.new_file(temporary, os.O_WRONLY), "wb") as file:
            file.write(self._certificates.chain_pem())
        temporary.chmod(0o644)
        temporary.replace(path)
        self._written = active
        return True

    async def load(self) -> ServerCredentials:
        """The credentials to serve with from now on. Raises CertificateProblem, Unavailable."""
        return await self._issue() if self._config.https.certificate is None else self._read()

    def due(self) -> bool:
        """Whether `load` would bring something newer."""
        if self._config.https.certificate is not None:
            return self._files_stamp() != self._stamp
        if self._not_before is None or self._not_after is None:
            return True
        if self._issuer is not self._trust.authorities.active:
            return True
        now = self._clock()  # it may have been set back since: nobody takes a certificate that begins tomorrow
        return now < self._not_before or needs_renewal(self._not_before, self._not_after, now)

    def names(self) -> list[str]:
        """What the issued certificate is for."""
        return names_for(self._config)

    async def _issue(self) -> ServerCredentials:
        key = generate_p256(secrets.token_bytes)
        names, issuer = self.names(), self._trust.authorities.active
        try:
            leaf = await self._certificates.issue_server(key, names)
        except BadServerName as error:
            raise CertificateProblem(f"https.names: {error}") from None
        except FailedPrecondition as error:
            raise CertificateProblem(f"https.certificate: {error.message}") from None
        log.info("certificate.issued", extra={"fields": {"serial": leaf.serial, "names": names}})
        self._not_before, self._not_after, self._issuer = leaf.not_before, leaf.not_after, issuer
        return ServerCredentials(leaf.chain_pem, key.reveal())

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


def names_for(config: Config) -> list[str]:
    """What a certificate that is issued under a configuration is for."""
    names = ["localhost", "127.0.0.1", "::1", *_own_names(), *config.https.names]
    for host in (config.https.host, config.mqtt.host, config.coap.host):
        try:
            if not ipaddress.ip_address(host).is_unspecified:
                names.append(host)
        except ValueError:
            names.append(host)
    return list(dict.fromkeys(names))


def _own_names() -> list[str]:
    """The host's name where it is a DNS name; what is none cannot stand in a certificate."""
    name = socket.gethostname().rstrip(".").lower()
    labels = name.split(".")
    fits = all(0 < len(label) <= 63 and label.replace("-", "a").isalnum() and label.isascii() for label in labels)
    return [name] if fits and len(name) <= 253 else []
