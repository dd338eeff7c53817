"""Certificate revocation lists (RFC 5280 §5): complete lists of version 2, one for each issuing CA.

A list is a pure function of its inputs: issuer, entries, number, time. The caller keeps the number and raises it with
every list (§5.2.3), and decides which entries are still due: a revoked certificate stays listed until the first list
after its expiry (§3.3). Entries are sorted by serial, so equal inputs give equal lists.

The built-in admission never reads these lists; the resolver looks certificates up by fingerprint. They are for other
verifiers who trust our authorities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from itertools import pairwise
from typing import Final, assert_never

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority
from certs.pem import write_block

CRL_LIFETIME: Final = timedelta(days=7)
"""How long a verifier may work with a list; a fresh one is signed after every revocation and well before this."""
_MAXIMUM_NUMBER = 2**159  # RFC 5280 §5.2.3: at most 20 octets
_MAXIMUM_SERIAL = 2**159  # RFC 5280 §4.1.2.2


class RevocationReason(Enum):
    """Why a certificate is revoked (RFC 5280 §5.3.1), as far as a complete list of device certificates needs it."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key_compromise"
    AFFILIATION_CHANGED = "affiliation_changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation_of_operation"
    PRIVILEGE_WITHDRAWN = "privilege_withdrawn"


@dataclass(frozen=True, slots=True)
class RevokedEntry:
    """One revoked certificate: its serial as `IssuanceIntent.serial_hex` has it, when (aware), and why."""

    serial_hex: str
    revoked_at: datetime
    reason: RevocationReason = RevocationReason.UNSPECIFIED


def build_crl(
    issuer: Authority,
    entries: Iterable[RevokedEntry],
    number: int,
    now: datetime,
    lifetime: timedelta = CRL_LIFETIME,
) -> bytes:
    """Signs the revocation list (DER) of one authority, valid from `now`, due again at the end of `lifetime`.

    A revocation that another node's clock dates after `now` is dated `now`. Raises ValueError for naive times, a
    serial or number out of range, and a serial that is listed twice.
    """
    if not 0 <= number < _MAXIMUM_NUMBER:
        raise ValueError("a CRL number has to be from 0 to 20 octets long")
    moment = _whole_seconds(now)
    revoked = [_entry(entry, moment) for entry in entries]
    revoked.sort(key=lambda entry: entry.serial_number)
    for before, after in pairwise(revoked):
        if before.serial_number == after.serial_number:
            raise ValueError(f"the serial {before.serial_number:x} is listed twice")
    # Handed over as a whole: adding one by one copies the list each time.
    builder = (
        x509.CertificateRevocationListBuilder(revoked_certificates=revoked)
        .issuer_name(issuer.certificate.subject)
        .last_update(moment)
        .next_update(moment + lifetime)
        .add_extension(issuer.key_identifier, critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    return issuer._sign_revocation_list(builder).public_bytes(Encoding.DER)


def crl_pem(der: bytes) -> bytes:
    """A revocation list in PEM (RFC 7468 §6)."""
    return write_block("X509 CRL", der)


def _entry(entry: RevokedEntry, now: datetime) -> x509.RevokedCertificate:
    serial = int(entry.serial_hex, 16)
    if not 0 < serial < _MAXIMUM_SERIAL:
        raise ValueError("a serial has to be positive and at most 20 octets long")
    moment = min(_whole_seconds(entry.revoked_at), now)
    builder = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment)
    flag = _flag(entry.reason)
    if flag is not None:
        builder = builder.add_extension(x509.CRLReason(flag), critical=False)
    return builder.build()


def _flag(reason: RevocationReason) -> x509.ReasonFlags | None:
    match reason:
        case RevocationReason.UNSPECIFIED:
            return None  # RFC 5280 §5.3.1: left out rather than written
        case RevocationReason.KEY_COMPROMISE:
            return x509.ReasonFlags.key_compromise
        case RevocationReason.AFFILIATION_CHANGED:
            return x509.ReasonFlags.affiliation_changed
        case RevocationReason.SUPERSEDED:
            return x509.ReasonFlags.superseded
        case RevocationReason.CESSATION_OF_OPERATION:
            return x509.ReasonFlags.cessation_of_operation
        case RevocationReason.PRIVILEGE_WITHDRAWN:
            return x509.ReasonFlags.privilege_withdrawn
        case _:
            assert_never(reason)


def _whole_seconds(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time without a zone; revocation lists are dated in UTC")
    return moment.astimezone(UTC).replace(microsecond=0)
