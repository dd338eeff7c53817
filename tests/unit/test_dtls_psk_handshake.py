"""Our own handshake with a pre-shared key: what it answers, what it refuses, and that order, copies and pieces of what
comes change nothing about what is proved. The end-to-end side of it stands in test_dtls_engine.py."""

from __future__ import annotations

import itertools
import os
import random

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.dtls.admission import DtlsCounters, DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.engine import DtlsEngine, Ended, Established, Event
from adapters.dtls.handshake import End, IdentityNeeded
from adapters.dtls.openssl_handshake import OpensslHandshake
from adapters.dtls.ports import PskKey, PskProven
from adapters.dtls.protection import Prf
from adapters.dtls.psk_handshake import PskHandshake
from adapters.dtls.records import (
    ALERT_DECODE_ERROR,
    ALERT_DECRYPT_ERROR,
    ALERT_HANDSHAKE_FAILURE,
    ALERT_ILLEGAL_PARAMETER,
    ALERT_PROTOCOL_VERSION,
    ClientHello,
    handshake_message,
    hello_verify_request,
    plaintext_record,
    psk_suite,
    read_client_hello,
    split_records,
)
from registry.secrets import Secret
from tests.bench.coap_client import PskClient
from tests.dtls_peers import KEY, Client, psk_client_context

CONTEXT = DtlsContext(None)
RENEGOTIATION = b"\xff\x01\0\1\0"
EXTENDED = b"\0\x17\0\0"
GOOD_SUITES = b"\x00\xa8"


def hello(
    extensions: bytes | None = None,
    *,
    suites: bytes = GOOD_SUITES,
    compressions: bytes = b"\0",
    version: bytes = b"\xfe\xfd",
    number: int = 1,
    sequence: int = 1,
    session_id: bytes = b"",
) -> ClientHello:
    """A ClientHello with a cookie; `extensions` None: it ends before them."""
    body = version + bytes(32) + bytes((len(session_id),)) + session_id + b"\x14" + bytes(20)
    body += len(suites).to_bytes(2, "big") + suites + bytes((len(compressions),)) + compressions
    if extensions is not None:
        body += len(extensions).to_bytes(2, "big") + extensions
    read = read_client_hello(plaintext_record(22, sequence, handshake_message(1, number, body)))
    assert read is not None
    return read


class Server:
    """An engine that shakes hands by itself, with its clock in hand."""

    def __init__(self, first: ClientHello) -> None:
        self.now = 100.0
        self.counters = DtlsCounters()
        self.engine = DtlsEngine(CONTEXT, first, DtlsLimits(), self.counters, clock=lambda: self.now)
        assert isinstance(self.engine._handshake, PskHandshake)
        self.events: list[Event] = self.engine.start(first)
        self.flight = self.engine.datagrams()

    def feed(self, *datagrams: bytes, key: bytes = KEY) -> list[bytes]:
        for datagram in datagrams:
            self.events += self.engine.receive(datagram)
            if self.events and isinstance(self.events[-1], IdentityNeeded):
                self.events += self.engine.key(PskKey(Secret(key), "the offer"))
        return self.engine.datagrams()


class Flight:
    """A client without extensions up to its second flight, and that flight in single records."""

    def __init__(self, identity: bytes = b"device-1", key: bytes = KEY) -> None:
        self.client = PskClient(identity, key)
        first = read_client_hello(self.client.hello())
        assert first is not None
        second = self.client.receive(hello_verify_request(first, bytes(20)))
        assert second is not None
        again = read_client_hello(second)
        assert again is not None
        self.server = Server(again)
        whole = self.client.receive(b"".join(self.server.flight))
        assert whole is not None
        self.exchange, self.change, self.finished = pieces(whole)

    @property
    def proven(self) -> bool:
        return self.server.events[-1:] == [Established(PskProven(b"device-1", "the offer"))]


def pieces(datagram: bytes) -> list[bytes]:
    return [datagram[record.start : record.end] for record in split_records(datagram)]


def server_hello(datagram: bytes) -> tuple[int, bytes]:
    """The suite and the extensions of the ServerHello that a flight begins with."""
    body = pieces(datagram)[0][25:]
    at = 35 + body[34]
    return int.from_bytes(body[at : at + 2], "big"), body[at + 5 :]


