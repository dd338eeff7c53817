"""Revocation lists: what is in them, and what their inputs may be."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography import x509

from certs.authority import Authority, make_issuing, make_root
from certs.crl import RevocationReason, RevokedEntry, build_crl

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
RANDOM = random.Random(6).randbytes
ISSUER = Authority(make_issuing(Authority(make_root("Gatehouse", NOW, RANDOM)), "Gatehouse", NOW, RANDOM))


def test_a_list_has_number_due_date_and_key_identifier_and_verifies() -> None:
    crl = x509.load_der_x509_crl(build_crl(ISSUER, (), 7, NOW))
    assert crl.is_signature_valid(ISSUER.certificate.public_key())
    assert crl.issuer == ISSUER.certificate.subject
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 7
    assert crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value == ISSUER.key_identifier
    assert (crl.last_update_utc, crl.next_update_utc) == (NOW, NOW + timedelta(days=7))
    assert len(crl) == 0


def test_entries_carry_their_reason_and_their_time_in_utc() -> None:
    berlin = timezone(timedelta(hours=2))
    entries = [
        RevokedEntry("7fff", datetime(2026, 5, 1, 13, 30, 5, 999, tzinfo=berlin), RevocationReason.KEY_COMPROMISE),
        RevokedEntry("0a", NOW + timedelta(minutes=5)),
    ]
    crl = x509.load_der_x509_crl(build_crl(ISSUER, entries, 1, NOW))
    ahead, compromised = list(crl)
    assert (ahead.serial_number, ahead.revocation_date_utc) == (0x0A, NOW)
    assert len(ahead.extensions) == 0
    assert compromised.revocation_date_utc == datetime(2026, 5, 1, 11, 30, 5, tzinfo=UTC)
    reason = compromised.extensions.get_extension_for_class(x509.CRLReason).value.reason
    assert reason is x509.ReasonFlags.key_compromise


def test_every_reason_can_be_written() -> None:
    entries = [RevokedEntry(f"{n + 1:x}", NOW, reason) for n, reason in enumerate(RevocationReason)]
    assert len(x509.load_der_x509_crl(build_crl(ISSUER, entries, 1, NOW))) == len(RevocationReason)


def test_equal_inputs_give_equal_lists_whatever_their_order() -> None:
    entries = [RevokedEntry(f"{n:x}", NOW) for n in range(1, 20)]
    assert build_crl(ISSUER, entries, 3, NOW) == build_crl(ISSUER, reversed(entries), 3, NOW)


@pytest.mark.parametrize(
    ("entries", "number", "now"),
    [
        ((RevokedEntry("0", NOW),), 1, NOW),
        ((RevokedEntry("-1", NOW),), 1, NOW),
        ((RevokedEntry("f" * 42, NOW),), 1, NOW),
        ((RevokedEntry("xyz", NOW),), 1, NOW),
        ((RevokedEntry("1", NOW.replace(tzinfo=None)),), 1, NOW),
        ((RevokedEntry("1", NOW), RevokedEntry("01", NOW)), 1, NOW),
        ((), -1, NOW),
        ((), 2**160, NOW),
        ((), 1, NOW.replace(tzinfo=None)),
    ],
    ids=range(9),
)
def test_impossible_lists_are_not_signed(entries: tuple[RevokedEntry, ...], number: int, now: datetime) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - several messages, one kind
        build_crl(ISSUER, entries, number, now)


def test_long_lists_take_time_in_proportion() -> None:
    def seconds(count: int) -> float:
        entries = [RevokedEntry(f"{n:x}", NOW) for n in range(1, count + 1)]
        begin = time.process_time()
        build_crl(ISSUER, entries, 1, NOW)
        return time.process_time() - begin

    few, many = max(seconds(1_000), 0.002), seconds(10_000)
    assert many < 40 * few  # ten times as much; a list copied for every entry would take a hundred times
