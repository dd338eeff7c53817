"""What the files that a configuration names must hold, and the names that a certificate can be for.

Theory. These checks are the same readings that the start does later, done before any socket opens: a mistake is told
with exit code 2 and its key, not by a node that has its database running already. They prove nothing for later; a file
may change, and the start reads it again. Imported only when there is something to check: it loads OpenSSL.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from adapters.tls.context import ServerCredentials, TlsContext
from certs.issuing import BadServerName, server_names
from edge.config import Config
from edge.config_values import ConfigError
from edge.server_certificate import names_for
from registry.operators import InvalidKeySet, parse_jwks


def check_server_certificate(certificate: Path, key: Path) -> None:
    """Raises ConfigError unless `certificate` is a chain in PEM and `key` its first certificate's, usable for TLS."""
    chain, secret = _content("https.certificate", certificate), _content("https.key", key)
    try:
        x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise ConfigError("https.certificate", f"{certificate} is not a chain of PEM certificates") from None
    try:
        load_pem_private_key(secret, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        raise ConfigError("https.key", f"{key} is not an unencrypted private key in PEM") from None
    try:
        TlsContext(ServerCredentials(chain, secret))
    except ValueError as error:
        raise ConfigError("https.key", f"{key}: {error}") from None


def check_operator_keys(path: Path) -> None:
    """Raises ConfigError unless `path` is a JSON Web Key Set that operators' tokens can be checked with."""
    try:
        parse_jwks(_content("security.operator_jwks", path).decode())
    except (UnicodeDecodeError, InvalidKeySet) as error:
        raise ConfigError("security.operator_jwks", f"{path}: {error}") from None


def check_server_names(config: Config) -> None:
    """Raises ConfigError unless a certificate can be issued for the configured names and hosts."""
    hosts = (("https.host", config.https.host), ("mqtt.host", config.mqtt.host), ("coap.host", config.coap.host))
    for dotted, name in (*(("https.names", name) for name in config.https.names), *hosts):
        _check_names(dotted, [name])
    _check_names("https.names", names_for(config))


def _check_names(dotted: str, names: list[str]) -> None:
    try:
        server_names(names)
    except BadServerName as error:
        raise ConfigError(dotted, str(error)) from None


def _content(dotted: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(dotted, f"cannot read {path}: {error.strerror}") from None