def alert(datagrams: list[bytes]) -> int:
    """Of the one fatal alert that was sent."""
    [datagram] = datagrams
    assert datagram[0] == 21
    assert datagram[13] == 2
    return datagram[14]


def test_the_pseudorandom_function_is_the_one_of_tls_1_2() -> None:
    """A vector that went round on the IETF's list for TLS, of 100 bytes."""
    secret = bytes.fromhex("9bbe436ba940f017b17652849a71db35")
    seed = b"test label" + bytes.fromhex("a0ba9f936cda311827a6f796ffd5198c")
    expected = (
        "e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a6b301791e90d35c9c9a46b4e14baf9af"
        "0fa022f7077def17abfd3797c0564bab4fbc91666e9def9b97fce34f796789baa48082d122ee42c5a72e5a5110fff701"
        "87347b66"
    )
    for size in (0, 12, 32, 33, 100):
        assert Prf(SHA256(), secret)(seed, size).hex() == expected[: 2 * size]


@pytest.mark.parametrize("suite", [b"PSK-AES128-CCM8", b"PSK-AES256-GCM-SHA384", b"PSK-AES128-GCM-SHA256"])
def test_it_answers_a_hello_as_openssl_does(suite: bytes) -> None:
    client = Client(psk_client_context(suites=suite))
    first = read_client_hello(client.step()[0])
    assert first is not None
    again = read_client_hello(client.feed(hello_verify_request(first, bytes(20)))[0])
    assert again is not None
    ours = Server(again).flight
    out: list[bytes] = []
    OpensslHandshake(CONTEXT, has_psk=True, limits=DtlsLimits(), out=out).start(again)
    assert len(ours) == len(out) == 1
    assert server_hello(ours[0])[0] == server_hello(out[0])[0]
    assert sorted(listed(server_hello(ours[0])[1])) == sorted(listed(server_hello(out[0])[1]))
    # the same records with the same numbers, and the same messages behind the ServerHello
    assert [record[:11] for record in pieces(ours[0])] == [record[:11] for record in pieces(out[0])]
    assert pieces(ours[0])[1:] == pieces(out[0])[1:]


