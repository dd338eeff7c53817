"""Certificates as openssl and curl see them: nothing here but the two programs, files, and a server process.

Each test is a transcript of what an operator and a device do by hand. What the device does is done by openssl (keys,
requests, verification, an open TLS connection) and curl (every HTTP exchange); what the operator does is curl, too.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

ROOT = Path(__file__).resolve().parents[2]
GATEHOUSE = (sys.executable, "-m", "edge")
SECONDS = 30
_numbers = count()

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None or shutil.which("curl") is None, reason="needs openssl and curl"
)


@dataclass(frozen=True)
class Answer:
    """What curl got."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


@dataclass(frozen=True)
class Site:
    """A running server, its operator, and a place for files."""

    data_dir: Path
    files: Path
    ports: dict[str, int]
    operator: str

    @property
    def chain(self) -> Path:
        return self.data_dir / "ca-chain.pem"

    def curl(self, method: str, path: str, *more: str, body: object = None, expect: int | None = None) -> Answer:
        """One request over a connection of its own. `path` is below /api/v1 unless it begins with /.well-known."""
        base = "" if path.startswith("/.well-known") else "/api/v1"
        url = f"https://localhost:{self.ports['https']}{base}{path}"
        head, out = self.new("head"), self.new("body")
        words = ["-sS", "-X", method, "--cacert", str(self.chain), "-D", str(head), "-o", str(out)]
        if body is not None:
            words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        run("curl", *words, *more, url)
        lines = head.read_bytes().decode("latin-1").split("\r\n\r\n")[-2].splitlines()
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
        answer = Answer(int(lines[0].split()[1]), headers, out.read_bytes() if out.exists() else b"")
        if expect is not None:
            assert answer.status == expect, answer.raw
        return answer

    def ask(self, method: str, path: str, body: object = None, *, expect: int = 200) -> Any:
        """The operator."""
        bearer = ("-H", f"Authorization: Bearer {self.operator}")
        return self.curl(method, path, *bearer, body=body, expect=expect).json

    def uplink(self, device_id: str, certificate: Path, key: Path) -> int:
        """A device reports by its certificate; the status."""
        body = {"kind": "event", "payload": {"door": 1}}
        credentials = ("--cert", str(certificate), "--key", str(key))
        return self.curl("POST", f"/devices/{device_id}/uplink", *credentials, body=body).status

    def new(self, name: str) -> Path:
        """A file name that is not taken."""
        return self.files / f"{next(_numbers):04}-{name}"

    def key(self) -> Path:
        """A device makes its key."""
        path = self.new("key.pem")
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)
        return path

    def csr(self, key: Path, subject: str = "/CN=pump") -> Path:
        """And a request for it."""
        path = self.new("csr.pem")
        openssl("req", "-new", "-key", key, "-subj", subject, "-out", path)
        return path

    def self_signed(self, key: Path, name: str = "pump.example", *more: str | Path) -> Path:
        """A certificate that no authority knows."""
        path = self.new("self.pem")
        openssl("req", "-x509", "-new", "-key", key, "-subj", f"/CN={name}", "-days", "30", "-out", path, *more)
        return path

    def signed_by(self, authority: Path, authority_key: Path, key: Path) -> Path:
        """A certificate of somebody else's authority."""
        path = self.new("leaf.pem")
        request = self.csr(key)
        issuer = ("-CA", authority, "-CAkey", authority_key, "-CAcreateserial")
        openssl("x509", "-req", "-in", request, *issuer, "-days", "30", "-out", path)
        return path

    def token(self, name: str = "Pump 7", **more: object) -> Any:
        return self.ask("POST", "/devices/registration/tokens", {"name": name, **more}, expect=201)

    def provisioned(self, key: Path) -> tuple[Any, Path]:
        """A device that came online with a token: the answer, and the file with its certificate."""
        body = {"token": self.token()["token"], "csr": self.csr(key).read_text()}
        answer = self.curl("POST", "/devices/provision", body=body, expect=201).json
        path = self.new("certificate.pem")
        path.write_text(answer["certificate"])
        return answer, path

    def verify(self, certificate: Path, *more: str | Path) -> subprocess.CompletedProcess[bytes]:
        """What `openssl verify` says of a device's certificate; trusted is the root alone."""
        root, untrusted = self.new("root.pem"), self.new("issuing.pem")
        *issuing, last = _blocks(self.chain.read_text())
        root.write_text(last)
        untrusted.write_text("".join(issuing))
        strict = ("-x509_strict", "-purpose", "sslclient", "-CAfile", root, "-untrusted", untrusted)
        return subprocess.run(
            ["openssl", "verify", *map(str, (*strict, *more)), str(certificate)], capture_output=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip


def run(*words: str | Path, data: bytes | None = None) -> bytes:
    done = subprocess.run([*map(str, words)], input=data, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr.decode()}"
    return done.stdout


def openssl(*words: str | Path, data: bytes | None = None) -> bytes:
    return run("openssl", *words, data=data)


def fingerprint_of(certificate: Path) -> str:
    """As openssl prints it: upper case with colons."""
    said = openssl("x509", "-in", certificate, "-noout", "-fingerprint", "-sha256").decode()
    return said.strip().partition("=")[2]


def der_of(pem: Path) -> bytes:
    return base64.b64decode("".join(pem.read_text().split("-----")[2].split()))


def _blocks(text: str) -> list[str]:
    end = "-----END CERTIFICATE-----\n"
    return [part + end for part in text.split(end) if part.strip()]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEHOUSE_")}
    free = {f"GATEHOUSE_{name}__PORT": "0" for name in ("HTTPS", "MQTT", "COAP", "OPS")}
    return {**kept, "PYTHONPATH": str(ROOT), **free}


def command(data_dir: Path, *words: str) -> str:
    return subprocess.run(
        [*GATEHOUSE, *words, "--data-dir", str(data_dir)], env=_environment(), capture_output=True, text=True,
        timeout=60, check=True,
    ).stdout.strip()  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One server for all tests of this file."""
    place, files = tmp_path_factory.mktemp("node"), tmp_path_factory.mktemp("files")
    with (
        (files / "log").open("w") as log,
        subprocess.Popen(
            [*GATEHOUSE, "serve", "--data-dir", str(place)], env=_environment(), stdout=subprocess.PIPE, stderr=log,
            text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready, (files / "log").read_text()
            command(place, "tenant", "create", "Acme")
            operator = command(place, "token", "mint", "--tenant", "acme", "--role", "tenant_admin")
            yield Site(place, files, json.loads(ready)["ready"], operator)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_from_openssl_req_to_the_revocation_list(site: Site) -> None:
    key = site.key()
    token = site.token("Pump 7", hardware_id="P-7", groups=["hall-2"])
    assert token["status"] == "pending"
    assert site.ask("GET", f"/devices/{token['device_id']}")["status"] == "pending"
    listed = site.ask("GET", "/devices/registration/tokens")["tokens"]
    assert [each["token_id"] for each in listed] == [token["token_id"]]

    body = {"token": token["token"], "csr": site.csr(key).read_text()}
    given = site.curl("POST", "/devices/provision", body=body, expect=201).json
    assert given["device_id"] == token["device_id"]
    assert given["mqtt"] == {"host": "127.0.0.1", "port": site.ports["mqtt"]}
    assert given["coap"]["host"] == "127.0.0.1"
    assert given["renew_after"] < given["not_after"]
    assert site.curl("POST", "/devices/provision", body=body, expect=200).json == given  # the answer was lost
    other = {**body, "csr": site.csr(site.key()).read_text()}
    assert site.curl("POST", "/devices/provision", body=other, expect=403).json["message"] == "provisioning refused"
    record = site.ask("GET", f"/devices/{token['device_id']}")
    assert (record["status"], record["groups"], record["renew_after"]) == (
        "registered", ["hall-2"], given["renew_after"],
    )  # fmt: skip

    certificate = site.new("certificate.pem")
    certificate.write_text(given["certificate"])
    assert site.verify(certificate).stdout.endswith(b": OK\n")
    chain = site.new("chain.pem")
    chain.write_text(given["ca_chain"])
    openssl("verify", "-x509_strict", "-CAfile", chain, certificate)
    subject = openssl("x509", "-in", certificate, "-noout", "-subject", "-nameopt", "RFC2253").decode()
    assert token["device_id"] in subject

    assert site.uplink(token["device_id"], certificate, key) == 202
    assert site.ask("GET", f"/devices/{token['device_id']}")["status"] == "active"

    with _open_connection(site, certificate, key, token["device_id"]) as device:
        printed = fingerprint_of(certificate)
        receipt = site.ask("DELETE", f"/devices/certs/{printed}?reason=key_compromise")
        assert (receipt["device_id"], receipt["remaining"]) == (token["device_id"], 0)
        assert [each["transport"] for each in receipt["sessions"]] == ["https"]
        assert receipt["sessions"][0]["closed_after_ms"] < 2000
        rest, _ = device.communicate(timeout=SECONDS)  # the server has closed it, so openssl ends
        assert rest == b""
    refused = site.curl("POST", "/telemetry", "--cert", str(certificate), "--key", str(key), body={"t": 1})
    assert (refused.status, refused.json["code"]) == (401, "UNAUTHENTICATED")
    again = site.ask("DELETE", f"/devices/certs/{printed}")
    assert (again["revoked_at"], again["sessions"]) == (receipt["revoked_at"], [])
    events = site.ask("GET", f"/devices/{token['device_id']}/timeline")["events"]
    assert any(e["kind"] == "auth.refused" and e["data"]["reason"] == "credential revoked" for e in events)

    _listed_as_revoked(site, certificate)


def _listed_as_revoked(site: Site, certificate: Path) -> None:
    """The revocation list, in both forms, is signed by the authority and names the certificate."""
    der, pem = site.new("crl.der"), site.new("crl.pem")
    answer = site.curl("GET", "/ca/crl", expect=200)
    assert answer.headers["content-type"] == "application/pkix-crl"
    der.write_bytes(answer.raw)
    text = openssl("crl", "-inform", "DER", "-in", der, "-CAfile", site.chain, "-noout", "-text").decode()
    serial = openssl("x509", "-in", certificate, "-noout", "-serial").decode().strip().removeprefix("serial=")
    assert f"Serial Number: {serial}" in text
    assert "Key Compromise" in text
    assert "X509v3 CRL Number" in text
    pem.write_bytes(site.curl("GET", "/ca/crl", "-H", "Accept: application/x-pem-file", expect=200).raw)
    assert pem.read_bytes().startswith(b"-----BEGIN X509 CRL-----")
    judged = site.verify(certificate, "-crl_check", "-CRLfile", pem)
    assert b"certificate revoked" in judged.stderr + judged.stdout
    _, other = site.provisioned(site.key())
    assert site.verify(other, "-crl_check", "-CRLfile", pem).stdout.endswith(b": OK\n")


def _open_connection(site: Site, certificate: Path, key: Path, device_id: str) -> subprocess.Popen[bytes]:
    """A device that reported and stays connected: `openssl s_client`, which ends when its connection does."""
    where = f"localhost:{site.ports['https']}"
    process = subprocess.Popen(
        ["openssl", "s_client", "-quiet", "-connect", where, "-CAfile", str(site.chain), "-verify_return_error",
         "-cert", str(certificate), "-key", str(key)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    body = b'{"kind": "event", "payload": {"door": 0}}'
    path = f"/api/v1/devices/{device_id}/uplink"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    process.stdin.write(head.encode() + b"\r\n\r\n" + body)
    process.stdin.flush()
    assert process.stdout.readline() == b"HTTP/1.1 202 Accepted\r\n"
    length = 0
    while (line := process.stdout.readline()) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    assert b"uplink_id" in process.stdout.read(length)
    assert process.poll() is None
    return process


def test_certificates_of_any_authority_work_once_registered_and_only_those(site: Site) -> None:
    authority_key = site.key()
    authority = site.self_signed(authority_key, "Somebody's CA")
    keys = [site.key() for _ in range(3)]
    foreign, sibling = (site.signed_by(authority, authority_key, key) for key in keys[:2])
    alone = site.self_signed(keys[2])
    for number, (certificate, key) in enumerate(((foreign, keys[0]), (alone, keys[2]))):
        body = {"name": "F", "hardware_id": f"F-{number}", "credential_type": "x509"}
        device_id = site.ask("POST", "/devices", body, expect=201)["device_id"]
        assert site.uplink(device_id, certificate, key) == 401  # nobody registered it yet
        path = f"/devices/{device_id}/certs"
        if number:
            bearer = ("-H", f"Authorization: Bearer {site.operator}", "-H", "Content-Type: application/x-pem-file")
            made = site.curl("POST", path, *bearer, "--data-binary", f"@{certificate}", expect=201).json
        else:
            made = site.ask("POST", path, {"certificate": certificate.read_text()}, expect=201)
        assert made["fingerprint"] == fingerprint_of(certificate).replace(":", "").lower()
        assert (made["origin"], made["device_id"]) == ("foreign", device_id)
        assert site.uplink(device_id, certificate, key) == 202
        assert site.uplink(device_id, sibling, keys[1]) == 401
        listed = site.ask("GET", f"/devices/certs?device_id={device_id}")["certificates"]
        assert [each["fingerprint"] for each in listed] == [made["fingerprint"]]
        assert site.ask("POST", path, {"certificate": certificate.read_text()}, expect=409)["code"] == "ALREADY_EXISTS"
        assert site.ask("DELETE", f"/devices/certs/{made['fingerprint']}")["remaining"] == 0
        assert site.uplink(device_id, certificate, key) == 401
    # Without a key, a certificate that nobody knows is in nobody's way where everybody may come.
    site.curl("GET", "/ca/chain", "--cert", str(sibling), "--key", str(keys[1]), expect=200)
    _, ours = site.provisioned(site.key())
    mine = {"name": "M", "hardware_id": "F-mine", "credential_type": "x509"}
    device_id = site.ask("POST", "/devices", mine, expect=201)["device_id"]
    refused = site.ask("POST", f"/devices/{device_id}/certs", {"certificate": ours.read_text()}, expect=400)
    assert refused["code"] == "INVALID_ARGUMENT"


def test_est_from_cacerts_to_simplereenroll(site: Site) -> None:
    est = "/.well-known/est"
    authorities = site.curl("GET", f"{est}/cacerts", expect=200)
    assert authorities.headers["content-type"].startswith("application/pkcs7-mime")
    assert authorities.headers["content-transfer-encoding"] == "base64"
    trusted = site.new("est-ca.pem")
    trusted.write_bytes(_pkcs7(authorities.raw))
    assert len(_blocks(trusted.read_text())) == len(_blocks(site.chain.read_text()))
    suggested = site.curl("GET", f"{est}/csrattrs", expect=200)
    assert suggested.headers["content-type"] == "application/csrattrs"
    parsed = openssl("asn1parse", "-inform", "DER", data=base64.b64decode(suggested.raw)).decode()
    assert all(each in parsed for each in ("ecdsa-with-SHA256", "id-ecPublicKey", "prime256v1"))

    key, token = site.key(), site.token("EST pump")
    request = site.new("request.b64")
    request.write_bytes(base64.encodebytes(der_of(site.csr(key))))
    enroll = ("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{request}")
    unknown = site.curl("POST", f"{est}/simpleenroll", *enroll, expect=401)
    assert unknown.headers["www-authenticate"].startswith("Basic realm=")
    assert site.curl("POST", f"{est}/simpleenroll", *enroll, "-u", "pump:rt_wrong", expect=401).raw
    answer = site.curl("POST", f"{est}/simpleenroll", *enroll, "-u", f"pump:{token['token']}", expect=200)
    assert answer.headers["content-type"] == "application/pkcs7-mime; smime-type=certs-only"
    certificate = site.new("est.pem")
    certificate.write_bytes(_pkcs7(answer.raw))
    assert len(_blocks(certificate.read_text())) == 1
    assert site.verify(certificate).stdout.endswith(b": OK\n")
    assert site.uplink(token["device_id"], certificate, key) == 202
    again = site.curl("POST", f"{est}/simpleenroll", *enroll, "-u", f"other:{token['token']}", expect=200)
    assert again.raw == answer.raw

    current, current_key = certificate, key
    for new_key in (key, site.key()):  # the same key renews, another one rekeys (RFC 7030 §4.2.2)
        der = site.new("renewal.der")
        subject = openssl("x509", "-in", current, "-noout", "-subject", "-nameopt", "compat").decode()
        renewal = site.csr(new_key, subject.removeprefix("subject=").strip())
        der.write_bytes(der_of(renewal))
        words = ("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{der}")
        credentials = ("--cert", str(current), "--key", str(current_key))
        renewed = site.curl("POST", f"{est}/simplereenroll", *words, *credentials, expect=200)
        successor = site.new("renewed.pem")
        successor.write_bytes(_pkcs7(renewed.raw))
        assert successor.read_text() != current.read_text()
        assert site.verify(successor).stdout.endswith(b": OK\n")
        assert site.uplink(token["device_id"], successor, new_key) == 202
        current, current_key = successor, new_key
    words = ("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{request}")
    assert site.curl("POST", f"{est}/simplereenroll", *words, expect=401).headers["www-authenticate"]
    foreign_key = site.key()
    foreign = site.self_signed(foreign_key)
    stranger = ("--cert", str(foreign), "--key", str(foreign_key))
    site.curl("POST", f"{est}/simplereenroll", *words, *stranger, expect=401)
    other_name = site.new("other.b64")
    other_name.write_bytes(base64.b64encode(der_of(site.csr(current_key, "/CN=somebody-else"))))
    words = ("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{other_name}")
    own = ("--cert", str(current), "--key", str(current_key))
    refused = site.curl("POST", f"{est}/simplereenroll", *words, *own, expect=400)
    assert refused.json["code"] == "INVALID_ARGUMENT"


def test_est_with_a_templates_key(site: Site) -> None:
    body = {"name": "Presses", "credential_type": "x509", "hardware_id_pattern": "PRESS-[0-9]+"}
    template = site.ask("POST", "/provisioning/templates", body, expect=201)
    keys_only = site.ask("POST", "/provisioning/templates", {"name": "Keys"}, expect=201)
    key, hardware_id = site.key(), "PRESS-12"
    words = ("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{site.csr(key, f'/CN={hardware_id}')}")
    wrong = site.curl("POST", "/.well-known/est/simpleenroll", *words, "-u", f"x:{keys_only['provision_key']}")
    assert wrong.status == 401  # it would make an API key, which EST cannot carry
    known = ("-u", f"x:{template['provision_key']}")
    answer = site.curl("POST", "/.well-known/est/simpleenroll", *words, *known, expect=200)
    certificate = site.new("press.pem")
    certificate.write_bytes(_pkcs7(answer.raw))
    devices = site.ask("GET", f"/devices?q={hardware_id}")["devices"]
    assert [(d["hardware_id"], d["credential_type"]) for d in devices] == [(hardware_id, "x509")]
    assert site.uplink(devices[0]["device_id"], certificate, key) == 202
    assert site.curl("POST", "/.well-known/est/simpleenroll", *words, *known, expect=200).raw == answer.raw
    csr = site.csr(site.key(), f"/CN={hardware_id}")
    words = ("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{csr}")
    assert site.curl("POST", "/.well-known/est/simpleenroll", *words, *known).json["code"] == "FAILED_PRECONDITION"


def test_a_roll_over_beside_the_running_server(site: Site) -> None:
    key, new_key = site.key(), site.key()
    before, old = site.provisioned(key)
    chain_before = site.chain.read_text()
    told = json.loads(command(site.data_dir, "ca", "rollover", "--json"))
    body = {"token": site.token()["token"], "csr": site.csr(new_key).read_text()}
    after = site.curl("POST", "/devices/provision", body=body, expect=201).json
    new = site.new("after.pem")
    new.write_text(after["certificate"])
    issuer = site.new("issuer.pem")
    issuer.write_text(_blocks(after["ca_chain"])[0])
    assert fingerprint_of(issuer).replace(":", "").lower() == told["active"]
    _wait_until(lambda: site.chain.read_text() != chain_before, "the file of what to trust stayed as it was")
    assert _blocks(site.chain.read_text())[-1] == _blocks(chain_before)[-1]  # the root stays
    _wait_until(lambda: _shown_issuer(site) == told["active"], "the server's own certificate is not the new issuer's")
    for certificate in (old, new):
        assert site.verify(certificate).stdout.endswith(b": OK\n")
    assert site.uplink(before["device_id"], old, key) == 202
    assert site.uplink(after["device_id"], new, new_key) == 202
    assert UUID(after["credential_id"]) != UUID(before["credential_id"])
    site.ask("DELETE", f"/devices/certs/{fingerprint_of(old)}")
    crl = site.new("old.crl")
    crl.write_bytes(site.curl("GET", f"/ca/crl?issuer={told['previous']}", expect=200).raw)
    text = openssl("crl", "-inform", "DER", "-in", crl, "-CAfile", site.chain, "-noout", "-text").decode()
    assert openssl("x509", "-in", old, "-noout", "-serial").decode().strip().removeprefix("serial=") in text
    site.curl("GET", f"/ca/crl?issuer={'00' * 32}", expect=404)


def _shown_issuer(site: Site) -> str:
    """The fingerprint of the authority that comes with the server's own certificate."""
    where = f"localhost:{site.ports['https']}"
    said = run("openssl", "s_client", "-connect", where, "-CAfile", site.chain, "-showcerts", data=b"").decode()
    _, issuer, *_ = re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n", said, re.DOTALL)
    path = site.new("shown.pem")
    path.write_text(issuer)
    return fingerprint_of(path).replace(":", "").lower()


def _wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    for _ in range(100):
        if holds():
            return
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError(otherwise)


def _pkcs7(raw: bytes) -> bytes:
    """The certificates of an EST answer, as openssl reads them."""
    said = openssl("pkcs7", "-inform", "DER", "-print_certs", data=base64.b64decode(raw))
    lines, keep = [], False
    for line in said.decode().splitlines():
        keep = keep or line == "-----BEGIN CERTIFICATE-----"
        lines += [line] if keep else []
        keep = keep and line != "-----END CERTIFICATE-----"
    return ("\n".join(lines) + "\n").encode()
