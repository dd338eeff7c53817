"""Public keys that are valid in form and worthless in fact.

A certificate binds a device to a key on the promise that only the device has the private half. For the keys found
here that promise is false from the start: anybody who sees the public half can sign.

  RSA      an even or tiny-factor modulus; two primes so close that Fermat's method finds them; moduli of the flawed
           Infineon library (CVE-2017-15361: primes of the form k·M + 65537^a mod M, seen by their residues)
  Ed25519  points of small order, for which a valid signature can be written without any private key, and encodings
           that are not the shortest (RFC 8032 §5.1.3)

Every check is pure arithmetic on public values, bounded in work; each returns a reason in words, or None.
"""

from __future__ import annotations

from math import gcd, isqrt, prod
from typing import Final

_FERMAT_STEPS = 100
"""Honest primes of 1024 bits differ in their upper half, so no step count finds them; careless ones fall in a few."""
_FIELD: Final = 2**255 - 19
_EDWARDS_D: Final = -121665 * pow(121666, -1, _FIELD) % _FIELD  # RFC 8032 §5.1


def rsa_weakness(modulus: int) -> str | None:
    """Why an RSA modulus is not worth a certificate, or None. A false alarm has a chance below one in 2^27."""
    if gcd(modulus, _SMALL_PRIME_PRODUCT) != 1:
        return "the modulus has a small factor"
    if _has_close_primes(modulus):
        return "the two primes of the modulus are too close"
    if all(modulus % prime in residues for prime, residues in _FLAWED_RESIDUES):
        return "the modulus was made by a generator known to be flawed (CVE-2017-15361)"
    return None


def ed25519_weakness(public_bytes: bytes) -> str | None:
    """Why 32 bytes of an Ed25519 public key are not worth a certificate, or None."""
    y = int.from_bytes(public_bytes, "little") & ~(1 << 255)
    if y >= _FIELD:
        return "the point is not encoded in the canonical form"
    # The orders 1, 2 and 4 have y = ±1 or 0. A point of order 8 doubles to one with y = 0, that is x² = -y², and
    # with the curve's equation -x² + y² = 1 + d·x²·y² this becomes d·y⁴ + 2·y² - 1 = 0.
    square = y * y % _FIELD
    if y == 0 or square == 1 or (_EDWARDS_D * square * square + 2 * square - 1) % _FIELD == 0:
        return "the point has a small order"
    return None


def _has_close_primes(modulus: int) -> bool:
    a = isqrt(modulus)
    if a * a < modulus:
        a += 1
    for _ in range(_FERMAT_STEPS):
        rest = a * a - modulus
        if isqrt(rest) ** 2 == rest:
            return True
        a += 1
    return False


def _primes_below(limit: int) -> list[int]:
    return [number for number in range(2, limit) if all(number % d for d in range(2, isqrt(number) + 1))]


def _powers(base: int, prime: int) -> frozenset[int]:
    return frozenset(pow(base, exponent, prime) for exponent in range(prime - 1))


_SMALL_PRIME_PRODUCT: Final = prod(_primes_below(2000))
# The product of the primes up to 167 divides M for every key length of the flawed generator; both primes, hence the
# modulus, are then powers of 65537 modulo each of them. Primes for which 65537 generates everything tell nothing.
_FLAWED_RESIDUES: Final = tuple(
    (prime, residues) for prime in _primes_below(168) if len(residues := _powers(65537, prime)) < prime - 1
)
