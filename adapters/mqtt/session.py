"""A session: what a client and the server share beyond one connection. 5.0 §4.1, §4.3, §4.4; 3.1.1 §3.1.2.4.

Theory
------
Outgoing, QoS 1 and 2, one row for each packet id (`_NEXT` is this table; what is missing breaks the protocol):

    QUEUED ──send──► PUBLISHED ──PUBACK (1), or a failed PUBREC (2)──► done
                         └──PUBREC (2)──► RECEIVED ──recorded()──► RELEASED ──PUBCOMP──► done

Incoming, QoS 2:

    PUBLISH ──► STORING ──stored()──► STORED ──PUBREL──► RELEASING ──released()──► gone (PUBCOMP)
                   └──failed()──► gone (PUBREC with the reason)

What can be lost. A *durable* session survives a crash of this process, so what the peer is told must be on disk first:
PUBREC after the message and its id are committed, PUBCOMP after the id is forgotten (else the client's next message
under this id would be taken for a repetition), PUBREL after the PUBREC is recorded (else a repeated PUBLISH would reach
a client that has finished). Therefore three events ask for a write and three calls confirm it. The packet id of an
outgoing message is assigned when it is queued, so that it is stored with it, and a restart repeats the same id. A
session that is not durable takes the same steps without waiting. What a crash can still do is repeat a PUBLISH that
never left with DUP set, and deliver a QoS 1 message again.

What can race. The network may close and come back while a message is being stored. Each connection has an epoch; a
receipt of an old epoch still moves the QoS 2 state, and acknowledges on the new connection if the client has repeated
its PUBLISH there. A QoS 1 receipt of an old epoch is of no use: the client repeats.

Everything that is sent goes through the `Link` that is attached; without one, deliveries wait. Order: PUBLISH in the
order of queueing [MQTT-4.6.0-5], repeats too [MQTT-4.6.0-1]; PUBREL in the order of PUBREC [MQTT-4.6.0-4]. Bounds:
messages and bytes that wait, messages on the way, incoming ids.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Final, Protocol

from adapters.mqtt.machine_events import (
    Delivered,
    Discarded,
    DiscardReason,
    ReceiptRecorded,
    SessionEnded,
    SessionEvent,
    WillDue,
)
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.session_values import (
    NEVER,
    Delivery,
    Outgoing,
    Phase,
    Receipt,
    Snapshot,
    Subscription,
    message_of_will,
)
from adapters.mqtt.wire_packets import QoS, Will
from adapters.mqtt.wire_reasons import LocalProtocolError, PacketType, ReasonCode, violation


class Untaken(Enum):
    """Why a delivery was not taken."""

    QUEUE_FULL = auto()  # QoS 1 and 2: the caller must not acknowledge it as kept
    OFFLINE = auto()  # QoS 0 without a connection
    SLOW = auto()  # QoS 0 to a peer that does not read
    EXPIRED = auto()  # QoS 0
    TOO_LARGE = auto()  # QoS 0 above the peer's Maximum Packet Size


class Link(Protocol):
    """The connection that a session sends through."""

    @property
    def ready(self) -> bool:
        """Whether the network takes more PUBLISH packets."""

    @property
    def window(self) -> int:
        """How many QoS 1 and 2 messages may be on the way: the peer's Receive Maximum or our cap."""

    def publish(self, delivery: Delivery, packet_id: int, dup: bool, now: float) -> bool:
        """Send PUBLISH; False when it is too large for the peer."""

    def release(self, packet_id: int, reason: ReasonCode) -> None:
        """Send PUBREL."""

    def complete(self, packet_id: int, reason: ReasonCode) -> None:
        """Send PUBCOMP."""

    def answered(self, receipt: Receipt, reason: ReasonCode, text: str, now: float) -> None:
        """An incoming PUBLISH of this or, for QoS 2, an earlier epoch is stored or refused."""


class Incoming(Enum):
    """Where an incoming QoS 2 packet id stands."""

    STORING = auto()
    STORED = auto()
    RELEASING = auto()


_DONE: Final = None
_NEXT: Final[dict[tuple[QoS, Phase, PacketType], Phase | None]] = {
    (QoS.AT_LEAST_ONCE, Phase.PUBLISHED, PacketType.PUBACK): _DONE,
    (QoS.EXACTLY_ONCE, Phase.PUBLISHED, PacketType.PUBREC): Phase.RECEIVED,
    (QoS.EXACTLY_ONCE, Phase.RECEIVED, PacketType.PUBREC): Phase.RECEIVED,
    (QoS.EXACTLY_ONCE, Phase.RELEASED, PacketType.PUBREC): Phase.RELEASED,
    (QoS.EXACTLY_ONCE, Phase.RELEASED, PacketType.PUBCOMP): _DONE,
}


