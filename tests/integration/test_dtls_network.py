"""Handshakes and datagrams through bad networks with a seed, and what people on the path can do: nothing that lasts.

The network is this process (dtls_peers.Link): loss, duplication, reordering and a 600-byte MTU in both directions.
OpenSSL's clock for retransmission is the real one, so lost flights cost their seconds; the handshakes of a test run at
the same time. The large run: GATEHOUSE_DTLS_HANDSHAKES=200 pytest tests/integration/test_dtls_network.py -k weather
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from adapters.dtls.admission import DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.ports import Association, CertificateProven, PskProven
from adapters.dtls.records import split_records
from tests.bench.coap_client import PskClient, Stage
from tests.dtls_peers import (
    KEY,
    Client,
    Echo,
    Link,
    MemoryListener,
    Weather,
    certificate_client_context,
    make_client_certificate,
    memory_listener,
    psk_client_context,
)
from tests.tls_peers import Holder, make_certificate

HANDSHAKES = int(os.environ.get("GATEHOUSE_DTLS_HANDSHAKES", "30"))
EACH = 10
BAD = Weather(loss=0.1, duplication=0.1, longest_delay=0.05, mtu=600)
HERE = ("192.0.2.1", 4000)


@pytest.fixture(scope="module")
def credentials() -> Holder:
    return make_certificate()


@pytest.fixture(scope="module")
def contexts() -> list[object]:
    return [psk_client_context(), certificate_client_context(make_client_certificate())]


async def persistent(link: Link, plain: bytes) -> None:
    """Send until the echo is there: what CoAP does above DTLS."""
    while plain not in link.client.plain:
        link.out(link.client.send(plain))
        try:
            await link.until(lambda: plain in link.client.plain, 0.3)
        except TimeoutError:
            pass


async def test_every_handshake_and_every_datagram_comes_through_bad_weather(
    credentials: Holder, contexts: list[object]
) -> None:
    listener = memory_listener(credentials=credentials.credentials(), limits=DtlsLimits(handshake_timeout=120))

    async def device(number: int) -> Link:
        client = Client(contexts[number % 2], mtu=600)  # type: ignore[arg-type]
        link = Link(listener, client, ("192.0.2.7", number), BAD, seed=number)
        await link.handshake()
        for datagram in range(EACH):
            await persistent(link, b"%d of %d" % (datagram, number))
        return link

    links = await asyncio.gather(*(device(number) for number in range(HANDSHAKES)))
    proofs = [type(association.proof) for association in listener.associations()]
    assert sorted(map(str, proofs)) == sorted(map(str, [PskProven, CertificateProven] * (HANDSHAKES // 2)))
    got = listener.application.received_datagrams
    assert {b"%d of %d" % (datagram, number) for datagram in range(EACH) for number in range(HANDSHAKES)} <= set(got)
    for name in ("lost", "doubled", "oversized"):  # the weather was what it says
        assert sum(getattr(link, name) for link in links)
    assert listener.counters.handshaking == 0
    assert listener.counters.dropped_wrong_key == 0  # type: ignore[attr-defined]
    await listener.close()


async def living(listener: MemoryListener, address: object = HERE) -> tuple[Link, Association]:
    """A client with an open association."""
    link = await Link(listener, Client(psk_client_context()), address).handshake()
    assert await link.ask(b"before") == b"before"
    return link, listener.application.associations[-1]


def half_open(listener: MemoryListener, address: object) -> Link:
    """A client that answers the cookie and never comes back."""
    link = Link(listener, Client(psk_client_context()), address)
    link.allowance = 2
    link.out(link.client.step())
    return link


async def undisturbed(listener: MemoryListener, link: Link, association: Association) -> None:
    assert association.alive
    assert await link.ask(b"after") == b"after"
    assert listener.associations() == [association]
    assert listener.application.endings == []
    await listener.close()


async def test_a_device_that_draws_the_same_random_value_whenever_it_starts_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its ClientHello cannot be told from a copy of the network's, until it has to have a newer cookie."""
    now = [0.0]
    listener = MemoryListener(Echo(), DtlsContext(None), clock=lambda: now[0])
    monkeypatch.setattr("tests.bench.coap_client.os.urandom", lambda size: b"4" * size)

    async def start() -> bool:
        client = PskClient(b"device-1", KEY)
        heard: list[bytes] = []
        listener.transmit = lambda datagram, _: heard.append(datagram)  # type: ignore[method-assign]
        listener.arrived(client.hello(), HERE)
        while heard:
            answer = client.receive(heard.pop(0))
            if answer is not None:
                listener.arrived(answer, HERE)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        return client.stage is Stage.OPEN

    assert await start()
    assert not await start()
    now[0] = 2 * listener.limits.cookie_lifetime + 1
    assert await start()
    assert [reason for _, reason in listener.application.endings] == ["replaced by a new handshake"]
    await listener.close()


