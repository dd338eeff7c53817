"""Keys: making them from given random bytes, storing them as PKCS#8, naming what kind they are.

A private key exists in two forms. `PrivateKeyPem` is the form that travels and is stored (sealed, by the caller): it
shows nothing when printed, and nothing but `reveal()` gives its bytes. A `SigningKey` is the opened form and never
leaves the module that signs with it.

Randomness is an argument, so a key is a pure function of the bytes given: pass `secrets.token_bytes`, or a seeded
source in a test. ECDSA signatures are deterministic (RFC 6979) where the OpenSSL beneath can do it, so a machine with
poor entropy early in its boot does not betray its CA key by a repeated nonce.

What can be lost: nothing here. What can leak: whatever the caller does with `reveal()`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from typing import NoReturn, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

RandomBytes: TypeAlias = Callable[[int], bytes]
"""A source of `n` unpredictable bytes, such as `secrets.token_bytes`."""

SigningKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
SubjectPublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
"""The kinds of public key that Gatehouse certifies."""

# FIPS 186-5, appendix A.2.1 asks for 64 bits more than the order has, which makes the bias of the reduction
# negligible; 48 bytes give 128.
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_P256_SEED_BYTES = 48
_MAXIMUM_PRIVATE_KEY_BYTES = 64 * 1024
"""An RSA-16384 key in PEM is below 13 KB; anything longer is not a key."""


class KeyKind(Enum):
    """The public keys that a certificate of ours may carry; the value is the name in records and messages."""

    P256 = "ec-p256"
    P384 = "ec-p384"
    ED25519 = "ed25519"
    RSA = "rsa"


class BadKey(ValueError):
    """A private key could not be read. The message never quotes the input."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PrivateKeyPem:
    """An unencrypted PKCS#8 private key in PEM. Printing, formatting and pickling it give nothing away."""

    _pem: bytes

    def reveal(self) -> bytes:
        """The PEM bytes. The caller seals them, or writes them to a file that only the owner can read."""
        return self._pem

    def __repr__(self) -> str:
        return "PrivateKeyPem(…)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrivateKeyPem):
            return NotImplemented
        return hmac.compare_digest(self._pem, other._pem)

    def __hash__(self) -> int:
        return hash(sha256(self._pem).digest())

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled; reveal() and seal it")


def generate_p256(random: RandomBytes) -> PrivateKeyPem:
    """A new ECDSA P-256 key from 48 bytes of `random`."""
    seed = _draw(random, _P256_SEED_BYTES)
    scalar = int.from_bytes(seed, "big") % (_P256_ORDER - 1) + 1
    return dump_private_key(ec.derive_private_key(scalar, ec.SECP256R1()))


def generate_ed25519(random: RandomBytes) -> PrivateKeyPem:
    """A new Ed25519 key from 32 bytes of `random` (RFC 8032 §5.1.5)."""
    return dump_private_key(ed25519.Ed25519PrivateKey.from_private_bytes(_draw(random, 32)))


def dump_private_key(key: SigningKey) -> PrivateKeyPem:
    """The PKCS#8 PEM form of an opened key."""
    return PrivateKeyPem(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def load_private_key(stored: PrivateKeyPem | bytes) -> SigningKey:
    """Opens an unencrypted P-256, P-384 or Ed25519 private key, PEM or DER (PKCS#8 or the older EC form).

    Raises BadKey for everything else; the message says what was expected and nothing of what was given.
    """
    data = stored.reveal() if isinstance(stored, PrivateKeyPem) else stored
    if len(data) > _MAXIMUM_PRIVATE_KEY_BYTES:
        raise BadKey(f"a private key of {len(data)} bytes; at most {_MAXIMUM_PRIVATE_KEY_BYTES} are read")
    try:
        if b"-----BEGIN" in data:
            key = serialization.load_pem_private_key(data, password=None)
        else:
            key = serialization.load_der_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # TypeError is how an encrypted key is reported. The cause is cut: it may quote what it could not parse.
        raise BadKey("not an unencrypted private key in PEM or DER") from None
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    raise BadKey("a private key of an unsupported kind; P-256, P-384 and Ed25519 are supported")


def public_key_of(stored: PrivateKeyPem) -> bytes:
    """The SubjectPublicKeyInfo (DER) that belongs to a private key. Raises BadKey."""
    return spki_der(load_private_key(stored).public_key())


def spki_der(key: PublicKeyTypes) -> bytes:
    """The SubjectPublicKeyInfo in DER (RFC 5280 §4.1.2.7): the canonical form in which keys are compared."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def spki_sha256(spki: bytes) -> str:
    """The lower-case hex SHA-256 of a SubjectPublicKeyInfo; "the same public key" means that this is the same."""
    return sha256(spki).hexdigest()


def kind_of(key: PublicKeyTypes) -> KeyKind | None:
    """The kind of a public key, or None where Gatehouse certifies no such key."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return KeyKind.ED25519
    if isinstance(key, rsa.RSAPublicKey):
        return KeyKind.RSA
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return KeyKind.P256
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return KeyKind.P384
    return None


def load_subject_public_key(spki: bytes) -> SubjectPublicKey:
    """Opens a SubjectPublicKeyInfo (DER) of a kind that Gatehouse certifies. Raises BadKey."""
    try:
        key = serialization.load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        raise BadKey("not a public key") from None
    if isinstance(key, ed25519.Ed25519PublicKey | rsa.RSAPublicKey | ec.EllipticCurvePublicKey) and kind_of(key):
        return key
    raise BadKey("a public key of an unsupported kind; P-256, P-384, Ed25519 and RSA are supported")


def signature_hash(key: SigningKey) -> hashes.SHA256 | hashes.SHA384 | None:
    """The hash that a signature by this key uses: as strong as the curve; None for Ed25519, which has its own."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return None
    return hashes.SHA384() if isinstance(key.curve, ec.SECP384R1) else hashes.SHA256()


def deterministic_ecdsa(key: SigningKey) -> bool | None:
    """The `ecdsa_deterministic` argument for a signature by this key; None where it is not applicable."""
    if isinstance(key, ed25519.Ed25519PrivateKey) or not backend.ecdsa_deterministic_supported():
        return None
    return True


def _draw(random: RandomBytes, count: int) -> bytes:
    drawn = random(count)
    if len(drawn) != count:
        raise ValueError(f"the random source gave {len(drawn)} bytes where {count} were asked for")
    return drawn