class _Row:
    __slots__ = ("delivery", "phase")

    def __init__(self, delivery: Delivery, phase: Phase) -> None:
        self.delivery = delivery
        self.phase = phase


class Session:
    """One client's session. Make one with `Session(limits)`, or continue one with `Session.restore`."""

    __slots__ = (
        "_active",
        "_awaiting_complete",
        "_bytes",
        "_expires_at",
        "_last_id",
        "_link",
        "_number",
        "_over",
        "_receipts",
        "_released",
        "_reserved",
        "_rows",
        "_unsent",
        "_will",
        "_will_at",
        "durable",
        "epoch",
        "events",
        "expiry",
        "incoming",
        "limits",
        "subscriptions",
    )

    def __init__(self, limits: MqttLimits, *, durable: bool = False) -> None:
        """`durable`: the server writes down what the events ask for, and confirms each."""
        self.limits = limits
        self.durable = durable
        self.subscriptions: dict[str, Subscription] = {}
        """By filter text. Read it; change it through the connection, or by `unsubscribe`."""
        self.expiry = 0.0
        """How long the session outlives its connection; `NEVER` for no end."""
        self.epoch = 0
        self.events: list[SessionEvent] = []
        self.incoming: dict[int, Incoming] = {}
        self._receipts: dict[int, int] = {}  # packet id of STORING -> receipt number
        self._awaiting_complete: set[int] = set()  # RELEASING whose PUBREL came on this connection
        self._number = 0
        self._link: Link | None = None
        self._rows: dict[int, _Row] = {}  # in sending order
        self._released: dict[int, None] = {}  # RECEIVED and RELEASED, in the order of PUBREC
        self._unsent: list[int] = []  # to be sent on this connection
        self._active: set[int] = set()  # on the way on this connection
        self._reserved: dict[int, int] = {}  # packet id -> bytes
        self._bytes = 0
        self._last_id = 0
        self._will: Will | None = None
        self._will_at: float | None = None
        self._expires_at: float | None = None
        self._over = False

    # State ----------------------------------------------------------------------------------------------------------

    @classmethod
    def restore(cls, snapshot: Snapshot, limits: MqttLimits, *, durable: bool = True) -> Session:
        """A session as it was. Raises LocalProtocolError when a packet id stands in the snapshot twice."""
        session = cls(limits, durable=durable)
        session.subscriptions = {one.filter.text: one for one in snapshot.subscriptions}
        session.incoming = dict.fromkeys(snapshot.incoming, Incoming.STORED)
        for row in snapshot.outgoing:
            if row.packet_id in session._rows or row.delivery.qos is QoS.AT_MOST_ONCE:
                raise LocalProtocolError(f"packet id {row.packet_id} cannot be restored")
            session._rows[row.packet_id] = _Row(row.delivery, row.phase)
            session._bytes += row.delivery.message.size
            session._last_id = row.packet_id
            if row.phase in (Phase.RECEIVED, Phase.RELEASED):
                session._rows[row.packet_id].phase = Phase.RELEASED
                session._released[row.packet_id] = None
        session.expiry = snapshot.expiry
        session._expires_at = snapshot.expires_at
        session._will, session._will_at = snapshot.will, snapshot.will_at
        return session

    def snapshot(self) -> Snapshot:
        """What a restart needs. What was asked to be written and is not confirmed counts as not written."""
        rows = [row for row in self._rows.items() if row[1].phase in (Phase.QUEUED, Phase.PUBLISHED, Phase.RECEIVED)]
        outgoing = [
            Outgoing(packet_id, row.delivery, Phase.PUBLISHED if row.phase is Phase.RECEIVED else row.phase)
            for packet_id, row in rows
        ]
        for packet_id in self._released:
            row = self._rows[packet_id]
            if row.phase is Phase.RELEASED:
                outgoing.append(Outgoing(packet_id, row.delivery, Phase.RELEASED))
        stored = (Incoming.STORED, Incoming.RELEASING)
        return Snapshot(
            tuple(self.subscriptions.values()),
            tuple(packet_id for packet_id, state in self.incoming.items() if state in stored),
            tuple(outgoing),
            self.expiry,
            self._expires_at,
            self._will,
            self._will_at,
        )

    @property
    def attached(self) -> bool:
        """Whether a connection is open."""
        return self._link is not None

    @property
    def owes_will(self) -> bool:
        """Whether a will is still to be published: after `detach`, whether it was not dropped."""
        return self._will is not None

    @property
    def unsent(self) -> list[int]:
        """Keys of the deliveries that have never been sent."""
        return [row.delivery.key for row in self._rows.values() if row.phase is Phase.QUEUED]

    @property
    def queued(self) -> int:
        """Outgoing messages that are not acknowledged."""
        return len(self._rows) + len(self._reserved)

    @property
    def queued_bytes(self) -> int:
        """About their size."""
        return self._bytes

    # Incoming -------------------------------------------------------------------------------------------------------

    def receipt(self, packet_id: int, qos: QoS, size: int) -> Receipt:
        """For the connection: a name for an incoming PUBLISH that is now to be stored."""
        self._number += 1
        if qos is QoS.EXACTLY_ONCE:
            self.incoming[packet_id] = Incoming.STORING
            self._receipts[packet_id] = self._number
        return Receipt(self._number, packet_id, qos, self.epoch, size)

    def stored(self, receipt: Receipt, now: float, reason: ReasonCode = ReasonCode.SUCCESS) -> None:
        """The message is committed: PUBACK or PUBREC may leave, in its order. `reason` is a success.

        Harmless when the connection, or the whole session, is gone in the meantime.
        """
        if reason.failed:
            raise LocalProtocolError(f"{reason.name} is no success")
        if receipt.qos is QoS.EXACTLY_ONCE:
            if not self._settle(receipt):
                return
            self.incoming[receipt.packet_id] = Incoming.STORED
        if self._link is not None:
            self._link.answered(receipt, reason, "", now)

    def failed(self, receipt: Receipt, reason: ReasonCode, now: float, text: str = "") -> None:
        """The message is refused and kept nowhere. `reason` is a failure that PUBACK may carry; `text` may be sent.

        5.0 is told in PUBACK or PUBREC; what has no acknowledgement (QoS 0, and everything in 3.1.1) ends the
        connection [MQTT-3.3.5-2]. To drop a QoS 0 message silently call `stored`.
        """
        if not reason.failed:
            raise LocalProtocolError(f"{reason.name} is no failure")
        if receipt.qos is QoS.EXACTLY_ONCE:
            if not self._settle(receipt):
                return
            del self.incoming[receipt.packet_id]
        if self._link is not None:
            self._link.answered(receipt, reason, text, now)

    def release(self, packet_id: int) -> bool:
        """For the connection: PUBREL came. True when the release has to be written down first."""
        match self.incoming.get(packet_id):
            case Incoming.STORED:
                self.incoming[packet_id] = Incoming.RELEASING
                self._awaiting_complete.add(packet_id)
                if self.durable:
                    return True
                self.released(packet_id)
            case Incoming.STORING:
                raise violation("PUBREL before PUBREC")
            case Incoming.RELEASING:  # a repetition: one PUBCOMP answers all that came on this connection
                self._awaiting_complete.add(packet_id)
            case None:
                if self._link is not None:  # 5.0 §4.3.3: after a lost PUBCOMP
                    self._link.complete(packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)
        return False

    def released(self, packet_id: int) -> None:
        """The incoming id is forgotten durably: PUBCOMP may leave [MQTT-4.3.3-11]."""
        if self.incoming.get(packet_id) is not Incoming.RELEASING:
            raise LocalProtocolError(f"packet id {packet_id} was not to be released")
        del self.incoming[packet_id]
        # A client that is back and has not repeated its PUBREL yet will; a PUBCOMP now would be one too many, and the
        # second could meet the next message of the same id.
        if self._link is not None and packet_id in self._awaiting_complete:
            self._link.complete(packet_id, ReasonCode.SUCCESS)
        self._awaiting_complete.discard(packet_id)

    # Outgoing -------------------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> int | Untaken:
        """A packet id and room for a message of `size` bytes that is to be stored before it is delivered."""
        limits = self.limits
        if self.queued >= limits.queued_messages or self._bytes + size > limits.queued_bytes:
            return Untaken.QUEUE_FULL
        packet_id = self._last_id % 0xFFFF + 1
        while packet_id in self._rows or packet_id in self._reserved:
            packet_id = packet_id % 0xFFFF + 1
        self._last_id = packet_id
        self._reserved[packet_id] = size
        self._bytes += size
        return packet_id

    def unreserve(self, packet_id: int) -> None:
        """Give back what `reserve` gave: the message could not be stored. Harmless for an id that is not reserved."""
        self._bytes -= self._reserved.pop(packet_id, 0)

    def deliver(self, delivery: Delivery, now: float, packet_id: int | None = None) -> int | Untaken:
        """Send a message, or keep it until it can be. Answers its packet id (0 for QoS 0), or why it was not taken.

        `packet_id` is one from `reserve`, or None to reserve in the same step.
        """
        if delivery.qos is QoS.AT_MOST_ONCE:
            return self._deliver_unsure(delivery, now)
        size = delivery.message.size
        if packet_id is None:
            reserved = self.reserve(size)
            if isinstance(reserved, Untaken):
                return reserved
            packet_id = reserved
        elif packet_id not in self._reserved:
            raise LocalProtocolError(f"packet id {packet_id} is not reserved")
        self._bytes += size - self._reserved.pop(packet_id)
        self._rows[packet_id] = _Row(delivery, Phase.QUEUED)
        if self._link is not None:
            self._unsent.append(packet_id)
            self.flush(now)
        return packet_id

    def recorded(self, packet_id: int) -> None:
        """A PUBREC is recorded: PUBREL may leave, in the order of the PUBRECs [MQTT-4.6.0-4]."""
        row = self._rows.get(packet_id)
        if row is None or row.phase is not Phase.RECEIVED:
            raise LocalProtocolError(f"packet id {packet_id} was not to be recorded")
        row.phase = Phase.RELEASED
        # Those after it in the order that were recorded earlier wait for it, so send all that this one held back.
        if self._link is None:
            return
        behind = False
        for other in self._released:
            phase = self._rows[other].phase
            behind = behind or other == packet_id
            if phase is Phase.RECEIVED:
                return
            if behind:
                self._link.release(other, ReasonCode.SUCCESS)

    def acknowledged(self, kind: PacketType, packet_id: int, reason: ReasonCode, now: float) -> None:
        """For the connection: PUBACK, PUBREC or PUBCOMP came. Raises RemoteProtocolError for one out of place."""
        row = self._rows.get(packet_id)
        if row is None or row.phase is Phase.QUEUED:  # of a message that is done, or of a forgotten session
            if kind is PacketType.PUBREC and row is None and self._link is not None and not reason.failed:
                self._link.release(packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)  # 5.0 §3.6.2.1
            return
        step = (row.delivery.qos, row.phase, kind)
        if step not in _NEXT:
            raise violation(f"{kind.name} for a message of QoS {row.delivery.qos:d} that is {row.phase.name}")
        if kind is PacketType.PUBREC and reason.failed:
            if row.phase is not Phase.PUBLISHED:
                raise violation("a PUBREC that takes an earlier one back")
            self._finish(packet_id, reason, now)  # [MQTT-4.4.0-2]
            return
        after = _NEXT[step]
        if after is _DONE:
            self._finish(packet_id, reason, now)
            return
        if row.phase is Phase.RELEASED:  # PUBREC again: the PUBREL was lost with an earlier connection
            if self._link is not None:
                self._link.release(packet_id, ReasonCode.SUCCESS)
            return
        if row.phase is Phase.RECEIVED:
            return
        row.phase = Phase.RECEIVED
        self._released[packet_id] = None
        if self.durable:
            self.events.append(ReceiptRecorded(packet_id, row.delivery.key))
        else:
            self.recorded(packet_id)

    def flush(self, now: float) -> None:
        """Send what waits, as far as the peer's Receive Maximum and the network allow."""
        link = self._link
        while self._unsent and link is not None and link.ready and len(self._active) < link.window:
            packet_id = self._unsent.pop(0)
            row = self._rows.get(packet_id)
            if row is None or row.phase not in (Phase.QUEUED, Phase.PUBLISHED):
                continue
            fresh = row.phase is Phase.QUEUED
            if fresh and row.delivery.message.expired(now):
                self._discard(packet_id, row, DiscardReason.EXPIRED)
            elif not link.publish(row.delivery, packet_id, not fresh, now):
                self._discard(packet_id, row, DiscardReason.TOO_LARGE)
            else:
                row.phase = Phase.PUBLISHED
                self._active.add(packet_id)

    def discard_queued(self, unwanted: Callable[[Delivery], bool]) -> tuple[Outgoing, ...]:
        """Drop deliveries that have never been sent and that `unwanted` names, such as of topics no longer granted."""
        found = [
            Outgoing(packet_id, row.delivery, row.phase)
            for packet_id, row in self._rows.items()
            if row.phase is Phase.QUEUED and unwanted(row.delivery)
        ]
        for one in found:
            self._forget(one.packet_id)
        return tuple(found)

    def unsubscribe(self, text: str) -> Subscription | None:
        """Take a subscription away, as when its grant is gone; answers what it was."""
        return self.subscriptions.pop(text, None)

    # Life -----------------------------------------------------------------------------------------------------------

    def attach(self, link: Link, expiry: float, will: Will | None, now: float) -> None:
        """For the connection: it is open. What is unacknowledged is sent again [MQTT-4.4.0-1]."""
        if self._link is not None or self.over(now):
            raise LocalProtocolError("the session has a connection, or is over")
        if self._will is not None and self._will_at is not None and self._will_at <= now:
            self._publish_will(now)
        self.epoch += 1
        self._link = link
        self.expiry = expiry
        self._expires_at = None
        self._will, self._will_at = will, None  # a delayed will of before is not sent [MQTT-3.1.3-9]
        self._active.clear()
        self._awaiting_complete.clear()
        waiting = (Phase.QUEUED, Phase.PUBLISHED)
        self._unsent = [packet_id for packet_id, row in self._rows.items() if row.phase in waiting]
        for packet_id in self._released:
            if self._rows[packet_id].phase is Phase.RECEIVED:
                break
            link.release(packet_id, ReasonCode.SUCCESS)
        self._active.update(self._released)
        self.flush(now)

    def detach(self, now: float, *, publish_will: bool, expiry: float | None = None) -> None:
        """For the connection: it is gone. Expiry and the will's delay begin to run."""
        self._link = None
        self._unsent.clear()
        self._active.clear()
        if expiry is not None:
            self.expiry = expiry
        self._expires_at = now + self.expiry
        if not publish_will:
            self._will = None
        if self._will is not None:
            delay = self._will.properties.will_delay_interval or 0
            self._will_at = now + min(delay, self.expiry)  # 5.0 §3.1.3.2.2

    def over(self, now: float) -> bool:
        """Whether the session has ended, so that a CONNECT must start a new one [MQTT-4.1.0-2]."""
        return self._over or (self._expires_at is not None and self._expires_at <= now)

    def end(self, now: float, *, publish_will: bool) -> list[SessionEvent]:
        """End a session that has no connection: clean start, or revocation (which publishes no will)."""
        if self._link is not None:
            raise LocalProtocolError("the session has a connection; disconnect it first")
        if not publish_will:
            self._will = None
        self._expires_at = now
        return self.tick(now)

    def next_timer(self) -> float | None:
        """When `tick` has something to do; None for never."""
        if self._link is not None or self._over:
            return None
        will_at = self._will_at if self._will is not None else None
        return min((at for at in (will_at, self._expires_at) if at is not None and at < NEVER), default=None)

    def tick(self, now: float) -> list[SessionEvent]:
        """What happened to a session without a connection: events not yet taken, the will, the end."""
        if self._link is None and not self._over:
            due = self._will_at is not None and self._will_at <= now
            if due or self.over(now):
                self._publish_will(now)
            if self.over(now):
                self._over = True
                self.events.append(SessionEnded())
        events = list(self.events)
        self.events.clear()
        return events

    # Parts ----------------------------------------------------------------------------------------------------------

    def _settle(self, receipt: Receipt) -> bool:
        """Whether this receipt is the one that its QoS 2 packet id waits for."""
        if self._receipts.get(receipt.packet_id) != receipt.number:
            return False
        del self._receipts[receipt.packet_id]
        return True

    def _deliver_unsure(self, delivery: Delivery, now: float) -> int | Untaken:
        if self._link is None:
            return Untaken.OFFLINE
        if delivery.message.expired(now):
            return Untaken.EXPIRED
        if not self._link.ready:
            return Untaken.SLOW
        return 0 if self._link.publish(delivery, 0, False, now) else Untaken.TOO_LARGE

    def _finish(self, packet_id: int, reason: ReasonCode, now: float) -> None:
        row = self._rows[packet_id]
        self._forget(packet_id)
        self.events.append(Delivered(packet_id, row.delivery.key, reason))
        self.flush(now)

    def _discard(self, packet_id: int, row: _Row, reason: DiscardReason) -> None:
        self._forget(packet_id)
        self.events.append(Discarded(packet_id, row.delivery, reason))

    def _forget(self, packet_id: int) -> None:
        row = self._rows.pop(packet_id)
        self._bytes -= row.delivery.message.size
        self._released.pop(packet_id, None)
        self._active.discard(packet_id)

    def _publish_will(self, now: float) -> None:
        if self._will is not None:
            self.events.append(WillDue(message_of_will(self._will, now)))
        self._will, self._will_at = None, None