async def test_a_client_that_has_not_heard_our_flight_need_not_wait_for_our_timer() -> None:
    listener = memory_listener()
    heard: list[bytes] = []
    listener.transmit = lambda datagram, _: heard.append(datagram)  # type: ignore[method-assign]
    client = Client(psk_client_context())
    listener.arrived(client.step()[0], HERE)
    [again] = client.feed(heard.pop())
    listener.arrived(again, HERE)
    [flight] = heard
    pending = listener._pending[HERE]
    pending.engine._handshake._clock = lambda: time.monotonic() + 0.9  # type: ignore[union-attr]
    listener.arrived(again, HERE)
    assert len(heard) == 2
    assert [record.sequence for record in split_records(heard[1])] == [
        record.sequence + 2 for record in split_records(flight)
    ]
    assert listener._pending[HERE] is pending
    await listener.close()


async def test_garbage_from_its_own_address_does_not_disturb_an_association() -> None:
    listener = memory_listener()
    link, association = await living(listener)
    for junk in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", bytes(13), bytes(2000), b"\x16\xfe\xfd\0\1" + b"\xff" * 30):
        listener.arrived(junk, HERE)
    for content in range(19, 26):
        for epoch in (0, 1, 2, 65_535):
            head = bytes((content,)) + b"\xfe\xfd" + epoch.to_bytes(2, "big") + b"\0\0\0\0\0\x63"
            for size in (0, 1, 2, 20, 40):
                listener.arrived(head + size.to_bytes(2, "big") + bytes(size), HERE)
    await undisturbed(listener, link, association)


async def test_spoofed_client_hellos_do_not_disturb_an_association() -> None:
    listener = memory_listener()
    link, association = await living(listener)
    for _ in range(50):
        [hello] = Client(psk_client_context()).step()
        listener.arrived(hello, HERE)
    assert not listener.counters.handshaking
    await undisturbed(listener, link, association)


async def test_a_replayed_handshake_does_not_disturb_an_association() -> None:
    listener = memory_listener()
    link, association = await living(listener)
    for datagram in list(link.sent) * 3:
        listener.arrived(datagram, HERE)
    await asyncio.sleep(0)
    assert listener.application.received_datagrams == [b"before"]
    await undisturbed(listener, link, association)


async def test_a_replayed_handshake_opens_nothing_anywhere() -> None:
    listener = memory_listener()
    link, association = await living(listener)
    association.close()
    for datagram in link.sent:
        listener.arrived(datagram, HERE)
        listener.arrived(datagram, ("192.0.2.2", 4000))
        await asyncio.sleep(0)
    assert listener.counters.started == 2  # its cookie is still good where it was baked, and only there
    assert listener.associations() == []
    assert listener.application.received_datagrams == [b"before"]
    assert listener.counters.established == 1
    await listener.close()


async def test_a_restarted_client_takes_its_old_place_when_it_has_verified() -> None:
    listener = memory_listener()
    _, old = await living(listener)
    again, new = await living(listener)
    assert not old.alive
    assert listener.application.endings == [(old, "replaced by a new handshake")]
    assert old.association_id != new.association_id
    assert await again.ask(b"more") == b"more"
    assert (listener.counters.open, listener.counters.replaced) == (1, 1)
    await listener.close()


async def test_a_newcomer_that_fails_leaves_the_association_as_it_was() -> None:
    listener = memory_listener()
    link, association = await living(listener)
    wrong = Link(listener, Client(psk_client_context(key=bytes(32))), HERE)
    with pytest.raises(AssertionError, match="bad record mac"):
        await wrong.handshake()
    listener.links[HERE] = link
    await undisturbed(listener, link, association)


async def test_an_association_works_while_another_handshake_is_halfway() -> None:
    application = Echo()
    listener = memory_listener(application)
    link, association = await living(listener)
    application.gate = asyncio.Event()
    Link(listener, Client(psk_client_context()), HERE).out(listener.links[HERE].client.step())
    async with asyncio.timeout(10):
        while len(application.asked) < 2:
            await asyncio.sleep(0)
    listener.links[HERE] = link
    assert listener.counters.handshaking == 1
    assert await link.ask(b"beside") == b"beside"
    await undisturbed(listener, link, association)


async def test_waiting_for_one_key_holds_up_nobody_else() -> None:
    application = Echo()
    listener = memory_listener(application)
    link, _ = await living(listener)
    application.gate = asyncio.Event()
    slow = Link(listener, Client(psk_client_context()), ("192.0.2.2", 1))
    waiting = asyncio.create_task(slow.handshake())
    async with asyncio.timeout(10):
        while len(application.asked) < 2:
            await asyncio.sleep(0)
    assert await link.ask(b"meanwhile") == b"meanwhile"
    application.gate.set()
    await waiting
    await listener.close()


