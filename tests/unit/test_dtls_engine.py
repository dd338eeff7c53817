"""One association as a machine: what a handshake needs, what it bounds, and what nobody can do to it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from adapters.dtls.admission import DtlsCounters, DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.engine import DtlsEngine, Ended, Established, Event, Received
from adapters.dtls.handshake import End, IdentityNeeded
from adapters.dtls.openssl_handshake import OpensslHandshake
from adapters.dtls.ports import CertificateProven, NothingProven, PskKey, PskProven
from adapters.dtls.protection import OPENSSL_SUITES
from adapters.dtls.psk_handshake import PskHandshake
from adapters.dtls.records import (
    handshake_message,
    hello_verify_request,
    plaintext_record,
    read_client_hello,
    read_extensions,
    split_records,
)
from registry.secrets import Secret
from tests.dtls_peers import KEY, Client, certificate_client_context, make_client_certificate, psk_client_context
from tests.tls_peers import Holder, make_certificate

SUITES = [
    b"PSK-AES128-CCM8",
    b"PSK-AES128-CCM",
    b"PSK-AES128-GCM-SHA256",
    b"PSK-AES256-GCM-SHA384",
    b"ECDHE-PSK-CHACHA20-POLY1305",
]


class Server:
    """An engine, and what it said."""

    def __init__(
        self,
        client: Client,
        context: DtlsContext | None = None,
        limits: DtlsLimits | None = None,
        path: Callable[[bytes], bytes] = bytes,
    ) -> None:
        [first] = client.step()
        hello = read_client_hello(path(first))
        assert hello is not None
        [second] = client.feed(hello_verify_request(hello, bytes(20)))
        again = read_client_hello(path(second))
        assert again is not None
        self.client = client
        self.counters = DtlsCounters()
        self.engine = DtlsEngine(context or DtlsContext(None), again, limits or DtlsLimits(), self.counters)
        self.handshake = self.engine._handshake
        self.events: list[Event] = self.engine.start(again)

    def feed(self, datagrams: list[bytes]) -> None:
        for datagram in datagrams:
            self.events += self.engine.receive(datagram)

    def to_client(self) -> list[bytes]:
        """Let the client hear what waits; returns its answers."""
        return [answer for datagram in self.engine.datagrams() for answer in self.client.feed(datagram)]

    def key(self, key: bytes = KEY) -> None:
        self.events += self.engine.key(PskKey(Secret(key), "the offer"))

    def finish(self, key: bytes = KEY) -> Server:
        for _ in range(10):
            self.feed(self.to_client())
            if isinstance(self.last, IdentityNeeded):
                self.key(key)
            if self.client.done or isinstance(self.last, Ended) or self.client.error:
                break
        return self

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None


def psk_server(key: bytes = KEY, **named: object) -> Server:
    return Server(Client(psk_client_context(key=key, **named)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def credentials() -> Holder:
    return make_certificate()


def certificate_server(
    credentials: Holder, holder: Holder | None, suites: bytes = b"ECDHE-ECDSA-AES128-CCM8", **limits: int
) -> Server:
    client = Client(certificate_client_context(holder, suites))
    return Server(client, DtlsContext(credentials.credentials()), DtlsLimits(**limits))


@pytest.mark.parametrize("suite", SUITES, ids=bytes.decode)
def test_a_key_is_asked_for_and_proved_and_data_flow(suite: bytes) -> None:
    server = psk_server(suites=suite)
    server.feed(server.to_client())
    assert server.events == [IdentityNeeded(b"device-1")]
    assert server.engine.datagrams() == []
    server.key()
    assert server.last == Established(PskProven(b"device-1", "the offer"))
    server.to_client()
    assert server.client.done
    for plain in (b"up", b"x" * server.engine.room):
        server.feed(server.client.send(plain))
        assert server.last == Received(plain)
        server.engine.send(plain)
        [datagram] = server.engine.datagrams()
        assert len(datagram) <= server.engine.mtu
        server.client.feed(datagram)
        assert server.client.plain[-1] == plain
    with pytest.raises(ValueError, match="there is room for"):
        server.engine.send(b"x" * (server.engine.room + 1))


def test_who_offers_a_key_is_asked_for_it_even_if_certificates_come_first(credentials: Holder) -> None:
    client = Client(psk_client_context(suites=b"ECDHE-ECDSA-AES128-CCM8:PSK-AES128-CCM8"))
    server = Server(client, DtlsContext(credentials.credentials()))
    server.feed(server.to_client())
    assert server.events == [IdentityNeeded(b"device-1")]
    server.key()
    assert server.last == Established(PskProven(b"device-1", "the offer"))


@pytest.mark.parametrize("suite", SUITES[:-1], ids=bytes.decode)
def test_a_client_whose_curves_are_not_ours_gets_what_it_offers_behind_them(suite: bytes) -> None:
    """OpenSSL has its handshake, and agrees on plain PSK."""
    context = psk_client_context(suites=b"ECDHE-PSK-CHACHA20-POLY1305:" + suite)
    assert Binding().lib.SSL_CTX_set1_curves_list(context._context, b"P-521") == 1  # type: ignore[attr-defined]
    server = Server(Client(context))
    assert isinstance(server.handshake, OpensslHandshake)
    server.finish()
    assert server.last == Established(PskProven(b"device-1", "the offer"))
    assert server.client.connection.get_cipher_name() == suite.decode()
    server.feed(server.client.send(b"up"))
    assert server.last == Received(b"up")


@pytest.mark.parametrize("has_psk", [True, False])
def test_every_suite_that_openssl_may_agree_on_can_be_taken_over(credentials: Holder, has_psk: bool) -> None:
    connection = DtlsContext(credentials.credentials()).connection(1200, has_psk=has_psk)
    offered = [name for name in connection.get_cipher_list() if not name.startswith("TLS_")]  # those are of TLS 1.3
    assert offered
    assert set(offered) <= set(OPENSSL_SUITES)


def rewritten(datagram: bytes, suites: bytes | None = None, without: int | None = None) -> bytes:
    """A ClientHello that offers other suites, or lacks an extension."""
    read = read_client_hello(datagram)
    assert read is not None
    parameters, extensions = read.parameters, b""
    at = 35 + parameters[34]  # behind the session id
    end = at + 2 + int.from_bytes(parameters[at : at + 2], "big")
    offered = parameters[at + 2 : end] if suites is None else suites
    for kind, data in (read_extensions(read) or {}).items():
        if kind != without:
            extensions += kind.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data
    body = parameters[:at] + bytes((len(read.cookie),)) + read.cookie + len(offered).to_bytes(2, "big") + offered
    body += parameters[end:] + len(extensions).to_bytes(2, "big") + extensions
    return plaintext_record(22, int.from_bytes(datagram[5:11], "big"), handshake_message(1, read.message_seq, body))


@pytest.mark.parametrize("extended", [True, False], ids=["extended master secret", "old master secret"])
@pytest.mark.parametrize(
    ("change", "ours", "agreed"),
    [
        ({}, False, "ECDHE-PSK-CHACHA20-POLY1305"),
        ({"suites": b"\xc0\xa8\x00\xff"}, True, "PSK-AES128-CCM8"),
        ({"suites": b"\xc0\xa8\xcc\xac\x00\xff"}, True, "PSK-AES128-CCM8"),
        ({"suites": b"\xcc\xac\x00\xa8\x00\xff"}, False, "ECDHE-PSK-CHACHA20-POLY1305"),
        ({"suites": b"\x00\xa8\x00\xff", "without": 23}, True, "PSK-AES128-GCM-SHA256"),
        ({"without": 23}, False, "ECDHE-PSK-CHACHA20-POLY1305"),
    ],
    ids=["nothing", "no ECDHE", "ECDHE last", "another second", "the weakest of all", "no extended master secret"],
)
def test_nobody_on_the_path_chooses_what_is_agreed_on(
    change: dict[str, Any], ours: bool, agreed: str, extended: bool
) -> None:
    """Neither a suite, nor whose handshake it is, nor how the master secret is derived: the Finished covers it all."""
    context = psk_client_context(suites=b"ECDHE-PSK-CHACHA20-POLY1305:PSK-AES128-GCM-SHA256:PSK-AES128-CCM8")
    if not extended:
        context.set_options(1)  # SSL_OP_NO_EXTENDED_MASTER_SECRET
    client = Client(context)
    server = Server(client, path=lambda datagram: rewritten(datagram, **change))
    assert isinstance(server.handshake, PskHandshake) is ours
    server.finish()
    assert client.connection.get_cipher_name() == agreed  # the client has gone along
    if not change or (change == {"without": 23} and not extended):
        assert server.last == Established(PskProven(b"device-1", "the offer"))
        return
    # with the extended master secret the keys are others already
    failed = End.WRONG_KEY if extended and change.get("without") is None else End.HANDSHAKE_FAILED
    assert server.last == Ended(failed)
    assert not client.done


@pytest.mark.parametrize("way_in", [b"PSK-AES128-CCM8", b"ECDHE-PSK-CHACHA20-POLY1305", b"ECDHE-ECDSA-AES128-CCM8"])
def test_a_client_that_had_to_repeat_its_hello_takes_our_flight_for_no_copy(credentials: Holder, way_in: bytes) -> None:
    """It has heard records 0 and 1 from us, the answers to its first ClientHello, and says its second in record 2."""
    client = Client(psk_client_context(suites=way_in))
    [first] = client.step()
    repeated = read_client_hello(numbered(first, 1))
    assert repeated is not None
    [second] = client.feed(hello_verify_request(repeated, bytes(20)))
    hello = read_client_hello(numbered(second, 2))
    assert hello is not None
    engine = DtlsEngine(DtlsContext(credentials.credentials()), hello, DtlsLimits())
    assert engine.start(hello) == []
    [flight] = engine.datagrams()
    sequences = [record.sequence for record in split_records(flight)]
    assert sequences == list(range(2, 2 + len(sequences)))
    assert client.feed(flight)  # it goes on, without anything sent again


def numbered(datagram: bytes, number: int) -> bytes:
    """Its first record under another number."""
    return datagram[:5] + number.to_bytes(6, "big") + datagram[11:]


def both_closes(server: Server) -> Iterator[bool]:
    server.engine.close()
    server.to_client()
    yield server.client.closed
    server.engine.close()
    yield server.engine.datagrams() == []


@pytest.mark.parametrize("suite", SUITES, ids=bytes.decode)
def test_either_side_can_close(suite: bytes) -> None:
    assert all(both_closes(psk_server(suites=suite).finish()))
    server = psk_server(suites=suite).finish()
    server.client.connection.shutdown()
    server.feed(server.client.written())
    assert server.last == Ended(End.CLOSED_BY_PEER)
    assert len(server.engine.datagrams()) == 1
    server.engine.send(b"late")
    assert server.engine.datagrams() == []


@pytest.mark.parametrize(
    "suite", [b"ECDHE-ECDSA-AES128-CCM8", b"ECDHE-ECDSA-AES128-CCM", b"ECDHE-ECDSA-AES128-GCM-SHA256"]
)
def test_a_certificate_of_any_issuer_is_proved(credentials: Holder, suite: bytes) -> None:
    holder = make_client_certificate(usages=[ExtendedKeyUsageOID.CLIENT_AUTH])
    server = certificate_server(credentials, holder, suite).finish()
    assert server.last == Established(CertificateProven(holder.der))
    server.feed(server.client.send(b"up"))
    assert server.last == Received(b"up")


def test_an_expired_certificate_is_the_applications_to_refuse(credentials: Holder) -> None:
    holder = make_client_certificate(expired=True)
    server = certificate_server(credentials, holder).finish()
    assert server.last == Established(CertificateProven(holder.der))


def test_a_client_may_show_nothing(credentials: Holder) -> None:
    assert certificate_server(credentials, None).finish().last == Established(NothingProven())


@pytest.mark.parametrize(
    ("holder", "fault"),
    [
        (lambda: make_client_certificate(usages=[ExtendedKeyUsageOID.SERVER_AUTH]), "not for clients"),
        (lambda: make_client_certificate(signing=False), "not for signing"),
        (lambda: make_client_certificate(key=ec.generate_private_key(ec.SECP192R1())), "weak key"),
        (lambda: make_client_certificate(key=rsa.generate_private_key(65_537, 1024)), "weak key"),
    ],
    ids=["server's usage", "no signature", "small curve", "small RSA"],
)
def test_a_certificate_that_is_not_for_this_is_refused(credentials: Holder, holder: object, fault: str) -> None:
    assert callable(holder)
    server = certificate_server(credentials, holder()).finish()
    assert server.last == Ended(End.CERTIFICATE)
    assert isinstance(server.handshake, OpensslHandshake)
    assert server.handshake.certificate_fault == fault
    assert server.client.error is None  # the refusal waits to be sent
    server.to_client()
    assert "alert" in str(server.client.error)


def test_any_usage_will_do(credentials: Holder) -> None:
    holder = make_client_certificate(usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
    assert isinstance(certificate_server(credentials, holder).finish().last, Established)


def test_one_failed_handshake_never_harms_the_next(credentials: Holder) -> None:
    context = DtlsContext(credentials.credentials())
    bad = make_client_certificate(usages=[ExtendedKeyUsageOID.SERVER_AUTH])
    for _ in range(5):
        failed = Server(Client(certificate_client_context(bad)), context).finish()
        assert failed.last == Ended(End.CERTIFICATE)
        wrong = Server(Client(psk_client_context(key=bytes(32))), context).finish()
        assert wrong.last == Ended(End.WRONG_KEY)
        good = Server(Client(certificate_client_context(make_client_certificate())), context).finish()
        assert isinstance(good.last, Established)


def test_dtls_1_0_has_no_handshake() -> None:
    client = Client(psk_client_context(version=0xFEFF, suites=b"ALL"))
    [first] = client.step()
    hello = read_client_hello(first)
    assert hello is not None
    assert hello.version == 0xFEFF
    engine = DtlsEngine(DtlsContext(None), hello, DtlsLimits())
    assert engine.start(hello) == [Ended(End.HANDSHAKE_FAILED)]


def test_a_wrong_key_and_an_unknown_identity_get_the_same_bytes() -> None:
    """The application gives a random key for an identity that nobody knows."""
    answers = []
    for identity in (b"device-1", b"nobody"):
        server = psk_server(key=bytes(32), identity=identity).finish()
        assert server.last == Ended(End.WRONG_KEY)
        answers.append(server.engine.datagrams())
        server.client.feed(answers[-1][0])
        assert "bad record mac" in str(server.client.error)
    assert answers[0] == answers[1]


def test_openssl_never_gets_the_key_of_another_identity() -> None:
    server = psk_server(suites=b"ECDHE-PSK-CHACHA20-POLY1305")
    server.feed(server.to_client())
    assert isinstance(server.handshake, OpensslHandshake)
    assert server.handshake.key_of(b"device-1") != KEY
    server.key()
    assert server.handshake.key_of(b"device-2") != KEY


def test_an_identity_with_a_nul_fails_as_a_wrong_key() -> None:
    """OpenSSL reads up to the NUL, we read all: no key is given for either."""
    server = psk_server()
    [flight] = server.to_client()
    server.feed([flight.replace(b"device-1", b"device\x001")])
    assert server.events == [IdentityNeeded(b"device\x001")]
    server.key()
    assert server.last in (Ended(End.WRONG_KEY), Ended(End.HANDSHAKE_FAILED))


def test_datagrams_wait_for_the_key_and_no_more_than_a_few() -> None:
    server = psk_server()
    [flight] = server.to_client()
    cut = split_records(flight)
    server.feed([flight[record.start : record.end] for record in cut])
    server.feed([flight] * 100)
    assert server.events == [IdentityNeeded(b"device-1")]
    assert server.counters.as_dict()["dropped_held"] > 80
    server.key()
    assert isinstance(server.last, Established)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_records_in_any_order_and_doubled_are_never_taken_for_a_wrong_key(order: tuple[int, ...]) -> None:
    """What OpenSSL discards as too early comes again with the client's retransmission, under new record numbers."""
    server = psk_server()
    [flight] = server.to_client()
    cut = [flight[record.start : record.end] for record in split_records(flight)]
    server.feed([cut[number] for number in order])
    server.key()
    server.feed([flight])
    assert not any(isinstance(event, Ended) for event in server.events)
    if not isinstance(server.last, Established):
        assert order.index(1) < order.index(0)  # ChangeCipherSpec before ClientKeyExchange, as RFC 6347 does not allow