def listed(extensions: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(extensions):
        size = int.from_bytes(extensions[at + 2 : at + 4], "big")
        found.append((int.from_bytes(extensions[at : at + 2], "big"), extensions[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (None, b""),
        (b"", b""),
        (RENEGOTIATION, RENEGOTIATION),
        (EXTENDED, EXTENDED),
        (b"\0\1\0\1\3", b"\0\1\0\1\3"),
        (b"\0\x0a\0\4\0\2\0\x17", b""),  # supported groups: nothing to say
        (EXTENDED + b"\x12\x34\0\0" + RENEGOTIATION, RENEGOTIATION + EXTENDED),
    ],
)
def test_what_it_understands_is_answered_and_nothing_else(asked: bytes | None, answered: bytes) -> None:
    server = Server(hello(asked))
    assert server.events == []
    assert server_hello(server.flight[0]) == (0x00A8, answered)


@pytest.mark.parametrize("length", [0, 1, 32])
def test_no_session_is_resumed(length: int) -> None:
    """RFC 5246 §7.4.1.3: an empty session id says so."""
    flight = Server(hello(session_id=bytes(length))).flight
    assert pieces(flight[0])[0][59] == 0


def test_the_signal_for_secure_renegotiation_is_answered_as_its_extension_is() -> None:
    assert server_hello(Server(hello(suites=b"\x00\xff\x00\xa8")).flight[0]) == (0x00A8, RENEGOTIATION)


def test_the_clients_order_decides() -> None:
    assert psk_suite(hello(suites=b"\xc0\x2b\xc0\xa8\x00\xa8")) == 0xC0A8
    assert psk_suite(hello(suites=b"\x00\xa8\xc0\xa8")) == 0x00A8
    assert psk_suite(hello(suites=b"\xc0\x2b")) is None
    assert psk_suite(hello(suites=b"\x00\xa8\xc0")) is None  # half a suite: nothing that could be believed


@pytest.mark.parametrize(
    ("refused", "description"),
    [
        (hello(b"\xff\x01\0\2\1\0"), ALERT_HANDSHAKE_FAILURE),  # RFC 5746 §3.6: not the first handshake
        (hello(b"\0\1\0\1\5"), ALERT_ILLEGAL_PARAMETER),  # RFC 6066 §4
        (hello(b"\0\1\0\0"), ALERT_ILLEGAL_PARAMETER),
        (hello(b"\0\x17\0\1\0"), ALERT_DECODE_ERROR),  # RFC 7627 §5.1: it is empty
        (hello(EXTENDED + EXTENDED), ALERT_DECODE_ERROR),  # RFC 5246 §7.4.1.4: not twice
        (hello(b"\0\x17\0"), ALERT_DECODE_ERROR),
        (hello(b"\0\x17\0\4\0"), ALERT_DECODE_ERROR),
        (hello(compressions=b"\1"), ALERT_ILLEGAL_PARAMETER),  # RFC 5246 §7.4.1.2: null is among them
        (hello(compressions=b""), None),
        (hello(session_id=bytes(33)), ALERT_DECODE_ERROR),  # RFC 5246 §7.4.1.2: 32 bytes at the most
        (hello(version=b"\xfe\xff"), ALERT_PROTOCOL_VERSION),
        (hello(version=b"\x03\x03"), ALERT_PROTOCOL_VERSION),
    ],
)
def test_a_hello_that_makes_no_sense_is_refused(refused: ClientHello, description: int | None) -> None:
    engine = DtlsEngine(CONTEXT, refused, DtlsLimits())
    assert engine.start(refused) == [Ended(End.HANDSHAKE_FAILED)]
    if description is not None:
        assert alert(engine.datagrams()) == description
    assert engine.retransmission_due() is None


def test_a_later_version_is_served_with_ours() -> None:
    server = Server(hello(version=b"\xfe\xfc"))
    assert pieces(server.flight[0])[0][25:27] == b"\xfe\xfd"


def test_numbers_go_on_where_the_client_is() -> None:
    """RFC 6347 §4.2.1, §4.2.2: messages behind the HelloVerifyRequests, records behind the ClientHello."""
    first, second = pieces(Server(hello(number=2, sequence=7)).flight[0])
    assert (first[5:11], second[5:11]) == ((7).to_bytes(6, "big"), (8).to_bytes(6, "big"))
    assert (first[17:19], second[17:19]) == (b"\0\2", b"\0\3")


@pytest.mark.parametrize("suites", [b"\x00\xa8", b"\xcc\xac"], ids=["ours", "OpenSSL's"])
def test_a_client_at_the_end_of_its_numbers_is_not_served(suites: bytes) -> None:
    groups = b"\0\x0a\0\4\0\2\0\x17"  # OpenSSL has no curve for who names none
    assert Ended(End.HANDSHAKE_FAILED) not in started(hello(groups, suites=suites))
    last = hello(groups, sequence=(1 << 48) - 1, suites=suites)
    assert started(last) == [Ended(End.HANDSHAKE_FAILED)]


def started(first: ClientHello) -> list[Event]:
    return DtlsEngine(CONTEXT, first, DtlsLimits()).start(first)


def test_random_values_are_never_the_same() -> None:
    assert len({pieces(Server(hello()).flight[0])[0][27:59] for _ in range(20)}) == 20


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_flight_may_come_in_any_order(order: tuple[int, ...]) -> None:
    flight = Flight()
    records = [flight.exchange, flight.change, flight.finished]
    flight.server.feed(*(records[number] for number in order))
    assert flight.proven


def test_every_copy_of_a_flight_changes_nothing() -> None:
    flight = Flight()
    flight.server.feed(flight.exchange, flight.exchange, flight.change, flight.change, flight.finished)
    assert flight.proven


def test_without_change_cipher_spec_nothing_under_the_keys_is_taken() -> None:
    flight = Flight()
    assert flight.server.feed(flight.exchange, flight.finished) == []
    assert flight.server.events == [IdentityNeeded(b"device-1")]
    flight.server.feed(flight.change)
    assert flight.proven


def test_a_change_cipher_spec_has_one_byte() -> None:
    flight = Flight()
    for wrong in (b"", b"\0", b"\1\1"):
        flight.server.feed(plaintext_record(20, 9, wrong))
    flight.server.feed(flight.exchange, flight.finished)
    assert not flight.proven


def test_the_key_exchange_may_come_in_pieces_in_any_order() -> None:
    dice = random.Random(3)
    for size in (1, 3, 4, 9):
        flight = Flight()
        body = flight.exchange[25:]
        head = flight.exchange[13:19]  # type, length, number
        parts = []
        for at in range(0, len(body), size):
            part = body[at : at + size]
            where = at.to_bytes(3, "big") + len(part).to_bytes(3, "big")
            parts.append(plaintext_record(22, 20 + at, head + where + part))
        dice.shuffle(parts)
        flight.server.feed(*parts, flight.change, flight.finished)
        assert flight.proven


def test_garbage_under_the_next_epoch_does_not_spoil_a_handshake() -> None:
    """However much: a datagram of 500 bytes has 35 such records."""
    flight = Flight()
    garbage = [b"\x16\xfe\xfd\0\1" + os.urandom(6) + b"\0\x28" + os.urandom(40) for _ in range(200)]
    flight.server.feed(*garbage, flight.exchange, flight.change, flight.finished)
    assert flight.proven


def test_of_what_comes_too_early_a_little_is_kept() -> None:
    """Whoever knows the address may send it, until the handshake is over."""
    flight = Flight()
    for size in (40, 115, 116, 1000):
        flight.server.feed(*[sealed(os.urandom(size))] * 40)
    shaking = flight.server.engine._handshake
    assert isinstance(shaking, PskHandshake)
    assert len(shaking._early) == 4
    again = Flight()
    again.server.feed(sealed(bytes(116)), sealed(bytes(1000)))
    shaking = again.server.engine._handshake
    assert isinstance(shaking, PskHandshake)
    assert shaking._early == []


@pytest.mark.parametrize("content", [20, 21, 23, 24])
def test_only_the_handshake_speaks_under_the_keys_before_it_is_over(content: int) -> None:
    flight = Flight()
    other = bytes((content,)) + flight.finished[1:]
    assert flight.server.feed(flight.exchange, flight.change, other) == []
    assert flight.server.events == [IdentityNeeded(b"device-1")]
    flight.server.feed(flight.finished)
    assert flight.proven


def test_our_last_flight_is_forgotten_when_it_has_arrived() -> None:
    """Data say so; the client's Finished would be answered once more before."""
    flight = Flight()
    flight.server.feed(flight.exchange, flight.change, flight.finished)
    flight.server.feed(flight.client.seal(b"data"))
    assert flight.server.feed(flight.finished) == []
    other = Flight()
    [last] = other.server.feed(other.exchange, other.change, other.finished)
    assert other.server.feed(other.finished) == [last]


def test_what_the_application_says_of_the_key_ends_or_goes_on() -> None:
    flight = Flight()
    flight.server.events += flight.server.engine.receive(flight.exchange)
    assert flight.server.engine.key(None) == [Ended(End.KEY_UNAVAILABLE)]


@pytest.mark.parametrize("together", [True, False], ids=["one datagram", "three datagrams"])
def test_a_wrong_key_is_told_and_proves_nothing(together: bool) -> None:
    flight = Flight()
    records = [flight.exchange, flight.change, flight.finished]
    answer = flight.server.feed(*([b"".join(records)] if together else records), key=bytes(32))
    assert flight.server.events[-1] == Ended(End.WRONG_KEY)
    assert alert(answer) == 20


@pytest.mark.parametrize("more", [-1, 1, 5])
def test_what_cannot_be_a_finished_says_nothing_of_the_key(more: int) -> None:
    """Under whatever key: it has another size."""
    flight = Flight()
    garbage = sealed(os.urandom(len(flight.finished) - 13 + more))
    assert flight.server.feed(flight.exchange, flight.change, garbage) == []
    flight.server.feed(flight.finished)
    assert flight.proven


def test_a_change_cipher_spec_from_before_the_keys_lets_no_garbage_end_the_handshake() -> None:
    """A stranger could have sent both at any time. OpenSSL discards such a ChangeCipherSpec; a Finished is taken."""
    flight = Flight()
    garbage = sealed(os.urandom(len(flight.finished) - 13))
    assert flight.server.feed(flight.change, garbage, flight.exchange, garbage) == []
    flight.server.feed(flight.finished)
    assert flight.proven


def sealed(fragment: bytes) -> bytes:
    """A record of the handshake that says it is under the keys."""
    return b"\x16\xfe\xfd\0\1" + bytes(6) + len(fragment).to_bytes(2, "big") + fragment


def test_a_wrong_key_is_told_though_the_change_came_early() -> None:
    """With the client's flight again, in which it comes behind the ClientKeyExchange."""
    flight = Flight(key=bytes(32))
    assert flight.server.feed(flight.change, flight.exchange, flight.finished) == []
    assert alert(flight.server.feed(flight.exchange + flight.change + flight.finished)) == 20
    assert flight.server.events[-1] == Ended(End.WRONG_KEY)


def test_a_handshake_that_was_changed_on_its_way_is_not_proved() -> None:
    """The keys are right, and what was said is not what was heard: only the Finished can tell."""
    flight = Flight(identity=b"device-2")
    answer = flight.server.feed(flight.exchange.replace(b"device-2", b"device-1"), flight.change, flight.finished)
    assert flight.server.events == [IdentityNeeded(b"device-1"), Ended(End.HANDSHAKE_FAILED)]
    assert alert(answer) == ALERT_DECRYPT_ERROR


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\1", b"\0\x01aa", b"\xff\xff"])
def test_a_key_exchange_without_its_shape_is_refused(body: bytes) -> None:
    flight = Flight()
    answer = flight.server.feed(plaintext_record(22, 5, handshake_message(16, 2, body)))
    assert flight.server.events == [Ended(End.HANDSHAKE_FAILED)]
    assert alert(answer) == ALERT_DECODE_ERROR


def test_a_message_counts_only_under_its_own_number() -> None:
    flight = Flight()
    for number in (0, 1, 3):
        flight.server.feed(plaintext_record(22, 5, handshake_message(16, number, b"\0\x01x")))
    assert flight.server.events == []
    flight.server.feed(flight.exchange, flight.change, flight.finished)
    assert flight.proven


def test_another_identity_behind_the_first_is_not_looked_at() -> None:
    flight = Flight()
    flight.server.feed(flight.exchange, plaintext_record(22, 5, handshake_message(16, 2, b"\0\x01x")))
    flight.server.feed(flight.change, flight.finished)
    assert flight.proven


@pytest.mark.parametrize("said", [b"\2\x28", b"\1\0"], ids=["fatal", "close_notify"])
def test_a_peer_that_gives_up_is_let_go(said: bytes) -> None:
    server = Server(hello())
    server.feed(plaintext_record(21, 9, b"\1\x5a"), plaintext_record(21, 9, b""), plaintext_record(21, 9, b"\2"))
    assert server.events == []
    assert server.feed(plaintext_record(21, 9, said)) == []
    assert server.events == [Ended(End.HANDSHAKE_FAILED)]


def test_a_flight_is_sent_again_with_new_numbers_until_it_has_arrived() -> None:
    """RFC 6347 §4.2.4.1: after 1 s, and twice as long each time, up to 60 s."""
    flight = Flight()
    server = flight.server
    before, numbers = 0.0, []
    for wait in (1, 2, 4, 8, 16, 32, 60, 60):
        assert server.engine.retransmission_due() == pytest.approx(wait)
        server.now += wait - 0.01
        assert server.engine.retransmit() == []
        assert server.engine.datagrams() == []
        server.now += 0.01
        assert server.engine.retransmit() == []
        [again] = server.engine.datagrams()
        assert [record[13:] for record in pieces(again)] == [record[13:] for record in pieces(server.flight[0])]
        numbers += [record[5:11] for record in pieces(again)]
        before += wait
    assert len(set(numbers)) == len(numbers)
    assert server.counters.as_dict()["retransmitted"] == 8
    server.feed(flight.exchange)
    assert server.engine.retransmission_due() is None
    server.feed(flight.change, flight.finished)
    assert flight.proven


def test_a_client_that_asks_again_gets_the_flight_again_but_not_for_a_copy_of_the_network() -> None:
    """RFC 6347 §4.2.4: the receipt of a retransmitted flight is answered, and the timer begins anew."""
    flight = Flight()
    server = flight.server
    server.now += 0.4
    server.engine.repeat()
    assert server.engine.datagrams() == []
    server.now += 0.3
    server.engine.repeat()
    server.engine.repeat()
    [again] = server.engine.datagrams()
    assert [record[13:] for record in pieces(again)] == [record[13:] for record in pieces(server.flight[0])]
    assert server.engine.retransmission_due() == pytest.approx(1)
    assert server.counters.as_dict()["retransmitted"] == 1
    server.now += 10
    server.feed(flight.exchange)
    server.engine.repeat()
    assert server.engine.datagrams() == []
    server.feed(flight.change, flight.finished)
    assert flight.proven
    server.engine.repeat()
    assert server.engine.datagrams() == []


@pytest.mark.parametrize("key", [KEY, bytes(32)], ids=["the key", "another key"])
def test_no_record_number_is_used_for_two_things_whatever_happens_when(key: bytes) -> None:
    """What repeats a number is the very same record: nothing is ever sealed twice under one nonce (RFC 6655 §3)."""
    sealed = repeated = 0
    for seed in range(200):
        dice, flight = random.Random(seed), Flight()
        server, said = flight.server, list(flight.server.flight)
        for _ in range(30):
            match dice.randrange(8):
                case 0:
                    server.now += dice.choice([0.6, 1.1, 5])
                    server.engine.retransmit()
                case 1:
                    server.now += dice.choice([0, 0.6])
                    server.engine.repeat()
                case 2 if server.engine.room:
                    server.engine.send(dice.randbytes(dice.randrange(1, 40)))
                case 3 if dice.random() < 0.1:
                    server.engine.close()
                case _:
                    said += server.feed(dice.choice([flight.exchange, flight.change, flight.finished]), key=key)
            said += server.engine.datagrams()
        used: dict[bytes, bytes] = {}
        for record in itertools.chain.from_iterable(map(pieces, said)):
            number = record[3:11]
            assert used.setdefault(number, record) == record
            sealed += record[4]
        repeated += len(said) > len(set(said))
    assert (sealed > 100) == (key == KEY)
    assert (repeated > 10) == (key == KEY)


def test_what_is_left_over_is_no_data() -> None:
    """Behind the Finished of the same datagram nothing is read: it could not be told from what came early."""
    flight = Flight()
    later = b"\x17\xfe\xfd\0\1\0\0\0\0\0\1\0\x20" + bytes(32)
    flight.server.feed(flight.exchange + flight.change + flight.finished + later)
    assert flight.proven


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=12), st.binary(max_size=4))
def test_any_hello_gives_a_flight_or_an_end(extensions: bytes, suites: bytes, compressions: bytes) -> None:
    offered = hello(extensions, suites=GOOD_SUITES + suites[: len(suites) // 2 * 2], compressions=compressions)
    engine = DtlsEngine(CONTEXT, offered, DtlsLimits())
    events = engine.start(offered)
    assert events in ([], [Ended(End.HANDSHAKE_FAILED)])
    assert sum(map(len, engine.datagrams())) < 200  # never larger than what asks for it with a cookie


def test_a_flight_with_one_byte_changed_proves_nothing() -> None:
    """Each of its bytes but a record's version and number, which nobody judges in the clear."""
    proven = []
    for at in itertools.count():
        flight = Flight()
        whole = bytearray(flight.exchange + flight.change + flight.finished)
        if at == len(whole):
            break
        whole[at] ^= 0x40
        flight.server.feed(bytes(whole))
        if flight.proven:
            proven.append(at)
    unread = [*range(1, 3), *range(5, 11)]
    assert proven == unread + [len(flight.exchange) + each for each in unread]