async def test_no_key_for_now_is_told_and_forgotten() -> None:
    application = Echo()
    application.unavailable = True
    listener = memory_listener(application)
    with pytest.raises(AssertionError, match="internal error"):
        await Link(listener, Client(psk_client_context()), HERE).handshake()
    assert listener.counters.as_dict()["dropped_key_unavailable"] == 1
    application.unavailable = False
    await living(listener)
    await listener.close()


async def test_what_the_client_closes_is_ended_and_answered() -> None:
    listener = memory_listener()
    link, association = await living(listener)
    link.client.connection.shutdown()
    link.out(link.client.written())
    async with asyncio.timeout(10):
        while association.alive:
            await asyncio.sleep(0)
    assert listener.application.endings == [(association, "closed by the peer")]
    assert listener.counters.open == 0
    await listener.close()


async def test_close_says_close_notify_and_tells_the_application_nothing() -> None:
    listener = memory_listener()
    links = [(await living(listener, ("192.0.2.9", number)))[0] for number in range(3)]
    await listener.close()
    for link in links:
        await link.until(lambda link=link: link.client.closed)
    assert listener.application.endings == []
    assert listener.counters.open == 0


async def test_the_application_may_close_or_abort_in_any_call() -> None:
    class Closing(Echo):
        def established(self, association: Association) -> None:
            super().established(association)
            association.close()

        def received(self, association: Association, datagram: bytes) -> None:
            raise AssertionError("it is closed")

    listener = memory_listener(Closing())
    link = await Link(listener, Client(psk_client_context()), HERE).handshake()
    await link.until(lambda: link.client.closed)
    association = listener.application.associations[0]
    association.send(b"late")
    association.close()
    association.abort()
    assert (listener.counters.open, listener.application.endings) == (0, [])
    await listener.close()


async def test_half_open_handshakes_give_way_and_a_good_one_gets_in() -> None:
    listener = memory_listener(limits=DtlsLimits(handshakes_in_flight=20, handshakes_per_address=10))
    for number in range(200):
        half_open(listener, (f"192.0.2.{number % 4}", number))
    async with asyncio.timeout(10):
        while listener.counters.started < 200:
            assert listener.counters.handshaking <= 20
            await asyncio.sleep(0)
    assert listener.counters.as_dict()["dropped_displaced"] == 180
    await living(listener, ("192.0.2.1", 9999))
    await listener.close()
    assert (listener.counters.handshaking, listener.counters.open) == (0, 0)


async def test_in_a_full_house_who_waits_for_a_key_gives_way_only_to_an_address_that_has_less() -> None:
    """Three of the first address and two of the second are all; the third one has none yet."""
    application = Echo()
    application.gate = asyncio.Event()
    listener = memory_listener(application, limits=DtlsLimits(handshakes_in_flight=5, handshakes_per_address=3))
    for number in range(9):
        link = Link(listener, Client(psk_client_context()), (f"192.0.2.{number // 4}", number))
        link.out(link.client.step())
        async with asyncio.timeout(10):
            before = listener.counters.as_dict()
            refused = before["dropped_address_limit"] + before["dropped_handshake_limit"]
            while len(application.asked) + refused < number + 1:
                await asyncio.sleep(0)
                now = listener.counters.as_dict()
                refused = now["dropped_address_limit"] + now["dropped_handshake_limit"]
    counts = listener.counters.as_dict()
    assert (counts["handshaking"], counts["dropped_address_limit"]) == (5, 1)
    assert counts["dropped_handshake_limit"] == 2, "the second address would have as many as the first"
    assert counts["dropped_displaced"] == 1
    await listener.close()


async def test_a_handshake_has_a_time() -> None:
    listener = memory_listener(limits=DtlsLimits(handshake_timeout=0.05))
    half_open(listener, HERE)
    async with asyncio.timeout(10):
        while not listener.counters.as_dict()["dropped_handshake_timeout"]:
            await asyncio.sleep(0.005)
    assert (listener.counters.started, listener.counters.handshaking) == (1, 0)
    await listener.close()


async def test_the_records_on_the_path_hold_no_plain_text() -> None:
    listener = memory_listener()
    link, _ = await living(listener)
    on_the_path = b"".join(link.sent + link.heard)
    assert b"before" not in on_the_path
    assert KEY not in on_the_path
    assert {record.epoch for datagram in link.heard for record in split_records(datagram)} == {0, 1}
    await listener.close()