def test_no_key_ends_the_handshake_with_an_alert() -> None:
    server = psk_server()
    server.feed(server.to_client())
    server.events += server.engine.key(None)
    assert server.last == Ended(End.KEY_UNAVAILABLE)
    server.to_client()
    assert "internal error" in str(server.client.error)


def test_a_key_that_comes_late_does_nothing() -> None:
    server = psk_server()
    server.feed(server.to_client())
    server.engine.close()
    server.key()
    assert not any(isinstance(event, Established) for event in server.events)
    assert server.engine.datagrams() == []


def test_a_handshake_has_a_size() -> None:
    server = psk_server()
    server.engine.datagrams()
    old = b"\x01\0\x03\xe8\0\0\0\0\0\0\x03\xe8" + bytes(1000)  # a message from before, which OpenSSL passes over
    server.feed([b"\x16\xfe\xfd\0\0\0\0\0\0\0\x09" + len(old).to_bytes(2, "big") + old] * 100)
    assert server.last == Ended(End.HANDSHAKE_OVERSIZED)


@pytest.mark.parametrize("suite", [b"PSK-AES128-CCM8", b"ECDHE-PSK-CHACHA20-POLY1305"], ids=bytes.decode)
def test_records_of_the_next_epoch_are_bounded(suite: bytes) -> None:
    """OpenSSL would keep a buffer for each, and gets none any more; ours keeps four and can do without."""
    server = psk_server(suites=suite)
    [flight] = server.to_client()
    early = b"\x16\xfe\xfd\0\1\0\0\0\0\0\x09\0\x20" + bytes(32)
    server.feed([early * 10] * 30)
    server.feed([flight])
    assert server.last == IdentityNeeded(b"device-1")
    server.key()
    assert isinstance(server.last, Established) is isinstance(server.handshake, PskHandshake)


