"""A client, a server and a network that misbehave at will, against the plainest model of what MQTT promises.

The client and the server's disk survive everything; the connection breaks at any byte, and the server dies between any
two steps. Whatever happens in between, once things calm down: QoS 2 arrived exactly once and QoS 1 at least once, in
both directions; what was refused was never stored; messages to the client came in order; nothing is left behind.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters.mqtt.connection import Connection
from adapters.mqtt.machine_events import (
    ConnectRequested,
    Delivered,
    Ended,
    Event,
    PublishReceived,
    ReceiptRecorded,
    ReleaseReceived,
)
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import NO_PROPERTIES, Properties
from adapters.mqtt.session import Incoming, Session, Untaken
from adapters.mqtt.session_values import Delivery, Message, Outgoing, Phase, Receipt, Snapshot
from adapters.mqtt.wire import decode, encode
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_packets import Ack, Connack, Connect, Disconnect, Packet, Publish, QoS
from adapters.mqtt.wire_reasons import PacketType, ReasonCode, Version

LIMITS = MqttLimits(queued_messages=8, receive_maximum=4, inflight=3, unanswered_messages=3)
WINDOW = 2  # the client's Receive Maximum
SURE = (QoS.AT_LEAST_ONCE, QoS.EXACTLY_ONCE)


class Client:
    """A correct client with a memory that is never lost."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.connected = False
        self.wire = bytearray()  # to the server, not yet arrived
        self.framer = Framer(1_000_000)
        self.outgoing: dict[int, tuple[bytes, QoS]] = {}
        self.released: dict[int, bytes] = {}
        self.unacknowledged: dict[QoS, list[int]] = {}
        self.begun: set[int] = set()  # incoming QoS 2
        self.unsettled: set[int] = set()  # incoming ids of this connection, for our Receive Maximum
        self.received: dict[QoS, list[bytes]] = {qos: [] for qos in QoS}
        self.outcome: dict[bytes, ReasonCode] = {}
        self.next_id = 1

    def connect(self) -> None:
        assert not self.connected
        self.wire.clear()
        self.framer = Framer(1_000_000)
        properties = NO_PROPERTIES
        if self.version is Version.V5:
            properties = Properties(session_expiry_interval=1_000, receive_maximum=WINDOW)
        self.send(Connect(self.version, "c", False, properties=properties))
        self.unacknowledged = {qos: [] for qos in SURE}
        self.unsettled.clear()

    def resume(self) -> None:
        self.connected = True
        for packet_id in self.released:
            self.send(Ack(PacketType.PUBREL, packet_id))
        for packet_id, (payload, qos) in self.outgoing.items():
            self.send(Publish("up", payload, qos, dup=True, packet_id=packet_id))
            self.unacknowledged[qos].append(packet_id)

    def publish(self, payload: bytes, qos: QoS) -> None:
        if qos is QoS.AT_MOST_ONCE:
            self.send(Publish("up", payload))
            return
        while self.next_id in self.outgoing or self.next_id in self.released:
            self.next_id = self.next_id % 9 + 1  # few ids, so that they return soon
        packet_id, self.next_id = self.next_id, self.next_id % 9 + 1
        self.outgoing[packet_id] = (payload, qos)
        self.unacknowledged[qos].append(packet_id)
        self.send(Publish("up", payload, qos, packet_id=packet_id))

    def send(self, packet: Packet) -> None:
        self.wire += encode(packet, self.version)

    def gets(self, data: bytes) -> None:
        self.framer.feed(data)
        while (frame := self.framer.next()) is not None:
            self.handle(decode(*frame, self.version))

    def handle(self, packet: Packet) -> None:
        match packet:
            case Connack():
                assert packet.reason is ReasonCode.SUCCESS
                self.resume()
            case Publish():
                self.take(packet)
            case Ack(type=PacketType.PUBACK | PacketType.PUBREC):
                qos = QoS.AT_LEAST_ONCE if packet.type is PacketType.PUBACK else QoS.EXACTLY_ONCE
                assert self.unacknowledged[qos].pop(0) == packet.packet_id, "acknowledged out of order"
                payload, asked = self.outgoing.pop(packet.packet_id)
                assert asked is qos
                if packet.reason.failed or qos is QoS.AT_LEAST_ONCE:
                    self.outcome[payload] = packet.reason
                else:
                    self.released[packet.packet_id] = payload
                    self.send(Ack(PacketType.PUBREL, packet.packet_id))
            case Ack(type=PacketType.PUBREL):
                self.begun.discard(packet.packet_id)
                self.unsettled.discard(packet.packet_id)
                self.send(Ack(PacketType.PUBCOMP, packet.packet_id))
            case Ack(type=PacketType.PUBCOMP):
                self.outcome[self.released.pop(packet.packet_id)] = ReasonCode.SUCCESS
            case Disconnect():
                pass
            case _:
                raise AssertionError(f"{packet!r} for a client")

    def take(self, packet: Publish) -> None:
        if packet.qos is QoS.AT_MOST_ONCE:
            self.received[packet.qos].append(packet.payload)
            return
        assert packet.packet_id not in self.unsettled or packet.dup
        self.unsettled.add(packet.packet_id)
        if self.version is Version.V5:
            assert len(self.unsettled) <= WINDOW
        if packet.qos is QoS.AT_LEAST_ONCE:
            self.unsettled.discard(packet.packet_id)  # for it is acknowledged in this step
            self.received[packet.qos].append(packet.payload)
            self.send(Ack(PacketType.PUBACK, packet.packet_id))
            return
        if packet.packet_id not in self.begun:
            self.begun.add(packet.packet_id)
            self.received[packet.qos].append(packet.payload)
        self.send(Ack(PacketType.PUBREC, packet.packet_id))


