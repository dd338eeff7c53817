"""Who gives way to a newcomer, and in which order: `adapters.dtls.admission.Ledger` by itself.

Nothing here has time or I/O. Each test fills a ledger, asks for one place more, and looks at whose it would be.
"""

from __future__ import annotations

import random

from adapters.dtls.admission import Drop, DtlsCounters, DtlsLimits, GiveWay, Ledger, Place


def taken(ledger: Ledger, address: str) -> Place:
    """A place, where there must be one."""
    place = ledger.admit(address)
    assert isinstance(place, Place)
    return place


def verified(ledger: Ledger, address: str, *, kept: bool = False) -> Place:
    """An association."""
    place = taken(ledger, address)
    ledger.verified(place)
    if kept:
        ledger.kept(place)
    return place


def test_at_a_full_table_the_oldest_of_nobodys_gives_way_before_any_handshake() -> None:
    ledger = Ledger(DtlsLimits(associations=4), DtlsCounters())
    verified(ledger, "192.0.2.1", kept=True)
    fresh = taken(ledger, "192.0.2.2")
    older, newer = verified(ledger, "192.0.2.3"), verified(ledger, "192.0.2.4")
    assert ledger.admit("192.0.2.5") == GiveWay(older)
    ledger.ended(older)
    taken(ledger, "192.0.2.5")
    assert ledger.admit("192.0.2.6") == GiveWay(newer)
    ledger.kept(newer)
    assert ledger.admit("192.0.2.6") == GiveWay(fresh), "somebody's stays"


def test_at_a_full_block_its_own_give_way_and_no_other() -> None:
    ledger = Ledger(DtlsLimits(associations_per_address=2), DtlsCounters())
    verified(ledger, "192.0.2.1")
    verified(ledger, "192.0.2.2", kept=True)
    mine = verified(ledger, "192.0.2.2")
    assert ledger.admit("192.0.2.2") == GiveWay(mine)
    ledger.kept(mine)
    assert ledger.admit("192.0.2.2") is Drop.ADDRESS_ASSOCIATIONS


def test_what_is_counted_is_what_is_there_whatever_comes_and_goes() -> None:
    generator, counters = random.Random(3), DtlsCounters()
    limits = DtlsLimits(associations=20, associations_per_address=8, handshakes_in_flight=10, handshakes_per_address=4)
    ledger = Ledger(limits, counters)
    shaking: list[Place] = []
    nobodies: list[Place] = []
    kept: list[Place] = []
    for _ in range(5_000):
        match generator.randrange(5):
            case 0 | 1:
                answer = ledger.admit(f"192.0.2.{generator.randrange(5)}")
                if isinstance(answer, Place):
                    shaking.append(answer)
                elif isinstance(answer, GiveWay):
                    (shaking if answer.place in shaking else nobodies).remove(answer.place)
                    ledger.ended(answer.place)
            case 2 if shaking:
                place = shaking.pop(generator.randrange(len(shaking)))
                ledger.verified(place)
                nobodies.append(place)
            case 3 if nobodies:
                place = nobodies.pop(generator.randrange(len(nobodies)))
                ledger.kept(place)
                kept.append(place)
            case _:
                some = generator.choice([shaking, nobodies, kept])
                if some:
                    ledger.ended(some.pop(generator.randrange(len(some))))
        assert (counters.handshaking, counters.open) == (len(shaking), len(nobodies) + len(kept))
        assert counters.handshaking + counters.open <= limits.associations
    for place in (*shaking, *nobodies, *kept):
        ledger.ended(place)
    assert (counters.handshaking, counters.open) == (0, 0)