@pytest.mark.parametrize("suite", [b"PSK-AES128-CCM8", b"ECDHE-PSK-CHACHA20-POLY1305"], ids=bytes.decode)
def test_of_a_datagram_some_records_are_looked_at(suite: bytes) -> None:
    """What waits for a key is thus bounded, whatever a datagram consists of."""
    server = psk_server(suites=suite)
    [flight] = server.to_client()
    empty = b"\x16\xfe\xfd" + bytes(10)
    server.feed([empty * 64 + flight])
    assert server.events == []
    server.feed([empty * 20 + flight])
    server.key()
    assert isinstance(server.last, Established)


def test_our_last_flight_is_sent_again_to_a_client_that_missed_it() -> None:
    server = psk_server()
    [flight] = server.to_client()
    server.feed([flight])
    server.key()
    [lost] = server.engine.datagrams()
    # the client's retransmission has new record numbers; OpenSSL's own would take a second
    server.feed([flight])
    assert server.engine.datagrams() == [lost]
    assert server.engine.datagrams() == []
    server.feed([flight])
    assert server.engine.datagrams() == []  # the very same record once more is a replay
    server.client.feed(lost)
    assert server.client.done


def test_what_the_engine_says_and_keeps_shows_no_key() -> None:
    server = psk_server()
    server.feed(server.to_client())
    before = server.handshake
    server.key()
    server.engine.send(b"x")
    shown = repr([server.events, server.engine, before, server.engine._protection, PskKey(Secret(KEY), "the offer")])
    assert "the offer" not in shown
    assert repr(KEY)[2:-1] not in shown
    assert KEY.hex() not in shown
    assert server.engine._handshake is None


