"""What we issue, judged by a public linter (pkilint). Skipped where the linter is not installed.

One finding is kept and named here: pkilint holds that a DNS name has at least two labels, and our server certificates
have to carry `localhost`, which is how the first device on the same machine calls them.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority, make_issuing, make_root, open_set
from certs.chains import bundle
from certs.crl import RevocationReason, RevokedEntry, build_crl, crl_pem
from certs.issuing import DeviceFacts, DeviceProfile, prepare_device, prepare_server, sign
from certs.keys import generate_p256
from certs.request import check_csr

NOW = datetime(2026, 5, 1, tzinfo=UTC)
RANDOM = random.Random(8).randbytes
URL = "http://gate.example/ca.crl"
ROOT = make_root("Gatehouse", NOW, RANDOM)
ISSUING = make_issuing(Authority(ROOT), "Gatehouse", NOW, RANDOM, crl_url=URL)
AUTHORITIES = open_set((ROOT, ISSUING))


def linter(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} of pkilint")
    return found


def findings(tool: str, *arguments: str) -> str:
    """The linter's own words for everything from WARNING up; empty where it found nothing."""
    done = subprocess.run(
        [linter(tool), "lint", "-s", "WARNING", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or done.stdout.strip(), done.stderr
    return done.stdout.strip()


def device() -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = request.sign(ec.derive_private_key(42, ec.SECP256R1()), hashes.SHA256())
    checked = check_csr(signed.public_bytes(Encoding.DER))
    facts = DeviceFacts("6a1f2c3e-1111-4222-8333-944455556666", "acme")
    return sign(prepare_device(checked, facts, AUTHORITIES.active, NOW, RANDOM, DeviceProfile(crl_url=URL))).der


def server(*names: str) -> bytes:
    return sign(prepare_server(generate_p256(RANDOM), names, AUTHORITIES.active, NOW, RANDOM, crl_url=URL)).der


@pytest.mark.parametrize(
    "der",
    [ROOT.certificate_der, ISSUING.certificate_der, device(), server("gate.example", "192.0.2.1", "::1")],
    ids=["root", "issuing", "device", "server"],
)
def test_the_linter_finds_nothing_in_our_certificates(der: bytes, tmp_path: Path) -> None:
    (tmp_path / "certificate.pem").write_bytes(bundle([der]))
    assert findings("lint_pkix_cert", str(tmp_path / "certificate.pem")) == ""


def test_the_name_localhost_is_the_one_finding_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "certificate.pem").write_bytes(bundle([server("localhost", "127.0.0.1")]))
    found = findings("lint_pkix_cert", str(tmp_path / "certificate.pem"))
    assert found.count("(ERROR)") == 1
    assert "(WARNING)" not in found
    assert 'Invalid domain name syntax: "localhost"' in found


def test_the_linter_finds_nothing_between_issuers_and_their_certificates(tmp_path: Path) -> None:
    links = ((ROOT.certificate_der, ISSUING.certificate_der), (ISSUING.certificate_der, device()))
    for issuer, subject in links:
        (tmp_path / "issuer.pem").write_bytes(bundle([issuer]))
        (tmp_path / "subject.pem").write_bytes(bundle([subject]))
        arguments = (str(tmp_path / "issuer.pem"), str(tmp_path / "subject.pem"))
        assert findings("lint_pkix_signer_signee_cert_chain", *arguments) == ""


def test_the_linter_finds_nothing_in_our_revocation_lists(tmp_path: Path) -> None:
    entries = [RevokedEntry(f"{number + 1:x}", NOW, reason) for number, reason in enumerate(RevocationReason)]
    for listed in ((), entries):
        (tmp_path / "crl.pem").write_bytes(crl_pem(build_crl(AUTHORITIES.active, listed, 1, NOW)))
        assert findings("lint_crl", "-t", "CRL", "-p", "PKIX", str(tmp_path / "crl.pem")) == ""
