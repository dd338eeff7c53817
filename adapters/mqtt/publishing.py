"""What one device publishes: to the core, to the broker, or with an answer, and what becomes of each message.

    PUBLISH ─► topic (authorization.py) ─► own, or a child's? ─► uplink | answer | report | renewal | child | broker
                    │ not allowed                 │ no                │ stored ─► PUBACK, PUBREC
                    └── 0x87, or closed ──────────┘                   └ refused ─► its reason, or closed

Acknowledgements. `Session.stored` is called when the core says that its transaction is committed, never before. The
packet id of a QoS 2 uplink is in that transaction where the session is stored, unless the uplink has a message id of
its own: both make a repetition harmless over any crash, and the message id over sessions too. What
the core refuses for good (a payload that is none) is 0x99 in MQTT 5; 3.1.1 has no such word, and saying yes would be
untrue, so the connection is closed [MQTT-3.3.5-2]. Of QoS 0 nobody expects an answer: a payload that cannot be read is
counted and dropped, while a topic that is not allowed ends the connection in both versions, with 0x87 in 5. When the
outcome is unknown (the database is away in the middle of a commit) nothing is said and the connection is closed: the
client repeats. An answer to a command that is over already is the one thing that 3.1.1 sees acknowledged without being
kept: closing would make the client repeat it for ever.

A full core. From half of its queue on, whoever sends is read from more slowly: gateways that fill their windows wait,
and nobody is refused. Where it is full all the same, reading stops for longer. MQTT 5 is told 0x97 for QoS 1 and 2; the
messages of 3.1.1, and of QoS 0, wait here and are tried again, in their order. What waits is bounded by what was read.

Order. What waits for room is behind what waited before, what is sent for a child behind what was sent for it before.
Requests with an answer, command responses and reports are judged side by side.

What can race: the store answers after the connection is gone (the session's state moves on, nobody is answered); a
child is taken from its gateway between the look and the commit (as over HTTPS, it was its own when it was asked). What
is judged or waits when its device is revoked is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final, assert_never
from uuid import uuid4

import msgspec

from adapters.mqtt.authorization import (
    CHILD_ATTACHED,
    RENEWED,
    Brokered,
    ChildAttachment,
    CommandAnswer,
    ConfigReport,
    Renewal,
    Target,
    UplinkTopic,
    may_publish,
    publish_target,
)
from adapters.mqtt.provisioning import response_to
from adapters.mqtt.refusals import MAX_TEXT, note_refusal
from adapters.mqtt.requests import child_attached, renewed
from adapters.mqtt.session_values import Message, Receipt
from adapters.mqtt.uplinks import payload_of, source_of, uplink_of
from adapters.mqtt.wire_packets import QoS
from adapters.mqtt.wire_reasons import ReasonCode, Version
from registry.commands import response_from
from registry.device_config import report_from
from registry.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RegistryError,
    ResourceExhausted,
    Unavailable,
)
from registry.messaging_values import Incoming, Published, SessionLost
from registry.model import DeviceId
from registry.payloads import NewUplink, PayloadTooLarge
from registry.uplinks import StoredUplink

if TYPE_CHECKING:
    from adapters.mqtt.device import DeviceRole

_NO_TOPIC: Final = "this topic is not open to this device"


class Publishing:
    """One connection's."""

    __slots__ = (
        "_for_children",
        "_levels",
        "_peer",
        "_retry",
        "_role",
        "_server",
        "_session",
        "_source",
        "_target",
        "waiting",
    )

    def __init__(self, role: DeviceRole) -> None:
        self._role = role
        self._peer = role.peer
        self._server = role.server
        self._session = role.session
        self.waiting: list[Callable[[], bool]] = []
        """Messages for which the core had no room, as attempts to hand them over: whether it was taken."""
        self._retry: asyncio.TimerHandle | None = None
        self._for_children: dict[DeviceId, list[tuple[Receipt, Message, UplinkTopic]]] = {}
        """What it sends for each child and has to be judged, the oldest first."""
        self._source = source_of(role.session, role.own)
        self._levels: tuple[str, ...] = ()  # of the last message's topic, and where that goes: mostly the next one's
        self._target: Target | None = None

    def take(self, receipt: Receipt, message: Message, levels: tuple[str, ...], now: float) -> None:
        """A PUBLISH: it is answered when its fate is known, now or later."""
        if levels is not self._levels:  # the machine gives the same ones for the same topic
            self._levels, self._target = levels, publish_target(levels, self._role.own)
        target = self._target
        match target:
            case UplinkTopic(device_id) if device_id == self._role.own:
                self._store(receipt, message, target, now)
            case Brokered() if may_publish(self._role.grants, levels, self._role.own):
                self._broker(receipt, message, now)
            case Brokered() | None:
                self._forbidden(receipt, now)
            case UplinkTopic(device_id):
                line = self._for_children.setdefault(device_id, [])
                line.append((receipt, message, target))
                if len(line) == 1:
                    self._peer.start(self._speak_for(device_id))
            case _:
                self._start(receipt, message, partial(self._publish_later, receipt, message, target))

    def close(self) -> None:
        """The connection is gone: what waits for room is dropped, and whoever wants to know repeats it."""
        self.waiting.clear()
        if self._retry is not None:
            self._retry.cancel()

    async def _speak_for(self, device_id: DeviceId) -> None:
        """Store what is sent for a child, in its order, however long it takes to learn whose child it is."""
        line = self._for_children[device_id]
        while line:
            receipt, message, target = line[0]
            try:
                if not await self._role.owner.speaks_for(self._session, device_id):
                    self._forbidden(receipt, self._server.now())
                elif not self._role.revoked:  # else it was revoked while we asked
                    self._store(receipt, message, target, self._server.now())
            except RegistryError as error:
                self._refused(receipt, error)
            line.pop(0)
            self._peer.poke()
        del self._for_children[device_id]

    async def _publish_later(self, receipt: Receipt, message: Message, target: Target) -> None:
        """What has to ask the database before its fate is known."""
        match target:
            case Brokered() | UplinkTopic():
                raise AssertionError("these do not come here")
            case Renewal():
                self._respond(receipt, message, await renewed(self._role, message), RENEWED)
                return
            case ChildAttachment():
                self._respond(receipt, message, await child_attached(self._role, message), CHILD_ATTACHED)
                return
            case CommandAnswer() | ConfigReport():
                pass
            case _:
                assert_never(target)
        if not await self._role.owner.speaks_for(self._session, target.device_id):
            self._forbidden(receipt, self._server.now())
            return
        if self._role.revoked:  # revoked while we asked
            return
        source = source_of(self._session, target.device_id)
        match target:
            case CommandAnswer(_, command_id):
                payload = payload_of(message, max_bytes=self._server.limits.payload_bytes)
                await self._role.registry.commands.answer(source, command_id, response_from(payload), uuid4().hex)
            case ConfigReport():
                payload = payload_of(message, max_bytes=self._server.limits.payload_bytes)
                await self._role.registry.device_configs.report(source, report_from(payload), uuid4().hex)
            case _:
                assert_never(target)
        self._stored(receipt)

    def _store(self, receipt: Receipt, message: Message, topic: UplinkTopic, now: float) -> None:
        source = self._source if topic.device_id == self._role.own else source_of(self._session, topic.device_id)
        try:
            uplink = uplink_of(topic, message, source, max_bytes=self._server.limits.payload_bytes)
        except InvalidArgument as error:
            self._unreadable(receipt, error, now)
            return
        if self._role.ownership is not None and receipt.qos is QoS.EXACTLY_ONCE and uplink.message_id is None:
            uplink = msgspec.structs.replace(uplink, origin=Incoming(self._role.ownership, receipt.packet_id))
        self._offer(receipt, partial(self._submit, receipt, uplink), now)

    def _broker(self, receipt: Receipt, message: Message, now: float) -> None:
        if receipt.qos is QoS.AT_MOST_ONCE and not message.retain:
            later = partial(self._peer.run, partial(self._stored, receipt))
            if self._role.broker.publish_unsure(self._role, message, later):
                self._role.mqtt.stored(receipt, now)
            return
        self._offer(receipt, partial(self._submit_brokered, receipt, message), now)

    def _brokered(self, receipt: Receipt, done: asyncio.Future[Published]) -> None:
        error = Unavailable("the server is stopping") if done.cancelled() else done.exception()
        match error:
            case None:
                self._server.counters.brokered += 1
                self._peer.run(partial(self._stored, receipt))
            case ResourceExhausted():
                self._server.counters.full += 1
                self._peer.run(lambda: self._no_room(receipt, self._server.now()))
            case SessionLost():
                self._peer.run(partial(self._peer.end, ReasonCode.SESSION_TAKEN_OVER, publish_will=True))
            case _:
                self._peer.run(partial(self._refused, receipt, error))

    def _no_room(self, receipt: Receipt, now: float) -> None:
        """A receiver's queue is full, and nothing was stored: 0x97 in 5.0; 3.1.1 is closed, and repeats it. QoS 0 is
        dropped."""
        if receipt.qos is QoS.AT_MOST_ONCE:
            self._server.counters.dropped += 1
            self._role.mqtt.stored(receipt, now)
        else:
            self._role.mqtt.failed(receipt, ReasonCode.QUOTA_EXCEEDED, now, "a queue is full; try again")

    def _offer(self, receipt: Receipt, attempt: Callable[[], bool], now: float) -> None:
        """Hand a message to the core, behind those of this connection that wait for room."""
        if self.waiting:
            self.waiting.append(attempt)
        elif not attempt():
            self._full(receipt, attempt, now)

    def _submit_brokered(self, receipt: Receipt, message: Message) -> bool:
        if self._role.revoked:  # revoked while it waited: nothing of it is stored, and the connection is being closed
            return True
        levels = tuple(message.topic.split("/"))
        if not may_publish(self._role.grants, levels, self._role.own):  # its grant went while it waited
            self._forbidden(receipt, self._server.now())
            return True
        try:
            future = self._role.broker.publish(self._role, message, receipt)
        except Unavailable:
            return False
        future.add_done_callback(partial(self._brokered, receipt))
        return True

    def _submit(self, receipt: Receipt, uplink: NewUplink) -> bool:
        if self._role.revoked:  # as above
            return True
        try:
            future = self._role.registry.uplinks.submit(uplink)
        except Unavailable:
            return False
        future.add_done_callback(partial(self._committed, receipt))
        if self._role.registry.uplinks.crowded:
            self._peer.hold(self._server.limits.crowded_pause)
        return True

    def _committed(self, receipt: Receipt, done: asyncio.Future[StoredUplink]) -> None:
        counters = self._server.counters
        error = Unavailable("the server is stopping") if done.cancelled() else done.exception()
        if error is not None:
            self._peer.run(partial(self._refused, receipt, error))
            return
        if done.result().duplicate:
            counters.duplicate += 1
        else:
            counters.stored += 1
        self._peer.run(partial(self._stored, receipt))

    def _full(self, receipt: Receipt, attempt: Callable[[], bool], now: float) -> None:
        """The core has no room: say so where there is a word for it, try again where there is none; read no more."""
        pause = self._server.limits.full_pause
        self._server.counters.full += 1
        self._peer.hold(pause)
        if self._peer.machine.version is Version.V5 and receipt.qos is not QoS.AT_MOST_ONCE:
            self._role.mqtt.failed(receipt, ReasonCode.QUOTA_EXCEEDED, now, "the server is full; try again")
            return
        self.waiting.append(attempt)
        if self._retry is None:
            self._retry = self._server.loop.call_later(pause, self._peer.run, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        while self.waiting:
            if not self.waiting[0]():
                pause = self._server.limits.full_pause
                self._peer.hold(pause)
                self._retry = self._server.loop.call_later(pause, self._peer.run, self._try_again)
                return
            self.waiting.pop(0)

    def _respond(self, receipt: Receipt, message: Message, answer: dict[str, object], tail: tuple[str, ...]) -> None:
        """Answer to this connection, under the name that the request used for the device."""
        now = self._server.now()
        name = message.topic.split("/")[1]
        otherwise = "/".join(("devices", name, *tail))
        qos = min(message.qos, QoS.AT_LEAST_ONCE)
        key = self._role.downlinks.next_key()
        self._role.mqtt.deliver(response_to(message, msgspec.json.encode(answer), otherwise, qos, key=key), now)
        self._role.mqtt.stored(receipt, now)

    # What became of a message ---------------------------------------------------------------------------------------

    def _stored(self, receipt: Receipt) -> None:
        self._role.mqtt.stored(receipt, self._server.now())

    def _refused(self, receipt: Receipt, error: BaseException) -> None:
        now = self._server.now()
        match error:
            case InvalidArgument():
                self._unreadable(receipt, error, now)
            case SessionLost():  # nothing was stored; whoever has the session now hears it again
                self._peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)
            case FailedPrecondition() | NotFound():
                if self._peer.machine.version is Version.V5 and receipt.qos is not QoS.AT_MOST_ONCE:
                    self._role.mqtt.failed(receipt, ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR, now, error.message)
                else:
                    self._role.mqtt.stored(receipt, now)
            case RegistryError():  # the outcome is not known: nothing is acknowledged, nothing refused
                self._server.counters.unknown += 1
                if receipt.qos is QoS.AT_MOST_ONCE:
                    self._role.mqtt.stored(receipt, now)
                else:
                    self._peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
            case _:
                raise error

    def _unreadable(self, receipt: Receipt, error: InvalidArgument, now: float) -> None:
        self._server.counters.rejected += 1
        self._server.counters.too_large += isinstance(error, PayloadTooLarge)
        if receipt.qos is QoS.AT_MOST_ONCE:
            self._role.mqtt.stored(receipt, now)
        else:
            self._role.mqtt.failed(receipt, ReasonCode.PAYLOAD_FORMAT_INVALID, now, error.message[:MAX_TEXT])

    def _forbidden(self, receipt: Receipt, now: float) -> None:
        self._server.counters.forbidden += 1
        note_refusal(self._server, self._session, "publish outside the device's topics")
        self._role.mqtt.failed(receipt, ReasonCode.NOT_AUTHORIZED, now, _NO_TOPIC)

    def _start(self, receipt: Receipt, message: Message, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await work()
            except RegistryError as error:
                self._refused(receipt, error)

        self._peer.start(run())
