"""Admission to a handshake: each limit refuses by its own name, and places are given back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.tls.admission import Drop, Ledger, TlsCounters, TlsLimits, address_block


class Shaking:
    """A handshake in flight."""

    def __init__(self, ledger: Ledger, address: str) -> None:
        self.ledger = ledger
        self.address = address
        self.displaced = False

    def displace(self) -> None:
        self.displaced = True
        self.ledger.handshake_ended(self.address, self)


def come(ledger: Ledger, address: str) -> Shaking | Drop:
    """A newcomer, or why there is none."""
    newcomer = Shaking(ledger, address)
    return ledger.admit(address, newcomer) or newcomer


def came(ledger: Ledger, address: str) -> Shaking:
    newcomer = come(ledger, address)
    assert isinstance(newcomer, Shaking)
    return newcomer


def test_each_limit_refuses_by_name_and_takes_no_place() -> None:
    counters = TlsCounters()
    ledger = Ledger(TlsLimits(connections=5, handshakes_in_flight=3, handshakes_per_address=2), counters)
    first, second = came(ledger, "10.0.0.1"), came(ledger, "10.0.0.1")
    assert come(ledger, "10.0.0.1") is Drop.ADDRESS_LIMIT
    ledger.handshake_ended("10.0.0.1", first)
    third, fourth = came(ledger, "10.0.0.2"), came(ledger, "10.0.0.3")
    assert come(ledger, "10.0.0.4") is Drop.HANDSHAKE_LIMIT
    assert come(ledger, "10.0.0.1") is Drop.HANDSHAKE_LIMIT
    ledger.handshake_ended("10.0.0.1", second)
    assert isinstance(come(ledger, "10.0.0.4"), Shaking)
    ledger.handshake_ended("10.0.0.2", third)
    ledger.handshake_ended("10.0.0.3", fourth)
    assert come(ledger, "10.0.0.6") is Drop.CONNECTION_LIMIT
    ledger.connection_ended("10.0.0.1")
    assert isinstance(come(ledger, "10.0.0.6"), Shaking)
    assert (counters.open, counters.handshaking) == (5, 2)


def test_one_address_cannot_hold_every_connection() -> None:
    counters = TlsCounters()
    ledger = Ledger(TlsLimits(connections=10, connections_per_address=2), counters)
    for address in ("2001:db8::1", "2001:db8::2"):
        ledger.handshake_ended(address, came(ledger, address))
    assert come(ledger, "2001:db8::3") is Drop.ADDRESS_CONNECTIONS
    assert isinstance(come(ledger, "2001:db8:0:1::3"), Shaking)  # a neighbour's block
    ledger.connection_ended("2001:db8::2")
    assert isinstance(come(ledger, "2001:db8::3"), Shaking)
    assert counters.open == 3


def test_the_oldest_handshake_of_the_greediest_address_gives_way() -> None:
    ledger = Ledger(TlsLimits(handshakes_in_flight=6), TlsCounters())
    alone = came(ledger, "10.0.0.1")
    crowd = [came(ledger, "10.0.0.2") for _ in range(3)]
    pair = [came(ledger, "10.0.0.3") for _ in range(2)]
    newcomers = [came(ledger, "10.0.0.4")]
    assert [each.displaced for each in crowd] == [True, False, False]
    newcomers.append(came(ledger, "10.0.0.5"))
    assert sum(each.displaced for each in crowd + pair) == 2
    newcomers.append(came(ledger, "10.0.0.6"))
    assert [each.displaced for each in crowd] == [True, True, False]
    assert [each.displaced for each in pair] == [True, False]
    assert come(ledger, "10.0.0.7") is Drop.HANDSHAKE_LIMIT  # each of six has one
    assert not any(each.displaced for each in [alone, *newcomers])


def test_who_is_refused_for_its_own_address_displaces_nobody() -> None:
    limits = TlsLimits(handshakes_in_flight=4, handshakes_per_address=4, connections_per_address=4)
    ledger = Ledger(limits, TlsCounters())
    for _ in range(4):
        ledger.handshake_ended("10.0.0.1", came(ledger, "10.0.0.1"))
    crowd = [came(ledger, "10.0.0.2") for _ in range(4)]
    assert come(ledger, "10.0.0.1") is Drop.ADDRESS_CONNECTIONS
    assert come(ledger, "10.0.0.2") is Drop.ADDRESS_LIMIT
    assert not any(each.displaced for each in crowd)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=120))
def test_shares_come_out_even_whoever_comes(steps: list[tuple[bool, int]]) -> None:
    """Against a plain model: only the greediest loses, never to somebody who then holds more, and nobody's only one."""
    counters = TlsCounters()
    ledger = Ledger(TlsLimits(handshakes_in_flight=10, handshakes_per_address=6), counters)
    living: list[Shaking] = []
    for comes, number in steps:
        address = f"10.0.0.{number}"
        held = Counter(each.address for each in living)
        if not comes:
            oldest = next((each for each in living if each.address == address), None)
            if oldest is not None:
                living.remove(oldest)
                ledger.handshake_ended(address, oldest)
            continue
        newcomer = come(ledger, address)
        displaced = [each for each in living if each.displaced]
        living = [each for each in living if not each.displaced]
        if isinstance(newcomer, Drop):
            assert displaced == []
            full = sum(held.values()) == 10 and max(held.values()) <= held[address] + 1
            assert newcomer is (Drop.ADDRESS_LIMIT if held[address] == 6 else Drop.HANDSHAKE_LIMIT)
            assert held[address] == 6 or full
            continue
        living.append(newcomer)
        assert len(displaced) == (sum(held.values()) == 10)
        for loser in displaced:
            assert held[loser.address] == max(held.values()) > held[address] + 1
    assert counters.handshaking == len(living)


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
