"""What the files that a configuration names must hold, and who may have written the configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from edge.config import Config, ConfigError, load
from tests.tls_peers import make_certificate

ONE, OTHER = make_certificate("one"), make_certificate("other")
ENCRYPTED = ONE.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"a password"))


def loaded(home: Path, **environ: str) -> Config:
    return load(None, home / "D", {"HOME": "/home/ada", **environ}, directory=home)


def refusal(home: Path, **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loaded(home, **environ)
    assert "\n" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("certificate", "key", "named", "told"),
    [
        (b"no certificate", ONE.key_pem, "https.certificate", "not a chain of PEM certificates"),
        (ONE.key_pem, ONE.key_pem, "https.certificate", "not a chain of PEM certificates"),
        (ONE.pem, b"no key", "https.key", "not an unencrypted private key"),
        (ONE.pem, ENCRYPTED, "https.key", "not an unencrypted private key"),
        (ONE.pem, OTHER.key_pem, "https.key", "does not belong to the first certificate"),
    ],
)
def test_a_certificate_and_a_key_that_cannot_be_served(
    certificate: bytes, key: bytes, named: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "c").write_bytes(certificate)
    (tmp_path / "k").write_bytes(key)
    error = refusal(tmp_path, GATEHOUSE_HTTPS__CERTIFICATE="c", GATEHOUSE_HTTPS__KEY="k")
    assert (error.key, told in error.reason) == (named, True)


def test_a_certificate_with_its_key_passes(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(ONE.pem)
    (tmp_path / "k").write_bytes(ONE.key_pem)
    assert loaded(tmp_path, GATEHOUSE_HTTPS__CERTIFICATE="c", GATEHOUSE_HTTPS__KEY="k").https.key == tmp_path / "k"


@pytest.mark.parametrize("text", ["", "{", '{"keys": 1}', json.dumps({"keys": [{"kty": "RSA"}]})])
def test_a_key_set_that_no_token_can_be_checked_with(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(text)
    assert refusal(tmp_path, GATEHOUSE_SECURITY__OPERATOR_JWKS="keys.json").key == "security.operator_jwks"


@pytest.mark.parametrize(
    ("variable", "name", "key"),
    [
        ("GATEHOUSE_HTTPS__NAMES", "gate.example.org,under_score..example", "https.names"),
        ("GATEHOUSE_HTTPS__NAMES", "gate.*.example.org", "https.names"),
        ("GATEHOUSE_HTTPS__NAMES", ",".join(f"n{number}.example.org" for number in range(100)), "https.names"),
        ("GATEHOUSE_HTTPS__HOST", "a..b", "https.host"),
        ("GATEHOUSE_MQTT__HOST", "-", "mqtt.host"),
    ],
)
def test_a_name_that_no_certificate_can_be_for(variable: str, name: str, key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **{variable: name}).key == key


def test_names_and_hosts_that_a_certificate_can_be_for(tmp_path: Path) -> None:
    names = {"GATEHOUSE_HTTPS__NAMES": "gate.example.org,*.example.org,192.0.2.1,2001:db8::1"}
    assert len(loaded(tmp_path, GATEHOUSE_HTTPS__HOST="gate.local", **names).https.names) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to others")
def test_root_reads_nobody_elses_configuration_unasked(tmp_path: Path) -> None:
    file = tmp_path / "gatehouse.toml"
    file.write_text("[https]\nport = 4711\n")
    file.chmod(0o644)
    assert loaded(tmp_path).https.port == 4711
    file.chmod(0o646)
    assert "may be written by others" in refusal(tmp_path).reason
    file.chmod(0o644)
    os.chown(file, 65534, 65534)
    error = refusal(tmp_path)
    assert (error.key, "belongs to user 65534" in error.reason) == ("--config", True)
    assert loaded(tmp_path, GATEHOUSE_CONFIG=str(file)).https.port == 4711
