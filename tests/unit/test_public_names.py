"""What devices are told: where other listeners are, and where the revocation list of their certificate is."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from edge.config import Config, load
from edge.wiring import device_profile, public_host


def configured(place: Path, **variables: str) -> Config:
    path = place / "gatehouse.toml"
    path.write_text("")
    return load(path, place, {f"GATEHOUSE_{name}": value for name, value in variables.items()})


@pytest.mark.parametrize(
    ("names", "listening", "told"),
    [
        ("", "127.0.0.1", "127.0.0.1"),
        ("", "gate.example", "gate.example"),
        ("", "0.0.0.0", socket.gethostname()),
        ("", "::", socket.gethostname()),
        ('["gate.example", "10.0.0.1"]', "0.0.0.0", "gate.example"),
        ('["*.example", "10.0.0.1"]', "127.0.0.1", "10.0.0.1"),
        ('["2001:db8::1"]', "::", "[2001:db8::1]"),
    ],
)
def test_the_first_name_is_what_devices_call_the_server(tmp_path: Path, names: str, listening: str, told: str) -> None:
    variables = {"HTTPS__NAMES": names} if names else {}
    assert public_host(configured(tmp_path, **variables), listening) == told


def test_certificates_name_their_list_where_the_server_has_a_name(tmp_path: Path) -> None:
    assert device_profile(configured(tmp_path)).crl_url is None
    named = {"HTTPS__NAMES": '["gate.example"]'}
    assert device_profile(configured(tmp_path, HTTPS__PORT="0", **named)).crl_url is None
    own = device_profile(configured(tmp_path, **named)).crl_url
    assert own == "https://gate.example:8443/api/v1/ca/crl?issuer={issuer}"
    elsewhere = "http://lists.example/{issuer}.crl"
    assert device_profile(configured(tmp_path, SECURITY__CRL_URL=elsewhere, **named)).crl_url == elsewhere
