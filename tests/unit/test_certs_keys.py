"""Keys: made from given bytes, stored without showing, and weak ones recognised."""

from __future__ import annotations

import pickle
import random
from math import prod

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from certs.der import MalformedDer, dotted, read_der
from certs.keys import (
    BadKey,
    PrivateKeyPem,
    generate_ed25519,
    generate_p256,
    load_private_key,
    load_subject_public_key,
    public_key_of,
    spki_der,
    spki_sha256,
)
from certs.weak_keys import ed25519_weakness, rsa_weakness

RANDOM = random.Random(2).randbytes
FIELD = 2**255 - 19


@pytest.mark.parametrize("generate", [generate_p256, generate_ed25519])
def test_a_key_is_a_function_of_the_bytes_given(generate) -> None:
    first, again = generate(random.Random(1).randbytes), generate(random.Random(1).randbytes)
    assert first == again
    assert hash(first) == hash(again)
    assert first != generate(RANDOM)
    assert spki_der(load_private_key(first).public_key()) == public_key_of(first)
    with pytest.raises(ValueError, match="random source"):
        generate(lambda _: b"short")


@pytest.mark.parametrize("drawn", [b"\x00", b"\xff"])
def test_extreme_bytes_still_give_a_key(drawn: bytes) -> None:
    assert generate_p256(lambda count: drawn * count).reveal()


def test_a_stored_key_shows_nothing() -> None:
    key = generate_p256(RANDOM)
    body = key.reveal().decode().splitlines()[1]
    for shown in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert body not in shown
    with pytest.raises(TypeError):
        pickle.dumps(key)
    assert key != key.reveal()


def test_keys_load_from_pem_and_der_in_both_forms() -> None:
    key = ec.derive_private_key(12, ec.SECP384R1())
    for encoding in (Encoding.PEM, Encoding.DER):
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
            loaded = load_private_key(key.private_bytes(encoding, form, NoEncryption()))
            assert spki_der(loaded.public_key()) == spki_der(key.public_key())


def test_unreadable_keys_are_refused_without_quoting_them() -> None:
    curve = ec.derive_private_key(12, ec.SECP256R1())
    foreign = rsa.generate_private_key(65537, 2048)
    locked = curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    unsupported = foreign.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (
        b"",
        b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
        locked,
        unsupported,
        b"x" * 70_000,
    ):
        with pytest.raises(BadKey) as caught:
            load_private_key(PrivateKeyPem(data))
        assert "c2VjcmV0" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_only_the_certified_kinds_of_public_key_are_opened() -> None:
    assert load_subject_public_key(public_key_of(generate_ed25519(RANDOM)))
    for spki in (b"", spki_der(ec.derive_private_key(1, ec.SECP521R1()).public_key())):
        with pytest.raises(BadKey):
            load_subject_public_key(spki)
    assert len(spki_sha256(b"")) == 64


# --- weak keys --------------------------------------------------------------------------------------------------------


def test_an_honest_rsa_modulus_is_not_weak() -> None:
    for _ in range(3):
        assert rsa_weakness(rsa.generate_private_key(65537, 2048).public_key().public_numbers().n) is None


def test_small_factors_and_close_primes_are_found() -> None:
    numbers = rsa.generate_private_key(65537, 2048).private_numbers()
    assert "factor" in (rsa_weakness(3 * numbers.p) or "")
    assert "factor" in (rsa_weakness(2 * numbers.p) or "")
    neighbour = next(q for q in range(numbers.p + 2**400, 2**1025, 2) if rsa_weakness(q * numbers.q) is None)
    assert "close" in (rsa_weakness(numbers.p * neighbour) or "")  # it need not be prime to be found
    assert "close" in (rsa_weakness(numbers.p**2) or "")


def test_a_modulus_of_the_flawed_generator_is_found() -> None:
    primes = [number for number in range(2, 168) if all(number % divisor for divisor in range(2, number))]
    product = prod(primes)

    def flawed(multiple: int, exponent: int) -> int:
        """A number of the generator's form without a factor below 2000: for the residues it need not be prime."""
        while True:
            candidate = multiple * product + pow(65537, exponent, product)
            if all(candidate % small for small in range(3, 2000, 2)):
                return candidate
            multiple += 1

    modulus = flawed(2**800, 1234567) * flawed(2**790, 7654321)
    assert "CVE-2017-15361" in (rsa_weakness(modulus) or "")


def test_every_point_of_small_order_is_found() -> None:
    d = -121665 * pow(121666, -1, FIELD) % FIELD
    # y of order 8, from y² = (-1 ± sqrt(1 + d)) / d
    root = pow(1 + d, (FIELD + 3) // 8, FIELD)
    if root * root % FIELD != (1 + d) % FIELD:
        root = root * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    assert root * root % FIELD == (1 + d) % FIELD
    found = [0, 1, FIELD - 1]
    for sign in (root, FIELD - root):
        square = (sign - 1) * pow(d, -1, FIELD) % FIELD
        y = pow(square, (FIELD + 3) // 8, FIELD)
        for candidate in (y, y * pow(2, (FIELD - 1) // 4, FIELD) % FIELD):
            if candidate * candidate % FIELD == square:
                found += [candidate, FIELD - candidate]
    assert len(found) == 5
    for y in found:
        for mark in (0, 1 << 255):
            assert "small order" in (ed25519_weakness((y | mark).to_bytes(32, "little")) or "")
    assert "canonical" in (ed25519_weakness((FIELD + 1).to_bytes(32, "little")) or "")


def test_an_honest_point_is_not_weak() -> None:
    for seed in range(20):
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        assert ed25519_weakness(key.public_key().public_bytes_raw()) is None


# --- the strict reader ------------------------------------------------------------------------------------------------


@given(st.binary(max_size=120))
@settings(deadline=None)
def test_the_reader_is_total_and_faithful(data: bytes) -> None:
    try:
        element = read_der(data)
    except MalformedDer:
        return
    assert element.encoding == data


@pytest.mark.parametrize(
    ("encoded", "text"),
    [("06032b6570", "1.3.101.112"), ("0603550403", "2.5.4.3"), ("060388370b", "2.999.11"), ("06012a", "1.2")],
)
def test_identifiers_are_written_with_dots(encoded: str, text: str) -> None:
    assert dotted(read_der(bytes.fromhex(encoded))) == text


@pytest.mark.parametrize(
    "encoded",
    [
        *["0600", "060180", "0602802a", "06032a8001", "0500ff", "050100", "010102", "0201", "02020001", "0202ff80"],
        *["0300", "030108", "03020101", "030101", "0000", "1000", "2500", "8085", "0281", "028100", "0282", "3f00"],
        *["31060201020201013000", "3106020102020101", "3106020101020101", "30800000", "", "02", "84ff"],
    ],
)
def test_what_is_not_der_is_refused(encoded: str) -> None:
    with pytest.raises(MalformedDer):
        read_der(bytes.fromhex(encoded))
