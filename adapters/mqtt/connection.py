"""The server's side of one MQTT connection, without the network: bytes and `now` in, events and bytes out.

Theory
------
    AWAITING_CONNECT ──CONNECT──► DECIDING ──accept()──► OPEN ──DISCONNECT, error, timeout, lost──► CLOSED
            └───────── anything else ─────────┴──refuse()─────────────────────────────────────────────►┘

`_LEGAL` says which packets each state takes; a missing one is a protocol error (5.0 §4.13.1). The shell's duties:

    connection.receive(data, now)                    while `wants_read`; stop reading otherwise
    while (event := connection.next_event(now)):     after every call into the connection or its session
    while (data := connection.data_to_send(now)):    likewise; write it, and tell pause_writing / resume_writing
    connection.tick(now) at next_timer()
    connection.lost(now) when the network closes; close it when `closed` and everything is written

Packets are taken from the buffer one at a time by `next_event`, and only while the server keeps up: not while it
judges a CONNECT, SUBSCRIBE or UNSUBSCRIBE (so these take effect in their order), not while too many messages are
being stored, not while the peer does not read our answers, and no more in one `turn` than the shell allows, so that a
flood of cheap packets shares the loop. What waits is bounded by `wants_read`. While we make the peer wait, its
keep-alive does not run.

PUBACKs leave in the order of their PUBLISHes, PUBRECs too [MQTT-4.6.0-2], [MQTT-4.6.0-3], whatever order the server
answers in; PUBCOMP, PINGRESP and SUBACK wait for none of these. A peer that breaks the protocol gets the reason: in
CONNACK before CONNECT is accepted, in DISCONNECT afterwards, and nothing in 3.1.1, which has no words for it; then the
connection is closed, and the will is published as after any loss. Nothing raises RemoteProtocolError out of here.

DISCONNECT is the client's last word: nothing behind it is looked at, and nothing more is sent than the answers to what
came before it. Whatever ends the connection while these are waited for, the will and the expiry are as it says.

Aliases and quotas live and die with the connection [MQTT-3.3.2-7], 5.0 §4.9; all else is in the session.

Its parts: acknowledgements.py (what is owed for incoming messages), subscription_requests.py (what is judged),
incoming_topics.py (aliases and names), outgoing.py (what is to be written), negotiation.py (what CONNECT is given).

Most connections of a node are idle, so what is empty should take nothing: queues are lists, since an empty deque takes
0.75 KB; they are short, so taking from the front costs no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from adapters.mqtt.acknowledgements import Acknowledgements
from adapters.mqtt.incoming_topics import IncomingTopics
from adapters.mqtt.machine_events import (
    Cause,
    ConnectRequested,
    Ended,
    Event,
    PublishReceived,
    ReleaseReceived,
    SubscribeRequested,
)
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.negotiation import connack_properties, granted_expiry, kept_alive, shortened_expiry
from adapters.mqtt.outgoing import Outgoing, reason_string
from adapters.mqtt.properties import NO_PROPERTIES
from adapters.mqtt.session import Incoming, Session
from adapters.mqtt.session_values import (
    Delivery,
    Receipt,
    message_of,
)
from adapters.mqtt.subscription_requests import Granted, SubscriptionRequests
from adapters.mqtt.wire import announced_version, decode, packet_type
from adapters.mqtt.wire_framing import Framer
from adapters.mqtt.wire_packets import (
    Ack,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Ping,
    Publish,
    QoS,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
)
from adapters.mqtt.wire_reasons import (
    CONNACK_RETURN_CODES,
    REASONS_OF,
    LocalProtocolError,
    PacketType,
    ReasonCode,
    RemoteProtocolError,
    Version,
    violation,
)

_DECIDED_WITHIN: Final = 60.0
"""Seconds for judging a CONNECT: more than a database that is away, and a session on another node, take together."""


class State(Enum):
    """Where a connection stands."""

    AWAITING_CONNECT = auto()
    DECIDING = auto()
    OPEN = auto()
    CLOSED = auto()


_LEGAL: Final[dict[State, frozenset[PacketType]]] = {
    State.AWAITING_CONNECT: frozenset((PacketType.CONNECT,)),  # [MQTT-3.1.0-1]
    State.DECIDING: frozenset(),
    State.OPEN: frozenset(  # no second CONNECT [MQTT-3.1.0-2]; no AUTH without a method [MQTT-4.12.0-7]
        (
            PacketType.PUBLISH,
            PacketType.PUBACK,
            PacketType.PUBREC,
            PacketType.PUBREL,
            PacketType.PUBCOMP,
            PacketType.SUBSCRIBE,
            PacketType.UNSUBSCRIBE,
            PacketType.PINGREQ,
            PacketType.DISCONNECT,
        )
    ),
    State.CLOSED: frozenset(),
}

_IN_CONNACK: Final[dict[ReasonCode, ReasonCode]] = {
    # What only DISCONNECT may say (5.0 §3.2.2.2), to a client that is not accepted yet: it is to come back.
    ReasonCode.SERVER_SHUTTING_DOWN: ReasonCode.SERVER_UNAVAILABLE,
    ReasonCode.SESSION_TAKEN_OVER: ReasonCode.SERVER_UNAVAILABLE,
}


class Connection:
    """One network connection. Times are seconds on the caller's clock; nothing raises for the peer's faults."""

    __slots__ = (
        "_acknowledgements",
        "_connect",
        "_events",
        "_framer",
        "_heard_at",
        "_keep_alive",
        "_leaving",
        "_now",
        "_opened_at",
        "_outgoing",
        "_partial_since",
        "_requests",
        "_stalled_since",
        "_topics",
        "_unanswered",
        "_unanswered_bytes",
        "_window",
        "client_id",
        "limits",
        "session",
        "state",
        "timer_stands",
        "turn",
        "version",
    )

    def __init__(self, limits: MqttLimits, now: float) -> None:
        self.limits = limits
        self.state = State.AWAITING_CONNECT
        self.version: Version | None = None
        self.session: Session | None = None
        """The session from `accept` on, also after the end: its messages may still be being stored."""
        self.client_id = ""
        self._framer = Framer(limits.connect_bytes)
        self.turn: int | None = None
        """Packets that may still be taken in this turn of the shell's loop; None for any number."""
        self.timer_stands = False
        """Whether what `next_timer` said last is early enough still: its times have only moved away since."""
        self._events: list[Event] = []
        self._outgoing = Outgoing()
        self._connect: Connect | None = None
        self._opened_at = now
        self._heard_at = now
        self._now = now
        self._keep_alive = 0.0
        self._partial_since: float | None = None
        self._stalled_since: float | None = None
        self._requests = SubscriptionRequests()
        self._leaving: tuple[ReasonCode, float | None] | None = None  # of DISCONNECT: its reason, another expiry
        self._window = limits.inflight  # the peer's, or ours
        # incoming
        self._topics = IncomingTopics(limits)
        self._acknowledgements = Acknowledgements()
        self._unanswered = 0
        self._unanswered_bytes = 0

    # Network in -----------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the network is to be closed once everything is written."""
        return self.state is State.CLOSED

    @property
    def wants_read(self) -> bool:
        """Whether more bytes are welcome. False makes the peer wait; nothing is lost."""
        if self.state is State.CLOSED:
            return False
        return (self._keeps_up and not self.behind) or self._framer.buffered == 0

    @property
    def behind(self) -> bool:
        """Whether the turn ended before the buffer did: call again in the next one."""
        return self.turn is not None and self.turn <= 0 and self._keeps_up and self._framer.buffered > 0

    @property
    def waiting(self) -> bool:
        """Whether packets may have been received that are not looked at yet, because the peer is made to wait."""
        return self.state is not State.CLOSED and self._framer.buffered > 0 and (self.behind or not self._keeps_up)

    @property
    def leaving(self) -> bool:
        """Whether the client has said goodbye."""
        return self._leaving is not None

    @property
    def busy(self) -> bool:
        """Whether the server owes an answer: a message is being stored, or a request judged."""
        return self.state is State.DECIDING or self._requests.judging is not None or self._unanswered > 0

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Bytes from the network. What comes after the end, or after DISCONNECT, is ignored."""
        if self.state is State.CLOSED or self._leaving is not None:
            return
        self._framer.feed(data)

    def lost(self, now: float) -> None:
        """The network is closed, by the peer or by a fault, without a DISCONNECT."""
        self._finish(now, Cause.LOST, ReasonCode.UNSPECIFIED_ERROR, "the network closed", publish_will=True)
        self._outgoing.clear()

    @property
    def has_events(self) -> bool:
        """Whether `next_event` has one that needs no packet."""
        if self._events:
            return True
        return self.state is State.OPEN and self.session is not None and bool(self.session.events)

    def next_event(self, now: float) -> Event | None:
        """The next thing that the server has to know, taking packets from the buffer as far as it keeps up."""
        self._now = now
        while True:
            if self._events:
                return self._events.pop(0)
            if self.session is not None and self.session.events and self.state is State.OPEN:
                return self.session.events.pop(0)
            if not self._take_packet(now):
                return None

    def take_refusals(self) -> tuple[int, int]:
        """Since the last call: filters for which the session had no room; names and filters above a limit of ours."""
        requests, topics = self._requests, self._topics
        counted = requests.full, requests.too_long + topics.too_long
        requests.full = requests.too_long = topics.too_long = 0
        return counted

    # Network out ----------------------------------------------------------------------------------------------------

    def data_to_send(self, now: float) -> bytes:
        """What is to be written now, empty for nothing. Call until empty; afterwards there may be events."""
        if not self._outgoing.size and self.state is State.OPEN and self.session is not None:
            self.session.flush(now)
        return self._outgoing.take()

    def pause_writing(self, now: float) -> None:
        """The network takes no more for now."""
        if self._stalled_since is None:
            self._stalled_since = now
            self.timer_stands = False

    @property
    def stalled_since(self) -> float | None:
        """Since when the network takes no more, or since `taking` was told; None while it takes everything."""
        return self._stalled_since

    def taking(self, now: float) -> None:
        """The network is full still, but the peer does take what is in it: it is slow, not gone."""
        if self._stalled_since is not None:
            self._stalled_since = now

    def resume_writing(self, now: float) -> None:
        """The network takes more again."""
        self._stalled_since = None
        self._heard_at = now  # we did not listen meanwhile

    # Time -----------------------------------------------------------------------------------------------------------

    def next_timer(self) -> float | None:
        """When `tick` is to be called, None for never. May be early; it never is late."""
        self.timer_stands = self.state is State.OPEN
        return min([at for at, _, _ in self._due()], default=None)

    def tick(self, now: float) -> None:
        """End the connection if one of its times is over."""
        if self.state is State.OPEN and not self._keeps_up:
            self._heard_at = now
            self._partial_since = None if self._partial_since is None else now
        for at, reason, text in self._due():
            if at <= now:
                if self.state is State.DECIDING:
                    self._refuse(reason, now, Cause.TIMEOUT, text)
                else:
                    self._end(now, Cause.TIMEOUT, reason, text)
                return

    # The server's answers -------------------------------------------------------------------------------------------

    def accept(
        self,
        session: Session,
        *,
        session_present: bool,
        now: float,
        client_id: str | None = None,
        response_information: str | None = None,
    ) -> None:
        """Admit the CONNECT, with its session: a new one, or the client's own if clean start is not set.

        Whoever had the session is to be disconnected first (SESSION_TAKEN_OVER). `client_id` is the assigned one, for
        a client that sent none [MQTT-3.2.2-16]. What the session has for the client is sent after CONNACK.
        """
        connect = self._decided()
        if session_present and connect.clean_start:
            raise LocalProtocolError("clean start starts with a new session")  # [MQTT-3.2.2-2]
        if bool(connect.client_id) == (client_id is not None):
            raise LocalProtocolError("a client id is assigned exactly when the client has none")
        self._now = now
        self.session = session
        self.client_id = client_id or connect.client_id
        self.state = State.OPEN
        self.timer_stands = False
        self._framer.max_packet = self.limits.packet_bytes
        self._heard_at = now
        expiry = self.granted_expiry(connect)
        properties = NO_PROPERTIES
        if connect.version is Version.V5:
            self._keep_alive = kept_alive(connect, self.limits)
            properties = connack_properties(connect, self.limits, expiry, client_id, response_information)
        else:
            self._keep_alive = float(connect.keep_alive)
        self._send(Connack(session_present, ReasonCode.SUCCESS, properties), now)
        if self.state is State.OPEN:  # the peer's Maximum Packet Size may not even allow CONNACK
            session.attach(self, expiry, connect.will, now)

    def refuse(self, reason: ReasonCode, now: float, text: str = "") -> None:
        """Do not admit the CONNECT. 3.1.1 gets the return code that says it, or just a closed connection."""
        self._decided()
        self._refuse(reason, now, Cause.REFUSED, text)

    def subscribed(self, packet_id: int, reasons: Sequence[ReasonCode], now: float) -> tuple[Granted, ...]:
        """One reason for each request of SubscribeRequested: the granted QoS, or a failure. Sends SUBACK, or asks again
        for those that waited for room.

        The answer lists what now stands; give it to the table of subscriptions, then deliver the retained messages.
        """
        if self.state is not State.OPEN or self.session is None:
            return ()
        granted, next_step = self._requests.subscribed(packet_id, reasons, self.session.subscriptions, self.limits)
        self._heard_at = now
        self._asked(next_step, now)
        return granted

    def unsubscribed(self, packet_id: int, now: float) -> None:
        """The subscriptions of UnsubscribeRequested are gone from the server's table. Sends UNSUBACK."""
        if self.state is not State.OPEN or self.session is None:
            return
        answer = self._requests.unsubscribed(packet_id, self.session.unsubscribe)
        self._heard_at = now
        self._send(answer, now)

    def disconnect(self, reason: ReasonCode, now: float, *, publish_will: bool = True, text: str = "") -> None:
        """End the connection from our side: revocation (no will), takeover, shutting down. Idempotent."""
        if self.state is State.OPEN:
            self._say_goodbye(reason, text, now)
        elif self.state is not State.CLOSED and self._connect is not None:
            self._send_refusal(reason, text, now)
        self._finish(now, Cause.CLOSED, reason, text, publish_will=publish_will)

    # What the session sends through ---------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether PUBLISH packets may be sent now."""
        return (
            self.state is State.OPEN
            and self._leaving is None
            and self._stalled_since is None
            and self._outgoing.size < self.limits.write_bytes
        )

    @property
    def window(self) -> int:
        """The peer's Receive Maximum, or our cap when that is less [MQTT-3.3.4-9]."""
        return self._window

    def publish(self, delivery: Delivery, packet_id: int, dup: bool, now: float) -> bool:
        """Send PUBLISH; False when it is too large for the peer [MQTT-3.1.2-24]."""
        return self._outgoing.publish(delivery, packet_id, dup, self.version or Version.V311, now)

    def release(self, packet_id: int, reason: ReasonCode) -> None:
        """Send PUBREL."""
        self._acknowledge(PacketType.PUBREL, packet_id, reason)

    def complete(self, packet_id: int, reason: ReasonCode) -> None:
        """Send PUBCOMP."""
        self._acknowledgements.completed(packet_id)
        self._acknowledge(PacketType.PUBCOMP, packet_id, reason)

    def answered(self, receipt: Receipt, reason: ReasonCode, text: str, now: float) -> None:
        """An incoming message is stored or refused: acknowledge it as soon as those before it are."""
        self._now = now
        assert self.session is not None
        if receipt.epoch == self.session.epoch:
            self._unanswered -= 1
            self._unanswered_bytes -= receipt.size
            if self._keeps_up:
                self._heard_at = max(self._heard_at, now)
        if receipt.qos is not QoS.AT_MOST_ONCE:
            self._acknowledgements.answer(receipt, reason, text)
            self._flush_acks(receipt.qos, now)
        elif reason.failed and receipt.epoch == self.session.epoch:
            self._end(now, Cause.VIOLATION, reason, text or "a message that is refused")
        if self._leaving is not None:
            self._leave(now)

    # Packets --------------------------------------------------------------------------------------------------------

    @property
    def _keeps_up(self) -> bool:
        """Whether the next packet may be taken."""
        return (
            self.state in (State.AWAITING_CONNECT, State.OPEN)
            and self._leaving is None
            and self._requests.judging is None
            and self._stalled_since is None
            and self._unanswered < self.limits.unanswered_messages
            and self._unanswered_bytes < self.limits.unanswered_bytes
        )

    def _take_packet(self, now: float) -> bool:
        if self._framer.buffered == 0:
            self._partial_since = None
            return False
        if not self._keeps_up or self.behind:
            return False
        first = 0
        body = b""
        try:
            frame = self._framer.next()
            if frame is None:
                if self._partial_since is None:
                    self._partial_since = now
                    self.timer_stands = False
                return False
            self._partial_since = None
            if self.turn is not None:
                self.turn -= 1
            first, body = frame
            kind = packet_type(first)
            if kind not in _LEGAL[self.state]:
                raise violation(f"{kind.name} in state {self.state.name}")
            packet = decode(first, body, self.version, self.limits.wire)
            self._heard_at = now
            self._handle(packet, now)
        except RemoteProtocolError as error:
            if self.state is State.AWAITING_CONNECT:
                self._connect_failed(first, body, error, now)
            else:
                self._end(now, Cause.VIOLATION, error.reason, error.text)
        return True

    def _handle(self, packet: Packet, now: float) -> None:
        match packet:
            case Publish():
                self._on_publish(packet, now)
            case Ack(type=PacketType.PUBREL):
                self._on_release(packet)
            case Ack():
                self._session.acknowledged(packet.type, packet.packet_id, packet.reason, now)
            case Ping():
                self._send(Ping(PacketType.PINGRESP), now)  # [MQTT-3.12.4-1]
            case Subscribe():
                self._on_subscribe(packet, now)
            case Unsubscribe():
                self._on_unsubscribe(packet)
            case Disconnect():
                self._on_disconnect(packet, now)
            case Connect():
                self._on_connect(packet, now)
            case Connack() | Suback() | Unsuback() | Auth():
                raise LocalProtocolError("the table of states let a server's packet through")

    @property
    def _session(self) -> Session:
        assert self.session is not None
        return self.session

    def _on_connect(self, connect: Connect, now: float) -> None:
        self.version = connect.version
        self._connect = connect
        self._read_peer_limits(connect)
        if connect.properties.authentication_method is not None:
            text = "no enhanced authentication is supported"
            self._refuse(ReasonCode.BAD_AUTHENTICATION_METHOD, now, Cause.REFUSED, text)  # [MQTT-4.12.0-1]
            return
        if not connect.client_id and not connect.clean_start and connect.version is Version.V311:
            text = "a client without an id must ask for a clean session"
            self._refuse(ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, now, Cause.VIOLATION, text)  # 3.1.1 [MQTT-3.1.3-8]
            return
        size = len(connect.client_id.encode())
        if size > self.limits.client_id_bytes or not connect.client_id.isprintable():
            text = f"a client id of {size} bytes, or with control characters"
            self._refuse(ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, now, Cause.VIOLATION, text)
            return
        if connect.will is not None:
            self._topics.levels(connect.will.topic)
            self._topics.check_response(connect.will.properties)
        self.state = State.DECIDING
        self._events.append(ConnectRequested(connect))

    def _read_peer_limits(self, connect: Connect) -> None:
        properties = connect.properties
        self._window = min(properties.receive_maximum or 0xFFFF, self.limits.inflight)  # [MQTT-4.9.0-1]
        self._outgoing.allow(properties, self.limits.topic_aliases_out)

    def _on_publish(self, packet: Publish, now: float) -> None:
        if packet.properties.subscription_identifiers:
            raise violation("a subscription identifier from a client")  # [MQTT-3.3.4-6]
        topic, levels = self._topics.of(packet)
        if packet.qos is QoS.AT_MOST_ONCE:
            self._announce(packet, topic, levels, now)
            return
        acknowledgements, packet_id = self._acknowledgements, packet.packet_id
        if acknowledgements.awaits(packet.qos, packet_id):
            if packet.qos is QoS.AT_LEAST_ONCE and not packet.dup:
                raise violation("a packet identifier that is in use")  # [MQTT-2.2.1-3]
            return  # the acknowledgement that is on its way answers both
        self._check_receive_maximum(packet)
        if packet.qos is QoS.AT_LEAST_ONCE:
            acknowledgements.expect(packet.qos, packet_id, self._announce(packet, topic, levels, now))
            return
        match self._session.incoming.get(packet_id):
            case None:
                acknowledgements.expect(packet.qos, packet_id, self._announce(packet, topic, levels, now))
            case Incoming.STORING:  # begun on an earlier connection; its answer will be this one's
                acknowledgements.expect(packet.qos, packet_id, None)
            case Incoming.STORED:  # [MQTT-4.3.3-10]
                acknowledgements.expect(packet.qos, packet_id, None, ReasonCode.SUCCESS)
                self._flush_acks(packet.qos, now)
            case Incoming.RELEASING:
                raise violation("a packet identifier between PUBREL and PUBCOMP")

    def _announce(self, packet: Publish, topic: str, levels: tuple[str, ...], now: float) -> Receipt:
        message = message_of(packet, topic, now)
        receipt = self._session.receipt(packet.packet_id, packet.qos, message.size)
        self._unanswered += 1
        self._unanswered_bytes += message.size
        self._events.append(PublishReceived(receipt, message, levels))
        return receipt

    def _check_receive_maximum(self, packet: Publish) -> None:
        if self.version is Version.V5:
            if packet.qos is QoS.EXACTLY_ONCE and self._acknowledgements.holds(packet.packet_id):
                return
            if self._acknowledgements.outstanding >= self.limits.receive_maximum:
                text = f"more than {self.limits.receive_maximum} unacknowledged messages"
                raise RemoteProtocolError(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, text)  # 5.0 §4.9
        if packet.qos is QoS.EXACTLY_ONCE and packet.packet_id not in self._session.incoming:
            allowed = max(self.limits.unreleased, self.limits.receive_maximum)
            if len(self._session.incoming) >= allowed:
                text = f"more than {allowed} messages of QoS 2 that are not released"
                raise RemoteProtocolError(ReasonCode.QUOTA_EXCEEDED, text)

    def _on_release(self, packet: Ack) -> None:
        if self._session.release(packet.packet_id):
            self._events.append(ReleaseReceived(packet.packet_id))

    def _on_subscribe(self, packet: Subscribe, now: float) -> None:
        self._asked(self._requests.subscribe(packet, self._session.subscriptions, self.limits), now)

    def _on_unsubscribe(self, packet: Unsubscribe) -> None:
        self._events.append(self._requests.unsubscribe(packet, self._session.subscriptions, self.limits))

    def _asked(self, next_step: SubscribeRequested | Suback, now: float) -> None:
        if isinstance(next_step, Suback):
            self._send(next_step, now)
        else:
            self._events.append(next_step)

    def _on_disconnect(self, packet: Disconnect, now: float) -> None:
        expiry = None
        interval = packet.properties.session_expiry_interval
        if packet.properties.server_reference is not None:
            raise violation("a server reference from a client")  # 5.0 §3.14.2.2.5
        if interval is not None:
            assert self._connect is not None
            if interval and not self._connect.properties.session_expiry_interval:
                raise violation("a session expiry where CONNECT had none")  # 5.0 §3.14.2.2.2
            expiry = shortened_expiry(interval, self.limits)
        self._leaving = packet.reason, expiry
        self._framer.clear()  # [MQTT-3.14.4-1]: there is nothing behind it
        self._leave(now)

    def _leave(self, now: float) -> None:
        """Close behind DISCONNECT, when what came before it is answered: who sends all at once learns that it was
        admitted [MQTT-3.2.0-1], and that its messages are stored."""
        if self._unanswered == 0:
            self._finish(now, Cause.DISCONNECTED, ReasonCode.SUCCESS, "", publish_will=True)

    # Negotiation ----------------------------------------------------------------------------------------------------

    def _decided(self) -> Connect:
        if self.state is not State.DECIDING or self._connect is None:
            raise LocalProtocolError(f"no CONNECT waits for a decision in state {self.state.name}")
        return self._connect

    def granted_expiry(self, connect: Connect) -> float:
        """How long the session of this CONNECT outlives its connection, in seconds; `NEVER` for no end."""
        return granted_expiry(connect, self.limits)

    # Acknowledgements -----------------------------------------------------------------------------------------------

    def _flush_acks(self, qos: QoS, now: float) -> None:
        kind = PacketType.PUBACK if qos is QoS.AT_LEAST_ONCE else PacketType.PUBREC
        while self.state is State.OPEN and (due := self._acknowledgements.due(qos)) is not None:
            packet_id, reason, text = due
            if reason.failed and self.version is Version.V311:  # it has no words for a refusal [MQTT-3.3.5-2]
                self._end(now, Cause.VIOLATION, reason, text or "a message that is refused")
                return
            if reason is not ReasonCode.SUCCESS or not self._outgoing.acknowledge(kind, packet_id):
                self._send(Ack(kind, packet_id, reason, reason_string(text)), now)

    def _acknowledge(self, kind: PacketType, packet_id: int, reason: ReasonCode) -> None:
        if self.state is State.OPEN:
            self._send(Ack(kind, packet_id, reason), self._now)

    # Sending --------------------------------------------------------------------------------------------------------

    def _send(self, packet: Packet, now: float) -> None:
        if self._outgoing.send(packet, self.version or Version.V311):
            return
        text = "a maximum packet size that no answer fits"  # [MQTT-3.1.2-24]: then there is nothing that we may say
        self._finish(now, Cause.VIOLATION, ReasonCode.PACKET_TOO_LARGE, text, publish_will=True)

    # The end --------------------------------------------------------------------------------------------------------

    def _connect_failed(self, first: int, body: bytes, error: RemoteProtocolError, now: float) -> None:
        """A first packet that is not a CONNECT, or not a valid one."""
        if self.version is None and first >> 4 == PacketType.CONNECT:
            try:
                self.version = announced_version(body)
                if self.version is None:  # the answer in the form that this client can read
                    newer = body[:6] == b"\0\x04MQTT" and body[6] & 0x7F > Version.V5
                    self.version = Version.V5 if newer else Version.V311
                self._connect = self._connect or Connect(self.version, "")
            except RemoteProtocolError:
                pass  # no MQTT at all: it would not understand an answer
        self._send_refusal(error.reason, error.text, now)
        self._finish(now, Cause.VIOLATION, error.reason, error.text, publish_will=False)

    def _refuse(self, reason: ReasonCode, now: float, cause: Cause, text: str) -> None:
        self._send_refusal(reason, text, now)
        self._finish(now, cause, reason, text, publish_will=False)

    def _send_refusal(self, reason: ReasonCode, text: str, now: float) -> None:
        """CONNACK with a failure, where the version has one for it. 5.0 §4.13.2, 3.1.1 [MQTT-3.2.2-6]."""
        if self._connect is None or self.version is None:
            return
        reason = _IN_CONNACK.get(reason, reason)
        if self.version is Version.V5:
            spoken = reason if reason in REASONS_OF[PacketType.CONNACK] else ReasonCode.UNSPECIFIED_ERROR
            self._send(Connack(False, spoken, reason_string(text)), now)
        elif reason in CONNACK_RETURN_CODES:
            self._send(Connack(False, reason), now)

    def _say_goodbye(self, reason: ReasonCode, text: str, now: float) -> None:
        """DISCONNECT with the reason in 5.0; 3.1.1 has none from a server."""
        if self.version is Version.V5 and self._leaving is None:
            spoken = reason if reason in REASONS_OF[PacketType.DISCONNECT] else ReasonCode.UNSPECIFIED_ERROR
            self._send(Disconnect(spoken, reason_string(text)), now)

    def _end(self, now: float, cause: Cause, reason: ReasonCode, text: str) -> None:
        if self.state is State.OPEN:
            self._say_goodbye(reason, text, now)
        self._finish(now, cause, reason, text, publish_will=True)

    def _finish(
        self,
        now: float,
        cause: Cause,
        reason: ReasonCode,
        text: str,
        *,
        publish_will: bool,
    ) -> None:
        if self.state is State.CLOSED:
            return
        expiry = None
        if self._leaving is not None:  # however it ends, the client's word was first
            cause, text = Cause.DISCONNECTED, ""
            reason, expiry = self._leaving
            publish_will = publish_will and reason is not ReasonCode.SUCCESS  # [MQTT-3.14.4-3]
        attached = self.state is State.OPEN
        self.state = State.CLOSED
        self._framer.clear()
        self._requests.clear()
        self._acknowledgements.clear()
        if attached and self.session is not None and self.session.attached:
            self.session.detach(now, publish_will=publish_will, expiry=expiry)
        self._events.append(Ended(cause, reason, text))

    def _due(self) -> list[tuple[float, ReasonCode, str]]:
        limits = self.limits
        due: list[tuple[float, ReasonCode, str]] = []
        if self.state is State.AWAITING_CONNECT:
            at = self._opened_at + limits.connect_timeout
            due.append((at, ReasonCode.MAXIMUM_CONNECT_TIME, "no CONNECT in time"))
        if self.state is State.DECIDING:  # a net: whoever decides has time limits of its own
            at = self._heard_at + _DECIDED_WITHIN
            due.append((at, ReasonCode.SERVER_UNAVAILABLE, "CONNECT was not decided"))
        if self.state is not State.OPEN:
            return due
        if self._keep_alive:
            at = self._heard_at + 1.5 * self._keep_alive  # [MQTT-3.1.2-22]; 3.1.1 [MQTT-3.1.2-24]
            due.append((at, ReasonCode.KEEP_ALIVE_TIMEOUT, "nothing heard for 1.5 times the keep-alive"))
        if limits.idle:  # 5.0 §3.1.2.10: a server may end an inactive connection whatever its keep-alive is
            at = self._heard_at + limits.idle
            due.append((at, ReasonCode.KEEP_ALIVE_TIMEOUT, "nothing heard for the longest time that is allowed"))
        if self._partial_since is not None:
            at = self._partial_since + limits.packet_grace + self._framer.buffered / limits.min_packet_rate
            due.append((at, ReasonCode.UNSPECIFIED_ERROR, "a packet that does not end"))
        if self._stalled_since is not None:
            at = self._stalled_since + limits.write_stall
            due.append((at, ReasonCode.UNSPECIFIED_ERROR, "a peer that does not read"))
        return due
