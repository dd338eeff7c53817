"""Admission to a handshake: each limit refuses by its own name, and places are given back."""

from __future__ import annotations

import pytest

from adapters.tls.admission import Drop, Ledger, TlsCounters, TlsLimits, address_block


def test_each_limit_refuses_by_name_and_takes_no_place() -> None:
    counters = TlsCounters()
    ledger = Ledger(TlsLimits(connections=4, handshakes_in_flight=3, handshakes_per_address=2), counters)
    assert [ledger.admit("10.0.0.1") for _ in range(3)] == [None, None, Drop.ADDRESS_LIMIT]
    assert ledger.admit("10.0.0.2") is None
    assert ledger.admit("10.0.0.3") is Drop.HANDSHAKE_LIMIT
    ledger.handshake_ended("10.0.0.1")
    assert ledger.admit("10.0.0.1") is None
    ledger.handshake_ended("10.0.0.2")
    assert ledger.admit("10.0.0.4") is Drop.CONNECTION_LIMIT
    ledger.connection_ended("10.0.0.1")
    assert ledger.admit("10.0.0.4") is None
    assert (counters.open, counters.handshaking) == (4, 3)


def test_one_address_cannot_hold_every_connection() -> None:
    counters = TlsCounters()
    ledger = Ledger(TlsLimits(connections=10, connections_per_address=2), counters)
    for address in ("2001:db8::1", "2001:db8::2"):
        assert ledger.admit(address) is None
        ledger.handshake_ended(address)
    assert ledger.admit("2001:db8::3") is Drop.ADDRESS_CONNECTIONS
    assert ledger.admit("2001:db8:0:1::3") is None  # a neighbour's block
    ledger.connection_ended("2001:db8::2")
    assert ledger.admit("2001:db8::3") is None
    assert counters.open == 3


@pytest.mark.parametrize(
    ("address", "block"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "20010db800010002::/64"),
        ("2001:db8:1:2:ffff::4", "20010db800010002::/64"),
        ("fe80::1%eth0", "fe80000000000000::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_ipv6_counts_by_its_64(address: str, block: str) -> None:
    assert address_block(address) == block


def test_every_drop_has_its_counter() -> None:
    counters = TlsCounters()
    for reason in Drop:
        counters.drop(reason)
        assert counters.as_dict()[reason.value] == 1


def test_water_marks_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="write_low_water"):
        TlsLimits(write_low_water=2, write_high_water=1)