def test_what_was_received_is_never_received_again() -> None:
    server = psk_server().finish()
    datagrams = [server.client.send(bytes([number]))[0] for number in range(100)]
    server.feed(datagrams[:64])
    before = len(server.events)
    server.feed(datagrams[:64])
    assert len(server.events) == before
    server.feed([datagrams[99], datagrams[98], datagrams[64], *datagrams[35:]])
    assert [event for event in server.events[before:] if isinstance(event, Received)] == [
        Received(bytes([number])) for number in (99, 98, 64, *range(65, 98))
    ]


def test_a_spoilt_record_is_not_there_and_does_no_harm() -> None:
    for suite in SUITES:
        server = psk_server(suites=suite).finish()
        before = len(server.events)
        [datagram] = server.client.send(b"good")
        for at in range(len(datagram)):
            server.feed([datagram[:at] + bytes([datagram[at] ^ 0x40]) + datagram[at + 1 :], datagram[:at]])
        assert server.events[before:] == []
        assert server.engine.datagrams() == []
        server.feed([datagram])
        assert server.last == Received(b"good")


def test_words_in_the_clear_do_nothing_to_an_open_association() -> None:
    for suite in SUITES:
        server = psk_server(suites=suite)
        [flight] = server.to_client()
        server.feed([flight])
        server.key()
        server.to_client()
        before = len(server.events)
        for description in range(256):
            server.feed([b"\x15\xfe\xfd\0\0\0\0\0\1\0" + bytes([description]) + b"\0\2\2" + bytes([description])])
            server.feed([b"\x15\xfe\xfd\0\0\0\0\0\1\0" + bytes([description]) + b"\0\2\1\0"])
        chopped = [flight[record.start : record.end] for record in split_records(flight) if record.epoch == 0]
        server.feed(chopped)
        assert server.events[before:] == []
        server.feed(server.client.send(b"still"))
        assert server.last == Received(b"still")


