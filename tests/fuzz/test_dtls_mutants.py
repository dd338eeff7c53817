"""Our handshake with a pre-shared key under fire, beside OpenSSL's: spoilt flights, spoilt hellos, a whole listener.

What holds for every script of dtls_attempts.py, and what the differences between the two servers are:

- Neither raises. Neither establishes anything unless the ClientKeyExchange, a ChangeCipherSpec and the very Finished of
  the client have come, nor ever under another key.
- Ours takes the records of the flight in any order and OpenSSL in theirs only, so ours establishes more.
- OpenSSL ends a handshake at what does not belong there in the clear (unexpected_message, illegal_parameter,
  decode_error); ours passes it over, since anybody could have sent it, and is harder to end.
- Ours ends where OpenSSL does not in two cases. With the ChangeCipherSpec first, OpenSSL does not come to look at what
  is behind it: at a spoilt identity (decrypt_error) or shape (decode_error), or at a spoilt Finished (bad_record_mac).
- Behind a record whose length is wrong OpenSSL goes on reading and may find another one; for us the datagram ends.

In the suite a few seconds of it. By hand, in 10 minutes, 300,000 flights and 1,600,000 steps at a listener:

    GATEHOUSE_DTLS_MUTANTS=200 pytest tests/fuzz/test_dtls_mutants.py --timeout 0
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from adapters.dtls.context import DtlsContext
from adapters.dtls.engine import Ended
from adapters.dtls.handshake import End
from adapters.dtls.records import ALERT_DECODE_ERROR, ALERT_DECRYPT_ERROR, ClientHello, split_records
from tests.dtls_peers import Client, Echo, MemoryListener, certificate_client_context, psk_client_context
from tests.fuzz.dtls_attempts import CHANGE, FINISHED, Attempt, draw, engine
from tests.tls_peers import make_certificate
from tests.unit.test_dtls_psk_handshake import hello, listed, server_hello

TIMES = int(os.environ.get("GATEHOUSE_DTLS_MUTANTS", "1"))
SCRIPTS = 1500 * TIMES
STEPS = 8000 * TIMES


def test_spoilt_flights_prove_nothing_and_end_no_more_than_with_openssl() -> None:
    proven = {True: 0, False: 0}
    for number in range(SCRIPTS):
        script = draw(random.Random(number))
        client, other = Attempt(), Attempt(openssl=True)
        ours, theirs = client.play(script), other.play(script)
        for attempt, result in ((client, ours), (other, theirs)):
            if result.established:
                assert result.asked == [b"device-1"]
                assert attempt.records[FINISHED] in result.delivered
                assert attempt.records[CHANGE][13:] in result.delivered
        if ours.end is not None and theirs.end is None:
            spoilt = {which for records in script for which, harm in records if harm is not None}
            match ours.end, ours.alert:
                case End.WRONG_KEY, 20:
                    assert FINISHED in spoilt
                case End.HANDSHAKE_FAILED, (50 | 51):
                    assert not theirs.established
                    assert (ours.alert == ALERT_DECODE_ERROR) == (not ours.asked)
                    assert (ours.alert == ALERT_DECRYPT_ERROR) == bool(ours.asked)
                case _:
                    raise AssertionError(f"script {number}: {ours.end} with {ours.alert}")
        elif theirs.established and not theirs.misfits:
            assert ours.established, f"script {number}"
        proven[True] += ours.established
        proven[False] += theirs.established
    assert SCRIPTS > proven[True] > proven[False] > SCRIPTS / 10


def test_spoilt_flights_of_another_key_prove_nothing() -> None:
    told = 0
    for number in range(SCRIPTS // 5):
        script = draw(random.Random(number))
        for openssl in (False, True):
            result = Attempt(openssl=openssl, key=bytes(32)).play(script)
            assert not result.established
            told += result.end is End.WRONG_KEY
    assert told > SCRIPTS / 20


EXTENSIONS = [
    bytes.fromhex(each)
    for each in (
        "ff01000100", "00170000", "0001000101", "0001000104", "000a000400020017", "002b000302fefd", "000b00020100",
        "000d000400020403", "00160000", "00230000", "00000006000400000161", "0036000100", "001c00020200", "12340000",
        "000500050100000000", "000f000101", "001000050003026832", "00310000", "001400020102",
    )
]  # fmt: skip
SUITES = [bytes.fromhex(each) for each in ("00a8", "c0a800a800ff", "00a9", "c0a400a8", "5600c0a8", "c0a9c0a800ae")]


def answer(asked: ClientHello, *, openssl: bool) -> tuple[object, ...]:
    made = engine(asked, openssl=openssl)
    events, out = made.start(asked), made.datagrams()
    if events:
        assert events == [Ended(End.HANDSHAKE_FAILED)]
        return ()
    suite, extensions = server_hello(out[0])
    return suite, sorted(listed(extensions)), [(record.sequence, record.content) for record in split_records(out[0])]


def test_whatever_a_client_offers_is_answered_as_openssl_answers_it() -> None:
    dice = random.Random(5)
    for _ in range(SCRIPTS):
        chosen = dice.sample(EXTENSIONS, dice.randrange(6))
        offered = b"".join(chosen) if chosen else dice.choice([None, b""])
        compressions = dice.choice([b"\0", b"\0", b"\1\0"])
        session_id = bytes(dice.choice([0, 0, 5, 32]))
        asked = hello(offered, suites=dice.choice(SUITES), compressions=compressions, session_id=session_id)
        ours = answer(asked, openssl=False)
        assert ours == answer(asked, openssl=True), asked.record.hex()
        assert bool(ours) == (sum(each[:2] == b"\0\1" for each in chosen) < 2)  # an extension twice


@pytest.mark.parametrize("kind", range(3), ids=["a byte changed", "cut", "a byte more"])
def test_spoilt_hellos_are_refused_where_openssl_refuses_them_or_passed_over(kind: int) -> None:
    """Ours is content with extensions that it does not know the inside of; it is never stricter, but with an extension
    twice that OpenSSL does not know either (RFC 5246 §7.4.1.4)."""
    dice, both = random.Random(kind), 0
    for _ in range(SCRIPTS // 3):
        extensions = bytearray(b"".join(dice.sample(EXTENSIONS, dice.randrange(1, 4))))
        at = dice.randrange(len(extensions))
        match kind:
            case 0:
                extensions[at] = dice.randrange(256)
            case 1:
                del extensions[at:]
            case _:
                extensions.insert(at, dice.randrange(256))
        asked = hello(bytes(extensions))
        ours, theirs = answer(asked, openssl=False), answer(asked, openssl=True)
        kinds = [each for each, _ in listed(asked.extensions[2:])]
        if theirs and len(set(kinds)) == len(kinds):
            assert ours == theirs, asked.record.hex()
        both += ours == theirs
    assert both > SCRIPTS / 10


def spoilt(datagram: bytes, dice: random.Random) -> bytes:
    data = bytearray(datagram) or bytearray(1)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = dice.randrange(len(data))
        match dice.randrange(5):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at] = dice.choice([0, 1, 2, 16, 20, 21, 22, 23, 0xFD, 0xFE, 0xFF])
            case 2:
                del data[at + 1 :]
            case 3:
                data[at:at] = dice.randbytes(dice.randrange(1, 30))
            case _:
                data += datagram
    return bytes(data)


async def test_a_listener_under_fire_never_fails_and_counts_right() -> None:
    """Clients of every kind come, talk, leave and come again from few addresses, and half of what they send comes
    spoilt, doubled, or not at all, between random bytes."""
    dice, failures, heard = random.Random(11), [], {}  # type: ignore[var-annotated]
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    listener = MemoryListener(Echo(), DtlsContext(make_certificate().credentials()))
    listener.transmit = lambda datagram, address: heard.setdefault(address, []).append(datagram)  # type: ignore[method-assign]
    ways_in: list[Any] = [psk_client_context(suites=suite) for suite in (
        b"PSK-AES128-CCM8", b"PSK-AES256-GCM-SHA384", b"ECDHE-PSK-CHACHA20-POLY1305",
    )]  # fmt: skip
    ways_in += [psk_client_context(key=bytes(32)), certificate_client_context(None)]
    clients: dict[Any, Client] = {}
    for step in range(STEPS):
        address = (f"192.0.2.{dice.randrange(3)}", dice.randrange(30))
        if address not in clients or dice.random() < 0.08:
            clients[address] = Client(dice.choice(ways_in))
            said = clients[address].step()
        else:
            said = []
        client = clients[address]
        for datagram in heard.pop(address, []):
            said += client.feed(spoilt(datagram, dice) if dice.random() < 0.1 else datagram)
        if client.done and client.error is None and not client.closed:
            said += client.send(b"hello")
        elif client.error is None and dice.random() < 0.2:
            said += client.retransmit()
        for datagram in said:
            for _ in range(dice.choice([0, 0, 0, 1, 3])):
                listener.arrived(spoilt(datagram, dice), address)
            for _ in range(dice.choice([0, 1, 1, 1, 1, 2])):
                listener.arrived(datagram, address)
        listener.arrived(dice.randbytes(dice.randrange(60)), address)
        if step % 50 == 0:
            for association in listener.associations()[:1]:
                association.close()
        await asyncio.sleep(0)
    counters = listener.counters
    assert failures == []
    assert counters.established > STEPS / 100
    assert (counters.open, counters.handshaking) == (len(listener.associations()), len(listener._pending))
    await listener.close()
    assert (counters.open, counters.handshaking) == (0, 0)