class Disk:
    """What survives the server."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, QoS]] = []
        self.incoming: dict[int, None] = {}
        self.rows: dict[int, Delivery] = {}
        self.recorded: dict[int, None] = {}

    def snapshot(self) -> Snapshot:
        outgoing = [
            Outgoing(packet_id, delivery, Phase.PUBLISHED)  # perhaps
            for packet_id, delivery in self.rows.items()
            if packet_id not in self.recorded
        ]
        outgoing += [Outgoing(packet_id, self.rows[packet_id], Phase.RELEASED) for packet_id in self.recorded]
        return Snapshot(incoming=tuple(self.incoming), outgoing=tuple(outgoing), expiry=1_000, expires_at=1e9)


class Exchange(RuleBasedStateMachine):
    """The two ends, the network between them, and the steps that the server takes at its leisure."""

    version = Version.V5
    durable = True

    def __init__(self) -> None:
        super().__init__()
        self.client = Client(self.version)
        self.disk = Disk()
        self.session = Session(LIMITS, durable=self.durable)
        self.connection: Connection | None = None
        self.pending: list[tuple[Receipt, bytes, bool]] = []  # to be stored, or stored and not confirmed
        self.releasing: list[tuple[int, bool]] = []
        self.recording: list[tuple[int, bool]] = []
        self.deleting: list[int] = []
        self.down: dict[QoS, list[bytes]] = {qos: [] for qos in QoS}
        self.up: dict[bytes, QoS] = {}
        self.count = 0
        self.fresh = True
        self.late = 0  # rows that came back because the server died before it deleted them

    @initialize()
    def first_connection(self) -> None:
        self.connect()

    # The network

    def connect(self) -> None:
        self.client.connect()
        self.connection = Connection(LIMITS, 0)
        self.carry(len(self.client.wire))

    def carry(self, size: int) -> None:
        """Some bytes of the client arrive, and everything that the server has to say in return."""
        connection = self.connection
        assert connection is not None
        if connection.wants_read:
            connection.receive(bytes(self.client.wire[:size]), 0)
            del self.client.wire[:size]
        self.serve()

    def serve(self) -> None:
        connection = self.connection
        if connection is None:
            return
        while True:
            event = connection.next_event(0)
            if event is not None:
                self.on_event(event)
            elif data := connection.data_to_send(0):
                self.client.gets(data)
            elif connection.closed:
                self.hang_up()
                return
            else:
                return

    def on_event(self, event: Event) -> None:
        match event:
            case ConnectRequested():
                assert self.connection is not None
                self.connection.accept(self.session, session_present=not self.fresh, now=0)
                self.fresh = False
            case PublishReceived():
                if event.message.qos is QoS.AT_MOST_ONCE:
                    self.session.stored(event.receipt, 0)
                else:
                    self.pending.append((event.receipt, event.message.payload, False))
            case ReleaseReceived():
                self.releasing.append((event.packet_id, False))
            case ReceiptRecorded():
                self.recording.append((event.packet_id, False))
            case Delivered():
                self.deleting.append(event.packet_id)
            case Ended():
                pass
            case _:
                raise AssertionError(f"{event!r} was not expected")

    def hang_up(self) -> None:
        if self.connection is not None:
            self.connection.lost(0)
            for event in self.leftovers(self.connection):
                self.on_event(event)
            for after in self.session.tick(0):
                self.on_event(after)
        self.connection = None
        self.client.connected = False
        self.client.wire.clear()

    @staticmethod
    def leftovers(connection: Connection) -> list[Event]:
        events = []
        while (event := connection.next_event(0)) is not None:
            events.append(event)
        return events

    @precondition(lambda self: self.connection is not None)
    @rule(size=st.integers(1, 60))
    def some_bytes_arrive(self, size: int) -> None:
        self.carry(size)

    @precondition(lambda self: self.connection is not None)
    @rule()
    def the_network_breaks(self) -> None:
        self.hang_up()

    @precondition(lambda self: self.connection is None)
    @rule()
    def the_client_returns(self) -> None:
        self.connect()

    @precondition(lambda self: self.durable)
    @rule()
    def the_server_dies(self) -> None:
        self.connection = None
        self.client.connected = False
        self.client.wire.clear()
        self.pending.clear()
        self.releasing.clear()
        self.recording.clear()
        self.late = max(0, len(self.disk.rows) - LIMITS.queued_messages)
        self.deleting.clear()
        self.session = Session.restore(self.disk.snapshot(), LIMITS, durable=True)

    # The ends

    @precondition(lambda self: self.client.connected and len(self.client.outgoing) + len(self.client.released) < 4)
    @rule(qos=st.sampled_from(QoS))
    def the_client_publishes(self, qos: QoS) -> None:
        self.count += 1
        payload = b"up %d" % self.count
        self.up[payload] = qos
        self.client.publish(payload, qos)

    @rule(qos=st.sampled_from(SURE))
    def the_server_publishes(self, qos: QoS) -> None:
        self.count += 1
        payload = b"down %d" % self.count
        delivery = Delivery(Message("down", payload, qos), qos)
        packet_id = self.session.reserve(delivery.message.size)
        if isinstance(packet_id, Untaken):
            assert self.session.queued >= LIMITS.queued_messages
            return
        if packet_id in self.disk.rows:  # its deletion is late
            self.delete()
        self.disk.rows[packet_id] = delivery
        self.down[qos].append(payload)
        self.session.deliver(delivery, 0, packet_id)
        self.serve()

    # The server's steps, each in two: write, then say so

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), fate=st.sampled_from(("commit", "confirm", "both", "fail")))
    def a_message_is_stored_or_not(self, data: st.DataObject, fate: str) -> None:
        at = data.draw(st.integers(0, len(self.pending) - 1))
        receipt, _, committed = self.pending[at]
        if fate == "fail" and not committed:
            del self.pending[at]
            self.session.failed(receipt, ReasonCode.QUOTA_EXCEEDED, 0)
            self.serve()
            return
        self.store(at, confirm=fate != "commit")

    def store(self, at: int, *, confirm: bool) -> None:
        receipt, payload, committed = self.pending[at]
        if not committed:
            self.disk.messages.append((payload, receipt.qos))
            if receipt.qos is QoS.EXACTLY_ONCE:
                self.disk.incoming[receipt.packet_id] = None
            self.pending[at] = (receipt, payload, True)
        if confirm:
            del self.pending[at]
            self.session.stored(receipt, 0)
            self.serve()

    @precondition(lambda self: self.releasing)
    @rule(confirm=st.booleans())
    def a_release_is_written(self, confirm: bool) -> None:
        packet_id, written = self.releasing[0]
        if not written:
            del self.disk.incoming[packet_id]
            self.releasing[0] = (packet_id, True)
        if confirm:
            del self.releasing[0]
            self.session.released(packet_id)
            self.serve()

    @precondition(lambda self: self.recording)
    @rule(data=st.data(), confirm=st.booleans())
    def a_receipt_is_recorded(self, data: st.DataObject, confirm: bool) -> None:
        self.record(data.draw(st.integers(0, len(self.recording) - 1)), confirm)

    def record(self, at: int, confirm: bool) -> None:
        packet_id, written = self.recording[at]
        if not written:
            self.disk.recorded[packet_id] = None
            self.recording[at] = (packet_id, True)
        if confirm:
            del self.recording[at]
            self.session.recorded(packet_id)
            self.serve()

    @precondition(lambda self: self.deleting)
    @rule()
    def delete(self) -> None:
        for packet_id in self.deleting:
            self.disk.rows.pop(packet_id, None)
            self.disk.recorded.pop(packet_id, None)
        self.deleting.clear()

    # What must hold

    @invariant()
    def qos_2_is_stored_once(self) -> None:
        stored = [payload for payload, qos in self.disk.messages if qos is QoS.EXACTLY_ONCE]
        assert len(stored) == len(set(stored))

    @invariant()
    def qos_2_is_received_once_and_in_order(self) -> None:
        received = self.client.received[QoS.EXACTLY_ONCE]
        assert received == self.down[QoS.EXACTLY_ONCE][: len(received)]

    @invariant()
    def what_is_acknowledged_is_stored(self) -> None:
        stored = {payload for payload, _ in self.disk.messages}
        for payload, reason in self.client.outcome.items():
            assert (payload in stored) is not reason.failed or self.up[payload] is QoS.AT_LEAST_ONCE
            assert payload in stored or reason.failed

    @invariant()
    def bounds_hold(self) -> None:
        assert self.session.queued <= LIMITS.queued_messages + self.late
        assert len(self.pending) <= LIMITS.unanswered_messages * 60

    def teardown(self) -> None:
        if self.connection is None:
            self.connect()
        for _ in range(200):
            while self.pending:
                self.store(0, confirm=True)
            while self.releasing:
                self.a_release_is_written(True)
            while self.recording:
                self.record(0, True)
            if self.connection is None:
                self.connect()
            self.carry(len(self.client.wire))
            if self.calm():
                break
        assert self.calm()
        self.delete()
        assert self.disk.incoming == {} or not self.durable
        assert self.disk.rows == {}
        assert self.session.queued == 0
        assert self.session.queued_bytes == 0
        assert self.session.incoming == {}
        stored = [payload for payload, _ in self.disk.messages]
        for payload, reason in self.client.outcome.items():
            if not reason.failed:
                assert stored.count(payload) == 1 or self.up[payload] is QoS.AT_LEAST_ONCE
        assert self.client.received[QoS.EXACTLY_ONCE] == self.down[QoS.EXACTLY_ONCE]
        first = list(dict.fromkeys(self.client.received[QoS.AT_LEAST_ONCE]))
        assert first == self.down[QoS.AT_LEAST_ONCE]

    def calm(self) -> bool:
        client = self.client
        work = client.wire or client.outgoing or client.released or self.pending or self.releasing or self.recording
        return not work and self.session.queued == 0


@pytest.mark.parametrize("version", Version)
@pytest.mark.parametrize("durable", [True, False])
def test_promises_hold_whatever_breaks(version: Version, durable: bool) -> None:
    machine = type("Machine", (Exchange,), {"version": version, "durable": durable})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_the_states_of_the_model_are_those_of_the_session() -> None:
    assert {state.name for state in Incoming} == {"STORING", "STORED", "RELEASING"}