def recorded(credentials: Holder | None) -> list[list[bytes]]:
    """The client's flights of one good handshake, with data at its end, each as single records."""
    client = Client(certificate_client_context(make_client_certificate()) if credentials else psk_client_context())
    server = Server(client, DtlsContext(credentials.credentials() if credentials else None))
    flights = []
    while not client.done:
        answers = server.to_client()
        flights.append(answers)
        server.feed(answers)
        if isinstance(server.last, IdentityNeeded):
            server.key()
        server.to_client()
    flights.append(client.send(b"data"))
    return flights


@pytest.mark.parametrize("psk", [True, False], ids=["psk", "certificate"])
def test_every_truncation_of_a_handshake_gives_an_end_or_nothing(credentials: Holder, psk: bool) -> None:
    """Fed to a fresh association, so keys never match: what comes is an event of the list, never an exception."""
    context = DtlsContext(credentials.credentials())
    flights = [datagram for flight in recorded(None if psk else credentials) for datagram in flight]
    fresh = psk_client_context() if psk else certificate_client_context(None)
    for datagram in flights:
        for end in range(0, len(datagram), 1 if psk else 7):
            server = Server(Client(fresh), context)
            server.feed([datagram[:end]])
            if isinstance(server.last, IdentityNeeded):
                server.key()
            server.feed([datagram])
            assert not any(isinstance(event, Established | Received) for event in server.events)


