"""Who gives way to a newcomer, and in which order: `adapters.dtls.admission.Ledger` by itself.

Time is a number here, and there is no I/O. Each test fills a ledger, asks for one place more, and looks at whose it
would be.
"""

from __future__ import annotations

import random

from adapters.dtls.admission import Drop, DtlsCounters, DtlsLimits, GiveWay, Ledger, Place


def taken(ledger: Ledger, address: str, now: float = 0.0) -> Place:
    """A place, where there must be one."""
    place = ledger.admit(address, now)
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
    assert ledger.admit("192.0.2.5", 0.0) == GiveWay(older)
    ledger.ended(older)
    taken(ledger, "192.0.2.5")
    assert ledger.admit("192.0.2.6", 0.0) == GiveWay(newer)
    ledger.kept(newer)
    assert ledger.admit("192.0.2.6", 0.0) == GiveWay(fresh), "somebody's stays"


def test_at_a_full_block_its_own_give_way_and_no_other() -> None:
    ledger = Ledger(DtlsLimits(associations_per_address=2), DtlsCounters())
    verified(ledger, "192.0.2.1")
    verified(ledger, "192.0.2.2", kept=True)
    mine = verified(ledger, "192.0.2.2")
    assert ledger.admit("192.0.2.2", 0.0) == GiveWay(mine)
    ledger.kept(mine)
    assert ledger.admit("192.0.2.2", 0.0) is Drop.ADDRESS_ASSOCIATIONS


def test_what_is_counted_is_what_is_there_whatever_comes_and_goes() -> None:
    generator, counters = random.Random(3), DtlsCounters()
    limits = DtlsLimits(associations=20, associations_per_address=8, handshakes_in_flight=10, handshakes_per_address=4)
    ledger = Ledger(limits, counters)
    shaking: list[Place] = []
    nobodies: list[Place] = []
    kept: list[Place] = []
    for step in range(5_000):
        now = step / 5
        match generator.randrange(6):
            case 0 | 1:
                answer = ledger.admit(f"192.0.2.{generator.randrange(5)}", now)
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
            case 4 if shaking:
                ledger.returned(generator.choice(shaking), now)
            case _:
                some = generator.choice([shaking, nobodies, kept])
                if some:
                    ledger.ended(some.pop(generator.randrange(len(some))))
        assert (counters.handshaking, counters.open) == (len(shaking), len(nobodies) + len(kept))
        assert counters.handshaking + counters.open <= limits.associations
    for place in (*shaking, *nobodies, *kept):
        ledger.ended(place)
    assert (counters.handshaking, counters.open) == (0, 0)
    assert not any((ledger._blocks, ledger._fresh, ledger._crowds, ledger._largest, ledger._nobodies))


def test_who_has_come_back_keeps_its_place_while_others_never_do() -> None:
    """However slow its path: the flood displaces itself."""
    ledger = Ledger(DtlsLimits(handshakes_per_address=8), DtlsCounters())
    slow = taken(ledger, "192.0.2.1")
    ledger.returned(slow, 0.0)
    for step in range(1_000):
        now = step / 40
        answer = ledger.admit("192.0.2.1", now)
        if isinstance(answer, GiveWay):
            assert answer.place is not slow
            ledger.ended(answer.place)


def come_back(ledger: Ledger, address: str, count: int, now: float = 0.0) -> list[Place]:
    """Handshakes that have come back, and may stop there."""
    places = [taken(ledger, address, now) for _ in range(count)]
    for place in places:
        ledger.returned(place, now)
    return places


def test_who_came_back_and_stopped_gives_way_after_a_while_to_its_block() -> None:
    ledger = Ledger(DtlsLimits(handshakes_per_address=8), DtlsCounters())
    crowd = come_back(ledger, "192.0.2.1", 8)
    assert ledger.admit("192.0.2.1", 3.9) is Drop.ADDRESS_LIMIT, "time for two losses"
    newcomers = []
    for oldest in crowd[:2]:
        assert ledger.admit("192.0.2.1", 4.0) == GiveWay(oldest)
        ledger.ended(oldest)
        newcomers.append(taken(ledger, "192.0.2.1", 4.0))
    assert ledger.admit("192.0.2.1", 9.0) == GiveWay(newcomers[0]), "a quarter is enough for newcomers"
    ledger.verified(newcomers[0])
    taken(ledger, "192.0.2.1", 9.0)
    ledger.returned(newcomers[1], 9.0)
    assert ledger.admit("192.0.2.1", 9.0) == GiveWay(crowd[2])


def test_over_all_the_block_that_has_most_of_them_gives_way() -> None:
    ledger = Ledger(DtlsLimits(handshakes_in_flight=10), DtlsCounters())
    [slow] = come_back(ledger, "192.0.2.1", 1)
    first, second = come_back(ledger, "192.0.2.2", 5, 1.0), come_back(ledger, "192.0.2.3", 4, 2.0)
    assert ledger.admit("192.0.2.2", 4.5) is Drop.HANDSHAKE_LIMIT, "not at once to one of the same crowd"
    assert ledger.admit("192.0.2.2", 5.0) == GiveWay(first[0])
    assert ledger.admit("192.0.2.4", 2.0) == GiveWay(first[0]), "at once to an address that has less"
    for place in first[:3]:
        ledger.ended(place)
    come_back(ledger, "192.0.2.4", 3, 5.0)
    assert ledger.admit("192.0.2.4", 5.9) is Drop.HANDSHAKE_LIMIT, "shares come out even"
    assert ledger.admit("192.0.2.4", 6.0) == GiveWay(second[0])
    assert ledger.admit("192.0.2.5", 5.0) == GiveWay(second[0])
    assert slow.shaking