def test_random_datagrams_before_and_after_the_handshake_give_nothing(credentials: Holder) -> None:
    dice = random.Random(5)
    context = DtlsContext(credentials.credentials())

    def noise() -> bytes:
        head = bytes((dice.choice((20, 21, 22, 23)),)) + b"\xfe\xfd" + bytes((0, dice.choice((0, 0, 1, 2))))
        body = dice.randbytes(dice.randrange(0, 80))
        framed = head + dice.randbytes(6) + len(body).to_bytes(2, "big") + body
        return dice.choice((framed, framed[: dice.randrange(len(framed) + 1)], dice.randbytes(dice.randrange(100))))

    ended = 0
    for number in range(150):
        client = Client(psk_client_context() if number % 2 else certificate_client_context(None))
        server = Server(client, context)
        server.feed([noise() for _ in range(20)])
        ended += any(isinstance(event, Ended) for event in server.events)
        assert not any(isinstance(event, Established | Received) for event in server.events)
    assert ended < 150  # most noise has no meaning at all
    for suite in SUITES:
        server = psk_server(suites=suite).finish()
        before = len(server.events)
        server.feed([noise() for _ in range(500)])
        assert server.events[before:] == []
        server.feed(server.client.send(b"still"))
        assert server.last == Received(b"still")


def test_a_flight_fits_the_mtu(credentials: Holder) -> None:
    server = certificate_server(credentials, make_client_certificate(), mtu=528, fallback_mtu=528)
    flight = server.engine.datagrams()
    assert len(flight) > 1
    assert max(map(len, flight)) <= 528


def test_secrets_are_in_no_repr() -> None:
    server = psk_server().finish()
    assert KEY.hex() not in repr(server.events)
    assert "the offer" not in repr(server.events)
